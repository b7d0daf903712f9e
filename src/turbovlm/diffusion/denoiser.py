"""The forwards of a denoiser and of the modules in it that have blocks: a run begins, tokens lie in rows and columns.

What follows in a run is decided by its parts, `merge_part`, or its blocks, `merge_stack`.
"""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from turbovlm.diffusion.choose import Site, least_tokens
from turbovlm.diffusion.grids import GridReader, Grids, Unread
from turbovlm.diffusion.merge_stack import block_forward, block_slot
from turbovlm.diffusion.run import Run, check_class, current_run, find_same_latents, module_at, run_within
from turbovlm.diffusion.whole import patches_below
from turbovlm.errors import StateError
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.tracing import is_captured, is_readable
from turbovlm.patching import Patch, install, patches_of, slot_of, take_off
from turbovlm.registry import class_paths
from turbovlm.shares import Share

if TYPE_CHECKING:
    from turbovlm.diffusion.feature import DenoiseFeature, Unit


@dataclass(frozen=True)
class Holder:
    """A denoiser, or a module in it that has the blocks.

    Attributes:
        name: its path in the module that was accelerated.
        begins: whether it is the denoiser, with which a run begins.
        arguments: names of what its forward takes; the first is the latent, or the tokens.
        grid: `Denoiser.grid`; None of a denoiser that is no holder of blocks.
        halved: how often rows and columns were halved before the first block, in a denoiser.
        between: `Denoiser.between`.
        collects: whether it reads what each block gives, as ControlNets do.
        guided: whether the halves of classifier-free guidance may come in one batch.
        frames: the axis of a denoiser's latent that is of frames, where each is an image of its own to the blocks.
    """

    name: str
    begins: bool
    arguments: tuple[str, ...]
    grid: GridReader | None
    halved: int = 0
    between: tuple[str, ...] = ()
    collects: bool = False
    guided: bool = True
    frames: int | None = None

    @property
    def inside(self) -> str:
        """What paths of its modules begin with in the module that was accelerated."""
        return f"{self.name}." if self.name else ""


