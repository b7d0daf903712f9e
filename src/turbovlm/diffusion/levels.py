"""Where a UNet halves rows and columns: which of its blocks have equally many tokens."""

from __future__ import annotations

from typing import Any

LISTS = ("input_blocks", "middle_block", "output_blocks")
"""Of UNets that have everything in one row, as the first latent diffusion models did; `diffusers` has stages."""


def is_unet(denoiser: Any) -> bool:
    """Whether convolutions come before its blocks."""
    return hasattr(denoiser, "down_blocks") or hasattr(denoiser, "input_blocks")


def stage_of(denoiser: Any, name: str) -> str:
    """The part of a denoiser in which all blocks have as many tokens as the one of that path in it."""
    parts = name.split(".")
    if parts[0] in LISTS:
        return _first_of_stage(denoiser, parts[0], int(parts[1]))
    return ".".join(parts[:2]) if parts[0].endswith("_blocks") and len(parts) > 3 else parts[0]


def halvings(denoiser: Any) -> dict[str, int]:
    """How often rows and columns were halved before each part of a UNet, by what the paths in it begin with."""
    if hasattr(denoiser, "input_blocks"):
        return _halvings_in_row(denoiser)
    downs, ups = getattr(denoiser, "down_blocks", None) or (), getattr(denoiser, "up_blocks", None) or ()
    level, found = 0, dict[str, int]()
    for i, stage in enumerate(downs):
        found[f"down_blocks.{i}."] = level
        level += getattr(stage, "downsamplers", None) is not None
    found["mid_block."] = level
    for i, stage in enumerate(ups):
        found[f"up_blocks.{i}."] = level
        level -= getattr(stage, "upsamplers", None) is not None
    return found


def _halvings_in_row(denoiser: Any) -> dict[str, int]:
    level, found = 0, dict[str, int]()
    for i, entry in enumerate(denoiser.input_blocks):
        level += _resizes(entry, "Downsample")
        found[f"input_blocks.{i}."] = level
    found["middle_block."] = level
    for i, entry in enumerate(denoiser.output_blocks):
        found[f"output_blocks.{i}."] = level
        level -= _resizes(entry, "Upsample")
    return found


def _resizes(entry: Any, kind: str) -> bool:
    """Whether an entry of a row has that layer, or a residual block that does the same by itself."""
    return any(type(layer).__name__ == kind or getattr(layer, "updown", False) for layer in entry)


def _first_of_stage(denoiser: Any, listed: str, index: int) -> str:
    """The path of the first entry of a row that has as many tokens as that one."""
    found = _halvings_in_row(denoiser)
    if listed == "middle_block":
        return listed
    level = found[f"{listed}.{index}."]
    return next(path[:-1] for path, halved in found.items() if path.startswith(f"{listed}.") and halved == level)
