"""Finding the blocks of a denoiser, and putting the merges into them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.nn as nn

from turbovlm.config import COMPONENTS, TurboConfig
from turbovlm.diffusion.families import Block, Part
from turbovlm.diffusion.merging import denoiser_forward, part_forward
from turbovlm.diffusion.plan import DiffusionPlan, Spot
from turbovlm.errors import ConfigError, TurboError, UnsupportedModelError
from turbovlm.patching import slot_of
from turbovlm.registry import class_paths, family_of

OVERRIDES = (part_forward, denoiser_forward)
"""The functions that take a method's place on one module."""

LEAST_KEPT = 0.25
"""Share of its tokens that a block reads at least."""

SHARED_BY = 4
"""How many blocks in a row merge alike."""

ALLOWED: dict[str, tuple[Any, ...]] = {
    "partition": ("grid", "auto"),
    "similarity": ("hidden", "auto"),
    "guidance": ("mean", "auto"),
    "order": ("spatial",),
    "dense": (False,),
    "restore": ("auto", "copy", "linear", "weighted"),
    "thresholds": (None,),
    "trace": (False,),
    "visual_keep": (None,),
    "cross_keep": (None,),
}
"""Settings of encoders, and what they may be here."""

DENOISERS = ("unet", "transformer")
"""Where a pipeline keeps its denoiser."""

MODEL = {"diffusers.models.modeling_utils.ModelMixin", "diffusers.configuration_utils.ConfigMixin"}
"""What every denoiser is; a list of ControlNets has no config."""
TRANSFORMERS = "diffusers.models.transformers"
PICTURES = {
    f"{TRANSFORMERS}.transformer_2d.Transformer2DModel",
    f"{TRANSFORMERS}.pixart_transformer_2d.PixArtTransformer2DModel",
    f"{TRANSFORMERS}.dit_transformer_2d.DiTTransformer2DModel",
    f"{TRANSFORMERS}.transformer_sd3.SD3Transformer2DModel",
}
"""What holds blocks and is given a picture, `[batch, channels, rows, columns]`."""
SEQUENCES = {f"{TRANSFORMERS}.transformer_flux.FluxTransformer2DModel"}
"""What is given tokens, and where they stand."""


def block_of(module: nn.Module) -> Block | None:
    """What kind of block a module is, or None."""
    block: Block | None = family_of("denoiser", module)
    return block


def is_denoiser(model: nn.Module) -> bool:
    """Whether there are blocks in it whose tokens can be merged and restored."""
    return any(block_of(module) is not None for module in model.modules())


def denoiser_of(pipe: Any) -> nn.Module | None:
    """A pipeline's denoiser, or None where it has none."""
    found = (getattr(pipe, name, None) for name in DENOISERS)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def plan_diffusion(model: nn.Module, config: TurboConfig, pipe: Any = None) -> DiffusionPlan:
    """How the tokens of `model`'s blocks will be merged.

    Args:
        pipe: the pipeline that the denoiser is from, if there is one.

    Raises:
        ConfigError: an amount that is no `keep`, a setting that only encoders have, components of which there are
            none, a `grid` of pictures whose grid is known, or `refresh` without a pipeline.
        UnsupportedModelError: blocks in a model that turbovlm does not know, such as a video's.
        TurboError: a part has a cache already.
    """
    _check(config, pipe)
    stages: dict[str, list[tuple[str, Block]]] = {}
    modules, roots = dict(model.named_modules()), [f"{root}." if root else "" for root in _roots(model)]
    for name, module in modules.items():
        block = block_of(module)
        if block is not None:
            _check_holder(name, modules)
            root = next((root for root in roots if name.startswith(root)), "")
            stages.setdefault(root + _stage(name.removeprefix(root)), []).append((name, block))
    spots: list[Spot] = []
    groups: list[str] = []
    for stage, blocks in stages.items():
        for index, (name, block) in enumerate(blocks):
            if index % SHARED_BY == 0:
                groups.append(f"{stage}:{index // SHARED_BY}")
            spots += [
                Spot(f"{name}.{part.path}", part, groups[-1], len(groups) - 1, f"{name}.{block.guide}")
                for part in _parts(modules[name], block)
                if part.component in config.components
            ]
    if config.grid is not None and not any(set(class_paths(module)) & SEQUENCES for module in modules.values()):
        raise ConfigError(
            f"grid={config.grid}: {type(model).__name__} is given pictures, of which rows and columns are known; only "
            "FLUX takes it"
        )
    known = [found for blocks in stages.values() for found in blocks]
    if not spots:
        there = {part.component for name, block in known for part in _parts(modules[name], block)}
        raise ConfigError(
            f"components={list(config.components)}: the blocks of this {type(model).__name__} have no such part; they "
            f"have {', '.join(name for name in COMPONENTS if name in there)}"
        )
    for spot in spots:
        _check_cache(model, spot.name)
    families = dict.fromkeys(block.family for _, block in known)
    return DiffusionPlan(config, ", ".join(families), tuple(spots), pipe=pipe if config.refresh > 1 else None)


