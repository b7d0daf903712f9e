"""Small denoisers of `diffusers`, made of its own configs, with what their forwards take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from families import _livelier as livelier


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Watch(torch.nn.Module):
    """Calls `note(inputs, output)` of a layer, from the forward of a module in place of its own, as adapters have one.

    A hook would be another reader, which gets all tokens.
    """

    def __init__(self, layer: torch.nn.Module, note: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self._own, self._note = layer.forward, note
        layer.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self._own(x)
        self._note(x, out)
        return out


@dataclass(frozen=True)
class Denoiser:
    """How to make one, and its inputs for `batch` images of `rows`×`columns` latent pixels."""

    make: Callable[[], Any]
    inputs: Callable[[int, int, int], dict[str, Any]]

    def __call__(self) -> Any:
        torch.manual_seed(0)
        return livelier(self.make())


def words(batch: int, width: int = 32) -> torch.Tensor:
    return noise(1, batch, 7, width)


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    size = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 32}
    size |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8, "norm_num_groups": 8}
    size |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(**{**size, **settings})


def unet_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "sample": noise(0, batch, 4, rows, columns),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": words(batch),
    }


def sdxl() -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    added |= {"projection_class_embeddings_input_dim": 6 * 8 + 32, "transformer_layers_per_block": (1, 5)}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    kinds |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return unet(**added, **kinds)


def sdxl_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    added = {"text_embeds": noise(2, batch, 32), "time_ids": torch.ones(batch, 6)}
    return {**unet_inputs(batch, rows, columns), "added_cond_kwargs": added}


def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
    )


def pixart_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, batch, 4, rows, columns),
        "encoder_hidden_states": words(batch),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def dit(num_embeds_ada_norm: int = 10) -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=num_embeds_ada_norm,
    )


def dit_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, batch, 4, rows, columns),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % 10,
    }


def sd3(**settings: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=32,
        **settings,
    )


def sd3_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, batch, 4, rows, columns),
        "encoder_hidden_states": words(batch),
        "pooled_projections": noise(2, batch, 32),
        "timestep": torch.full((batch,), 500),
    }


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    rows, columns = rows // 2, columns // 2
    places = torch.zeros(rows, columns, 3)
    places[..., 1] = torch.arange(rows)[:, None]
    places[..., 2] = torch.arange(columns)
    return {
        "hidden_states": noise(0, batch, rows * columns, 16),
        "encoder_hidden_states": words(batch),
        "pooled_projections": noise(2, batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": places.view(-1, 3),
        "txt_ids": torch.zeros(7, 3),
    }


DENOISERS = {
    "sd15": Denoiser(unet, unet_inputs),
    "sdxl": Denoiser(sdxl, sdxl_inputs),
    "pixart": Denoiser(pixart, pixart_inputs),
    "dit": Denoiser(dit, dit_inputs),
    "sd3": Denoiser(sd3, sd3_inputs),
    "sd35": Denoiser(lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)), sd3_inputs),
    "flux": Denoiser(flux, flux_inputs),
}
