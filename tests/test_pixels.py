"""Cells of equal pixels: which stand for which, left out before the tower and by the language model."""

from __future__ import annotations

import pytest
import torch

from turbovlm.ops.pixels import predicted, predicted_in_sequence
from vlms import noise


def by_loops(cells, grid, tolerance, window=0):
    """The definition in plain lines: row after row, from left to right."""
    _, rows, columns = grid
    x, source = cells.double(), list(range(len(cells)))
    for i in range(len(cells)):
        row, column = i // columns % rows, i % columns
        for inside, neighbour in ((column, i - 1), (row, i - columns)):
            if (inside % window if window else inside) == 0:
                continue
            stands = source[neighbour]
            if max((x[i] - x[stands]).abs().tolist()) <= tolerance:
                source[i] = stands
                break
    return torch.tensor(source)


def crowded(seed, grid, levels=3):
    """Cells of few different pixels, on levels that are exact in every type."""
    n = grid[0] * grid[1] * grid[2]
    kinds = (noise(seed, levels, 5) * 4).round() / 64
    return kinds[torch.randint(levels, (n,), generator=torch.Generator().manual_seed(seed))]


GRIDS = [(1, 1, 1), (1, 1, 7), (1, 6, 1), (2, 5, 4), (1, 9, 13), (3, 8, 8)]


@pytest.mark.parametrize("tolerance", [0, 1 / 64, 3 / 64])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cells_that_stand_for_others_against_loops(grid, window, tolerance):
    for seed in range(4):
        cells = crowded(seed, grid, levels=2 + seed)
        found = predicted(cells, grid, tolerance, window)
        assert torch.equal(found, by_loops(cells, grid, tolerance, window))
        assert torch.equal(found[found], found)  # what stands for others stays itself
        assert bool(((cells - cells[found]).abs() <= tolerance).all())


def test_an_image_is_drawn_again_from_what_is_left():
    cells = crowded(0, (2, 9, 11), levels=2)
    source = predicted(cells, (2, 9, 11), 0)
    left = source == torch.arange(len(source))
    assert 0 < int(left.sum()) < len(source)
    drawn = torch.zeros_like(cells)
    drawn[left] = cells[left]
    assert torch.equal(drawn[source], cells)


def test_differences_do_not_add_up_along_a_gradient():
    cells = (torch.arange(16.0) / 8).view(16, 1)
    assert predicted(cells, (1, 1, 16), 0.25).tolist() == [i // 3 * 3 for i in range(16)]


def test_frames_and_what_is_no_number_are_apart():
    cells = torch.zeros(8, 2)
    assert predicted(cells, (2, 2, 2), 0).tolist() == [0] * 4 + [4] * 4
    for tolerance in (0, 1.0):
        assert predicted(cells.fill_(torch.nan), (2, 2, 2), tolerance).tolist() == [*range(8)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_types_of_pixels(dtype):
    cells = (crowded(1, (1, 6, 6)) * 64 + 30).to(dtype)
    for tolerance in (0, 2):
        assert torch.equal(predicted(cells, (1, 6, 6), tolerance), by_loops(cells, (1, 6, 6), tolerance))


def test_images_of_one_sequence_are_apart():
    grids = torch.tensor([[1, 2, 3], [2, 2, 2], [1, 1, 1]])
    cells = torch.ones(15, 4)
    assert predicted_in_sequence(cells, grids, 0).tolist() == [0] * 6 + [6] * 4 + [10] * 4 + [14]
