"""Small denoisers that are given several images in one sequence, as pipelines that edit images give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from denoisers import flux, noise, words
from families import _livelier as livelier
from image_denoisers import flux2, longcat, qwen
from video_denoisers import COLUMNS, FRAMES, ROWS, ltx, ltx2, ltx2_inputs, ltx_inputs

Grids = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Several:
    """How to make a denoiser, its inputs for `batch` sequences, and frames, rows and columns of each of its images."""

    make: Callable[[], Any]
    inputs: Callable[[int, Grids], dict[str, Any]]
    grids: Grids

    def __call__(self) -> Any:
        torch.manual_seed(0)
        return livelier(self.make())

    def given(self, batch: int, grids: Grids | None = None) -> dict[str, Any]:
        return self.inputs(batch, self.grids if grids is None else grids)


def places(grids: Grids, axes: int, index: Callable[[int], int]) -> torch.Tensor:
    """Where tokens stand, `[tokens, axes]`: which image, row and column."""
    found = []
    for i, (_, rows, columns) in enumerate(grids):
        image = torch.zeros(rows, columns, axes)
        image[..., 0], image[..., 1], image[..., 2] = index(i), torch.arange(rows)[:, None], torch.arange(columns)
        found.append(image.view(-1, axes))
    return torch.cat(found)


def tokens(grids: Grids) -> int:
    return sum(frames * rows * columns for frames, rows, columns in grids)


def sequence(batch: int, grids: Grids, width: int = 16) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, batch, tokens(grids), width),
        "encoder_hidden_states": words(batch),
        "timestep": torch.full((batch,), 0.5),
    }


def kontext_inputs(batch: int, grids: Grids) -> dict[str, Any]:
    given = {**sequence(batch, grids), "pooled_projections": noise(2, batch, 32), "txt_ids": torch.zeros(7, 3)}
    return {**given, "img_ids": places(grids, 3, lambda image: int(image > 0))}


def longcat_inputs(batch: int, grids: Grids) -> dict[str, Any]:
    ids = places(grids, 3, lambda image: image + 1)
    ids[:, 1:] += 512
    return {**sequence(batch, grids), "txt_ids": torch.zeros(7, 3), "img_ids": ids}


def flux2_inputs(batch: int, grids: Grids) -> dict[str, Any]:
    ids = places(grids, 4, lambda image: 10 * image).expand(batch, -1, -1)
    return {**sequence(batch, grids), "img_ids": ids, "txt_ids": torch.zeros(batch, 7, 4)}


def qwen_inputs(batch: int, grids: Grids) -> dict[str, Any]:
    return {**sequence(batch, grids), "img_shapes": [list(grids)] * batch}


def corners(grid: tuple[int, int, int], frame: float = 0) -> torch.Tensor:
    """Where the tokens of a video begin, `[3, tokens]`: in seconds, and in pixels."""
    axes = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
    found = torch.stack(axes).view(3, -1)
    found[0] = (8 * found[0] - 7).clamp(min=0) + frame
    return found * torch.tensor([1 / 25, 32, 32])[:, None]


def of_video(given: dict[str, Any], batch: int, grids: Grids) -> dict[str, Any]:
    return {
        **given,
        "hidden_states": noise(0, batch, tokens(grids), 4),
        "timestep": 500 - torch.arange(tokens(grids)).expand(batch, -1) % 7,
    }


def ltx_condition_inputs(batch: int, grids: Grids) -> dict[str, Any]:
    """A later frame that is given stands in front of the video."""
    where = torch.cat((corners(grids[0], frame=16), corners(grids[1])), dim=1)
    return {**of_video(ltx_inputs(batch), batch, grids), "video_coords": where.expand(batch, -1, -1)}


def ltx2_condition_inputs(batch: int, grids: Grids) -> dict[str, Any]:
    """A frame that is given stands behind the video, where its last one is."""
    starts = torch.cat((corners(grids[0]), corners(grids[1], frame=9)), dim=1)
    where = torch.stack((starts, starts + 1 / 25), dim=-1)
    return {**of_video(ltx2_inputs(batch), batch, grids), "video_coords": where.expand(batch, -1, -1, -1)}


VIDEO, FRAME = (FRAMES, ROWS, COLUMNS), (2, ROWS, COLUMNS)

SEVERAL = {
    "kontext": Several(flux, kontext_inputs, ((1, 8, 12), (1, 10, 14))),
    "kontext, smaller reference": Several(flux, kontext_inputs, ((1, 9, 11), (1, 8, 8))),
    "longcat edit": Several(longcat, longcat_inputs, ((1, 8, 12), (1, 8, 12))),
    "flux2, two references": Several(flux2, flux2_inputs, ((1, 8, 12), (1, 11, 9), (1, 8, 10))),
    "qwen edit": Several(qwen, qwen_inputs, ((1, 8, 12), (1, 9, 9))),
    "qwen edit 2511": Several(lambda: qwen(zero_cond_t=True), qwen_inputs, ((1, 8, 12), (1, 9, 9), (1, 12, 8))),
    "qwen layered": Several(lambda: qwen(use_layer3d_rope=True), qwen_inputs, (*[(1, 8, 8)] * 3, (1, 8, 9))),
    "ltx condition": Several(ltx, ltx_condition_inputs, (FRAME, VIDEO)),
    "ltx2 condition": Several(ltx2, ltx2_condition_inputs, (VIDEO, FRAME)),
}
