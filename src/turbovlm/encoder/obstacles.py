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
CROSS = re.compile(r"(?:multi_?head_?)?(?:cross_?att\w*|encoder_att\w*|encdecattention|cross|xattn|image_attn)", re.I)
TABLE = re.compile(
    r"rel_pos\w*|relative_(?:position|attention|coords?)\w*|rel_(?:height|width|bias|embeddings?|attn)\w*|attention_bias(?:es|_idxs)"
    r"|r_(?:r|w|s)_bias|pos_bias_\w|bias_table|linear_pos|relative",
    re.I,
)
USUAL = re.compile(
    r"v|value|(?:to|v|value|w|lin|fc|q|k|s|o|out|c|proj|dense|bias|linear|layer|output|self|attn|attention|scale|weight|in)+"
    r"|.*norm.*|.*drop.*|.*bias|rot.*|rope.*|gamma.*|lambda.?|ls.?|ln.*|layerscale.*|fn|act.*|inproj.*|projection(?:layer)?"
)
"""Names in a block's or an attention's own parts that a layout can describe."""
WINDOWS: tuple[str, ...] = (
    "window_size",
    "window_area",
    "win_size",
    "attn_window",
    "partition_size",
    "attention_window",
    "num_windows",
)
WINDOWS += ("local_attention", "sliding_window", "block_size", "lsh_attn_chunk_length", "local_attn_chunk_length")
SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
HEADS = ("num_attention_heads", "num_heads", "n_heads")
FIXED = re.compile(r"mlp_tokens|linear_tokens|token_mixing\w*|mlp_token\w*|sgu|spatial_gating\w*")
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
STEM = re.compile(r"(?:stem|patch_\w*|embed\w*)(?:\.[^.]+)?$")
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
        around = [a for a in around if not a or not isinstance(modules[a], LISTS)]
        owner = next((a for a in around if any(_within(stem, a) for stem, _ in stems)), "")
        grouped.setdefault(owner, []).append(name)
    found = []
    for owner, names in grouped.items():
        reads = arguments_of(modules[owner]) or frozenset(kind for stem, kind in stems if _within(stem, owner))
        pairs = tuple((name, modules[name]) for name in names)
        if re.search("audio|speech", type(modules[owner]).__name__, re.I):
            reads = frozenset({"sound"})
        found.append(Part(owner, modules[owner], reads, pairs, tuple(blocks[name] for name in names)))
    return [part for part in found if not any(_covers(other, part) for other in found if other is not part)]


def _covers(other: Part, part: Part) -> bool:
    """Whether `part` is a piece of `other`, such as its stem, or stands around it, such as a neck and a decoder."""
    if _within(part.name, other.name) and part.reads <= other.reads:
        return not part.attention_blocks and (not other.attention_blocks or bool(STEM.search(part.name)))
    attends = len(other.attention_blocks) > 1 and "images" in other.reads & part.reads
    return attends and _within(other.name, part.name)


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
    if not part.attention_blocks:
        return _without_attention(part)
    place = "grid" if part.reads == {"images"} else "order of its tokens"
    name = next(each for each in part.classes if any(type(block).__name__ == each for block in part.attention_blocks))
    blocks = [block for block in part.attention_blocks if type(block).__name__ == name]
    attentions = [a for (_, block), found in zip(part.blocks, part.attentions) for a in found if block in blocks]
    which, images = f"its blocks ({name})", "images" in part.reads
    if images and (widths := _widths(attentions)):
        return f"{which} {widths}"
    if other := _between(part):
        return f"blocks without attention ({other}) stand between its blocks ({name}), and need the {place}"
    if any(CROSS.fullmatch(path.rpartition(".")[2]) for path, _ in attentions):
        return f"{which} attend to another sequence as well (cross-attention)"
    if images and (side := _setting([part.module], ("spatial_merge_size",))):
        return f"squares of patches are joined behind {which} ({side}), which needs the grid"
    if found := _inside(blocks, re.compile("sampling_offsets")):
        return f"{which} sample the grid at positions of their own ({found}: deformable attention)"
    if found := _inside(blocks, RECURRENT):
        return f"{which} have a recurrence over tokens beside attention ({found})"
    if is_causal(part):
        return f"{which} have {CAUSAL}"
    if found := _inside(blocks, TABLE) or _inside([part.module], TABLE):
        return f"{which} look positions up in a table ({found}), in which merged tokens have no place"
    if window := _setting([*blocks, part.module], WINDOWS):
        return f"{which} attend within windows ({window}), which need the {place}"
    if found := _convolution(blocks):
        return f"{which} have a convolution over neighbours inside ({found}), which needs the {place}"
    if found := _pooling(blocks):
        return f"{which} pool neighbours inside ({found}), which needs the {place}"
    if shared := _shares_keys(attentions):
        return f"{which} share keys between heads (grouped queries, {shared})"
    if found := _inside(blocks, re.compile("experts?")):
        return f"{which} send tokens to experts ({found})"
    if len(part.classes) > 1:
        others = ", ".join([each for each in part.classes if each != name][:2])
        return f"{which} stand beside blocks of other kinds ({others}), as in no layout"
    return f"{which} {_plain_or_parts(blocks, 'ViT' if images else 'BERT')}"


