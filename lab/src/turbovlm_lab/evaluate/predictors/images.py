"""Text-to-image, also from images: what a `diffusers` pipeline makes, as features to compare with real ones'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbovlm.errors import ConfigError
from turbovlm.loading import ModelSpec, library_errors
from turbovlm.loading.pipelines import load_pipeline
from turbovlm.profile.pipelines import find_denoiser
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import LazyImage, Sample
from turbovlm_lab.evaluate.run import Predictor

Features = Callable[[Sequence[Any]], Tensor]
"""Images, as PIL has them, to `[images, width]`."""


@dataclass(frozen=True)
class Making:
    """How images are made.

    Attributes:
        steps: of denoising; the pipeline's own if None.
        guidance: its scale; the pipeline's own if None.
        seed: of the first sample; each next has the next.
        folder: where images are kept, as PNG; nowhere if None.
        strength: an image begins as its sample's, noised as far as this share of the steps takes away, in (0, 1];
            as noise if None.

    Raises:
        ConfigError: a strength outside of that.
    """

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    folder: Path | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"strength={self.strength!r}: must be a number in (0, 1]")


DEFAULT = Making()


def text_to_image(spec: AskedModel, samples: Sequence[Sample], making: Making, features: Features) -> Predictor:
    """The features of each prompt's image. A sample's image is the same in every batch and every run.

    Raises:
        TurboError: there is no such pipeline.
    """
    named = ModelSpec(f"diffusers:{spec.name}", spec.device, spec.dtype)
    pipe = load_pipeline(named, pretrained=True, without=())  # a safety checker is part of what is evaluated
    return made_by(pipe, samples, making, features)


def made_by(pipe: Any, samples: Sequence[Sample], making: Making, features: Features) -> Predictor:
    """The same, of a pipeline that is there."""
    pipe.set_progress_bar_config(disable=True)
    seeds = {sample.id: making.seed + number for number, sample in enumerate(samples)}
    given = {"num_inference_steps": making.steps, "guidance_scale": making.guidance, "strength": making.strength}
    settings = {name: value for name, value in given.items() if value is not None}

    make, side = (pipe, 0) if making.strength is None else (_from_images(pipe), _side(pipe))

    def prepare(sample: Sample, image_size: int | None) -> tuple[str, int, int | None, Any]:
        begin = None if making.strength is None else _fitted(sample.images[0], side)
        return sample.text, seeds[sample.id], image_size, begin

    @torch.inference_mode()
    def predict(prepared: list[tuple[str, int, int | None, Any]]) -> list[Any]:
        size: dict[str, Any] = {} if prepared[0][2] is None else {"height": prepared[0][2], "width": prepared[0][2]}
        if making.strength is not None:
            size = {"image": [begin for *_, begin in prepared]}
        generators = [torch.Generator().manual_seed(seed) for _, seed, *_ in prepared]
        made = make([text for text, *_ in prepared], generator=generators, **settings, **size).images
        if making.folder is not None:
            for image, (_, seed, *_) in zip(made, prepared):
                image.save(making.folder / f"{seed:06d}.png")
        found: list[Any] = features(made).tolist()
        return found

    return Predictor(pipe, prepare, predict)


def _from_images(pipe: Any) -> Any:
    """A pipeline of the same modules that begins with images."""
    import diffusers

    made = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


def _side(pipe: Any) -> int:
    """Pixels a side of the images that a pipeline makes unless told otherwise."""
    denoiser: Any = find_denoiser(pipe)
    return int(denoiser.config.sample_size * pipe.vae_scale_factor)


def _fitted(image: LazyImage, side: int) -> Any:
    from PIL import ImageOps

    return ImageOps.fit(image.open(), (side, side))


def features_named(name: str, device: str = "cpu") -> Features:
    """`"inception"` for FID, whose weights torch-fidelity fetches; `"vit"` for the ViT-S/14 of `turbovlm_lab.zoo`.

    Raises:
        ConfigError: none of these.
        TurboError: the weights are not there.
    """
    if name == "vit":
        return _vit_features(device)
    if name == "inception":
        return _inception_features(device)
    raise ConfigError(f"features={name!r}: must be one of inception, vit")


def features_of(images: Sequence[LazyImage], features: Features, batch: int = 32) -> Tensor:
    """Of images that are read batch by batch."""
    read = (images[start : start + batch] for start in range(0, len(images), batch))
    return torch.cat([features([image.open() for image in some]) for some in read])


def _vit_features(device: str) -> Features:
    """CLS after block 10 of images of 112 pixels."""
    from turbovlm_lab.zoo import preprocess
    from turbovlm_lab.zoo.reader import scene_encoder

    encoder = scene_encoder().to(device)

    @torch.inference_mode()
    def vit(images: Sequence[Any]) -> Tensor:
        pixels = preprocess([image.convert("RGB") for image in images], 112).to(device)
        cls: Tensor = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 0]
        return cls.cpu()

    return vit


def _inception_features(device: str) -> Features:
    with library_errors(ModelSpec("torchmetrics:FID")):
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = FrechetInceptionDistance(feature=2048).inception.eval().to(device)

    @torch.inference_mode()
    def inception(images: Sequence[Any]) -> Tensor:
        import numpy as np

        pixels = [torch.from_numpy(np.asarray(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        found: list[Tensor] = [network(each[None].to(device)).float().cpu() for each in pixels]
        return torch.cat(found)

    return inception
