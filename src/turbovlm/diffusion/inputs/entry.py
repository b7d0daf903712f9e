"""What a class of denoisers takes: its native size, how pixels become tokens, and what its forward is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What is asked of a denoiser in one forward.

    Attributes:
        model: on its device, in its dtype.
        batch: images, or videos.
        frames, rows, columns: of the latent, in latent frames and pixels.
        grid: frames, rows and columns of its tokens.
        pixels: of the image, per side of a latent pixel.
    """

    model: Any
    batch: int
    frames: int
    rows: int
    columns: int
    grid: tuple[int, int, int]
    pixels: int
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def config(self) -> Any:
        """The denoiser's."""
        return self.model.config

    @property
    def tokens(self) -> int:
        """How many the latent makes."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    def noise(self, *shape: int) -> Tensor:
        """Seeded noise, `[batch, *shape]`."""
        made = torch.randn(self.batch, *shape, generator=self._generator)
        return made.to(self.model.device, self.model.dtype)

    def latent(self, channels: int | None = None) -> Tensor:
        """Noise of the shape of an image's latent, `[batch, channels, rows, columns]`."""
        return self.noise(channels or self.config.in_channels, self.rows, self.columns)

    def video(self, channels: int | None = None) -> Tensor:
        """Noise of the shape of a video's latent, `[batch, channels, frames, rows, columns]`."""
        return self.noise(channels or self.config.in_channels, self.frames, self.rows, self.columns)

    def packed(self) -> Tensor:
        """Noise of the shape of a latent that is given as tokens, `[batch, tokens, channels]`."""
        return self.noise(self.tokens, self.config.in_channels)

    def full(self, value: float) -> Tensor:
        """The same number for every image, `[batch]`."""
        return torch.full((self.batch,), value, device=self.model.device)

    def of(self, value: float) -> Tensor:
        """The same number for every image, `[batch]`, in the denoiser's dtype."""
        return self.full(value).to(self.model.dtype)

    def every(self, *shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """A mask that leaves nothing out, `[batch, *shape]`."""
        return torch.ones(self.batch, *shape, device=self.model.device, dtype=dtype)

    def range(self, length: int) -> Tensor:
        """0, 1, …, on the denoiser's device."""
        return torch.arange(length, device=self.model.device)

    def places(self, axes: int = 3) -> Tensor:
        """Row and column of each token of an image as the second and third of so many axes, `[tokens, axes]`."""
        _, rows, columns = self.grid
        found = torch.zeros(rows, columns, axes)
        found[..., 1], found[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        return found.view(-1, axes).to(self.model.device, self.model.dtype)


@dataclass(frozen=True)
class Entry:
    """One class of denoisers.

    Args:
        make: its forward's arguments, by name.
        pixels: of the image, per side of a latent pixel; or that of a config.
        packed: latent pixels per side of a token, where the pipeline packs them; None where the config's `patch_size`
            says it.
        size: height and width in pixels that it is made for, or those of a config, where `sides` do not say.
        sides: fields of the config that say it, in latent pixels: of both, or of rows and columns.
        frames: of a video that it is made for, or those of a config; 1 of images.
        stride: frames per latent frame; None of classes that make images alone.
        first: frames that the first latent frame has.
        least: frames that it takes at least.
    """

    make: Callable[[Request], dict[str, Any]]
    pixels: int | Callable[[Any], int] = 8
    packed: int | None = None
    size: tuple[int, int] | Callable[[Any], tuple[int, int]] = (1024, 1024)
    sides: tuple[str, ...] = ()
    frames: int | Callable[[Any], int] = 1
    stride: int | None = None
    first: int = 1
    least: int = 1

    def pixels_of(self, config: Any) -> int:
        """Pixels per side of a latent pixel."""
        return self.pixels if isinstance(self.pixels, int) else self.pixels(config)

    def patch_of(self, config: Any) -> tuple[int, int]:
        """Latent frames, and latent pixels per side, of a token."""
        patch = config.get("patch_size") or 1
        sizes = tuple(patch) if isinstance(patch, tuple | list) else (int(patch),)
        frames = sizes[0] if len(sizes) == 3 else int(config.get("patch_size_t") or 1)
        return frames, self.packed or sizes[-1]

    def size_of(self, config: Any) -> tuple[int, int]:
        """Height and width in pixels that it is made for."""
        sides: Any = [config.get(name) for name in self.sides]
        if not sides or sides[0] is None:
            return self.size if isinstance(self.size, tuple) else self.size(config)
        if len(sides) == 1:
            sides = [sides[0]] * 2 if isinstance(sides[0], int) else sides[0]
        pixels = self.pixels_of(config)
        return sides[0] * pixels, sides[1] * pixels

    def frames_of(self, config: Any) -> int:
        """Frames of a video that it is made for."""
        return self.frames if isinstance(self.frames, int) else self.frames(config)
