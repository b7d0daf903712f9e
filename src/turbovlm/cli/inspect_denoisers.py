"""`turbovlm inspect` of a pipeline of `diffusers`, or of its denoiser alone: which blocks merge, and what it saves."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from turbovlm.cli.generation import Size, saved_settings, sizes_from
from turbovlm.cli.output import console, write_json
from turbovlm.errors import ConfigError

if TYPE_CHECKING:
    import torch.nn as nn

    from turbovlm.apply import Handle
    from turbovlm.config import DenoiseConfig
    from turbovlm.diffusion.inputs import Request
    from turbovlm.loading import ModelSpec

DEFAULT_KEEP = 0.5


def run(args: argparse.Namespace) -> int:
    """Print what a handle says behind one forward of native size, and write it as JSON.

    Raises:
        ConfigError: an option that is of encoders, a size or frames that make no whole number of tokens.
        UnsupportedModelError: nothing in the denoiser can be accelerated.
    """
    import turbovlm
    from turbovlm.apply import denoiser_of
    from turbovlm.loading import ModelSpec

    config, size = _config(args), _size(args)
    spec = ModelSpec(args.model)
    model = _outline(spec)
    denoiser: Any = denoiser_of(model) or model
    turbovlm.apply(model, config).remove()  # refused before anything is counted
    request = _request(model, denoiser, size, args.frames)
    before = _macs(denoiser, request)
    handle = _apply(model, config, request)
    after = None if before is None else _macs(denoiser, request)
    _print(args.model, request, handle, before, after)
    if args.json:
        write_json(args.json, _as_json(args.model, request, handle, before, after))
    return 0


def _config(args: argparse.Namespace) -> DenoiseConfig:
    config = _asked(args)
    if config.over_steps:
        raise ConfigError(f"{config.amount}: one forward is inspected, which is of no step; give one of the shares")
    return config


def _asked(args: argparse.Namespace) -> DenoiseConfig:
    from turbovlm.config import DenoiseConfig

    for name in ("r", "flops", "visual_keep"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: a denoiser takes --keep, the share of the tokens that its blocks read, "
                "because what is merged is restored"
            )
    if args.settings is None:
        return DenoiseConfig(DEFAULT_KEEP if args.keep is None else args.keep, min_tokens=args.min_tokens)
    if args.min_tokens:
        raise ConfigError("--min-tokens: the settings file says it")
    (config,) = saved_settings([args.settings], DenoiseConfig).values()
    return config  # type: ignore[return-value]


def _size(args: argparse.Namespace) -> Size:
    (size,) = sizes_from(None if args.image_size is None else [args.image_size])
    return size


def _outline(spec: ModelSpec) -> Any:
    """On the meta device; a model that another package brings with its weights."""
    from turbovlm.loading.pipelines import load_pipeline, load_pipeline_outline

    outline = load_pipeline_outline(spec)
    return load_pipeline(spec, pretrained=True) if outline is None else outline


def _request(model: Any, denoiser: nn.Module, size: Size, frames: int | None) -> Request:
    """One image or video of the size that is asked for, or of the pipeline's own, or of the denoiser's."""
    from turbovlm.diffusion.inputs import denoiser_request
    from turbovlm.profile.pipelines import check_size, own_size, pixels_per_latent

    if model is denoiser:
        return denoiser_request(denoiser, size, 1, frames)
    if size is not None:
        check_size(model, size)
    return denoiser_request(denoiser, size or own_size(model), 1, frames, pixels_per_latent(model))


def _apply(model: Any, config: DenoiseConfig, request: Request) -> Handle:
    """With rows and columns where nothing else tells them: positions on the meta device have no values."""
    import turbovlm
    from turbovlm.diffusion.grids import OfPositions

    handle = turbovlm.apply(model, config)
    (feature,) = handle.features
    holders: Any = [holder for _, holder in feature.holders]  # type: ignore[attr-defined]
    if config.grid is not None or not any(isinstance(holder.grid, OfPositions) for holder in holders):
        return handle
    handle.remove()
    return turbovlm.apply(model, config.changed(grid=request.grid[1:]))


def _macs(denoiser: Any, request: Request) -> int | None:
    """Of one forward; None where it looks at values, of which the meta device has none."""
    from turbovlm.diffusion.inputs import inputs_asked
    from turbovlm.loading import running
    from turbovlm.loading.models import as_far_as_shapes_go
    from turbovlm.profile import macs

    counted = None
    with running(type(denoiser).__name__), as_far_as_shapes_go():
        counted = macs(denoiser, **inputs_asked(request))
    return counted


def _print(name: str, request: Request, handle: Handle, before: int | None, after: int | None) -> None:
    frames, rows, columns = request.grid
    of = f"{request.columns * request.pixels}x{request.rows * request.pixels} pixels"
    lie = f"{frames} frames of {rows}x{columns}" if frames > 1 else f"{rows}x{columns}"
    lines = [f"{name}: {of}, {lie} patches of the latent", repr(handle)]
    if before is None or after is None:
        lines.append("  its forward looks at values, so that nothing can be counted without weights")
    else:
        lines.append(
            f"  {_billions(before)} → {_billions(after)} GMACs of one forward: {after / before:.1%} left, at best "
            f"{before / after:.2f}x faster"
        )
    out = console()
    for line in "\n".join(lines).splitlines():
        indent = len(line) - len(line.lstrip()) + 2
        out.print(textwrap.fill(line, out.width, subsequent_indent=" " * indent))


def _billions(count: int) -> str:
    return f"{count / 1e9:,.0f}" if count >= 1e11 else f"{count / 1e9:.3g}"


def _as_json(name: str, request: Request, handle: Handle, before: int | None, after: int | None) -> dict[str, Any]:
    feature: Any = handle.features[0]
    last = feature.last or {}
    groups: dict[str, dict[str, Any]] = {}
    for unit in feature.units:
        choice = last.get(unit.key)
        left = None if choice is None else choice.tokens if choice.merge is None else choice.merge.sizes.shape[1]
        tokens = None if choice is None else [choice.tokens, left]
        groups.setdefault(unit.group, {"blocks": [], "tokens": tokens})["blocks"].append(unit.block)
    for group in groups.values():
        group["blocks"] = list(dict.fromkeys(group["blocks"]))
    return {
        "model": name,
        "settings": handle.config.amount,
        "family": feature.family,
        "grid": list(request.grid),
        "groups": list(groups.values()),
        "whole": dict(feature.whole),
        "macs": [before, after],
    }
