"""What keeps blocks that no layout knows from losing tokens, told from their modules: names, shapes, settings.

Nothing is run, and no library is imported. Where the modules do not tell, what was found is said, and no more.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

Named = tuple[str, nn.Module]
"""A module and its path."""

_AFFIXES = r"(?:a|b|s|proj|projs|projection|lin|linear|layer|dense|conv|weight|withmqa|net|func|in|global|local)*"
_PREFIXES = r"(?:to|w|lin|linear|proj|conv|in|attn|self|mix|c)*"
QUERY = re.compile(rf"{_PREFIXES}(?:q|query|queries){_AFFIXES}")
KEY = re.compile(rf"{_PREFIXES}(?:k|key|keys|kv|keyvalue){_AFFIXES}")
PACKED = re.compile(rf"(?:{_PREFIXES}(?:qkv|qk|querykeyvalue){_AFFIXES}|cattn|attproj|wpack|inprojweight|qkvmem)")
RECURRENT = re.compile(
    r"A_log|A_logs|dt_proj|dt_bias|receptance|time_decay|time_mix_\w+|rg_lru|recurrent_gate_weight|igate_preact|ssm|mamba"
)
CROSS = re.compile(r"(?:multi_?head_?)?(?:cross_?att\w*|encoder_att\w*|encdecattention|cross|xattn|image_attn)", re.I)
TABLE = re.compile(
    r"rel_pos\w*|relative_(?:position|attention|coords?)\w*|rel_(?:height|width|bias|embeddings?|attn)\w*|attention_bias(?:es|_idxs)"
    r"|r_(?:r|w|s)_bias|pos_bias_\w|bias_table|linear_pos|relative",
    re.I,
)
WINDOWS = ("window_size", "window_area", "win_size", "attn_window", "partition_size", "attention_window", "chunk_size_attn")
SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
CAUSAL = "causal attention: a merged token would tell words what comes after them"


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
    stems = [each for each in stems_of(model) if not any(_within(each[0], block) for block in attentions)]
    grouped: dict[str, list[str]] = {}
    for name in sorted(blocks, key=list(modules).index):
        around = ancestors(name)[1:] or [""]
        owner = next((a for a in around if any(_within(stem, a) for stem, _ in stems)), "")
        grouped.setdefault(owner, []).append(name)
    found = []
    for owner, names in grouped.items():
        reads = arguments_of(modules[owner]) or frozenset(kind for stem, kind in stems if _within(stem, owner))
        pairs = tuple((name, modules[name]) for name in names)
        found.append(Part(owner, modules[owner], reads, pairs, tuple(blocks[name] for name in names)))
    return found


def stems_of(model: nn.Module) -> list[tuple[str, str]]:
    """What makes tokens in a model, by path, and of what: `"images"`, `"text"` or `"sound"`."""
    return [(n, reads) for n, m in model.named_modules(remove_duplicate=False) if (reads := _stem(n, m))]


def arguments_of(module: nn.Module) -> frozenset[str]:
    """What a module's forward reads, by the names of its arguments."""
    function = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()
    return frozenset(kind for kind, known in _INPUTS.items() if set(known) & set(names))


def obstacle(part: Part) -> str:
    """Why a part cannot lose tokens: what its blocks have that merging does not know; one phrase."""
    blocks, place = part.attention_blocks, "grid" if part.reads == {"images"} else "order of its tokens"
    if not blocks:
        return _without_attention(part)
    name = next(each for each in part.classes if any(type(block).__name__ == each for block in blocks))
    which = f"its blocks ({name})"
    images = "images" in part.reads
    widths = _widths(blocks)
    if images and len(widths) > 1:
        return f"a hierarchy: {which} have widths {', '.join(map(str, widths))}, and the step between needs the grid"
    if len(blocks) < len(part.blocks) and _rest_mixes(part):
        others = [type(block).__name__ for (_, block), found in zip(part.blocks, part.attentions) if not found]
        return f"{which} alternate with blocks without attention ({max(others, key=others.count)}), which need the {place}"
    if images and (window := _first_setting(blocks, WINDOWS)):
        return f"{which} attend within windows ({window}), which need the grid"
    if len({len(found) for found in part.attentions if found}) == 1 and _crosses(part):
        return f"{which} attend to another sequence as well (cross-attention)"
    if (side := _joined_squares(part)) and images:
        return f"squares of {side}x{side} patches are joined behind its blocks, which needs the grid"
    if found := _inside(blocks, re.compile(r"sampling_offsets"), nn.Module):
        return f"{which} sample the grid at positions of their own ({found}: deformable attention)"
    if found := _inside(blocks, RECURRENT, nn.Module):
        return f"{which} have a recurrence over tokens beside attention ({found})"
    if is_causal(part):
        return f"{which} have {CAUSAL}"
    if found := _inside(blocks, TABLE, nn.Module):
        return f"{which} look positions up in a table of pairs or distances ({found}), in which merged tokens have no place"
    if found := _convolution(blocks):
        return f"{which} have a convolution over neighbours inside ({found}), which needs the {place}"
    if found := _pooling(blocks):
        return f"{which} pool neighbours inside ({found}), which needs the {place}"
    if shared := _shares_keys(part):
        return f"{which} share keys between heads (grouped queries, {shared})"
    if found := _inside(blocks, re.compile(r"experts?"), nn.Module):
        return f"{which} send tokens to experts ({found})"
    return f"{which} {_plain_or_parts(part)}"


