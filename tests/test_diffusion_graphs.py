"""Compiled denoisers that serve many sizes: no more graphs than without merging, and what eager gives."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import turbovlm
from turbovlm.diffusion import grids
from turbovlm.diffusion.grids import grids_at

pytest.importorskip("diffusers")
SIZES = ((16, 16), (24, 16), (16, 24), (24, 32), (32, 32), (26, 38))


def small_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def small_flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def of_unet(rows, columns):
    generator = torch.Generator().manual_seed(rows * columns)
    draw = [torch.randn(2, *shape, generator=generator) for shape in ((4, rows, columns), (7, 32))]
    return {"sample": draw[0], "timestep": torch.tensor(500), "encoder_hidden_states": draw[1]}


def of_flux(rows, columns):
    generator = torch.Generator().manual_seed(rows * columns)
    shapes = (rows * columns, 8), (7, 32), (32,)
    draw = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return {
        "hidden_states": draw[0],
        "encoder_hidden_states": draw[1],
        "pooled_projections": draw[2],
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def graphs_of(model, inputs, sizes, **settings):
    """How many graphs a compiled model needs for all sizes; each result is eager's."""
    torch._dynamo.reset()
    handle = turbovlm.apply(model, **settings) if settings else None
    expected = [model(**inputs(*size)).sample for size in sizes]
    model.compile(backend="eager", fullgraph=True)
    counters.clear()
    for size, wanted in zip(sizes, expected):
        assert torch.allclose(model(**inputs(*size)).sample, wanted, atol=1e-5), size
    if handle is not None:
        handle.remove()
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        pytest.param({"keep": (0.5, 0.6)}, 0),
        # of images so small that fewer than 32 tokens go, the regression sees fewer
        pytest.param({"keep": 0.7}, 1, marks=pytest.mark.slow),
        pytest.param({"keep": 0.5, "scope": "part", "degree": "weighted_difference"}, 0, marks=pytest.mark.slow),
        pytest.param({"keep": 0.5, "reduce": "prune", "restore": "copy"}, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_unet_of_many_sizes_has_its_own_three_graphs(settings, more):
    assert graphs_of(small_unet(), of_unet, SIZES) == 3
    assert graphs_of(small_unet(), of_unet, SIZES, **settings) == 3 + more


@torch.no_grad()
@pytest.mark.slow
def test_flux_of_many_sizes_has_its_own_graphs():
    """Of 64 tokens each the second and third: positions tell them from a square."""
    sizes = [(8, 8), (4, 16), (16, 4), (12, 10), (10, 14), (7, 13)]
    assert graphs_of(small_flux(), of_flux, sizes, keep=0.5) == graphs_of(small_flux(), of_flux, sizes)


@torch.no_grad()
def test_positions_are_looked_at_once(monkeypatch):
    """A look waits for all that a GPU has to do: pipelines give every step the same tensor."""
    model, inputs, looks = small_flux(), of_flux(8, 12), []
    monkeypatch.setattr(grids, "grids_at", lambda *given: looks.append(given) or grids_at(*given))
    with turbovlm.apply(model, keep=0.5) as handle:
        for _ in range(3):
            model(**inputs)
        assert len(looks) == 1
        inputs["img_ids"].copy_(of_flux(12, 8)["img_ids"])
        model(**inputs)
        assert len(looks) == 2 and next(iter(handle.features[0].last.values())).grids == ((1, 12, 8),)