def _parts(module: nn.Module, block: Block) -> list[Part]:
    """Those that a block has."""
    return [part for part in block.parts if getattr(module, part.path, None) is not None]


def _roots(model: nn.Module) -> list[str]:
    """Paths of the outermost denoisers in it."""
    roots: list[str] = []
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{root}.") or root == "" for root in roots)
        if not inside and set(class_paths(module)) >= MODEL and is_denoiser(module):
            roots.append(name)
    return roots


def _check(config: TurboConfig, pipe: Any) -> None:
    if config.keep is None:
        raise ConfigError(f"{config.amount}: image generation takes keep, the share of its tokens that a block reads")
    for name, allowed in ALLOWED.items():
        if getattr(config, name) not in allowed:
            among = ", ".join(map(repr, allowed))
            raise ConfigError(f"{name}={getattr(config, name)!r}: image generation allows {among} only")
    if min(config.keep if isinstance(config.keep, tuple) else (config.keep,)) < LEAST_KEPT:
        raise ConfigError(f"{config.amount}: one token in every 2×2 cell stays, so keep must be ≥ {LEAST_KEPT}")
    if config.refresh > 1 and getattr(pipe, "scheduler", None) is None:
        raise ConfigError(
            f"refresh={config.refresh}: a pipeline's scheduler says when a step ends; apply to the pipeline, not to "
            "its denoiser"
        )


def _check_holder(block: str, modules: dict[str, nn.Module]) -> None:
    """Blocks are the same in models of videos or embeddings; only of pictures is it known how their tokens lie."""
    parts = block.split(".")
    around = [modules[".".join(parts[:i])] for i in range(len(parts) - 1, -1, -1)]
    holder = next((m for m in around if not isinstance(m, nn.ModuleList)), None)
    if holder is None or not set(class_paths(holder)) & (PICTURES | SEQUENCES):
        found = type(modules[""] if holder is None else holder).__name__
        raise UnsupportedModelError(
            f"{block} is in a {found}, of which turbovlm does not know how its tokens lie; known are "
            f"{', '.join(sorted(path.rpartition('.')[2] for path in PICTURES | SEQUENCES))}"
        )


def _stage(name: str) -> str:
    """The part of a denoiser in which all blocks have equally many tokens."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0].endswith("_blocks") and len(parts) > 3 else parts[0]


def install_diffusion(model: nn.Module, plan: DiffusionPlan) -> None:
    """Put the overrides in place."""
    for spot in plan.spots:
        module = model.get_submodule(spot.name)
        _override(module, part_forward, plan, spot, model.get_submodule(spot.guide))
    roots = _roots(model)
    for name, module in model.named_modules():
        pictured = bool(set(class_paths(module)) & PICTURES)
        if name in roots or pictured:
            config: Any = module.config
            names = tuple(inspect.signature(type(module).forward).parameters)[1:]
            patch = int(config.get("patch_size") or 1) if pictured else 0
            _override(module, denoiser_forward, plan, name in roots, patch, names)


def _check_cache(model: nn.Module, name: str) -> None:
    """A cache below the merge would give back what it was given in another step, where other tokens were merged."""
    registry: Any = getattr(model.get_submodule(name), "_diffusers_hook", None)
    caches = [hook for hook in registry.hooks.values() if hook._is_stateful] if registry is not None else []
    if caches:
        raise TurboError(
            f"{name} has a {type(caches[0]).__name__}, which keeps what it gave in earlier steps: enable the cache "
            "after turbovlm.apply"
        )


def _override(module: nn.Module, function: Any, plan: DiffusionPlan, *fixed: Any) -> None:
    """Put `function` in the place of the module's forward, below the hook that accelerate has put around it."""
    method = type(module).forward  # looked up here: Dynamo does not look it up on classes that are allowed in graphs
    name = slot_of(module)
    forward = functools.partial(function, module, plan, module.__dict__.get(name), method, *fixed)
    functools.update_wrapper(forward, method.__get__(module))
    setattr(module, name, forward)
