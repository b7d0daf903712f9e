"""Encoders by name, built from their config alone or with their weights."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

from turbovlm.encoder.layout import fetch
from turbovlm.encoder.towers import find_towers
from turbovlm.errors import TurboError
from turbovlm.loading.spec import ModelSpec, library_errors, load_added, running, without_remarks
from turbovlm.registry import family_of
from turbovlm.vlm.families import native_pixels

MODEL_HELP = (
    "a transformers hub id, a folder with a config.json, or timm:NAME, torchvision:NAME, open_clip:NAME; "
    "weights are neither needed nor fetched"
)


def load_model(spec: ModelSpec, image_size: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """Build a model from its config, in eval mode, with random weights unless `pretrained`.

    Args:
        spec: see `MODEL_HELP`; or a model that another package brings.
        image_size: pixels per side, instead of the model's own.
        pretrained: load the weights as the library does: from its cache, the folder, or the hub.

    Raises:
        TurboError: the library is not installed, or does not know the model, or has no weights for it.
    """
    added = spec.added
    if spec.makes_images:
        raise TurboError(f"{spec.text}: makes images, and is no encoder; turbovlm inspect says what it costs")
    if added is not None:
        model: nn.Module = load_added(spec, added, pretrained)
        if image_size is not None:
            if not added.any_size:
                raise TurboError(f"--image-size {image_size}: {spec.text} takes images of its own size only")
            model.config.image_size = image_size  # type: ignore[union-attr]
        return model
    if spec.library not in BUILDERS:
        raise TurboError(f"{spec.text}: {spec.library!r} is none of {', '.join(BUILDERS)}")
    # On its device at once: a model on the meta device takes no memory.
    built_on = contextlib.nullcontext() if pretrained else torch.device(spec.device)
    quiet = contextlib.nullcontext() if pretrained else without_remarks()
    with library_errors(spec), quiet, built_on:
        return BUILDERS[spec.library](spec.name, image_size, pretrained).eval().to(spec.device, spec.dtype)


def load_outline(spec: ModelSpec, image_size: int | None = None) -> nn.Module | None:
    """Build a model on the meta device, which takes no memory, and see that each of its encoders runs.

    Returns:
        The model; None where it can only be had with its weights.

    Raises:
        TurboError: see `load_model` and `check_runs`.
        UnsupportedModelError: nothing in the model can be accelerated.
    """
    if spec.added is not None or (spec.name.startswith(("hf-hub:", "local-dir:")) and spec.library == "open_clip"):
        return None
    model = load_model(dataclasses.replace(spec, device="meta"), image_size)
    check_runs(spec.text, model, "meta")
    return model


def check_runs(name: str, model: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Run every encoder once, unmerged, on one image: what its library has against the model is said before ours.

    On the meta device only shapes are seen, and an encoder whose sequence depends on values is left out.

    Args:
        name: of the model, for the message.
        model: with encoders that turbovlm knows.
        device, dtype: of the model.

    Raises:
        TurboError: one does not run, as with a size that its patches do not divide.
        UnsupportedModelError: nothing in the model can be accelerated.
    """
    for tower in find_towers(model):
        if device == "meta" and (tower.layout.joint or tower.layout.packed):
            continue
        inputs = tower.random_inputs(1, dtype, device)
        with running(name), torch.no_grad(), as_far_as_shapes_go():
            tower.module(**inputs)


def check_reads(name: str, model: nn.Module, pixels: int | None) -> None:
    """Let what a language model reads of an image be computed once, unmerged, on the meta device.

    Args:
        name: of the model, for the message.
        model: on the meta device.
        pixels: a side of the image; None for the size that the vision encoder is made for.

    Raises:
        TurboError: the library cannot compute it, as with a config that makes no token of an image.
    """
    part: Any
    for part in model.modules():
        family = family_of("vlm", part)
        if family is None:
            continue
        if family.packed or family.cross_attention:  # these read values, of which the meta device has none
            return
        if family.guide is None or family.per_token is not None:  # these read more than pixels
            return
        side = native_pixels(family, part) if pixels is None else pixels
        image = torch.empty(1, 3, side, side, device="meta")
        with running(name, f"read an image of {side}x{side} pixels"), torch.no_grad(), as_far_as_shapes_go():
            tower: Any = fetch(part, family.tower)
            tower(pixel_values=image)
            if family.per_image is None and not family.rearrange:  # these take several tiles of an image
                part.get_image_features(pixel_values=image)
        return


WITHOUT_VALUES = ("meta tensor", "register_meta", "device_type 'meta'")
"""What PyTorch says where something asks for a value on the meta device."""


@contextlib.contextmanager
def as_far_as_shapes_go() -> Iterator[None]:
    """End where a forward asks for a value, which tensors on the meta device have not."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if not any(said in str(error).lower() for said in WITHOUT_VALUES):
            raise


def _transformers(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if image_size is not None:
        vision = getattr(config, "vision_config", config)
        if not hasattr(vision, "image_size"):
            raise TurboError(f"--image-size {image_size}: a {type(vision).__name__} has no image size")
        vision.image_size = image_size
    _check_config(config)
    architecture = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    if pretrained:
        model: nn.Module = architecture.from_pretrained(name, config=config)
    elif architecture is transformers.AutoModel:
        model = architecture.from_config(config)
    else:
        model = architecture(config)
    return model


def _check_config(config: Any) -> None:
    """Refuse sizes that no model has, which libraries take and fail with later."""
    for part in (config, getattr(config, "vision_config", None)):
        for name in ("image_size", "patch_size", "num_channels"):
            value = getattr(part, name, None)
            sizes = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(size, int) and size < 1 for size in sizes):
                raise TurboError(f"{config.name_or_path}: its config has {name}={value}; must be an integer ≥ 1")


def _timm(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    import timm

    size = {} if image_size is None else {"img_size": image_size}
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **size)
    return model


def _torchvision(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    from torchvision import models

    settings: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        settings["weights_backbone"] = None
    model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **settings)
    return model


def _open_clip(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    import open_clip

    if pretrained != name.startswith(("hf-hub:", "local-dir:")):
        form = "hf-hub:ID or local-dir:FOLDER, which have weights" if pretrained else "the architecture's name"
        raise TurboError(f"open_clip:{name}: for {'pretrained' if pretrained else 'random'} weights give {form}")
    model: nn.Module = open_clip.create_model(
        name,
        load_weights=pretrained,
        pretrained_text=False,
        force_image_size=image_size,
        device=str(torch.get_default_device()),
    )
    return model


BUILDERS: dict[str, Callable[[str, int | None, bool], nn.Module]] = {
    "transformers": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
"""By library: `(name, image_size, pretrained)` to the model."""