def is_causal(part: Part) -> bool:
    """Whether a part's attention is causal, as far as its modules or its config say so."""
    for found in part.attentions:
        for _, attention in found:
            if getattr(attention, "is_causal", None) is True or getattr(attention, "causal", None) is True:
                return "images" not in part.reads or part.reads == {"images", "text"}
    config = getattr(part.module, "config", None)
    return bool(getattr(config, "is_decoder", False)) and not getattr(config, "is_encoder_decoder", False)


def ancestors(name: str) -> list[str]:
    """Paths of a module and all around it, innermost first: `"a.b"` gives `["a.b", "a", ""]`."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _without_attention(part: Part) -> str:
    if not part.blocks:
        return "it has no repeated blocks"
    which = f"its blocks ({', '.join(part.classes[:2])})"
    found = [block for _, block in part.blocks]
    if mark := _inside(found, RECURRENT, nn.Module):
        return f"no attention: {which} are a recurrence over tokens in order ({mark})"
    if any(isinstance(m, nn.RNNBase) for block in found for m in block.modules()):
        return f"no attention: {which} are recurrent"
    if convolution := _convolution(found):
        return f"no attention: {which} are convolutional ({convolution})"
    return f"no attention that turbovlm can tell in {which}: {_children(found[-1])}"


def _plain_or_parts(part: Part) -> str:
    """Of blocks without any obstacle: whether they are a norm, attention, a norm and an MLP; else what they hold."""
    block, attentions = part.blocks[-1][1], part.attentions[-1]
    own = dict(block.named_modules())
    within = [path for path, module in own.items() if any(module is each for _, each in attentions)]
    outside = {p: m for p, m in own.items() if not any(_within(p, path) for path in within)}
    norms = [p for p, m in outside.items() if "norm" in type(m).__name__.lower()]
    linear = [p for p, m in outside.items() if p and _is_linear(m)]
    if len(within) == 1 and len(norms) == 1:
        return f"have one norm ({norms[0]}) for attention and MLP: side by side, or one of the two alone"
    if len(within) == 1 and len(norms) >= 2 and len(linear) >= 2 and len(part.classes) == 1:
        return "look like a ViT's, but no layout describes them: docs/extending.md shows how to write one, in 15 lines"
    return f"are none that a layout describes ({_children(block)}): docs/extending.md says what one needs"


def _children(block: nn.Module) -> str:
    names = [name for name, _ in block.named_children()]
    return "they hold " + ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "they hold no modules"


def _block_around(name: str, modules: dict[str, nn.Module]) -> str:
    """Path of the block that an attention module is in: the nearest element of a list of its like."""
    elements = [a for a in ancestors(name) if a and isinstance(modules[_parent(a)], nn.ModuleList | nn.Sequential | nn.ModuleDict)]
    for index, element in enumerate(elements):
        classes = [type(child) for child in modules[_parent(element)].children()]
        if len(classes) == 1 or len(set(classes)) < len(classes) or index == len(elements) - 1:
            return element
    return _parent(name)


def _elements(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths of innermost list elements of a class that is no layer of torch, one of several alike."""
    names = []
    for name, module in modules.items():
        if name and isinstance(modules[_parent(name)], nn.ModuleList | nn.Sequential | nn.ModuleDict):
            if not type(module).__module__.startswith("torch.nn."):
                names.append(name)
    classes = [type(modules[name]) for name in names]
    for name, cls in zip(names, classes):
        if classes.count(cls) > 1 and not any(other.startswith(f"{name}.") and classes.count(type(modules[other])) > 1 for other in names):
            yield name


