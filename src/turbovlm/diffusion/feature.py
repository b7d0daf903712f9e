"""The feature that merges tokens in a denoiser: finding its blocks, checking them, saying what they do."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from turbovlm.config import COMPONENTS, DenoiseConfig
from turbovlm.diffusion.choose import Site, least_tokens
from turbovlm.diffusion.families import Block, Denoiser, Part
from turbovlm.diffusion.merge_part import (
    COMPILED,
    Holder,
    block_forward,
    denoiser_forward,
    is_compiled,
    part_forward,
)
from turbovlm.diffusion.refresh import Steps
from turbovlm.diffusion.run import Choice
from turbovlm.diffusion.whole import what_stood_inside
from turbovlm.errors import ConfigError, TurboError, UnsupportedModelError
from turbovlm.ops.degree import needs_semantic
from turbovlm.patching import Patch
from turbovlm.registry import class_paths, families, family_of
from turbovlm.threads import Remembering

SHARED_BY = 4
"""How many blocks in a row merge alike."""

MODEL = {"diffusers.models.modeling_utils.ModelMixin", "diffusers.configuration_utils.ConfigMixin"}
"""Bases of every denoiser; a list of ControlNets has no config."""


@dataclass(eq=False)
class DenoiseFeature(Remembering[dict[str, Choice]]):
    """What the patches of one accelerated denoiser share.

    Attributes:
        config: the settings.
        family: the families of its blocks, for people.
        sites: the parts that merge, in the order of the denoiser.
        blocks: paths of the blocks that have them.
        holders: paths of the denoisers and of the modules that have the blocks.
        semantic: whether A is computed, for the degree.
        steps: the pipeline's steps, whose forwards share what was chosen.
        whole: parts that read all tokens, by `Site.name`, and why: at `apply`, then in the last forward.
        removed, last: as in `turbovlm.patching.Feature`; `last` is what each group read in the last forward, by
            `Site.key`, where that was not compiled.
    """

    config: DenoiseConfig
    family: str
    sites: tuple[Site, ...]
    blocks: tuple[str, ...]
    holders: tuple[tuple[str, Holder], ...]
    semantic: bool
    steps: Steps = field(default_factory=lambda: Steps(1))
    whole: dict[str, str] = field(default_factory=dict)
    removed: bool = False

    @property
    def beside(self) -> tuple[Any, ...]:
        """The pipeline's scheduler, where it is patched."""
        scheduler = self.steps.scheduler
        return () if scheduler is None else (scheduler,)

    def patches(self, model: nn.Module) -> list[Patch]:
        """The forwards of the denoiser, its holders, its blocks and their parts; and the scheduler's methods."""
        found = [
            Patch(model.get_submodule(name), "forward", denoiser_forward, self, what) for name, what in self.holders
        ]
        found += [Patch(model.get_submodule(name), "forward", block_forward, self) for name in self.blocks]
        found += [Patch(model.get_submodule(site.name), "forward", part_forward, self, site) for site in self.sites]
        return [*found, *self.steps.patches(self)]

    def describe(self) -> list[str]:
        """The blocks that merge, by the groups that merge alike, and how many tokens they read in the last forward."""
        config, groups = self.config, dict[str, list[str]]()
        for site in self.sites:
            groups.setdefault(site.group, []).append(site.name.removesuffix(f".{site.part.path}"))
        often = "" if config.refresh == 1 else f", chosen in every {_nth(config.refresh)} step"
        there = {site.part.component for site in self.sites}
        parts = ", ".join(name for name in config.components if name in there)
        keep: Any = config.keep
        shares = ", ".join(f"{share:.0%}" for share in (keep if isinstance(keep, tuple) else (keep,)))
        lines = [f"  {self.family}: {shares} of the tokens in {parts}{often}"]
        for group, blocks in groups.items():
            named = list(dict.fromkeys(blocks))
            alike = "" if len(named) == 1 else f" … {named[-1]}: {len(named)} blocks merge alike"
            lines.append(f"    {named[0]}{alike}{self._tokens_of(group)}")
        return lines + self._whole()

    def _whole(self) -> list[str]:
        """The parts that read all tokens, those of one kind and reason in one line."""
        kinds = {site.name: site.part.path for site in self.sites}
        alike: dict[tuple[str, str], list[str]] = {}
        for name, reason in self.whole.items():
            alike.setdefault((kinds[name], reason), []).append(name)
        return [
            f"    left whole: {names[0]}{'' if len(names) == 1 else f' and {len(names) - 1} more {path}'}: {reason}"
            for (path, reason), names in alike.items()
        ]

    def _tokens_of(self, group: str) -> str:
        sites = [site for site in self.sites if site.group == group]
        if all(site.name in self.whole for site in sites):
            return ""
        keys = {site.key for site in sites}
        choice = next((choice for key, choice in (self.last or {}).items() if key in keys), None)
        if choice is None:
            return ""
        fewest = least_tokens(self.config)
        if choice.tokens < fewest:
            return f", {choice.tokens} tokens: fewer than {fewest} are left as they are"
        return f", {choice.tokens} → {choice.tokens if choice.merge is None else choice.merge.sizes.shape[1]} tokens"


