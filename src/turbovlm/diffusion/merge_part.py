"""The forwards of what was patched: a denoiser begins a run, its holders say how tokens lie, its parts merge.

A part reads merged tokens, and every position gets its token's result back behind it (Turbo, §6.2, equation 14). The
merge is chosen once for a group of blocks, on what its first part reads, and may hold for several steps.
"""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.diffusion.attend import attend_merged
from turbovlm.diffusion.choose import Site, choice_of, least_tokens, square
from turbovlm.diffusion.families import Part
from turbovlm.diffusion.restore import restore_linear
from turbovlm.diffusion.run import RUN, THREAD, Run, find_same_latents, run_within
from turbovlm.diffusion.whole import reason_to_leave_whole
from turbovlm.errors import ConfigError, StateError, UnsupportedModelError
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import Merge
from turbovlm.ops.tracing import is_exporting_to_onnx, is_readable
from turbovlm.patching import Patch, install, patches_of, slot_of, take_off

if TYPE_CHECKING:
    from turbovlm.diffusion.feature import DenoiseFeature


@dataclass(frozen=True)
class Holder:
    """A denoiser, or a module in it that has the blocks.

    Attributes:
        name: its path in the module that was accelerated.
        begins: whether it is the denoiser, with which a run begins.
        arguments: names of what its forward takes; the first is the latent, or the tokens.
        pixels: latent pixels a side of a token, where it is given an image; 0 where not.
        positions: name of the argument that says where each token stands, where it has one.
        halved: how often rows and columns were halved before the first block, in a denoiser.
    """

    name: str
    begins: bool
    arguments: tuple[str, ...]
    pixels: int
    positions: str | None
    halved: int = 0


