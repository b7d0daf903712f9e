"""The encoders and decoders in a model that no layout knows: repeated blocks, and what makes their tokens.

Told from names and shapes of modules; nothing is run, and no library is imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn as nn

Named = tuple[str, nn.Module]
"""A module and its path."""
_AFFIXES = (
    r"(?:a|b|s|head|heads|proj|projs|projection|lin|linear|layer|dense|conv|weight|withmqa|net|func|in|global|local)*"
)
_PREFIXES = r"(?:to|project|w|lin|linear|proj|conv|in|attn|self|mix|c)*"
QUERY = re.compile(rf"{_PREFIXES}(?:q|query|queries){_AFFIXES}")
KEY = re.compile(rf"{_PREFIXES}(?:k|key|keys|kv|keyvalue){_AFFIXES}")
PACKED = re.compile(
    rf"(?:{_PREFIXES}(?:qkv|qk|querykeyvalue|querieskeysvalues){_AFFIXES}|cattn|attproj|wpack|inprojweight|qkvmem)"
)
RECURRENT = re.compile(
    r"A_log|A_logs|dt_proj|dt_bias|receptance|time_decay|time_mix_\w+|rg_lru|recurrent_gate_weight|igate_preact|ssm|mamba"
)
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
STEM = re.compile(r"(?:stem|patch_\w*|embed\w*)(?:\.[^.]+)?$")


@dataclass(frozen=True)
class Part:
    """An encoder or decoder that no layout knows.

    Attributes:
        name: its path; empty where it is the model itself.
        module: what holds the blocks and what makes their tokens, a patch embedding or a table of words.
        reads: `"images"`, `"text"`, both, or neither where it reads something else, such as sound.
        blocks: its repeated blocks, those with attention alone where any has it.
        attentions: the attention modules of each block, none in a network without attention.
    """

    name: str
    module: nn.Module
    reads: frozenset[str]
    blocks: tuple[Named, ...]
    attentions: tuple[tuple[Named, ...], ...]

    @property
    def classes(self) -> list[str]:
        """The blocks' classes, the most frequent first."""
        names = [type(block).__name__ for _, block in self.blocks]
        return sorted(dict.fromkeys(names), key=lambda name: (-names.count(name), names.index(name)))

    @property
    def attention_blocks(self) -> list[nn.Module]:
        """The blocks that attend."""
        return [block for (_, block), found in zip(self.blocks, self.attentions) if found]

    @property
    def title(self) -> str:
        """Path and class."""
        return f"{self.name} ({type(self.module).__name__})" if self.name else type(self.module).__name__


def is_attention(module: nn.Module) -> bool:
    """Whether a module has projections of its own to queries and keys, apart or in one."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = [name.replace("_", "").lower() for name in (*module._modules, *module._parameters)]
    if any(RECURRENT.fullmatch(name) for name in (*module._modules, *module._parameters)):
        return False
    packed = any(PACKED.fullmatch(name) for name in names)
    return packed or (any(QUERY.fullmatch(n) for n in names) and any(KEY.fullmatch(n) for n in names))


def parts_of(model: nn.Module) -> list[Part]:
    """The encoders and decoders in a model: blocks, grouped by what makes their tokens."""
    modules = dict(model.named_modules())
    attentions: dict[str, list[Named]] = {}
    holders = [name for name, module in modules.items() if is_attention(module)]
    for name in holders:
        if not any(name.startswith(f"{other}.") for other in holders):  # of nested ones the outer
            attentions.setdefault(_block_around(name, modules), []).append((name, modules[name]))
    blocks = {name: tuple(found) for name, found in attentions.items()}
    for name in _elements(modules):
        inside = any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in attentions)
        if name not in blocks and not inside:
            blocks[name] = ()
    stems = [each for each in stems_of(model) if not any(within(each[0], block) for block in attentions)]
    grouped: dict[str, list[str]] = {}
    for name in sorted(blocks, key=list(modules).index):
        around = ancestors(name)[1:] or [""]
        around = [a for a in around if not a or not isinstance(modules[a], LISTS)]
        owner = next((a for a in around if any(within(stem, a) for stem, _ in stems)), "")
        grouped.setdefault(owner, []).append(name)
    found = []
    for owner, names in grouped.items():
        reads = arguments_of(modules[owner]) or frozenset(kind for stem, kind in stems if within(stem, owner))
        pairs = tuple((name, modules[name]) for name in names)
        if re.search("audio|speech", type(modules[owner]).__name__, re.I):
            reads = frozenset({"sound"})
        found.append(Part(owner, modules[owner], reads, pairs, tuple(blocks[name] for name in names)))
    return [part for part in found if not any(_covers(other, part) for other in found if other is not part)]


def stems_of(model: nn.Module) -> list[tuple[str, str]]:
    """What makes tokens in a model, by path, and of what: `"images"`, `"text"` or `"sound"`."""
    return [(n, reads) for n, m in model.named_modules(remove_duplicate=False) if (reads := _stem(n, m))]


def arguments_of(module: nn.Module) -> frozenset[str]:
    """What a module's forward reads, by the names of its arguments."""
    function = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()
    return frozenset(kind for kind, known in _INPUTS.items() if set(known) & set(names))


