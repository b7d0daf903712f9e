"""What `apply` says of a model whose encoders it cannot accelerate: which part, why, and what works instead.

One line each. Why is told from the modules (`obstacles`); the table here is for what these cannot tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.nn as nn

from turbovlm.config import READINGS, ReadConfig
from turbovlm.encoder.obstacles import Part, ancestors, arguments_of, is_causal, obstacle, parts_of, stems_of
from turbovlm.errors import TurboError
from turbovlm.registry import class_paths

KNOWN = "docs/models.md lists the models that are supported"
SQUARES = "squares of patches are joined behind its blocks, which needs the grid"
RESIDUAL_NORMS = "its norms stand behind attention and MLP, before the residual is added, as in no layout yet"
REFUSED = {
    "timm.models.vision_transformer.ResPostBlock": RESIDUAL_NORMS,
    "timm.models.eva.EvaBlockPostNorm": RESIDUAL_NORMS,
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and MLP run side by side",
    "timm.models.vision_transformer.ParallelThingsBlock": "several attentions and MLPs run side by side",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLVisionBlock": SQUARES,
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock": (
        f"its windowed attention needs the grid, and {SQUARES}"
    ),
    "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionBlock": SQUARES,
    "open_clip.transformer.CustomResidualAttentionBlock": "its attention scales heads or cosines in its own way",
}
"""Blocks, by the path of their class, whose reason their modules do not show."""

CLOSED = {
    "torch.fx.graph_module.GraphModule": "a traced graph (torch.fx, torch.export) has no block modules",
    "torch.jit._script.ScriptModule": "TorchScript has no block modules to patch",
}
"""Modules that hold a program instead of a model: merging is traced with the model, where it comes before."""

_SHOWN = 2
"""Parts that a message names at most."""


def nothing_found(model: nn.Module, modules: Mapping[str, nn.Module], strays: Mapping[str, str]) -> str:
    """Why there is no encoder in `model` to accelerate.

    Args:
        modules: all of its modules by path.
        strays: of blocks that a layout knows, by the path of their class, why they are not taken.
    """
    which = f"{type(model).__name__} has no block that turbovlm can accelerate"
    for module in modules.values():
        for path in class_paths(module):
            if path in CLOSED:
                return f"{which}: {CLOSED[path]}: apply to the model before it is traced"
    parts = parts_of(model)
    images = [part for part in parts if "images" in part.reads]
    encoders = [part for part in parts if not is_causal(part)]
    told = images or encoders or parts
    if not told:
        children = ", ".join(dict.fromkeys(type(child).__name__ for child in model.children()))
        return f"{which}: it holds no repeated blocks, only {children or 'parameters'}; {KNOWN}"
    reasons = dict.fromkeys(
        f"{part.title}: {_reason(part, strays)}" if part.name else _reason(part, strays) for part in told
    )
    more = f"; and {len(reasons) - _SHOWN} parts more" if len(reasons) > _SHOWN else ""
    return f"{which}: {'; '.join(list(reasons)[:_SHOWN])}{more}{instead(model)}; {KNOWN}"


def beside_text(model: nn.Module, texts: Collection[str]) -> str | None:
    """Why text encoders at the paths `texts` are not merged: the model reads images or sound beside them; or None."""
    around = {name for text in texts for name in ancestors(text)}
    readers = [(name, kind) for name, kind in stems_of(model) if kind != "text"]
    readers += [(n, kind) for n, m in model.named_modules() for kind in arguments_of(m) & {"images", "sound"}]
    for name, kind in readers:
        if any(text in ancestors(name) for text in texts):  # its own
            continue
        path = [a for a in ancestors(name) if a not in around][-1:] or [name]
        module = model.get_submodule(path[0])
        parts = [] if path[0] in around else parts_of(module)
        reason = _reason(parts[0], {}) if parts else "turbovlm knows no encoder in it"
        return (
            f"{type(model).__name__} has no block that turbovlm can accelerate: {path[0]} ({type(module).__name__}) reads "
            f"its {kind}: {reason}; apply to {min(texts)} alone to merge words; {KNOWN}"
        )
    return None


def instead(model: nn.Module) -> str:
    """Which other setting shortens what a model reads of images, each asked for; empty where it reads none."""
    for setting, what in zip(READINGS, ("its language model", "its cross-attention")):
        if reads(model, setting):
            return f"; {setting} shortens what {what} reads"
    parts = parts_of(model)
    if any(part.reads == {"images"} for part in parts) and any(is_causal(part) for part in parts):
        return f"; {' and '.join(READINGS)} do not know it either"
    return ""


def reads(model: nn.Module, setting: str) -> bool:
    """Whether `visual_keep` or `cross_keep` is supported for a model, by asking for it."""
    from turbovlm.vlm.install import find_readings  # which finds blocks by means of this package

    try:
        find_readings(model, ReadConfig(**{setting: 0.5}))
    except TurboError:
        return False
    return True


def _reason(part: Part, strays: Mapping[str, str]) -> str:
    for _, block in part.blocks:
        for path in class_paths(block):
            reason = REFUSED.get(path) or strays.get(path)
            if reason is not None:
                return f"its blocks ({type(block).__name__}): {reason}"
    return obstacle(part)