def denoiser_forward(patch: Patch, model: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a denoiser, or a holder in it, whose tokens lie in rows and columns that are known from now on."""
    check_class(patch, model)
    feature: DenoiseFeature = patch.feature  # type: ignore[assignment]
    holder: Holder = patch.detail
    given: dict[str, Any] = {**dict(zip(holder.arguments, args)), **kwargs}
    latent = given[holder.arguments[0]]
    apart = holder.collects or any(given.get(name) is not None for name in holder.between)
    grids = _grids_of(holder, model, given, feature)
    if not holder.begins:
        run = current_run(patch)
        run.grids, run.apart = grids, apart
        return original(*args, **kwargs)
    latent = torch.stack(latent) if isinstance(latent, list) else latent  # some take one for each image
    if holder.frames is not None:
        latent = latent.movedim(holder.frames, 1).flatten(0, 1)
    steps, compiling = feature.steps, torch.compiler.is_compiling()
    if not compiling:
        steps.follow_pipeline(feature)
        if feature.places:
            _follow_blocks(holder, model, feature)
        else:
            _check_not_compiled(holder, model, feature)
        _follow_parts(holder, model, feature)
    seen = latent if is_readable(latent) else None
    if not compiling and steps.progress is not None and is_captured(latent):
        raise StateError(
            f"{feature.config.amount}: a CUDA graph repeats what was kept in the step in which it was captured; give "
            "one share for all steps, or let torch.compile make the graphs"
        )
    timestep = next((given[name] for name in TIMESTEPS if given.get(name) is not None), None)
    share = steps.share(None if seen is None else timestep)
    # without `refresh` a graph that cannot look at latents shares nothing
    shares = seen is not None or feature.config.refresh > 1
    choices = steps.begin_forward(seen) if shares else {}
    run = Run(
        feature,
        model,
        path_for(latent),
        len(latent),
        find_same_latents(latent) if holder.guided and len(latent) > 1 else None,
        share,
        choices,
        grids,
        _tokens(latent, grids) >> 2 * holder.halved,
        inside=holder.inside,
        apart=apart,
    )
    out = run_within(run, original, *args, **kwargs)
    if shares:
        steps.end_forward(seen, choices)
    if not compiling:
        own = {unit.key for unit in _units_of(holder, feature)}
        others = {key: choice for key, choice in (feature.last_here or {}).items() if key not in own}
        feature.last = {**others, **run.choices}  # a list of ControlNets has a forward of each
        reasons: dict[str, str | None] = {**feature.whole, **_reasons(holder, run)}
        feature.whole = {name: reason for name, reason in reasons.items() if reason is not None}
        _warn_of_nothing(feature, share)
    return out


TIMESTEPS = ("timestep", "timesteps", "t")
"""Names by which denoisers take how noisy a latent is."""


def _tokens(latent: Any, grids: Grids | Unread | None) -> int:
    return grids.tokens if isinstance(grids, Unread) else sum(map(math.prod, grids or (latent.shape[-2:],)))


def _grids_of(holder: Holder, model: Any, given: dict[str, Any], feature: DenoiseFeature) -> Grids | Unread | None:
    """How the tokens of a holder lie; None where it does not know."""
    return None if holder.grid is None else holder.grid(model, given, feature.config.sides)


def _follow_parts(holder: Holder, model: Any, feature: DenoiseFeature) -> None:
    """Patch the parts that stand where others stood, as an adapter around a layer does, and the layer after it."""
    inside = holder.inside
    for site in _sites_of(holder, feature):
        part = module_at(model, site.name.removeprefix(inside))
        if part is None or _is_patched(part, feature):
            continue
        if feature.places and block_slot(module_at(model, site.block.removeprefix(inside))) != "forward":
            continue  # compiled by itself: see `merge_stack`
        with FOLLOWING:
            if not _is_patched(part, feature):  # another thread may have been here in the meantime
                below = [patch for module in part.modules() for patch in patches_of(module)]
                take_off(patch for patch in below if patch.feature is feature)
                install([Patch(part, "forward", feature.part_function, feature, site)])


def _follow_blocks(holder: Holder, model: Any, feature: DenoiseFeature) -> None:
    """Patch blocks outside of what they were compiled to by themselves, now or meanwhile, and copies of them."""
    inside = holder.inside
    for place in feature.places:
        if not place.name.startswith(inside):
            continue
        block = module_at(model, place.name.removeprefix(inside))
        if block is None:
            continue
        called = block.__dict__.get(slot_of(block, slot := block_slot(block)))
        if any(patch.feature is feature for patch in patches_below(called)):
            continue
        if place.kind.path not in class_paths(block):
            continue  # another module was put in its place
        with FOLLOWING:
            inner = [patch for module in block.modules() for patch in patches_of(module)]
            own = [patch for patch in inner if patch.feature is feature]
            moved = [patch for patch in own if isinstance(patch.detail, type(place))]
            take_off(moved if slot == "forward" else own)
            install([Patch(block, slot, block_forward, feature, place)])


FOLLOWING = threading.Lock()


def _is_patched(part: Any, feature: DenoiseFeature) -> bool:
    patch = part.__dict__.get(slot_of(part, "forward"))
    if type(patch) is Patch and patch.feature is feature:  # as nearly always
        return True
    return any(patch.feature is feature for patch in patches_of(part))


def _sites_of(holder: Holder, feature: DenoiseFeature) -> list[Site]:
    """The parts in a denoiser."""
    inside = holder.inside
    return [site for site in feature.sites if site.name.startswith(inside)]


def _units_of(holder: Holder, feature: DenoiseFeature) -> list[Unit]:
    """What merges in a denoiser."""
    inside = holder.inside
    return [unit for unit in feature.units if unit.name.startswith(inside)]


def _check_not_compiled(holder: Holder, model: Any, feature: DenoiseFeature) -> None:
    """Refuse blocks that are compiled one by one.

    Raises:
        StateError: one is.
    """
    inside = holder.inside
    for name in feature.blocks:
        if name.startswith(inside) and is_compiled(module_at(model, name.removeprefix(inside))):
            raise StateError(f"{name} {COMPILED}")


def is_compiled(block: Any) -> bool:
    """Whether a block was compiled by itself, in place."""
    return getattr(block, "_compiled_call_impl", None) is not None


COMPILED = (
    "is compiled by itself, as compile_repeated_blocks does: every block that merges would be a graph of its own, and "
    "from the ninth on PyTorch compiles none; compile the whole denoiser, with its compile()"
)


def _reasons(holder: Holder, run: Run) -> dict[str, str | None]:
    """Why each part or block of a denoiser whose forward has ended read all tokens; None where it did not."""
    return {unit.name: run.whole.get(unit.name, NOT_CALLED) for unit in _units_of(holder, run.feature)}


NOT_CALLED = "the last forward skipped it, or called another forward that was put in its place"


def _warn_of_nothing(feature: DenoiseFeature, share: Share) -> None:
    """Say where a forward has merged nothing at all, or in no part of one kind, though it should have."""
    if all(each == 1 for each in (share if isinstance(share, tuple) else (share,))):
        return
    parts: dict[str, list[str | None]] = {}
    for unit in feature.units:
        parts.setdefault(unit.component, []).append(feature.whole.get(unit.name))
    idle = {name: set(reasons) - {NOT_CALLED} for name, reasons in parts.items() if all(reasons)}
    if any(idle.values()):
        why = "; ".join(f"{name}: {', '.join(sorted(map(str, each)))}" for name, each in idle.items() if each)
        others = [name for name in feature.config.parts if name not in idle]
        what = "blocks" if feature.places else "parts of these components"
        by_parts = others and not feature.places
        instead = f"components={others} leaves them whole without this warning" if by_parts else "else handle.remove()"
        warnings.warn(
            f"turbovlm leaves all {what} whole: {why}. To have them merged take that off, or put "
            f"the library's own back; {instead}",
            stacklevel=2,
        )
    fewest = least_tokens(feature.config)
    tokens = max((choice.largest for choice in (feature.last or {}).values()), default=fewest)
    if tokens < fewest:
        warnings.warn(
            f"turbovlm merges nothing in this denoiser: its blocks read at most {tokens} tokens of an image, and "
            f"images of fewer than {fewest} are left as they are",
            stacklevel=2,
        )
