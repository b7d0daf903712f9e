"""Finding the part of a model that reads visual tokens, and putting the shorter prompt into it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.nn as nn

from turbovlm.config import TurboConfig
from turbovlm.encoder.layout import fetch, library_version, spell
from turbovlm.encoder.towers import layout_of
from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.patching import slot_of
from turbovlm.registry import families
from turbovlm.vlm.attention import encoding, expanding, guiding_forward, reading_across, rearranging
from turbovlm.vlm.families import PIXELS, Reader, blocks_of, reader_of
from turbovlm.vlm.plan import ReadingPlan
from turbovlm.vlm.reading import positioning, prefilling, preparing, reading_forward

GENERATING = {
    "_expand_multimodal_outputs": expanding,
    "_prefill": prefilling,
    "_prepare_position_ids_for_generation": positioning,
}
"""What `generate` calls on the model."""
OVERRIDES = (
    guiding_forward,
    encoding,
    reading_across,
    rearranging,
    reading_forward,
    preparing,
    *GENERATING.values(),
)
"""The functions that take a method's place on one module."""


def plan_reading(model: nn.Module, config: TurboConfig) -> ReadingPlan:
    """How `model`'s visual tokens will be chosen.

    Raises:
        UnsupportedModelError: nothing in the model reads visual tokens in place of placeholders, or its library is
            too old for it.
        ConfigError: `guidance="cls"` for a tower without CLS.
    """
    found = [(name, module, reader) for name, module in model.named_modules() if (reader := reader_of(module))]
    if not found:
        raise UnsupportedModelError(
            f"visual_keep={config.visual_keep}: {type(model).__name__} has no language model that reads visual tokens, "
            f"as far as turbovlm knows; supported: {', '.join(reader.family for reader in families('vlm'))}"
        )
    name, part, reader = found[0]
    if not reader.across and "mm_encoder_outputs" not in inspect.signature(type(part).forward).parameters:
        raise UnsupportedModelError(
            f"visual_keep={config.visual_keep}: {reader.family} of {library_version(type(part))} does not take encoded "
            "images apart from the prompt; transformers ≥ 5.18 does"
        )
    return _plan(name, part, reader, config)


def _plan(name: str, part: Any, reader: Reader, config: TurboConfig) -> ReadingPlan:
    tower = fetch(part, tuple(reader.tower.split(".")))
    blocks = blocks_of(tower)
    guide = blocks[reader.guide(part)]
    path = next(path for path, module in part.named_modules() if module is guide)
    if reader.packed:
        cls, prefix, spelling = False, 0, None
    else:
        layout = layout_of(guide)
        if layout is None:
            raise UnsupportedModelError(
                f"visual_keep={config.visual_keep}: {reader.family} with a tower of {type(guide).__qualname__}, whose "
                "attention turbovlm cannot read"
            )
        spelling = spell(layout, guide)
        cls = layout.cls(tower) if callable(layout.cls) else layout.cls
        prefix = layout.prefix(tower) if callable(layout.prefix) else layout.prefix
    if config.guidance == "cls" and not cls:
        raise ConfigError(f"guidance='cls': {reader.family}'s tower has no CLS token; use 'mean' or 'auto'")
    guidance = ("cls" if cls else "mean") if config.guidance == "auto" else config.guidance
    return ReadingPlan(config, reader, name, path, spelling, prefix, guidance)


def install_reading(model: nn.Module, plan: ReadingPlan) -> None:
    """Put the overrides in place, after those of the towers' blocks."""
    part: Any = model.get_submodule(plan.name) if plan.name else model
    guide = part.get_submodule(plan.guide)
    slot = slot_of(guide)
    setattr(guide, slot, functools.partial(guiding_forward, guide, plan, guide.__dict__.get(slot)))
    if plan.reader.across:
        _override(fetch(part, tuple(plan.reader.tower.split("."))), "forward", reading_across, plan)
        return
    _override(part, "forward", reading_forward, plan)
    for modality in PIXELS:
        if hasattr(type(part), f"get_{modality}_features"):
            _override(part, f"get_{modality}_features", encoding, plan, modality)
    for name in plan.reader.rearrange:
        _override(part, name, rearranging, plan, name)
    for owner in _generating(model, part):
        path = next(path for path, module in owner.named_modules() if module is part)
        _override(owner, "prepare_inputs_for_generation", preparing, plan, path)
        for name, function in GENERATING.items():
            if hasattr(type(owner), name):
                _override(owner, name, function, plan)


def replaced(model: nn.Module, plan: ReadingPlan) -> list[tuple[str, nn.Module]]:
    """The modules whose forward `install_reading` replaces, with their paths."""
    paths = [plan.guide, plan.reader.tower if plan.reader.across else ""]
    names = [".".join(filter(None, (plan.name, path))) for path in paths]
    return [(name, model.get_submodule(name)) for name in names]


def _generating(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The modules with a `generate` around the part that reads."""
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "prepare_inputs_for_generation") and any(child is part for child in module.modules())
    ]


def _override(module: nn.Module, name: str, function: Any, *fixed: Any) -> None:
    method = functools.partial(function, module, *fixed)
    functools.update_wrapper(method, getattr(type(module), name).__get__(module))
    setattr(module, slot_of(module) if name == "forward" else name, method)
