"""Drawings of what was merged: which patches have become one token, and heat maps on top of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from turbovlm.encoder.state import BlockTrace

    Pixels = NDArray[np.uint8]
    Color = tuple[int, int, int]

CAPTION_HEIGHT = 22
GAP = 8
_ANCHORS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""Six colours, evenly spaced between which a heat map's colours lie; dark is 0, light is 1."""


def groups(
    trace: Sequence[BlockTrace],
    image: Image,
    *,
    block: int | Sequence[int] | None = None,
    batch_index: int = 0,
    grid: tuple[int, int] | None = None,
    cell: int = 20,
    outline: Color = (255, 255, 255),
) -> Image:
    """Draw which patches have become one token: each group in the mean colour of its pixels, borders between groups.

    Args:
        trace: `handle.trace` of a forward with `TurboConfig(trace=True)`.
        image: the image as the model saw it: cropped as it was; it is resized to the grid of patches.
        block: the block after which to draw; several give a strip with captions; None is the last one traced.
        batch_index: the image's place in the batch of that forward.
        grid: rows and columns of patches; None where they are as many.
        cell: pixels per patch and side, at least 3.
        outline: colour of the borders, which are one pixel wide.

    Returns:
        An RGB image of `columns · cell` by `rows · cell` pixels; or such images side by side, with captions.

    Raises:
        ConfigError: a block that was not traced, a batch index out of range, or a grid that is not the patches'.
    """
    if isinstance(cell, bool) or not isinstance(cell, int) or cell < 3:
        raise ConfigError(f"cell={cell!r}: must be an integer ≥ 3, the pixels per patch and side")
    if not trace:
        raise ConfigError("trace=[]: there is nothing to draw; trace a forward with TurboConfig(trace=True)")
    if block is None:
        return _panel(trace[-1], image, batch_index, grid, cell, outline)
    if isinstance(block, int):
        return _panel(_entry(trace, block), image, batch_index, grid, cell, outline)
    if not block:
        raise ConfigError("block=[]: give at least one block")
    entries = [_entry(trace, number) for number in block]
    panels = [_panel(entry, image, batch_index, grid, cell, outline) for entry in entries]
    return _strip(panels, [f"after block {entry.block}: {entry.sizes.shape[1]} tokens" for entry in entries])


def heatmap(
    map: Any,
    image: Image,
    *,
    opacity: float = 0.6,
    high: float | None = None,
    outline: float | None = None,
) -> Image:
    """Lay a heat map over an image.

    Args:
        map: `[height, width]`, a tensor or an array, finite and non-negative.
        image: the image it belongs to; it is resized to the map.
        opacity: of the colours, in [0, 1].
        high: the value drawn in the lightest colour; None is the map's largest.
        outline: draw the border, in white, of the region where the map is at least this share of its largest value.

    Returns:
        An RGB image of `width` by `height` pixels.

    Raises:
        ConfigError: a map that is no such thing, or an opacity, outline or `high` out of range.
    """
    import numpy as np
    from PIL import Image as pillow

    values = np.asarray(map.detach().cpu() if isinstance(map, Tensor) else map, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all() or values.min() < 0:
        raise ConfigError(f"map of shape {values.shape}: must be [height, width], finite and non-negative")
    if not 0 <= opacity <= 1:
        raise ConfigError(f"opacity={opacity!r}: must be in [0, 1]")
    if outline is not None and not 0 < outline <= 1:
        raise ConfigError(f"outline={outline!r}: must be a share in (0, 1] of the map's largest value")
    if high is not None and not high > 0:
        raise ConfigError(f"high={high!r}: must be a number > 0")
    top = values.max() if high is None else high
    shares = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    stops = np.linspace(0, 1, len(_ANCHORS))
    colors = np.stack([np.interp(shares, stops, channel) for channel in zip(*_ANCHORS)], axis=-1)
    size = (values.shape[1], values.shape[0])
    below = np.asarray(image.convert("RGB").resize(size, pillow.Resampling.BICUBIC), dtype=np.float64)
    pixels = np.rint(opacity * colors + (1 - opacity) * below).astype(np.uint8)
    if outline is not None and values.max() > 0:
        pixels[_rim(values >= outline * values.max())] = 255
    return pillow.fromarray(pixels)


def _entry(trace: Sequence[BlockTrace], block: int) -> BlockTrace:
    found = [entry for entry in trace if entry.block == block]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"block={block}: {len(found)} encoders were traced; pass the entries of one of them")
    traced = ", ".join(str(entry.block) for entry in trace)
    raise ConfigError(f"block={block}: must be one of the blocks traced: {traced}")


def _panel(
    entry: BlockTrace, image: Image, batch_index: int, grid: tuple[int, int] | None, cell: int, outline: Color
) -> Image:
    import numpy as np
    from PIL import Image as pillow

    batch = entry.source.shape[0]
    if not 0 <= batch_index < batch:
        raise ConfigError(f"batch_index={batch_index}: must be in 0 … {batch - 1}; {batch} images were traced")
    token_of_patch = entry.source[batch_index, entry.prefix : entry.source.shape[1] - entry.suffix].detach().cpu()
    rows, columns = _grid(int(token_of_patch.numel()), grid)
    resized = image.convert("RGB").resize((columns * cell, rows * cell), pillow.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float64)
    _, group = torch.unique(token_of_patch, return_inverse=True)
    labels = np.kron(group.reshape(rows, columns).numpy(), np.ones((cell, cell), dtype=np.int64))
    counts = np.bincount(labels.ravel())
    means = np.stack([np.bincount(labels.ravel(), pixels[..., c].ravel()) / counts for c in range(3)], axis=-1)
    filled = np.rint(means).astype(np.uint8)[labels]
    filled[_borders(labels)] = outline
    return pillow.fromarray(filled)


def _grid(patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        side = round(patches**0.5)
        if side == 0 or side * side != patches:
            raise ConfigError(f"{patches} patches are no square: give grid=(rows, columns)")
        return side, side
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ConfigError(f"grid={grid!r}: must be the rows and columns of {patches} patches")
    return rows, columns


def _borders(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The pixels whose right, lower or lower-right neighbour has another label; one pixel wide."""
    import numpy as np

    border = np.zeros(labels.shape, dtype=bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1, :] |= labels[:-1, :] != labels[1:, :]
    border[:-1, :-1] |= labels[:-1, :-1] != labels[1:, 1:]
    return border


def _rim(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a region with a neighbour outside it, sideways or up and down; the image's edge is no border."""
    import numpy as np

    around = np.pad(inside, 1, mode="edge")
    enclosed = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return inside & ~enclosed


def _strip(panels: list[Image], captions: list[str]) -> Image:
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    draw = ImageDraw.Draw(panels[0])
    widths = [max(panel.width, int(draw.textlength(text, font=font)) + 4) for panel, text in zip(panels, captions)]
    width = sum(widths) + GAP * (len(panels) - 1)
    strip = pillow.new("RGB", (width, panels[0].height + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(strip)
    left = 0
    for panel, text, space in zip(panels, captions, widths):
        draw.text((left + 2, 2), text, fill=(40, 40, 40), font=font)
        strip.paste(panel, (left, CAPTION_HEIGHT))
        left += space + GAP
    return strip