def _stem(name: str, module: nn.Module) -> str:
    """What a module makes tokens of, if it does: a first convolution or projection of images, a table of words."""
    if isinstance(module, nn.Conv2d | nn.Conv3d) and module.in_channels in (1, 3, 4):
        if len(set(module.kernel_size[-2:])) == 1 and module.groups == 1:
            return "images"
    last = name.rpartition(".")[2]
    if "patch_embed" in name and (isinstance(module, nn.Conv2d | nn.Conv3d) or _is_linear(module)):
        return "images"
    if isinstance(module, nn.Embedding) and not re.search(r"pos|type|lang|segment|speaker|time|query|rel|bias", last):
        return "text" if module.num_embeddings > 512 else ""
    if isinstance(module, nn.Conv1d) and re.search(r"feature_extractor|conv1|conv_layers|stem", name):
        return "sound"
    return ""


_INPUTS = {
    "images": ("pixel_values", "pixel_values_videos", "pixel_values_images", "image", "images", "input_image", "img"),
    "text": ("input_ids", "decoder_input_ids", "text", "input_embeds"),
    "sound": ("input_features", "input_values", "audio_codes", "waveform", "audio_values", "spectrogram"),
    "series": ("past_values",),
}


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return False
    return hasattr(module, "in_features") or any(p.ndim == 2 for p in module.parameters(recurse=False))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _within(name: str, around: str) -> bool:
    return not around or name == around or name.startswith(f"{around}.")


def _widths(blocks: list[nn.Module]) -> list[int]:
    """Widths of the blocks' tokens, in order, each once: those of their first norm."""
    found = []
    for block in blocks:
        norms = (m for m in block.modules() if "norm" in type(m).__name__.lower())
        weights = (getattr(norm, "weight", None) for norm in norms)
        found += [int(w.shape[0]) for w in weights if w is not None and w.ndim == 1][:1]
    return list(dict.fromkeys(found))


def _rest_mixes(part: Part) -> bool:
    """Whether blocks without attention stand behind the first that attends."""
    first = next(i for i, found in enumerate(part.attentions) if found)
    rest = [block for (_, block), found in zip(part.blocks[first:], part.attentions[first:]) if not found]
    return any(_convolution([block]) or _inside([block], RECURRENT, nn.Module) for block in rest)


def _first_setting(blocks: list[nn.Module], names: tuple[str, ...]) -> str:
    for block in blocks:
        for module in block.modules():
            for name in names:
                value: Any = module.__dict__.get(name)
                sides = value if isinstance(value, tuple | list) else (value,)
                if value is not None and all(isinstance(side, int) and side > 1 for side in sides):
                    return f"{name}={value}"
    return ""


def _crosses(part: Part) -> bool:
    return any(CROSS.fullmatch(name.rpartition(".")[2]) for found in part.attentions for name, _ in found)


def _joined_squares(part: Part) -> int:
    for holder in (part.module, getattr(part.module, "config", None)):
        side = getattr(holder, "spatial_merge_size", None)
        if isinstance(side, int) and side > 1:
            return side
    return 0


def _inside(blocks: list[nn.Module], pattern: re.Pattern[str], kind: type) -> str:
    """Path of the first module, parameter or buffer in a block whose own name matches, or the empty string."""
    for block in blocks:
        for path, module in block.named_modules():
            for name in (*module._modules, *module._parameters, *module._buffers):
                value = getattr(module, name)
                if value is not None and pattern.fullmatch(name):
                    return f"{path}.{name}".lstrip(".")
    return ""


def _convolution(blocks: list[nn.Module]) -> str:
    """Path of the first convolution over more than one position."""
    for block in blocks:
        for path, module in block.named_modules():
            size = getattr(module, "kernel_size", None)
            if "conv" in type(module).__name__.lower() and isinstance(size, tuple | int):
                if max(size if isinstance(size, tuple) else (size,)) > 1:
                    return path or type(module).__name__
    return ""


def _pooling(blocks: list[nn.Module]) -> str:
    pools = (nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool2d, nn.MaxPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool3d, nn.MaxPool3d)
    return next((path for block in blocks for path, m in block.named_modules() if isinstance(m, pools)), "")


def _shares_keys(part: Part) -> str:
    for found in part.attentions:
        for _, attention in found:
            for holder in (attention, getattr(attention, "config", None)):
                heads = next((h for n in ("num_attention_heads", "num_heads", "n_heads") if isinstance(h := getattr(holder, n, None), int)), 0)
                for name in SHARED:
                    keys = getattr(holder, name, None)
                    if isinstance(keys, int) and 0 < keys < heads:
                        return f"{keys} for {heads}"
    return ""
