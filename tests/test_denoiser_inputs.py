"""Inputs of a denoiser alone follow from its config: in every family, of the size that is asked for."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from turbovlm import ConfigError, TurboError
from turbovlm.diffusion.families import FAMILIES
from turbovlm.diffusion.grids import OfPositions
from turbovlm.diffusion.inputs import INPUTS, denoiser_inputs, denoiser_request

pytest.importorskip("diffusers")

from denoisers import DENOISERS
from frame_denoisers import FRAMED
from image_denoisers import IMAGE_DENOISERS
from video_denoisers import VIDEOS

FRAMES = {f"{name}, frames": FRAMED[name] for name in ("animatediff", "stable-video")}
ALL = {**DENOISERS, **IMAGE_DENOISERS, **{f"{name}, video": make for name, make in VIDEOS.items()}, **FRAMES}
ROWS, COLUMNS = 12, 16
SQUARE = "dit", "hidream"
BY_VALUES = {"glm", "lumina2", "hidream", "qwen 2.1", "hunyuan-1.5, video", "mochi, video"}
"""Models whose own forwards look at values, which the meta device has none of."""


def asked(name, model):
    """A size of 12×16 tokens, and frames for three latent ones; those of `SQUARE` are square."""
    entry = INPUTS[type(model).__name__]
    side = entry.pixels_of(model.config) * entry.patch_of(model.config)[1]
    frames = None if entry.stride is None else max(entry.first, entry.least) + 2 * entry.stride
    return (ROWS * side, (ROWS if name in SQUARE else COLUMNS) * side), frames


def test_every_denoiser_of_diffusers_that_merges_has_an_entry():
    holders = {path.rpartition(".")[2] for family in FAMILIES if not family.roots for path in family.holders}
    inside = {"Transformer2DModel", "TransformerSpatioTemporalModel"}  # of UNets
    assert {name for name in holders - inside if "ControlNet" not in name} <= INPUTS.keys()


@pytest.mark.parametrize("name", ALL)
def test_a_forward_of_the_size_that_is_asked_for(name):
    model = ALL[name]()
    size, frames = asked(name, model)
    grid = denoiser_request(model, size, 2, frames).grid
    assert grid[1:] == (ROWS, ROWS if name in SQUARE else COLUMNS)
    assert (grid[0] == 1) == (frames is None) or "refiner" in name
    inputs = denoiser_inputs(model, size, 2, frames)
    with torch.no_grad():
        out = model(**inputs)[0]
    assert len(next(iter(inputs.values()))) == 2 and all(each.isfinite().all() for each in out)
    if name == "sdxl":  # whose first resolution has no blocks, and the next too few tokens
        return
    with turbovlm.apply(model, keep=0.5) as handle, torch.no_grad():
        model(**inputs)
        first = next(choice for choice in handle.features[0].last.values() if choice.merge is not None)
    tokens = (1 if name in FRAMES else grid[0]) * grid[1] * grid[2]  # there each frame is a sequence of its own
    assert (first.tokens, first.merge.sizes.shape[1]) == (tokens, tokens // 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALL.keys() - BY_VALUES))
def test_multiply_accumulates_on_the_meta_device_are_those_of_a_forward(name):
    model = ALL[name]()
    size, frames = asked(name, model)

    def counted(**settings):
        inputs = denoiser_inputs(model, size, 1, frames)
        plain = turbovlm.profile.macs(model, **inputs)
        with turbovlm.apply(model, keep=0.5, **settings):
            return plain, turbovlm.profile.macs(model, **inputs)

    real = counted()
    by_places = any(isinstance(holder.grid, OfPositions) for holder in holders_of(model))
    model.to("meta")
    assert counted(**({"grid": (ROWS, COLUMNS)} if by_places else {})) == real


def holders_of(model):
    with turbovlm.apply(model, keep=0.5) as handle:
        return [holder for _, holder in handle.features[0].holders]


def test_sizes_that_make_no_whole_number_of_tokens():
    flux, wan = DENOISERS["flux"](), VIDEOS["wan"]()
    with pytest.raises(ConfigError, match="--image-size 136x128: FluxTransformer2DModel takes multiples of 16 pixels"):
        denoiser_inputs(flux, (128, 136), 1)
    with pytest.raises(ConfigError, match="--frames 9: FluxTransformer2DModel makes images"):
        denoiser_inputs(flux, None, 1, 9)
    with pytest.raises(ConfigError, match="--frames 8: WanTransformer3DModel takes 1 and multiples of 4 more"):
        denoiser_inputs(wan, None, 1, 8)
    with pytest.raises(ConfigError, match="square images only"):
        denoiser_inputs(DENOISERS["dit"](), (128, 192), 1)
    animate = VIDEOS["animate"]()
    with pytest.raises(ConfigError, match="--frames 1: WanAnimateTransformer3DModel takes 5 and multiples of 4 more"):
        denoiser_inputs(animate, None, 1, 1)


def test_native_sizes():
    assert denoiser_request(DENOISERS["flux"](), None, 1).grid == (1, 64, 64)
    assert denoiser_request(IMAGE_DENOISERS["hunyuan"](), None, 1).grid == (1, 32, 32)
    assert denoiser_request(VIDEOS["wan"](), None, 1).grid == (21, 30, 52)
    assert denoiser_request(VIDEOS["cogvideox"](), None, 1).grid == (3, 7, 5)
    assert denoiser_request(VIDEOS["allegro"](), None, 1).grid == (3, 7, 5)


def test_a_class_that_is_not_known():
    import diffusers

    with pytest.raises(TurboError, match="AutoencoderKL: which inputs it takes is not known"):
        denoiser_inputs(diffusers.AutoencoderKL(), None, 1)