def is_causal(part: Part) -> bool:
    """Whether a part's attention is causal, as far as its modules or its config say so."""
    if part.reads == {"images"}:
        return False
    for _, attention in (each for found in part.attentions for each in found):
        masks = (mask for mask in attention._buffers.values() if mask is not None)
        if vars(attention).get("is_causal") is True or vars(attention).get("causal") is True:
            return True
        if any(mask.ndim == 4 and mask.shape[-1] == mask.shape[-2] > 1 for mask in masks):  # as in GPT
            return True
    own = vars(config) if (config := vars(part.module).get("config")) is not None else {}
    return bool(own.get("is_decoder")) and not own.get("is_encoder_decoder")


def ancestors(name: str) -> list[str]:
    """Paths of a module and all around it, innermost first: `"a.b"` gives `["a.b", "a", ""]`."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _without_attention(part: Part) -> str:
    if not part.blocks:
        return "it has no repeated blocks"
    which = f"its blocks ({', '.join(part.classes[:2])})"
    found = [block for _, block in part.blocks]
    if mark := _inside(found, RECURRENT):
        return f"no attention: {which} are a recurrence over tokens in order ({mark})"
    if any(isinstance(m, nn.RNNBase) for block in found for m in block.modules()):
        return f"no attention: {which} are recurrent"
    if mark := _inside(found, FIXED):
        return f"no attention: {which} mix tokens by a layer of fixed length ({mark})"
    if convolution := _convolution(found):
        return f"no attention: {which} are convolutional ({convolution})"
    return f"no attention that turbovlm can tell in {which}: {_children(found[-1])}"


def _plain_or_parts(blocks: list[nn.Module], model: str) -> str:
    """Of blocks without any obstacle: whether they are a norm, attention, a norm and an MLP; else what they hold."""
    for block in blocks:
        if not (found := _parts(block)).startswith(_PLAIN):
            return found
    return f"{_PLAIN} a {model}'s, but no layout describes them yet: docs/extending.md shows how, in 15 lines"


_PLAIN = "look like"


def _parts(block: nn.Module) -> str:
    own = dict(block.named_modules())
    within = [path for path, module in own.items() if is_attention(module)]
    outside = {path: module for path, module in own.items() if not any(_within(path, each) for each in within)}
    norms = [path for path, module in outside.items() if "norm" in type(module).__name__.lower()]
    linear = [path for path, module in outside.items() if path and _is_linear(module)]
    holders = [block, *(own[path] for path in within)]
    names = [name for each in holders for name, value in each._parameters.items() if value is not None]
    names += [name for path in within for name in own[path]._modules]
    unknown = [name for name in names if not _is_usual(name)]
    if len(within) != 1 or unknown:
        extra = f", {', '.join(unknown)} beside" if unknown else ""
        return f"are none that a layout describes ({_children(block)}{extra}): docs/extending.md says what one needs"
    if len(norms) == 1 and len(linear) >= 2:
        return f"have one norm ({norms[0]}) for attention and MLP, as no layout has"
    if len(norms) >= 2 and len(linear) >= 2:
        return _PLAIN
    return f"are none that a layout describes ({_children(block)}): docs/extending.md says what one needs"


def _is_usual(name: str) -> bool:
    plain = name.replace("_", "").lower()
    return any(pattern.fullmatch(plain) for pattern in (USUAL, QUERY, KEY, PACKED))


def _children(block: nn.Module) -> str:
    names = [name for name, _ in block.named_children()]
    return "they hold " + ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "they hold no modules"


def _block_around(name: str, modules: dict[str, nn.Module]) -> str:
    """Path of the block that an attention module is in: the nearest element of a list of its like."""
    elements = [a for a in ancestors(name) if a and isinstance(modules[_parent(a)], LISTS)]
    for index, element in enumerate(elements):
        classes = [type(child) for child in modules[_parent(element)].children()]
        if len(classes) == 1 or len(set(classes)) < len(classes) or index == len(elements) - 1:
            return element
    return _parent(name)


def _elements(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths of innermost list elements of a class that is no layer of torch, one of several alike."""
    names = []
    for name, module in modules.items():
        listed = name and isinstance(modules[_parent(name)], LISTS)
        if listed and not type(module).__module__.startswith("torch.nn."):
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
    if "patch_embed" in name and _is_linear(module):
        return "images"
    if isinstance(module, nn.Embedding) and not re.search(r"pos|type|lang|segment|speaker|time|query|rel|bias", last):
        return "text" if module.num_embeddings > 512 else ""
    if isinstance(module, nn.Conv1d) and re.search(r"feature_extractor|conv1|conv_layers|stem", name):
        return "sound"
    return ""


