"""What `apply` says of a model whose encoders it cannot accelerate: which part, why, and what works instead.

One line each. Why is told from the modules (`obstacles`); the table here is for what these cannot tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch.nn as nn

from turbovlm.config import READINGS, ReadConfig
from turbovlm.encoder.obstacles import CAUSAL, PLAIN, is_causal, obstacle
from turbovlm.encoder.parts import Part, ancestors, arguments_of, parts_of, stems_of
from turbovlm.errors import TurboError
from turbovlm.registry import class_paths, family_of

KNOWN = "docs/models.md lists what is supported"
RESIDUAL_NORMS = "its norms stand behind attention and MLP, before the residual is added, as in no layout yet"
DISENTANGLED = "its attention adds scores of relative positions, which a merged token does not have"
ONE_SEQUENCE = "it runs all images as one sequence, and merged tokens would have to keep to their image"
SPARSE = "its attention is sparse over blocks or hashes of tokens, and not softmax(QKᵀ)"
_MODELS = "transformers.models"
REFUSED = {
    **dict.fromkeys(
        (
            f"{_MODELS}.bloom.modeling_bloom.BloomBlock",
            f"{_MODELS}.mpt.modeling_mpt.MptBlock",
            f"{_MODELS}.xglm.modeling_xglm.XGLMDecoderLayer",
            f"{_MODELS}.imagegpt.modeling_imagegpt.ImageGPTBlock",
            f"{_MODELS}.openai.modeling_openai.Block",
            f"{_MODELS}.codegen.modeling_codegen.CodeGenBlock",
            f"{_MODELS}.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseLayer",
        ),
        CAUSAL,
    ),
    **dict.fromkeys(
        (
            f"{_MODELS}.deberta.modeling_deberta.DebertaLayer",
            f"{_MODELS}.deberta_v2.modeling_deberta_v2.DebertaV2Layer",
            f"{_MODELS}.sew_d.modeling_sew_d.SEWDLayer",
        ),
        DISENTANGLED,
    ),
    **dict.fromkeys(
        (
            f"{_MODELS}.big_bird.modeling_big_bird.BigBirdLayer",
            f"{_MODELS}.bigbird_pegasus.modeling_bigbird_pegasus.BigBirdPegasusEncoderLayer",
            f"{_MODELS}.pegasus_x.modeling_pegasus_x.PegasusXEncoderLayer",
            f"{_MODELS}.reformer.modeling_reformer.ReformerLayer",
            f"{_MODELS}.yoso.modeling_yoso.YosoLayer",
            f"{_MODELS}.mra.modeling_mra.MraLayer",
        ),
        SPARSE,
    ),
    **dict.fromkeys(
        (
            f"{_MODELS}.pixtral.modeling_pixtral.PixtralAttentionLayer",
            f"{_MODELS}.video_llama_3.modeling_video_llama_3.VideoLlama3VisionEncoderLayer",
            f"{_MODELS}.kimi_k25.modeling_kimi_k25.Kimi_K25VisionEncoderLayer",
        ),
        ONE_SEQUENCE,
    ),
    "timm.models.vision_transformer.ResPostBlock": RESIDUAL_NORMS,
    "timm.models.eva.EvaBlockPostNorm": RESIDUAL_NORMS,
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and MLP run side by side",
    "timm.models.vision_transformer.ParallelThingsBlock": "several attentions and MLPs run side by side",
    "open_clip.transformer.CustomResidualAttentionBlock": "its attention scales heads or cosines in its own way",
}
"""Blocks, by the path of their class, whose reason their modules do not show."""

CLOSED = {
    "torch.fx.graph_module.GraphModule": "a traced graph (torch.fx, torch.export) has no block modules",
    "torch.jit._script.ScriptModule": "TorchScript has no block modules to patch",
    "torch.export.exported_program.ExportedProgram": "an exported program has no block modules",
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
        if any(isinstance(module, nn.Conv2d | nn.Conv3d) for module in modules.values()):
            return f"{which}: no attention: it is a convolutional network of {children}; {KNOWN}"
        return f"{which}: it holds no repeated blocks, only {children or 'parameters'}; {KNOWN}"
    attending = [part for part in told if part.attention_blocks]
    told = attending + [part for part in images if part not in attending] if attending else told
    told.sort(key=lambda part: bool(images) and part.reads != {"images"})
    titles = [f"{part.title}: " if part.name or len(told) > 1 else "" for part in told]
    reasons = list(dict.fromkeys(title + _reason(part, strays) for title, part in zip(titles, told)))
    more = f"; and {len(reasons) - _SHOWN} parts more" if len(reasons) > _SHOWN else ""
    return f"{which}: {'; '.join(reasons[:_SHOWN])}{more}{instead(model)}; {KNOWN}"


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
        title = f"{path[0]} ({type(module).__name__})" if path[0] else "it"
        alone = [text for text in texts if _merges(model.get_submodule(text))]
        words = f"; to merge words, apply to {alone[0]} alone" if alone else ""
        return (
            f"{type(model).__name__} has no block that turbovlm can accelerate: {title} reads {kind}: {reason}{words}; "
            f"{KNOWN}"
        )
    return None


def instead(model: nn.Module) -> str:
    """Which other setting shortens what a model reads of images, each asked for; empty where it reads none."""
    for setting, what in zip(READINGS, ("its language model", "its cross-attention")):
        for others in ({}, {"alpha": 0}):
            if reads(model, setting, **others):
                words = "".join(f" with {name}={value!r}" for name, value in others.items())
                return f"; {setting}{words} shortens what {what} reads"
    parts = parts_of(model)
    if any(part.reads == {"images"} for part in parts) and any(is_causal(part) for part in parts):
        return "; visual_keep has no reader for it either"
    return ""


def reads(model: nn.Module, setting: str, **others: Any) -> bool:
    """Whether `visual_keep` or `cross_keep`, and other settings, are supported for a model, by asking for them."""
    from turbovlm.vlm.install import find_readings  # which finds blocks by means of this package

    if not any(family_of("vlm", module) for module in model.modules()):
        return False
    if others and setting != "visual_keep":
        return False
    config = ReadConfig(0.5, **others) if setting == "visual_keep" else ReadConfig(cross_keep=0.5)
    try:
        find_readings(model, config)
    except TurboError:
        return False
    return True


def _merges(model: nn.Module) -> bool:
    from turbovlm.encoder.towers import find_towers  # which asks this module why it finds none

    try:
        return bool(find_towers(model))
    except TurboError:
        return False


def _reason(part: Part, strays: Mapping[str, str]) -> str:
    told = obstacle(part)
    for _, block in part.blocks:
        for path in class_paths(block):
            stray = strays.get(path)
            reason = REFUSED.get(path) or (
                stray if stray is not None and (PLAIN in told or "causal" in stray) else None
            )
            if reason is not None:
                return f"its blocks ({type(block).__name__}): {reason}"
    return told
