"""Finding the blocks of a denoiser, checking them, and planning what merges."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from turbovlm.config import COMPONENTS, DenoiseConfig
from turbovlm.diffusion.choose import WHOLE_BLOCK, Site
from turbovlm.diffusion.denoiser import COMPILED, Holder, is_compiled
from turbovlm.diffusion.families import Block, Denoiser, Part
from turbovlm.diffusion.feature import DenoiseFeature
from turbovlm.diffusion.grids import OfPositions, OfShapes
from turbovlm.diffusion.levels import halvings, is_unet, stage_of
from turbovlm.diffusion.merge_stack import Place, Stack
from turbovlm.diffusion.refresh import Steps
from turbovlm.diffusion.whole import what_stands_in_block, what_stood_inside
from turbovlm.errors import ConfigError, TurboError, UnsupportedModelError
from turbovlm.ops.degree import needs_semantic
from turbovlm.registry import class_paths, families, family_of
from turbovlm.shares import keep_at

SHARED_BY, SHARED_BY_STACKED = 4, 12
"""How many blocks in a row merge alike, where their parts merge, and where they merge whole."""

MODEL = {"diffusers.models.modeling_utils.ModelMixin", "diffusers.configuration_utils.ConfigMixin"}
"""Bases of every denoiser; a list of ControlNets has no config."""


def find_denoiser(model: nn.Module, config: DenoiseConfig, owner: Any) -> DenoiseFeature:
    """The feature of a denoiser, or of several in one module, checked.

    Args:
        owner: the pipeline that the denoiser is from, or the model itself.

    Raises:
        ConfigError: components that its blocks do not have, a `grid` of images whose grid is known, `refresh` or a
            `keep` over the steps without a pipeline, or such a function that returns no share.
        UnsupportedModelError: blocks in a model that is not known, such as one whose blocks see space and time in turn.
        TurboError: a part has a cache already, or the scheduler has methods of its own.
    """
    if (config.refresh > 1 or config.over_steps) and getattr(owner, "scheduler", None) is None:
        asked = f"refresh={config.refresh}" if config.refresh > 1 else config.amount
        raise ConfigError(
            f"{asked}: a pipeline's scheduler says when a step ends; apply to the pipeline, not to its denoiser or a "
            "ControlNet alone, which take one keep, decided in each step"
        )
    keep_at(config.keep, 0.0)  # what a function returns is refused now rather than in the first step
    modules = dict(model.named_modules())
    known = {name: family for name, module in modules.items() if (family := family_of("denoiser", module)) is not None}
    found = {name: family for name, family in known.items() if _has_images(name, family, modules)}
    for name, family in (found or known).items():
        _check_holder(name, family, modules)
        if set(class_paths(owner)) & set(family.refused):
            raise UnsupportedModelError(
                f"{type(owner).__name__} gives its denoiser images, text and padding in turn, in one sequence, and "
                "turbovlm does not know how these lie; the family's other pipelines can be accelerated"
            )
    if config.grid is not None and not any(isinstance(family.grid, OfPositions) for family in found.values()):
        raise ConfigError(
            f"grid={config.grid}: {type(model).__name__} is given images, of which rows and columns are known; only "
            "denoisers that are given tokens take it"
        )
    roots = _find_roots(modules, found)
    _check_wanted(modules, found, config)
    if config.where == "part":
        places: tuple[Place, ...] = ()
        sites = _find_sites(modules, found, roots, config)
    else:
        places = _find_places(modules, found, roots, config)
        sites = _find_attentions(modules, found, places)
    if not sites and not places:
        there = {part.component for name, family in found.items() for part in _parts_of(modules[name], family)[1]}
        raise ConfigError(
            f"components={list(config.parts)}: the blocks of this {type(model).__name__} have no such part; they "
            f"have {', '.join(name for name in COMPONENTS if name in there)}"
        )
    if config.queries_only and not any(site.part.attending and site.part.attending.keys_apart for site in sites):
        raise ConfigError(
            f"queries_only=True: the attention of this {type(model).__name__} makes queries and keys of one sequence; "
            "leave it out"
        )
    for name in found:
        _check_block(name, modules[name], found[name], config)
    for site in sites:
        _check_cache(site.name, modules[site.name])
    names = ", ".join(dict.fromkeys(family.family for family in found.values()))
    holders = tuple(_find_holders(modules, found, roots))
    scheduler = getattr(owner, "scheduler", None)
    steps = Steps(config, None if scheduler is None else owner)
    if scheduler is not None:
        steps.count_with(scheduler)
    if places:
        reasons = {place.name: what_stands_in_block(modules[place.name], place.kind) for place in places}
    else:
        reasons = {site.name: what_stood_inside(modules[site.name], site.part, site.library) for site in sites}
    whole = {name: reason for name, reason in reasons.items() if reason is not None}
    semantic = needs_semantic(config.degree)
    return DenoiseFeature(config, names, sites, tuple(found), places, holders, semantic, steps, whole)


def _has_images(block: str, family: Denoiser, modules: dict[str, nn.Module]) -> bool:
    """Whether the image's tokens go through a block, as the name of its list and what has it tell."""
    if family.lists and block.rpartition(".")[0].rpartition(".")[2] not in family.lists:
        return False
    holder = _holder_of(block, modules)
    return holder is None or not set(class_paths(holder)) & set(family.beside)


