"""Inputs of a denoiser alone, of native size or another, as its config has them: one entry of `INPUTS` per class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turbovlm.errors import ConfigError, TurboError

PIXELS = 8
"""Pixels per side of a latent pixel, in every family that turbovlm knows."""
NATIVE = 128
"""Latent pixels per side where a config names none, as FLUX's: 1024 pixels."""


@dataclass(frozen=True)
class Request:
    """What is asked of a denoiser in one forward.

    Attributes:
        model: on its device, in its dtype.
        batch: images.
        rows, columns: of the latent, in latent pixels.
    """

    model: Any
    batch: int
    rows: int
    columns: int
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def noise(self, *shape: int) -> Tensor:
        """Seeded noise, `[batch, *shape]`."""
        made = torch.randn(self.batch, *shape, generator=self._generator)
        return made.to(self.model.device, self.model.dtype)

    def latent(self) -> Tensor:
        """Noise of the shape of the latent, `[batch, channels, rows, columns]`."""
        return self.noise(self.model.config.in_channels, self.rows, self.columns)

    def full(self, value: float) -> Tensor:
        """The same number for every image, `[batch]`."""
        return torch.full((self.batch,), value, device=self.model.device)


def denoiser_inputs(model: Any, size: tuple[int, int] | None, batch: int) -> dict[str, Any]:
    """Make seeded noise for one forward of a denoiser alone.

    Args:
        model: on its device, in its dtype.
        size: height and width of the image in pixels, 8 to a latent pixel; None for the denoiser's own.
        batch: images.

    Returns:
        Arguments of its forward, by name.

    Raises:
        ConfigError: a size that makes no whole number of tokens.
        TurboError: a class of denoisers whose inputs are not known.
    """
    kind, config = type(model).__name__, model.config
    if kind not in INPUTS:
        raise TurboError(f"{kind}: which inputs it takes is not known; give the pipeline that it is from")
    native = config.get("sample_size") or NATIVE
    rows, columns = (native, native) if isinstance(native, int) else native
    patch = FLUX_PATCH if kind == FLUX else int(config.get("patch_size") or 1)
    if size is not None:
        if any(side % (PIXELS * patch) for side in size):
            height, width = size
            raise ConfigError(
                f"--image-size {width}x{height}: {kind} takes multiples of {PIXELS * patch} pixels a side"
            )
        rows, columns = (side // PIXELS for side in size)
    return {**INPUTS[kind](Request(model, batch, rows, columns)), "return_dict": False}


def _unet(asked: Request) -> dict[str, Any]:
    config = asked.model.config
    if config.addition_embed_type not in (None, "text_time") or config.class_embed_type is not None:
        raise TurboError(
            f"UNet2DConditionModel with addition_embed_type={config.addition_embed_type!r} and "
            f"class_embed_type={config.class_embed_type!r}: which inputs it takes is not known; give the pipeline that "
            "it is from"
        )
    widths = config.encoder_hid_dim or config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": asked.latent(),
        "encoder_hidden_states": asked.noise(77, widths if isinstance(widths, int) else widths[0]),  # CLIP's text
        "timestep": asked.full(500),
    }
    if config.addition_embed_type == "text_time":  # SDXL: a vector of the text, and six numbers of the image's size
        pooled = asked.noise(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": asked.full(512)[:, None].repeat(1, 6)}
    return inputs


def _pixart(asked: Request) -> dict[str, Any]:
    sized = asked.model.use_additional_conditions
    return {
        "hidden_states": asked.latent(),
        "encoder_hidden_states": asked.noise(120, asked.model.config.caption_channels),  # T5's, as PixArt cuts it
        "timestep": asked.full(500),
        "added_cond_kwargs": {
            "resolution": asked.noise(2) if sized else None,
            "aspect_ratio": asked.noise(1) if sized else None,
        },
    }


def _dit(asked: Request) -> dict[str, Any]:
    if asked.rows != asked.columns:
        size = f"{asked.columns * PIXELS}x{asked.rows * PIXELS}"
        raise ConfigError(f"--image-size {size}: DiTTransformer2DModel makes square images only")
    return {"hidden_states": asked.latent(), "timestep": asked.full(500), "class_labels": asked.full(0).long()}


def _sd3(asked: Request) -> dict[str, Any]:
    config = asked.model.config
    return {
        "hidden_states": asked.latent(),
        "encoder_hidden_states": asked.noise(333, config.joint_attention_dim),  # CLIP's 77 and T5's 256
        "timestep": asked.full(500),
        "pooled_projections": asked.noise(config.pooled_projection_dim),
    }


def _flux(asked: Request) -> dict[str, Any]:
    model, config, words = asked.model, asked.model.config, 512
    rows, columns = asked.rows // FLUX_PATCH, asked.columns // FLUX_PATCH
    places = torch.zeros(rows, columns, 3)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return {
        "hidden_states": asked.noise(rows * columns, config.in_channels),
        "encoder_hidden_states": asked.noise(words, config.joint_attention_dim),
        "pooled_projections": asked.noise(config.pooled_projection_dim),
        "img_ids": places.view(-1, 3).to(model.device, model.dtype),
        "txt_ids": torch.zeros(words, 3, device=model.device, dtype=model.dtype),
        "guidance": asked.full(3.5).to(model.dtype) if config.guidance_embeds else None,
        "timestep": asked.full(0.5).to(model.dtype),
    }


FLUX, FLUX_PATCH = "FluxTransformer2DModel", 2
"""FLUX takes patches of 2×2 latent pixels, which the pipeline packs; its config says 1."""

INPUTS: Mapping[str, Callable[[Request], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    FLUX: _flux,
}
"""By the name of the denoiser's class."""