def ancestors(name: str) -> list[str]:
    """Paths of a module and all around it, innermost first: `"a.b"` gives `["a.b", "a", ""]`."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def within(name: str, around: str) -> bool:
    return not around or name == around or name.startswith(f"{around}.")


def is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return False
    return hasattr(module, "in_features") or any(p.ndim == 2 for p in module.parameters(recurse=False))


def _covers(other: Part, part: Part) -> bool:
    """Whether `part` is a piece of `other`, such as its stem, or stands around it, such as a neck and a decoder."""
    if within(part.name, other.name) and part.reads <= other.reads:
        return not part.attention_blocks and (not other.attention_blocks or bool(STEM.search(part.name)))
    attends = len(other.attention_blocks) > 1 and "images" in other.reads & part.reads
    return attends and within(other.name, part.name)


def _block_around(name: str, modules: dict[str, nn.Module]) -> str:
    """Path of the block that an attention module is in: the nearest element of a list of its like."""
    elements = [a for a in ancestors(name) if a and isinstance(modules[_parent(a)], LISTS)]
    for index, element in enumerate(elements):
        classes = [type(child) for child in modules[_parent(element)].children()]
        if len(classes) == 1 or len(set(classes)) < len(classes) or index == len(elements) - 1:
            return element
    around = _parent(name)
    return name if any(_stem(path, module) for path, module in modules[around].named_modules()) else around


def _elements(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths of innermost list elements of a class that is no layer of torch, one of several alike."""
    names = []
    for name, module in modules.items():
        listed = name and isinstance(modules[_parent(name)], LISTS)
        if listed and not type(module).__module__.startswith("torch.nn.") and module._modules:
            names.append(name)
    classes = [type(modules[name]) for name in names]
    for name, cls in zip(names, classes):
        if classes.count(cls) > 1 and not any(
            other.startswith(f"{name}.") and classes.count(type(modules[other])) > 1 for other in names
        ):
            yield name


def _stem(name: str, module: nn.Module) -> str:
    """What a module makes tokens of, if it does: a first convolution or projection of images, a table of words."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return "images" if module.in_channels in (1, 3, 4) and len(set(module.kernel_size[-2:])) == 1 else ""
    last = name.rpartition(".")[2]
    if "patch_embed" in name and is_linear(module):
        return "images"
    if isinstance(module, nn.Embedding) and not re.search(r"pos|type|lang|segment|speaker|time|query|rel|bias", last):
        return "text" if module.num_embeddings > 32 else ""
    if isinstance(module, nn.Conv1d) and re.search(r"feature_extractor|conv1|conv_layers|stem", name):
        return "sound"
    return ""


_INPUTS = {
    "images": ("pixel_values", "pixel_values_videos", "pixel_values_images", "image", "images", "input_image", "img"),
    "text": ("input_ids", "decoder_input_ids", "text", "input_embeds"),
    "sound": ("input_features", "input_values", "audio_codes", "waveform", "audio_values", "spectrogram", "audio_mel"),
    "series": ("past_values",),
}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
