"""Videos: a drawing that moves on a straight path over white or over a photograph, and the prompt that says so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scenes import Emoji, over, placed
from torch import Tensor

from turbovlm_lab.zoo.emoji import STYLES
from turbovlm_lab.zoo.moving import FRAMES, THINGS, WAYS

STYLE = STYLES.index("noto")
PANNED, ZOOM = 0.33, 0.8
"""Share of the photographs that move, and the share of their side that is seen."""


def videos(emoji: Emoji, index: Tensor, generator: torch.Generator, frames: int = FRAMES) -> Tensor:
    """A video of each of the prompts that `index`, `[batch]`, points at: `[batch, 3, frames, 64, 64]` in [−1, 1].

    Args:
        emoji: the drawings and photographs.
        index: into `moving_prompts`.
        generator: where chance comes from.
        frames: how many of the 15 frames, from the first on.
    """
    ways = len(WAYS)
    thing, photo, way = index // (2 * ways), index // ways % 2, index % ways
    drawing = torch.tensor([emoji.names.index(name) for name in THINGS])[thing]
    chance = torch.rand(8, len(index), generator=generator)
    scale = 0.45 + 0.2 * chance[0]
    drawn = placed(
        repeated(emoji.images[STYLE, drawing].float() / 255, frames),
        scale.repeat_interleave(frames),
        (-walked(way, 1 - scale, chance[1:4], frames) / scale[:, None]).flatten(1),
    )
    behind = panned(emoji, chance[4:], generator, frames)
    behind = torch.where(photo.repeat_interleave(frames).view(-1, 1, 1, 1) == 1, behind, torch.ones(()))
    return over(drawn, behind).unflatten(0, (-1, frames)).transpose(1, 2)


def walked(way: Tensor, room: Tensor, chance: Tensor, frames: int) -> Tensor:
    """A straight path along `way`, at a steady pace, that never leaves the image.

    How far to the right and down its middle is in each frame, in halves of the image's side: `[2, batch, frames]`.

    Args:
        way: which of `WAYS`, `[batch]`.
        room: how far from the middle the drawing's own middle may be, `[batch]`.
        chance: of length, begin and height, in [0, 1], `[3, batch]`.
        frames: how many.
    """
    length = 2 * room * (0.6 + 0.4 * chance[0])
    begin = -room + (2 * room - length) * chance[1]
    along = begin[:, None] + length[:, None] * torch.arange(frames) / (FRAMES - 1)
    along = torch.where((way % 2 == 1)[:, None], along, -along)  # right and down; left and up
    across = (room * (2 * chance[2] - 1))[:, None].expand_as(along)
    level = (way < 2)[:, None]
    return torch.stack([torch.where(level, along, across), torch.where(level, across, along)])


def panned(emoji: Emoji, chance: Tensor, generator: torch.Generator, frames: int) -> Tensor:
    """Crops of photographs, `[batch · frames, 3, 64, 64]` in [0, 1]: a third of them move slowly to one side."""
    count = chance.shape[1]
    photos = emoji.photos[torch.randint(len(emoji.photos), (count,), generator=generator)].float() / 255
    mirrored = (chance[0] < 0.5).view(-1, 1, 1, 1)
    photos = torch.where(mirrored, photos, photos.flip(3))
    pace = torch.where(chance[1] < PANNED, (2 * chance[2] - 1) * (1 - ZOOM), 0.0)
    affine = torch.zeros(count, frames, 2, 3)
    affine[..., 0, 0] = affine[..., 1, 1] = ZOOM
    affine[..., 0, 2] = pace[:, None] * (2 * torch.arange(frames) / (FRAMES - 1) - 1)
    affine[..., 1, 2] = ((2 * chance[3] - 1) * (1 - ZOOM))[:, None]
    photos = repeated(photos, frames)
    return F.grid_sample(photos, F.affine_grid(affine.flatten(0, 1), list(photos.shape)), padding_mode="border")


def repeated(images: Tensor, frames: int) -> Tensor:
    """Each image for each of its frames."""
    return images.repeat_interleave(frames, dim=0)