def _nth(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def find_denoiser(model: nn.Module, config: DenoiseConfig, owner: Any) -> DenoiseFeature:
    """The feature of a denoiser, or of several in one module, checked.

    Args:
        owner: the pipeline that the denoiser is from, or the model itself.

    Raises:
        ConfigError: components that its blocks do not have, a `grid` of images whose grid is known, or `refresh`
            without a pipeline.
        UnsupportedModelError: blocks in a model that is not known, such as a video's.
        TurboError: a part has a cache already, or the scheduler has methods of its own.
    """
    if config.refresh > 1 and getattr(owner, "scheduler", None) is None:
        raise ConfigError(
            f"refresh={config.refresh}: a pipeline's scheduler says when a step ends; apply to the pipeline, not to "
            "its denoiser"
        )
    modules = dict(model.named_modules())
    found = {name: family for name, module in modules.items() if (family := family_of("denoiser", module)) is not None}
    for name, family in found.items():
        _check_holder(name, family, modules)
        if set(class_paths(owner)) & set(family.refused):
            raise UnsupportedModelError(
                f"{type(owner).__name__} gives its denoiser the tokens of two images in one sequence, and turbovlm "
                "does not know how these lie; for runs without an image apply to pipe.transformer"
            )
    if config.grid is not None and not any(family.positions for family in found.values()):
        raise ConfigError(
            f"grid={config.grid}: {type(model).__name__} is given images, of which rows and columns are known; only "
            "denoisers that are given tokens take it"
        )
    roots = _find_roots(modules, found)
    sites = _find_sites(modules, found, roots, config)
    if not sites:
        there = {part.component for name, family in found.items() for part in _parts_of(modules[name], family)[1]}
        raise ConfigError(
            f"components={list(config.components)}: the blocks of this {type(model).__name__} have no such part; they "
            f"have {', '.join(name for name in COMPONENTS if name in there)}"
        )
    for name in found:
        _check_block(name, modules[name], found[name])
    for site in sites:
        _check_cache(site.name, modules[site.name])
    names = ", ".join(dict.fromkeys(family.family for family in found.values()))
    holders = tuple(_find_holders(modules, found, roots))
    scheduler = getattr(owner, "scheduler", None)
    steps = Steps(config.refresh, None if scheduler is None else owner)
    if scheduler is not None:
        steps.count_with(scheduler)
    reasons = {site.name: what_stood_inside(modules[site.name], site.part, site.library) for site in sites}
    whole = {name: reason for name, reason in reasons.items() if reason is not None}
    return DenoiseFeature(config, names, sites, tuple(found), holders, needs_semantic(config.degree), steps, whole)


def _find_roots(modules: dict[str, nn.Module], found: dict[str, Denoiser]) -> list[str]:
    """Paths of the outermost denoisers."""
    roots: list[str] = []
    for name, module in modules.items():
        inside = any(root == "" or name.startswith(f"{root}.") for root in roots)
        begins = any(name == "" or block.startswith(f"{name}.") for block in found)
        if not inside and begins and set(class_paths(module)) >= MODEL:
            roots.append(name)
    return roots


def _find_sites(
    modules: dict[str, nn.Module], found: dict[str, Denoiser], roots: list[str], config: DenoiseConfig
) -> tuple[Site, ...]:
    """The parts that merge, in groups of up to `SHARED_BY` blocks of one stage."""
    stages: dict[str, list[str]] = {}
    root_of = {name: next((f"{r}." for r in roots if r and name.startswith(f"{r}.")), "") for name in found}
    for name, root in root_of.items():
        stages.setdefault(root + _stage_of(name.removeprefix(root)), []).append(name)
    sites: list[Site] = []
    groups: list[str] = []
    for stage, blocks in stages.items():
        for place, name in enumerate(blocks):
            if place % SHARED_BY == 0:
                groups.append(f"{stage}:{place // SHARED_BY}")
            block, parts = _parts_of(modules[name], found[name])
            for part in parts:
                if part.component in config.components:
                    key = f"{groups[-1]}, by the text" if part.component == "cross_attention" else groups[-1]
                    guide = f"{name.removeprefix(root_of[name])}.{block.guide}"
                    path, number = f"{name}.{part.path}", len(groups) - 1
                    sites.append(Site(path, part, groups[-1], number, guide, key, block.library))
    return tuple(sites)


def _parts_of(module: nn.Module, family: Denoiser) -> tuple[Block, list[Part]]:
    """What kind of block a module is, and the parts that it has."""
    block = next(block for path in class_paths(module) for block in family.blocks if block.path == path)
    return block, [part for part in block.parts if getattr(module, part.path, None) is not None]


def _stage_of(name: str) -> str:
    """Path of the part of a denoiser in which all blocks have equally many tokens."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0].endswith("_blocks") and len(parts) > 3 else parts[0]


def _halved_before(denoiser: Any, name: str, blocks: Iterable[str]) -> int:
    """How often a denoiser halves rows and columns before the largest resolution that has blocks."""
    downs, ups = getattr(denoiser, "down_blocks", None) or (), getattr(denoiser, "up_blocks", None) or ()
    level, levels = 0, dict[str, int]()
    for i, stage in enumerate(downs):
        levels[f"down_blocks.{i}."] = level
        level += getattr(stage, "downsamplers", None) is not None
    levels["mid_block."] = level
    for i, stage in enumerate(ups):
        levels[f"up_blocks.{i}."] = level
        level -= getattr(stage, "upsamplers", None) is not None
    inside = f"{name}." if name else ""
    stages = {f"{inside}{stage}": halved for stage, halved in levels.items()}
    return min((halved for stage, halved in stages.items() for block in blocks if block.startswith(stage)), default=0)


def _find_holders(
    modules: dict[str, nn.Module], found: dict[str, Denoiser], roots: list[str]
) -> list[tuple[str, Holder]]:
    """The denoisers and the modules that have blocks, with what is known of their arguments."""
    holders = []
    for name, module in modules.items():
        paths = set(class_paths(module))
        family = next((family for family in found.values() if paths & set(family.holders)), None)
        if family is None and name not in roots:
            continue
        image = family is not None and family.positions is None
        pixels = int(module.config.get("patch_size") or 1) if image else 0  # type: ignore[operator, union-attr]
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        positions = None if family is None else family.positions
        halved = _halved_before(module, name, found) if name in roots else 0
        holders.append((name, Holder(name, name in roots, arguments, pixels, positions, halved)))
    return holders


def _check_holder(block: str, family: Denoiser, modules: dict[str, nn.Module]) -> None:
    """Refuse blocks in models of videos or embeddings: only of images is it known how their tokens lie."""
    parts = block.split(".")
    around = [modules[".".join(parts[:i])] for i in range(len(parts) - 1, -1, -1)]
    holder = next((module for module in around if not isinstance(module, nn.ModuleList)), None)
    if holder is None or not set(class_paths(holder)) & set(family.holders):
        found = type(modules[""] if holder is None else holder).__name__
        known = sorted(path.rpartition(".")[2] for each in families("denoiser") for path in each.holders)
        raise UnsupportedModelError(
            f"{block} is in a {found}, of which turbovlm does not know how its tokens lie; known are {', '.join(known)}"
        )


def _check_block(name: str, block: Any, family: Denoiser) -> None:
    """Refuse a block that is compiled by itself, or of a class whose forward is not the known one.

    Raises:
        TurboError: it is.
    """
    if is_compiled(block):
        raise TurboError(f"{name} {COMPILED}")
    path = _parts_of(block, family)[0].path
    known: Any = next(kind for kind in type(block).__mro__ if f"{kind.__module__}.{kind.__qualname__}" == path)
    if type(block).forward is not known.forward:
        kind = next(kind for kind in type(block).__mro__ if "forward" in kind.__dict__)
        undo = "call tomesd.remove_patch first" if kind.__module__.startswith("tomesd") else "take that off first"
        raise TurboError(
            f"{name} is a {kind.__qualname__} of {kind.__module__}, with a forward of its own that turbovlm does not "
            f"know: {undo}, or register the class as a family"
        )


def _check_cache(name: str, module: nn.Module) -> None:
    """Refuse a cache below the merge: it would give back what it was given in another step, of other tokens."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    caches = [hook for hook in registry.hooks.values() if hook._is_stateful] if registry is not None else []
    if caches:
        raise TurboError(
            f"{name} has a {type(caches[0]).__name__}, which keeps what it gave in earlier steps: enable the cache "
            "after turbovlm.apply"
        )
