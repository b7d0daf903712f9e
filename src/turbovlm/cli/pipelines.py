"""Pipelines and denoisers of `diffusers` by name, with their weights or with random ones."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.cli.models import loading
from turbovlm.errors import ConfigError, TurboError
from turbovlm.loading import added_models

PREFIX = "diffusers:"
EMOJI = "zoo:emoji"
EMOJI_PROMPTS = (
    "red apple, noto, on a photo",
    "smiling cat, twemoji, on white",
    "sailboat, fluent, on a photo",
    "pizza, noto, on white",
)

LEFT_OUT = ("safety_checker", "image_encoder")
"""Components without which a pipeline makes the same pictures."""


def is_generator(spec: str) -> bool:
    """Whether a name is of image generation."""
    return spec.startswith(PREFIX) or spec == EMOJI


def load_generator(spec: str, device: str, dtype: torch.dtype, pretrained: bool) -> Any:
    """A pipeline, or a denoiser alone (an `nn.Module`), with random weights unless `pretrained`.

    Args:
        spec: `diffusers:` and a hub id or a folder, of a pipeline (model_index.json) or of a denoiser (config.json);
            or `zoo:emoji`.
        device: where to put it.
        dtype: of its weights.
        pretrained: load the weights, from the cache, the folder or the hub.

    Raises:
        TurboError: `diffusers` is not installed, does not know the model, or has no weights for it.
    """
    if not spec.startswith(PREFIX):
        prefix, _, name = spec.partition(":")
        return added_models(prefix).load_pipeline(name, pretrained).to(device, dtype)
    with loading(spec, "diffusers"):
        where = spec.removeprefix(PREFIX)
        if where.startswith((".", "/", "~")):
            where = str(Path(where).expanduser())
            if not Path(where).is_dir():
                raise TurboError(f"{spec!r}: there is no such folder")
        made = _pretrained(where, dtype) if pretrained else _random(where, device, dtype)
        return made.eval().to(device) if isinstance(made, nn.Module) else made.to(device)


def _index(where: str) -> dict[str, Any] | None:
    """What model_index.json says; None where there is a config.json in its place."""
    from diffusers import DiffusionPipeline

    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(where)
    except OSError as error:
        try:
            _config(where)
        except OSError:
            reason = textwrap.shorten(str(error), 120, placeholder=" …")
            raise TurboError(
                f"{where}: neither a pipeline's model_index.json nor a denoiser's config.json can be read: {reason}"
            ) from error
        return None
    return index


def _config(where: str) -> dict[str, Any]:
    from diffusers import AutoModel

    config: dict[str, Any] = AutoModel.load_config(where)
    return config


def _pretrained(where: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    index = _index(where)
    if index is None:
        return _named("diffusers", _config(where)["_class_name"]).from_pretrained(where, torch_dtype=dtype)
    without = {name: None for name in LEFT_OUT if name in index}
    return DiffusionPipeline.from_pretrained(where, torch_dtype=dtype, **without)


def _random(where: str, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    index = _index(where)
    if index is None:
        config = _config(where)
        with _building(device, dtype):
            return _named("diffusers", config["_class_name"]).from_config(config)
    pipeline = _named("diffusers", index["_class_name"])
    known = inspect.signature(pipeline.__init__).parameters
    given = {name: value for name, value in index.items() if name in known and not name.startswith("_")}
    named = {name: value for name, value in given.items() if isinstance(value, list | tuple)}
    absent = {name: None for name, value in named.items() if name in LEFT_OUT or value[0] is None}
    kinds = {name: _named(*value) for name, value in named.items() if name not in absent}
    parts = {name: _component(where, name, kind, device, dtype) for name, kind in kinds.items()}
    return pipeline(**{**given, **absent, **parts})


def _component(where: str, name: str, kind: Any, device: str, dtype: torch.dtype) -> Any:
    """A model by its config alone; a tokenizer, a scheduler and so on as it is."""
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(where, subfolder=name)
    if hasattr(kind, "config_class"):  # of transformers
        config = kind.config_class.from_pretrained(where, subfolder=name)
        with _building(device, dtype):
            return kind(config).eval()
    config = kind.load_config(where, subfolder=name)
    with _building(device, dtype):
        return kind.from_config(config).eval()


def _named(library: str, name: str) -> Any:
    if library not in ("diffusers", "transformers"):
        raise TurboError(f"{library}.{name}: only classes of diffusers and transformers are built with random weights")
    found = getattr(importlib.import_module(library), name, None)
    if not isinstance(found, type):
        raise TurboError(f"{library} has no class {name!r}")
    return found


@contextlib.contextmanager
def _building(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


PIXELS = 8
"""A side of a latent pixel, in every family that turbovlm knows."""
WORDS = {"UNet2DConditionModel": 77, "PixArtTransformer2DModel": 120, "SD3Transformer2DModel": 333}
"""Tokens of a text, by the denoiser that reads them; FLUX reads 512."""


def denoiser_inputs(model: Any, size: tuple[int, int] | None, batch: int) -> dict[str, Any]:
    """Seeded noise for one forward of a denoiser alone, as its config has it.

    Args:
        model: on its device, in its dtype.
        size: height and width of the picture in pixels, 8 to a latent pixel; None for the denoiser's own.
        batch: pictures.

    Raises:
        ConfigError: a size that makes no whole number of tokens.
        TurboError: a kind of denoiser whose inputs are not known.
    """
    config, kind = model.config, type(model).__name__
    native = config.get("sample_size") or 128
    rows, columns = (native, native) if isinstance(native, int) else native
    patch = 2 if kind == "FluxTransformer2DModel" else int(config.get("patch_size") or 1)
    if size is not None:
        if any(side % (PIXELS * patch) for side in size):
            height, width = size
            raise ConfigError(
                f"--image-size {width}x{height}: {kind} takes multiples of {PIXELS * patch} pixels a side"
            )
        rows, columns = (side // PIXELS for side in size)
    if kind == "DiTTransformer2DModel" and rows != columns:
        raise ConfigError(f"--image-size {columns * PIXELS}x{rows * PIXELS}: {kind} makes square pictures only")
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)

    def all_of(value: float) -> Tensor:
        return torch.full((batch,), value, device=model.device)

    latent = {"hidden_states": noise(config.in_channels, rows, columns)}
    times = {"timestep": all_of(500), "return_dict": False}
    words = WORDS.get(kind, 512)
    added_is_known = config.get("addition_embed_type") in (None, "text_time")
    if kind == "UNet2DConditionModel" and added_is_known and config.class_embed_type is None:
        text = {"encoder_hidden_states": noise(words, config.encoder_hid_dim or _width(config.cross_attention_dim))}
        added: dict[str, Any] = {}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"added_cond_kwargs": {"text_embeds": noise(pooled), "time_ids": all_of(512)[:, None].repeat(1, 6)}}
        return {"sample": latent["hidden_states"], **text, **times, **added}
    if kind == "PixArtTransformer2DModel":
        sized = model.use_additional_conditions
        sizes = {"resolution": noise(2) if sized else None, "aspect_ratio": noise(1) if sized else None}
        text = {"encoder_hidden_states": noise(words, config.caption_channels)}
        return {**latent, **text, **times, "added_cond_kwargs": sizes}
    if kind == "DiTTransformer2DModel":
        return {**latent, **times, "class_labels": all_of(0).long()}
    if kind == "SD3Transformer2DModel":
        text = {"encoder_hidden_states": noise(words, config.joint_attention_dim)}
        return {**latent, **text, **times, "pooled_projections": noise(config.pooled_projection_dim)}
    if kind == "FluxTransformer2DModel":
        rows, columns = rows // patch, columns // patch
        places = torch.zeros(rows, columns, 3)
        places[..., 1], places[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        return {
            "hidden_states": noise(rows * columns, config.in_channels),
            "encoder_hidden_states": noise(words, config.joint_attention_dim),
            "pooled_projections": noise(config.pooled_projection_dim),
            "img_ids": places.view(-1, 3).to(model.device, model.dtype),
            "txt_ids": torch.zeros(words, 3, device=model.device, dtype=model.dtype),
            "guidance": all_of(3.5).to(model.dtype) if config.guidance_embeds else None,
            **times,
            "timestep": all_of(0.5).to(model.dtype),
        }
    raise TurboError(f"{kind}: which inputs it takes is not known; give the pipeline that it is from")


def _width(widths: int | list[int]) -> int:
    return widths if isinstance(widths, int) else widths[0]