def denoiser_forward(patch: Patch, model: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a denoiser, or a holder in it, whose tokens lie in rows and columns that are known from now on."""
    _check_class(patch, model)
    feature: DenoiseFeature = patch.feature  # type: ignore[assignment]
    holder: Holder = patch.detail
    given: dict[str, Any] = {**dict(zip(holder.arguments, args)), **kwargs}
    latent = given[holder.arguments[0]]
    if not holder.begins:
        run = _current_run(patch, "a module that has blocks")
        run.grid = _grid_of(holder, latent, given, feature.config.grid)
        return original(*args, **kwargs)
    steps, compiling = feature.steps, torch.compiler.is_compiling()
    if not compiling:
        steps.follow_pipeline(feature)
        _check_not_compiled(holder, model, feature)
        _follow_parts(holder, model, feature)
    seen = latent if is_readable(latent) else None
    # without `refresh` a graph that cannot look at latents shares nothing
    shares = seen is not None or steps.every > 1
    choices = steps.begin_forward(seen) if shares else {}
    grid = _grid_of(holder, latent, given, feature.config.grid)
    guided = latent.ndim == 4 and len(latent) > 1  # FLUX is guided in forwards of their own
    run = Run(
        feature,
        model,
        path_for(latent),
        len(latent),
        find_same_latents(latent) if guided else None,
        choices,
        grid,
        math.prod(grid or latent.shape[-2:]) >> 2 * holder.halved,
    )
    out = run_within(run, original, *args, **kwargs)
    if shares:
        steps.end_forward(seen, choices)
    if not compiling:
        own = {site.key for site in _sites_of(holder, feature)}
        others = {key: choice for key, choice in (feature.last_here or {}).items() if key not in own}
        feature.last = {**others, **run.choices}  # a list of ControlNets has a forward of each
        reasons: dict[str, str | None] = {**feature.whole, **_reasons(holder, run)}
        feature.whole = {name: reason for name, reason in reasons.items() if reason is not None}
        _warn_of_nothing(feature)
    return out


def block_forward(patch: Patch, block: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a block, also where gradient checkpointing runs it once more in the backward pass, after its denoiser.

    The first time, its hidden states get the run as an attribute, by which the second time finds it.
    """
    _check_class(patch, block)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return original(*args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    run = THREAD.run
    if run is not None and run.feature is patch.feature:
        setattr(hidden, RUN, run)
        return original(*args, **kwargs)
    first = getattr(hidden, RUN, None)
    return original(*args, **kwargs) if first is None else run_within(first, original, *args, **kwargs)


def part_forward(patch: Patch, module: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run one part of a block on merged tokens, and give every position its token's result."""
    _check_class(patch, module)
    site: Site = patch.detail
    part = site.part
    x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
    run = _current_run(patch, site.name)
    text, mask, *_ = (*rest, None, None)
    text, mask = kwargs.get("encoder_hidden_states", text), kwargs.get("attention_mask", mask)
    run.whole[site.name] = reason_to_leave_whole(patch, module, text, mask, kwargs)
    merge = None if run.whole[site.name] else choice_of(run, site, module, x, text, kwargs).merge
    if merge is None:
        return original(x, *rest, **kwargs)
    words = x.shape[1] - merge.weights.shape[1] if part.text_in_front else 0
    image = x[:, words:]
    merged = merge.merge(image, path=run.path)
    read = torch.cat([x[:, :words], merged], dim=1) if words else merged
    if part.attending is None:
        out = original(read, *rest, **kwargs)
    else:
        out = attend_merged(patch, module, original, run.path, merge, read, rest, kwargs)
    restore = run.feature.config.restore  # "auto": on GPUs a small system of equations outlasts most feed-forwards
    if part.smooth and (restore == "linear" or (restore == "auto" and x.device.type == "cpu")):
        if is_exporting_to_onnx():
            raise StateError(
                f'restore={restore!r}: the regression behind {site.name} has no operator in ONNX: restore="copy" has'
            )
        return restore_linear(merge, image, merged, out)
    if isinstance(out, Tensor) and not words:
        return merge.unmerge(out)
    return _restore_beside_text(part, merge, out)


def _check_class(patch: Patch, module: Any) -> None:
    """See that the forward which a patch stands in for is still that of the module's class.

    Raises:
        StateError: another library, such as tomesd, has given the module another class, or the class another forward.
    """
    own: Any = type(module)
    if own.forward is not patch.method:
        raise StateError(
            f"a {own.__qualname__} of {own.__module__} has had another forward since turbovlm.apply, which would not "
            "be called: take that off, or remove turbovlm's and apply again"
        )


def _current_run(patch: Patch, name: str) -> Run:
    """The run that a patch's module is called in.

    Raises:
        StateError: it is called outside of its denoiser's forward.
    """
    run = THREAD.run
    if run is None or run.feature is not patch.feature:
        raise StateError(
            f"{name} runs outside of its denoiser's forward, or that was replaced since turbovlm.apply: remove and "
            "apply again"
        )
    return run


def _restore_beside_text(part: Part, merge: Merge, out: Any) -> Any:
    """Every position with its token's result; the text's tokens, and outputs that are not the image's, as they are."""
    if not isinstance(out, Tensor):
        return tuple(merge.unmerge(each) if i in part.restored else each for i, each in enumerate(out))
    words = out.shape[1] - merge.sizes.shape[1]
    return torch.cat([out[:, :words], merge.unmerge(out[:, words:])], dim=1)


def _grid_of(
    holder: Holder, latent: Tensor, given: dict[str, Any], otherwise: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of the tokens of a holder; None where it does not know."""
    if holder.pixels:
        return latent.shape[-2] // holder.pixels, latent.shape[-1] // holder.pixels
    positions = None if holder.positions is None else given.get(holder.positions)
    return None if positions is None else _grid_of_positions(holder, positions, latent, otherwise)


def _grid_of_positions(
    holder: Holder, positions: Tensor, tokens: Tensor, otherwise: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of tokens that come with the positions where they stand, `[tokens, 3]`.

    Where Python may not look at these, `otherwise`, or a square.

    Raises:
        UnsupportedModelError: they are not those of one image.
        ConfigError: there are not as many as `otherwise` says.
    """
    if not is_readable(positions):
        rows, columns = otherwise or square(tokens)
        if rows * columns != tokens.shape[1]:
            raise ConfigError(f"grid={otherwise}: the image has {tokens.shape[1]} tokens; give its rows and columns")
        return rows, columns
    flat = positions.reshape(-1, positions.shape[-1])
    rows, columns = (flat.amax(dim=0) - flat.amin(dim=0) + 1).long().tolist()[1:]
    if rows * columns != tokens.shape[1] or bool((flat[:, 0] != flat[0, 0]).any()):
        raise UnsupportedModelError(
            f"{holder.positions} place {tokens.shape[1]} tokens on {rows}×{columns} positions: not one image, row by "
            "row, so turbovlm does not know how they lie"
        )
    return rows, columns


def _follow_parts(holder: Holder, model: Any, feature: DenoiseFeature) -> None:
    """Patch the parts that stand where others stood, as an adapter around a layer does, and the layer after it."""
    for site in _sites_of(holder, feature):
        part = _module_at(model, holder, site.name)
        if part is None or _is_patched(part, feature):
            continue
        with FOLLOWING:
            if not _is_patched(part, feature):  # another thread may have been here in the meantime
                below = [patch for module in part.modules() for patch in patches_of(module)]
                take_off(patch for patch in below if patch.feature is feature)
                install([Patch(part, "forward", part_forward, feature, site)])


FOLLOWING = threading.Lock()


def _is_patched(part: Any, feature: DenoiseFeature) -> bool:
    patch = part.__dict__.get(slot_of(part, "forward"))
    if type(patch) is Patch and patch.feature is feature:  # as nearly always
        return True
    return any(patch.feature is feature for patch in patches_of(part))


def _sites_of(holder: Holder, feature: DenoiseFeature) -> list[Site]:
    """The parts in a denoiser."""
    inside = f"{holder.name}." if holder.name else ""
    return [site for site in feature.sites if site.name.startswith(inside)]


def _module_at(model: Any, holder: Holder, name: str) -> Any:
    """The module of that path in a denoiser; None where it is gone. Much faster than `get_submodule`."""
    module = model
    for step in (name.removeprefix(f"{holder.name}.") if holder.name else name).split("."):
        module = None if module is None else module._modules.get(step)
    return module


def _check_not_compiled(holder: Holder, model: Any, feature: DenoiseFeature) -> None:
    """Refuse blocks that are compiled one by one.

    Raises:
        StateError: one is.
    """
    inside = f"{holder.name}." if holder.name else ""
    for name in feature.blocks:
        if name.startswith(inside) and is_compiled(_module_at(model, holder, name)):
            raise StateError(f"{name} {COMPILED}")


def is_compiled(block: Any) -> bool:
    """Whether a block was compiled by itself, in place."""
    return getattr(block, "_compiled_call_impl", None) is not None


COMPILED = (
    "is compiled by itself, as compile_repeated_blocks does: every block that merges would be a graph of its own, and "
    "from the ninth on PyTorch compiles none; compile the whole denoiser, with its compile()"
)


def _reasons(holder: Holder, run: Run) -> dict[str, str | None]:
    """Why each part of a denoiser whose forward has ended read all tokens; None where it did not."""
    return {site.name: run.whole.get(site.name, NOT_CALLED) for site in _sites_of(holder, run.feature)}


NOT_CALLED = "the last forward skipped it, or called another forward that was put in its place"


def _warn_of_nothing(feature: DenoiseFeature) -> None:
    """Say where a forward has merged nothing at all, or in no part of one kind, though it should have."""
    keep: Any = feature.config.keep
    if all(share == 1 for share in (keep if isinstance(keep, tuple) else (keep,))):
        return
    parts: dict[str, list[str | None]] = {}
    for site in feature.sites:
        parts.setdefault(site.part.component, []).append(feature.whole.get(site.name))
    idle = {name: set(reasons) - {NOT_CALLED} for name, reasons in parts.items() if all(reasons)}
    if any(idle.values()):
        why = "; ".join(f"{name}: {', '.join(sorted(map(str, each)))}" for name, each in idle.items() if each)
        others = [name for name in feature.config.components if name not in idle]
        instead = f"components={others} leaves them whole without this warning" if others else "else handle.remove()"
        warnings.warn(
            f"turbovlm leaves all parts of these components whole: {why}. To have them merged take that off, or put "
            f"the library's own back; {instead}",
            stacklevel=2,
        )
    fewest = least_tokens(feature.config)
    tokens = max((choice.tokens for choice in (feature.last or {}).values()), default=fewest)
    if tokens < fewest:
        warnings.warn(
            f"turbovlm merges nothing in this denoiser: its blocks read at most {tokens} tokens, and those of fewer "
            f"than {fewest} are left as they are",
            stacklevel=2,
        )