_INPUTS = {
    "images": ("pixel_values", "pixel_values_videos", "pixel_values_images", "image", "images", "input_image", "img"),
    "text": ("input_ids", "decoder_input_ids", "text", "input_embeds"),
    "sound": ("input_features", "input_values", "audio_codes", "waveform", "audio_values", "spectrogram", "audio_mel"),
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


def _widths(attentions: list[Named]) -> str:
    """How the tokens' widths differ between attentions, where they do: in stages, or in branches side by side."""
    widths = [width for _, attention in attentions if (width := _width(attention))]
    stages = [width for width, before in zip(widths, [0, *widths]) if width != before]
    if len(stages) < 2:
        return ""
    if len(set(stages)) < len(stages):
        return f"are of several widths side by side ({', '.join(map(str, dict.fromkeys(stages)))}), as no layout has"
    return f"form a hierarchy of stages (widths {', '.join(map(str, stages))}), and the step between needs the grid"


def _width(attention: nn.Module) -> int:
    """What an attention's projection to queries takes; 0 where that cannot be told."""
    if isinstance(attention, nn.MultiheadAttention):
        return int(attention.embed_dim)
    for name, child in attention.named_children():
        plain = name.replace("_", "").lower()
        if QUERY.fullmatch(plain) or PACKED.fullmatch(plain):
            weight = next((p for p in child.parameters() if p.ndim > 1), None)
            return 0 if weight is None else int(weight.shape[0 if type(child).__name__ == "Conv1D" else 1])
    return 0


def _between(part: Part) -> str:
    """The class of blocks without attention that stand between those that attend, and mix tokens."""
    places = [index for index, found in enumerate(part.attentions) if found]
    rest = [block for index, (_, block) in enumerate(part.blocks) if places[0] < index < places[-1]]
    rest = [block for block in rest if block not in part.attention_blocks]
    return next((type(b).__name__ for b in rest if _convolution([b]) or _inside([b], RECURRENT)), "")


def _setting(modules: list[nn.Module], names: tuple[str, ...]) -> str:
    """The first of the settings that a module, or the config of the first one, has above 1, as `name=value`."""
    for module in [each for block in modules for each in block.modules()] + [vars(modules[-1]).get("config")]:
        for name in names:
            value: Any = vars(module).get(name) if module is not None else None
            sides = value if isinstance(value, tuple | list) else (value,)
            if value is not None and all(isinstance(side, int) and side > 1 for side in sides):
                return f"{name}={value}"
    return ""


def _inside(blocks: list[nn.Module], pattern: re.Pattern[str]) -> str:
    """Path of the first module, parameter or buffer in a block whose own name matches, or the empty string."""
    for block in blocks:
        for path, module in block.named_modules():
            for name in (*module._modules, *module._parameters, *module._buffers):
                if pattern.fullmatch(name) and getattr(module, name) is not None:
                    return f"{path}.{name}".lstrip(".")
    return ""


def _convolution(blocks: list[nn.Module]) -> str:
    """Path of the first convolution over more than one position."""
    for block in blocks:
        for path, module in block.named_modules():
            size = getattr(module, "kernel_size", None)
            sides = size if isinstance(size, tuple) else (size,)
            if "conv" in type(module).__name__.lower() and any(isinstance(side, int) and side > 1 for side in sides):
                return path or type(module).__name__
    return ""


def _pooling(blocks: list[nn.Module]) -> str:
    pools = (nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool2d, nn.MaxPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool3d, nn.MaxPool3d)
    return next((path for block in blocks for path, m in block.named_modules() if isinstance(m, pools)), "")


def _shares_keys(attentions: list[Named]) -> str:
    for _, attention in attentions:
        for holder in (attention, vars(attention).get("config")):
            own = vars(holder) if holder is not None else {}
            heads = next((n for name in HEADS if isinstance(n := own.get(name), int)), 0)
            keys = next((n for name in SHARED if isinstance(n := own.get(name), int)), 0)
            if 0 < keys < heads:
                return f"{keys} for {heads}"
    return ""