def _holder_of(block: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """What has a block, directly, in a list or in its library's wrapper around it; None of a module without a path."""
    parts = block.split(".")
    around = [modules[".".join(parts[:i])] for i in range(len(parts) - 1, -1, -1)] if block else []
    inside = modules[block]
    return next((each for each in around if not isinstance(each, nn.ModuleList) and not _wraps(each, inside)), None)


def _wraps(module: nn.Module, block: nn.Module) -> bool:
    """Whether a module of a block's own library has nothing but the block; others, as compilers', may change it."""
    libraries = {type(each).__module__.partition(".")[0] for each in (module, block)}
    return list(module._modules.values()) == [block] and len(libraries) == 1


def _check_wanted(modules: dict[str, nn.Module], found: dict[str, Denoiser], config: DenoiseConfig) -> None:
    """Refuse settings that a family has nothing for.

    Raises:
        ConfigError: naming the setting.
    """
    for name, family in found.items():
        block, _ = _parts_of(modules[name], family)
        if config.where == "part" and not block.by_parts:
            raise ConfigError(
                f"scope='part': blocks of {family.family} merge whole; give scope='block' or scope='stack'"
            )
        if not block.guide and needs_semantic(config.degree):
            raise ConfigError(
                f"degree={config.degree!r}: it needs the attention that the image's tokens are paid, which turbovlm "
                f"does not know of {family.family}; give degree='redundancy'"
            )


def _find_roots(modules: dict[str, nn.Module], found: dict[str, Denoiser]) -> list[str]:
    """Paths of the outermost denoisers."""
    roots: list[str] = []
    others = {path for family in found.values() for path in family.roots}
    for name, module in modules.items():
        inside = any(root == "" or name.startswith(f"{root}.") for root in roots)
        begins = any(name == "" or block.startswith(f"{name}.") for block in found)
        paths = set(class_paths(module))
        if not inside and begins and (paths >= MODEL or paths & others):
            roots.append(name)
    return roots


def _find_sites(
    modules: dict[str, nn.Module], found: dict[str, Denoiser], roots: list[str], config: DenoiseConfig
) -> tuple[Site, ...]:
    """The parts that merge, in groups of up to `SHARED_BY` blocks of one stage."""
    sites: list[Site] = []
    groups: list[str] = []
    for stage, blocks in _stages(modules, found, roots).items():
        for place, name in enumerate(blocks):
            if place % SHARED_BY == 0:
                groups.append(f"{stage}:{place // SHARED_BY}")
            block, parts = _parts_of(modules[name], found[name])
            for part in parts:
                if part.component in config.parts:
                    key = f"{groups[-1]}, by the text" if part.component == "cross_attention" else groups[-1]
                    guide = f"{name.removeprefix(_root_of(name, roots))}.{block.guide}"
                    path, number = f"{name}.{part.path}", len(groups) - 1
                    sites.append(Site(path, part, groups[-1], number, guide, key, block.library))
    return tuple(sites)


def _root_of(name: str, roots: list[str]) -> str:
    """What the path of a block begins with, before that in its denoiser."""
    return next((f"{root}." for root in roots if root and name.startswith(f"{root}.")), "")


def _stages(modules: dict[str, nn.Module], found: dict[str, Denoiser], roots: list[str]) -> dict[str, list[str]]:
    """The paths of blocks by the parts of the denoiser in which they have equally many tokens."""
    stages: dict[str, list[str]] = {}
    for name in found:
        root = _root_of(name, roots)
        stages.setdefault(root + stage_of(modules[root[:-1]], name.removeprefix(root)), []).append(name)
    return stages


def _find_places(
    modules: dict[str, nn.Module], found: dict[str, Denoiser], roots: list[str], config: DenoiseConfig
) -> tuple[Place, ...]:
    """Where each block is: in a stack of up to `span` blocks of one list, and one kind of them.

    Stacks of a stage share a merge until they have `SHARED_BY_STACKED` blocks.
    """
    span = config.longest
    whole = _whole_first(modules, found, roots, config)
    places: list[Place] = []
    number = 0
    for stage, blocks in _stages(modules, found, roots).items():
        sharing = SHARED_BY_STACKED
        for names in _runs_of([name for name in blocks if name not in whole], modules, span):
            if sharing >= SHARED_BY_STACKED:
                sharing, number = 0, number + 1
            sharing += len(names)
            block, _ = _parts_of(modules[names[0]], found[names[0]])
            guide = f"{names[0].removeprefix(_root_of(names[0], roots))}.{block.guide}"
            group = f"{stage}:{number - 1}"
            part = Part("", WHOLE_BLOCK, text=block.text)
            stack = Stack(Site(names[0], part, group, number - 1, guide, group, block.library), tuple(names))
            for name, behind in zip(names, [*names[1:], None]):
                arguments = tuple(inspect.signature(type(modules[name]).forward).parameters)[1:]
                places.append(Place(name, block, arguments, stack, behind))
    return tuple(places)


WHOLE_FIRST, DEEP = 4, 12
"""So many blocks at the front are left whole, of that many or more: what first blocks read is hardly more than each
token's own noise, so that what is alike there is not alike later (benchmarks/stacks.py)."""


def _whole_first(
    modules: dict[str, nn.Module], found: dict[str, Denoiser], roots: list[str], config: DenoiseConfig
) -> set[str]:
    """Paths of the first blocks of each denoiser, which are left whole; none of UNets, whose convolutions come first.

    Raises:
        ConfigError: they are asked for of UNets alone, or are all blocks.
    """
    whole: set[str] = set()
    for root in roots:
        blocks = [name for name in found if root == "" or name.startswith(f"{root}.")]
        if is_unet(modules[root]):
            continue
        count = config.whole_first
        if count is None:
            count = WHOLE_FIRST if len(blocks) >= DEEP else 0
        if count >= len(blocks):
            raise ConfigError(f"whole_first={count}: this {type(modules[root]).__name__} has {len(blocks)} blocks")
        whole.update(blocks[:count])
    if config.whole_first and not whole:
        raise ConfigError(
            f"whole_first={config.whole_first}: a UNet has convolutions in front of its blocks; leave it out"
        )
    return whole


def _runs_of(blocks: list[str], modules: dict[str, nn.Module], span: int) -> list[list[str]]:
    """Runs of up to `span` blocks of one class in one list, about equally long."""
    lists: dict[tuple[str, type], list[str]] = {}
    for name in blocks:
        lists.setdefault((name.rpartition(".")[0], type(modules[name])), []).append(name)
    runs = []
    for names in lists.values():
        count = -(-len(names) // span)
        ends = [len(names) * i // count for i in range(count + 1)]
        runs += [names[a:b] for a, b in itertools.pairwise(ends)]
    return runs


def _find_attentions(
    modules: dict[str, nn.Module], found: dict[str, Denoiser], places: tuple[Place, ...]
) -> tuple[Site, ...]:
    """The self-attentions of blocks that merge, in which sizes count."""
    sites = []
    for place in places:
        stack = place.stack.site
        for part in _parts_of(modules[place.name], found[place.name])[1]:
            if part.attending is not None:
                path = f"{place.name}.{part.path}"
                sites.append(Site(path, part, stack.group, stack.index, stack.guide, stack.key, stack.library))
    return tuple(sites)


def _parts_of(module: nn.Module, family: Denoiser) -> tuple[Block, list[Part]]:
    """What kind of block a module is, and the parts that it has."""
    block = next(block for path in class_paths(module) for block in family.blocks if block.path == path)
    return block, [part for part in block.parts if getattr(module, part.path, None) is not None]


def _halved_before(denoiser: Any, name: str, blocks: Iterable[str]) -> int:
    """How often a denoiser halves rows and columns before the largest resolution that has blocks."""
    inside = f"{name}." if name else ""
    stages = {f"{inside}{stage}": halved for stage, halved in halvings(denoiser).items()}
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
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        grid = None if family is None else family.grid
        halved = _halved_before(module, name, found) if name in roots else 0
        between = () if family is None else family.between
        collects = "ControlNet" in type(module).__name__ or (family is not None and bool(paths & set(family.mixing)))
        guided = not isinstance(grid, OfPositions | OfShapes)  # those are guided in forwards of their own
        frames = next((axis for each in found.values() for path, axis in each.frames if path in paths), None)
        holders.append((name, Holder(name, name in roots, arguments, grid, halved, between, collects, guided, frames)))
    return holders


def _check_holder(block: str, family: Denoiser, modules: dict[str, nn.Module]) -> None:
    """Refuse known blocks in other models, as of time or embeddings: only of holders is it known how tokens lie."""
    holder = _holder_of(block, modules)
    if holder is None or not set(class_paths(holder)) & set(family.holders):
        found = type(modules[""] if holder is None else holder).__name__
        known = sorted(path.rpartition(".")[2] for each in families("denoiser") for path in each.holders)
        raise UnsupportedModelError(
            f"{block} is in a {found}, of which turbovlm does not know how its tokens lie; known are {', '.join(known)}"
        )


def _check_block(name: str, block: Any, family: Denoiser, config: DenoiseConfig) -> None:
    """Refuse a block whose parts merge and that is compiled by itself, or of a class whose forward is not known.

    Raises:
        TurboError: it is.
    """
    if config.where == "part" and is_compiled(block):
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
