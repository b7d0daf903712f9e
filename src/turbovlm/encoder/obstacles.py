"""What keeps blocks that no layout knows from losing tokens, told from their modules: names, shapes, settings.

Nothing is run, and no library is imported. Where the modules do not tell, what was found is said, and no more.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch.nn as nn

from turbovlm.encoder.parts import KEY, PACKED, QUERY, RECURRENT, Named, Part, is_attention, is_linear, within

CROSS = re.compile(r"(?:multi_?head_?)?(?:cross_?att\w*|encoder_att\w*|encdecattention|cross|xattn|image_attn)", re.I)
TABLE = re.compile(
    r"rel_pos\w*|relative_(?:position|attention|coords?)\w*|rel_(?:height|width|bias|embeddings?|attn)\w*|emb_rel\w*|attention_bias(?:es|_idxs)"
    r"|r_(?:r|w|s)_bias|pos_bias_\w|bias_table|linear_pos|relative",
    re.I,
)
USUAL = re.compile(
    r"v|value|(?:to|v|value|w|lin|fc|q|k|s|o|out|c|proj|dense|bias|linear|layer|output|self|attn|attention|scale|weight|in)+"
    r"|.*norm.*|.*drop.*|.*bias|rot.*|rope.*|gamma.*|lambda.?|ls.?|ln.*|layerscale.*|fn|act.*|inproj.*|projection(?:layer)?"
)
"""Names in a block's or an attention's own parts that a layout can describe."""
WINDOWS = (
    *("window_size", "window_area", "win_size", "attn_window", "partition_size", "attention_window", "num_windows"),
    *("local_attention", "sliding_window", "lsh_attn_chunk_length", "local_attn_chunk_length"),
)
SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
HEADS = ("num_attention_heads", "num_heads", "n_heads")
FIXED = re.compile(r"mlp_tokens|linear_tokens|token_mixing\w*|mlp_token\w*|sgu|spatial_gating\w*")
CAUSAL = "causal attention: a merged token would tell words what comes after them"
PLAIN = "look like"


def obstacle(part: Part) -> str:
    """Why a part cannot lose tokens: what its blocks have that merging does not know; one phrase."""
    if not part.attention_blocks:
        return _without_attention(part)
    if len(part.attention_blocks) == 1 and len(part.blocks) > 2:  # such as a convolutional network's last pooling
        rest = [(block, ()) for block, found in zip(part.blocks, part.attentions) if not found]
        blocks_alone, none = zip(*rest) if rest else ((), ())
        if "convolutional" in (told := _without_attention(replace(part, blocks=blocks_alone, attentions=none))):
            return f"{told}, but for one ({type(part.attention_blocks[0]).__name__})"
    place = "grid" if part.reads == {"images"} else "order of its tokens"
    name = next(each for each in part.classes if any(type(block).__name__ == each for block in part.attention_blocks))
    blocks = [block for block in part.attention_blocks if type(block).__name__ == name]
    attentions = [a for (_, block), found in zip(part.blocks, part.attentions) for a in found if block in blocks]
    which, images = f"its blocks ({name})", "images" in part.reads
    if images and (widths := _widths(attentions)):
        return f"{which} {widths}"
    if other := _between(part):
        return f"blocks without attention ({other}) stand between its blocks ({name}), and need the {place}"
    if any(_is_cross(path) for path, _ in attentions):
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
    told = _plain_or_parts(blocks, "ViT" if images else "BERT")
    if not told.startswith(PLAIN) or len(part.classes) == 1:
        return f"{which} {told}"
    readers = [b for b, found in zip(part.blocks, part.attentions) if any(_is_cross(path) for path, _ in found)]
    if readers:
        return f"{which} are read by a decoder's cross-attention ({type(readers[0][1]).__name__}), as in no layout"
    others = [each for each in part.classes if each != name][:2]
    return f"{which} stand beside blocks of other kinds ({', '.join(others)}), as in no layout"


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
        if not (found := _parts(block)).startswith(PLAIN):
            return found
    return f"{PLAIN} a {model}'s, but no layout describes them yet: docs/extending.md shows how, in 15 lines"


def _parts(block: nn.Module) -> str:
    own = dict(block.named_modules())
    attending = [path for path, module in own.items() if is_attention(module)]
    inside = [path for path in attending if path]  # a block may hold its projections itself
    outside = {path: module for path, module in own.items() if path and not any(within(path, each) for each in inside)}
    norms = [path for path, module in outside.items() if "norm" in type(module).__name__.lower()]
    linear = [path for path, module in outside.items() if path and is_linear(module)]
    holders = [block, *(own[path] for path in inside)]
    names = [name for each in holders for name, value in each._parameters.items() if value is not None]
    names += [name for path in inside for name in own[path]._modules]
    unknown = [name for name in names if not _is_usual(name)]
    if len(attending) != 1 or unknown:
        extra = f", {', '.join(unknown)} beside" if unknown else ""
        return f"are none that a layout describes ({_children(block)}{extra}): docs/extending.md says what one needs"
    if len(norms) == 1 and len(linear) >= 2:
        return f"have one norm ({norms[0]}) for attention and MLP, as no layout has"
    if len(norms) >= 2 and len(linear) >= 2:
        return PLAIN
    return f"are none that a layout describes ({_children(block)}): docs/extending.md says what one needs"


def _is_usual(name: str) -> bool:
    plain = name.replace("_", "").lower()
    return any(pattern.fullmatch(plain) for pattern in (USUAL, QUERY, KEY, PACKED))


def _is_cross(path: str) -> bool:
    return CROSS.fullmatch(path.rpartition(".")[2]) is not None


def _children(block: nn.Module) -> str:
    names = [name for name, _ in block.named_children()]
    return "they hold " + ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "they hold no modules"


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
