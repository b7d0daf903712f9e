"""Cells of an image whose pixels those of the cell beside them predict: predictive coding, a cell at a time.

A cell is a square of patches. One that goes is predicted by the cell to its left, or else by the one above it, so that
an image can be drawn again from the cells that stay and from which of them stands for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.averaging import precise_dtype


def predicted(cells: Tensor, grid: tuple[int, int, int], tolerance: float, window: int = 0) -> Tensor:
    """For each cell the one that stands for it, itself where it stays, `[n]`, int64.

    Row after row, a cell goes where the one that stands for its left neighbour, or else the one that stands for its
    upper neighbour, is within `tolerance` of it in every value. It is compared with what stands and not with the
    neighbour, so that differences do not add up along a gradient. Frames, and windows, are apart: what is at the first
    row or column of one has no neighbour there. A NaN is equal to nothing.

    Args:
        cells: pixels, `[n, values]`, row after row and frame after frame.
        grid: frames, rows and columns of cells, n in all.
        tolerance: the largest absolute difference of two values; 0 for equal cells alone.
        window: cells along the side of the squares within which cells stand for each other; 0 for whole frames.
    """
    frames, rows, columns = grid
    x = cells.reshape(frames, rows, columns, -1)
    own = torch.arange(len(cells), device=cells.device).view(frames, rows, columns)
    if tolerance == 0:
        return _by_neighbours(x, own, window).flatten()
    return _by_diagonals(x, own, tolerance, window).flatten()


def _by_neighbours(x: Tensor, own: Tensor, window: int) -> Tensor:
    """Equal cells: equality is transitive, so each points to its neighbour, and all follow where these point to."""
    _, rows, columns = own.shape
    left, above = (torch.zeros_like(own, dtype=torch.bool) for _ in range(2))
    left[:, :, 1:] = (x[:, :, 1:] == x[:, :, :-1]).all(dim=-1)
    above[:, 1:] = (x[:, 1:] == x[:, :-1]).all(dim=-1)
    if window:
        left[:, :, ::window] = False
        above[:, ::window] = False
    source = torch.where(left, own - 1, torch.where(above, own - columns, own)).flatten()
    for _ in range((rows + columns).bit_length()):  # each step doubles how far a cell has looked
        source = source[source]
    return source.view_as(own)


def _by_diagonals(x: Tensor, own: Tensor, tolerance: float, window: int) -> Tensor:
    """Cells within a tolerance: those of one anti-diagonal at once, as their neighbours are of the one before."""
    _, rows, columns = own.shape
    source, flat = own.clone(), x.flatten(0, 2)
    places = torch.arange(rows, device=own.device)
    for diagonal in range(1, rows + columns - 1):
        row = places[max(0, diagonal - columns + 1) : diagonal + 1]
        column = diagonal - row
        here = own[:, row, column]
        found = here
        # of those to the left last, so that they come first
        for step_row, step_column, inside in ((1, 0, row), (0, 1, column)):
            has_one = (inside % window != 0) if window else inside > 0
            stands = source[:, row - step_row * has_one, column - step_column * has_one]
            found = torch.where(_within(flat, here, stands, tolerance) & has_one, stands, found)
        source[:, row, column] = found
    return source


def _within(cells: Tensor, here: Tensor, stands: Tensor, tolerance: float) -> Tensor:
    """Whether the cells at two places are within a tolerance of each other, `[frames, cells]`, bool."""
    precise = precise_dtype(cells)
    apart = cells[here].to(precise) - cells[stands].to(precise)
    near: Tensor = (apart.abs() <= tolerance).all(dim=-1)
    return near


def predicted_in_sequence(cells: Tensor, grids: Tensor, tolerance: float, window: int = 0) -> Tensor:
    """`predicted` of several images or videos, one after another in `cells`: places among all of them, `[n]`.

    Args:
        cells: `[n, values]`.
        grids: frames, rows and columns of cells of each, `[images, 3]`.
        tolerance, window: as in `predicted`.
    """
    found, first = [], 0
    for frames, rows, columns in grids.tolist():
        count = frames * rows * columns
        image = cells[first : first + count]
        found.append(predicted(image, (frames, rows, columns), tolerance, window) + first)
        first += count
    return torch.cat(found)
