"""Drawings show exactly what the trace says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

import turbovlm
from turbovlm.errors import ConfigError
from turbovlm.visualize import CAPTION_HEIGHT, GAP, groups, heatmap

CELL = 6
WHITE = (255, 255, 255)


def entry(labels: np.ndarray, block: int = 0, prefix: int = 1) -> SimpleNamespace:
    """A block's trace, in which patch i is part of token `labels[i]`, after `prefix` tokens of their own."""
    source = torch.cat([torch.arange(prefix), prefix + torch.from_numpy(labels.ravel())])[None]
    sizes = torch.bincount(source[0]).float()[None]
    return SimpleNamespace(name=f"layer.{block}", block=block, prefix=prefix, suffix=0, source=source, sizes=sizes)


def noise(rows: int, columns: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (rows * CELL, columns * CELL, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def quadrants(side: int = 4) -> np.ndarray:
    half = np.arange(side) // (side // 2)
    return 2 * half[:, None] + half[None, :]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_groups_have_their_pixels_mean_colour(prefix: int) -> None:
    image = noise(4, 4)
    drawing = np.asarray(groups([entry(quadrants(), prefix=prefix)], image, cell=CELL))
    pixels = np.asarray(image, dtype=float)
    assert drawing.shape == (24, 24, 3)
    for top in (0, 12):
        for left in (0, 12):
            mean = pixels[top : top + 12, left : left + 12].mean(axis=(0, 1))
            inside = drawing[top : top + 11, left : left + 11]
            assert (inside == np.rint(mean)).all()


def test_a_group_in_two_places_has_one_colour() -> None:
    labels = np.array([[0, 1], [1, 0]])
    image = noise(2, 2)
    drawing = np.asarray(groups([entry(labels)], image, cell=CELL))
    pixels = np.asarray(image, dtype=float)
    mean = np.rint((pixels[:6, :6].mean(axis=(0, 1)) + pixels[6:, 6:].mean(axis=(0, 1))) / 2)
    assert (drawing[0, 0] == mean).all()
    assert (drawing[-1, -1] == mean).all()
    assert (drawing[0, -1] != mean).any()


def test_borders_run_between_groups_only() -> None:
    black = Image.new("RGB", (24, 24))
    drawing = np.asarray(groups([entry(quadrants())], black, cell=CELL))
    line = (drawing == 255).all(axis=-1)
    expected = np.zeros((24, 24), dtype=bool)
    expected[11, :] = expected[:, 11] = True
    assert (line == expected).all()
    assert (drawing[~expected] == 0).all()


def test_nothing_merged_draws_every_patch() -> None:
    drawing = groups([entry(np.arange(16).reshape(4, 4))], noise(4, 4), cell=CELL)
    assert len(set(drawing.get_flattened_data() if hasattr(drawing, "get_flattened_data") else drawing.getdata())) == 17


def test_last_block_is_the_default_and_blocks_are_found_by_number() -> None:
    trace = [entry(np.arange(16), block=2), entry(quadrants(), block=5)]
    image = noise(4, 4)
    assert groups(trace, image).tobytes() == groups(trace, image, block=5).tobytes()
    assert groups(trace, image).tobytes() != groups(trace, image, block=2).tobytes()


def test_strip_holds_every_panel_and_a_caption_each() -> None:
    trace = [entry(np.arange(16), block=0), entry(quadrants(), block=1)]
    image = noise(4, 4)
    strip = groups(trace, image, block=[0, 1], cell=60)
    assert strip.size == (2 * 240 + GAP, 240 + CAPTION_HEIGHT)
    second = strip.crop((240 + GAP, CAPTION_HEIGHT, 480 + GAP, 240 + CAPTION_HEIGHT))
    assert second.tobytes() == groups(trace, image, block=1, cell=60).tobytes()
    captions = np.asarray(strip.crop((0, 0, strip.width, CAPTION_HEIGHT)))
    for panel in (captions[:, :240], captions[:, 240:]):
        assert panel.min() < 128


def test_grid_that_is_not_square() -> None:
    labels = np.repeat(np.arange(2), 4)
    image = noise(2, 4)
    with pytest.raises(ConfigError, match=r"8 patches are no square: give grid"):
        groups([entry(labels)], image)
    with pytest.raises(ConfigError, match=r"grid=\(3, 3\)"):
        groups([entry(labels)], image, grid=(3, 3))
    assert groups([entry(labels)], image, grid=(2, 4), cell=CELL).size == (24, 12)


def test_image_in_the_batch() -> None:
    both = entry(quadrants())
    both.source = torch.cat([both.source, entry(np.arange(16)).source])
    image = noise(4, 4)
    one = groups([entry(np.arange(16))], image).tobytes()
    assert groups([both], image, batch_index=1).tobytes() == one
    assert groups([both], image, batch_index=0).tobytes() != one
    for wrong in (2, -1):
        with pytest.raises(ConfigError, match=rf"batch_index={wrong}: must be in 0 … 1"):
            groups([both], image, batch_index=wrong)


def test_wrong_settings_are_named() -> None:
    image = noise(4, 4)
    with pytest.raises(ConfigError, match=r"block=7: must be one of the blocks traced: 0"):
        groups([entry(quadrants())], image, block=7)
    with pytest.raises(ConfigError, match="2 encoders"):
        groups([entry(quadrants()), entry(quadrants())], image, block=0)
    with pytest.raises(ConfigError, match="nothing to draw"):
        groups([], image)
    with pytest.raises(ConfigError, match="at least one block"):
        groups([entry(quadrants())], image, block=[])
    with pytest.raises(ConfigError, match="cell=2"):
        groups([entry(quadrants())], image, cell=2)


def test_groups_of_a_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    with turbovlm.apply(model, r=4, trace=True) as handle, torch.no_grad():
        model(pixel_values=torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
        trace = handle.trace
    for block, tokens in enumerate((13, 9, 5)):
        drawing = np.asarray(groups(trace, noise(4, 4), block=block, batch_index=1, cell=CELL))
        colors = {tuple(color) for color in drawing.reshape(-1, 3)} - {WHITE}
        assert len(colors) == tokens - 1


def ramp() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4)


def test_heatmap_without_opacity_is_the_image() -> None:
    image = noise(1, 1).resize((4, 3))
    assert heatmap(ramp(), image, opacity=0).tobytes() == image.tobytes()


def test_heatmap_runs_from_dark_to_light() -> None:
    drawing = np.asarray(heatmap(ramp(), Image.new("RGB", (4, 3)), opacity=1))
    assert tuple(drawing[0, 0]) == (0, 0, 4)
    assert tuple(drawing[-1, -1]) == (252, 255, 164)
    brightness = drawing.astype(int).sum(axis=-1).ravel()
    assert (np.diff(brightness) > 0).all()


def test_heatmap_scale_can_be_fixed() -> None:
    low = np.asarray(heatmap(ramp() / 100, Image.new("RGB", (4, 3)), opacity=1, high=11))
    assert low.astype(int).sum(axis=-1).max() < 40


def test_heatmap_outlines_the_region_above_a_share() -> None:
    values = torch.zeros(6, 6)
    values[1:5, 1:5] = 0.8
    values[2, 2] = 1
    drawing = np.asarray(heatmap(values, Image.new("RGB", (6, 6)), outline=0.5))
    white = (drawing == 255).all(axis=-1)
    rim = (values > 0).numpy()
    rim[2:4, 2:4] = False
    assert (white == rim).all()


def test_heatmap_outline_ends_at_the_edge_of_the_image() -> None:
    values = torch.zeros(4, 6)
    values[:, :3] = 1
    drawing = np.asarray(heatmap(values, Image.new("RGB", (6, 4)), outline=0.5))
    white = (drawing == 255).all(axis=-1)
    assert white[:, 2].all()
    assert white.sum() == 4


def test_heatmap_of_zeros_is_dark() -> None:
    drawing = heatmap(np.zeros((2, 2)), Image.new("RGB", (2, 2)), opacity=1, outline=0.5)
    assert drawing.getpixel((0, 0)) == (0, 0, 4)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (torch.zeros(1, 3, 4), {}, r"map of shape \(1, 3, 4\)"),
        (torch.full((2, 2), torch.nan), {}, "finite"),
        (-torch.ones(2, 2), {}, "non-negative"),
        (torch.ones(2, 2), {"opacity": 1.5}, "opacity=1.5"),
        (torch.ones(2, 2), {"outline": 0}, "outline=0"),
        (torch.ones(2, 2), {"high": 0}, "high=0"),
    ],
)
def test_heatmap_names_what_is_wrong(values: torch.Tensor, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heatmap(values, Image.new("RGB", (2, 2)), **settings)
