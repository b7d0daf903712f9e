"""Subjects that are folders of `transformers`, named on the command line: classifiers, and encoders without labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.calibration.outputs import default_measure, measured_parts
from turbovlm.encoder.towers import find_towers
from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.loading import ModelSpec, running
from turbovlm.loading.processors import load_with_processor, size_arguments, transformers_class
from turbovlm_lab.studio.encoders import ImageEncoder
from turbovlm_lab.studio.subjects import IMAGE, Sample, Subject

if TYPE_CHECKING:
    from PIL.Image import Image


def folder_subject(folder: Path) -> Subject:
    """A folder as a subject; its weights are loaded when it is used."""
    name = folder.name or str(folder.resolve().name)
    return Subject(
        key=f"folder-{name}",
        title=f"{name} · your model",
        about=f"The model in {folder}.",
        takes=IMAGE,
        load=functools.partial(_load, folder),
        amounts={"flops": 0.6, "keep": 0.4, "r": 4.0},
        encodes=True,
    )


def _load(folder: Path) -> ImageEncoder:
    """The model of a folder.

    Raises:
        TurboError: it cannot be loaded, or takes no images.
        UnsupportedModelError: nothing in it can be accelerated, or it has several encoders.
    """
    spec = ModelSpec(str(folder))
    model, processor = load_with_processor(spec, transformers_class(spec))
    towers = find_towers(model)
    if len(towers) != 1:
        found = ", ".join(tower.name or "the model itself" for tower in towers) or "none"
        raise UnsupportedModelError(f"{folder}: the studio shows models of one encoder of images; it has {found}")
    config: Any = getattr(model.config, "vision_config", model.config)
    side, patch = _pixels(getattr(config, "image_size", 224)), _pixels(getattr(config, "patch_size", 16))
    image_processor = getattr(processor, "image_processor", processor)
    measure = default_measure(model)

    def prepare(images: Sequence[Image], size: int) -> dict[str, Tensor]:
        given = size_arguments(image_processor, None if size == side else size, str(folder))
        return {"pixel_values": image_processor(images=list(images), return_tensors="pt", **given)["pixel_values"]}

    def encode(version: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Logits, the embedding, or every position's token, `[images, values]`."""
        with running(str(folder)):
            parts = measured_parts(measure, version, inputs)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    with running(str(folder)), torch.inference_mode():
        tried = measured_parts(measure, model, {"pixel_values": torch.zeros(1, 3, side, side)})
    gives_tokens = any(part.shape[1] > 1 for part in tried)

    labels = getattr(model.config, "id2label", None) if "Classification" in type(model).__name__ else None

    def answer(sample: Sample, output: Tensor) -> dict[str, Any]:
        if not labels or output.shape[1] != len(labels):
            return {}
        shares = output[0].softmax(dim=0).tolist()
        return {"labels": {f"{labels[place]}": share for place, share in enumerate(shares)}}

    notes = () if labels else ("It has no labels: what it gives is compared by drift alone.",)
    return ImageEncoder(
        *(model, side, patch, prepare, encode, answer, "the model"),
        notes=notes,
        fixed={"dense": True} if gives_tokens else {},
        shown=lambda pixels: shown(pixels["pixel_values"][0], image_processor),
    )


def shown(pixels: Tensor, processor: Any) -> Image:
    """An image as a model gets it, `[3, height, width]`, with its processor's mean and deviation put back."""
    from PIL import Image as pillow

    mean, deviation = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or deviation is None:
        values = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
    else:
        values = pixels * torch.tensor(deviation).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    return pillow.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _pixels(size: Any) -> int:
    """Per side; of a config that has both sides, where they are one.

    Raises:
        ConfigError: they are not.
    """
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise ConfigError(f"the studio shows models of square images; this one's are {size}")
    return sides[0]
