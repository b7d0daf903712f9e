"""Subjects that encode an image: CLIP, which names it, and a ViT that finds what stands out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

import turbovlm
from turbovlm.config import Config, TurboConfig
from turbovlm.errors import ConfigError
from turbovlm.sharing import twin
from turbovlm_lab.studio.measuring import Times, counted, drift_of, timed_in_turn
from turbovlm_lab.studio.photos import demo_photos
from turbovlm_lab.studio.subjects import IMAGE, Answer, Loaded, Outcome, Sample, Subject, View, packages
from turbovlm_lab.zoo import clip, minilm, saliency

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm.encoder.state import BlockTrace

KEPT = 8
"""Samples of which the unmerged result is kept."""


@dataclass(frozen=True, eq=False)
class _Whole:
    """A sample, prepared, and what the unmerged model makes of it."""

    pixels: Any
    output: Tensor
    gmacs: float


class ImageEncoder(Loaded):
    """An encoder of images with its weights; see `turbovlm_lab.studio.subjects.Encodes`.

    Args:
        model: the encoder.
        side, patch: pixels per side of its images and of its patches.
        prepare: RGB images and pixels per side → its input.
        encode: a model and an input → what drift is measured on, `[images, …]`.
        answer: of a sample and what `encode` gave, in words or as a picture: fields of `Answer`.
        mean: of `encode`'s outputs over other images, for the centred drift; `notes`: see `Outcome`.
        shown: its input of one image → the image as the model saw it; None where that is the centre square.
        measured: what `encode` runs, for the reader.
    """

    def __init__(
        self,
        model: nn.Module,
        side: int,
        patch: int,
        prepare: Callable[[Sequence[Image], int], Any],
        encode: Callable[[nn.Module, Any], Tensor],
        answer: Callable[[Sample, Tensor], dict[str, Any]],
        measured: str,
        mean: Callable[[ImageEncoder], Tensor] | None = None,
        notes: tuple[str, ...] = (),
        shown: Callable[[Any], Image] | None = None,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self.model: Any = model
        self.fixed = dict(fixed or {})
        self.side, self.patch, self.encode, self.measured = side, patch, encode, measured
        self._prepare, self._answer, self._mean_of, self._notes, self._shown = prepare, answer, mean, notes, shown
        self._mean: Tensor | None = None
        self._merged = twin(model)
        with turbovlm.apply(self._merged, r=0) as handle:
            self.depth = len(handle.schedules[0].tokens) - 1
        self._wholes: OrderedDict[str, _Whole] = OrderedDict()

    def prepare(self, images: Sequence[Image], side: int | None = None) -> Any:
        return self._prepare(images, self.side if side is None else side)

    def seen(self, image: Image) -> Image:
        if self._shown is not None:
            return self._shown(self.prepare([image]))
        return saliency.centre_square(image).resize((self.side, self.side))

    @torch.inference_mode()
    def run(self, sample: Sample, configs: Sequence[Config]) -> Outcome:
        whole, model = self._whole(sample), self._merged
        answer = self._answer(sample, whole.output)  # what is wrong with the words is said first
        config = next(config for config in configs if isinstance(config, TurboConfig))
        with turbovlm.apply(model, config) as handle:
            output, gmacs = counted(lambda: self.encode(model, whole.pixels))
            said = repr(handle)
        with turbovlm.apply(model, config.changed(trace=True)) as handle:
            self.encode(model, whole.pixels)  # by itself: to record A takes multiply-accumulates
            traces = tuple(handle.trace)
        view, tokens = self._view(sample.image, traces)
        return Outcome(
            unmerged=Answer(whole.gmacs, (tokens[0],) * len(tokens), **answer),
            merged=Answer(gmacs, tokens, **self._answer(sample, output)),
            measured=self.measured,
            time=lambda: self._time(whole.pixels, configs),
            said=said,
            drift=drift_of(output, whole.output),
            centred=None if self.mean is None else drift_of(output, whole.output, self.mean),
            view=view,
            notes=self._notes,
        )

    @torch.inference_mode()
    def _time(self, pixels: Any, configs: Sequence[Config]) -> list[Times]:
        with turbovlm.apply(self._merged, *configs):
            self.encode(self._merged, pixels)  # the first forward plans
            return timed_in_turn([lambda: self.encode(self.model, pixels), lambda: self.encode(self._merged, pixels)])

    @property
    def mean(self) -> Tensor | None:
        """Of outputs over the built-in images."""
        if self._mean is None and self._mean_of is not None:
            self._mean = self._mean_of(self)
        return self._mean

    def _whole(self, sample: Sample) -> _Whole:
        if sample.image is None:
            raise ConfigError("image: choose one, or upload one")
        if sample.key not in self._wholes:
            pixels = self.prepare([sample.image])
            output, gmacs = counted(lambda: self.encode(self.model, pixels))
            self._wholes[sample.key] = _Whole(pixels, output, gmacs)
            while len(self._wholes) > KEPT:
                self._wholes.popitem(last=False)
        return self._wholes[sample.key]

    def _view(self, image: Image | None, traces: tuple[BlockTrace, ...]) -> tuple[View | None, tuple[int, ...]]:
        """What is drawn of a traced forward, and the tokens in front of the first block and behind each."""
        first = traces[0]
        patches = first.source.shape[1] - first.prefix - first.suffix
        tokens = (first.source.shape[1], *(trace.sizes.shape[1] for trace in traces))
        assert image is not None
        shown = self.seen(image)
        columns = round((patches * shown.width / shown.height) ** 0.5)
        rows = patches // columns
        return (View(shown, (rows, columns), traces) if rows * columns == patches else None), tokens


LABELS = "astronaut, cat, cup of coffee, rocket, motorcycle, temple, flower, dog, castle, bicycle"


def labels_in(words: str) -> list[str]:
    """Labels, separated by commas.

    Raises:
        ConfigError: fewer than two different ones, or too many.
    """
    labels = list(dict.fromkeys(" ".join(label.split()) for label in words.split(",") if label.strip()))
    if len({label.lower() for label in labels}) < len(labels) or len(labels) < 2:
        raise ConfigError('labels: give at least two different ones, separated by commas: "cat, dog, beach"')
    if len(labels) > 200:
        raise ConfigError(f"labels: {len(labels)} are too many; give at most 200")
    return labels


def _load_clip() -> ImageEncoder:
    from turbovlm_lab.zoo.clip_text import load_clip_text

    texts = load_clip_text()
    known: dict[tuple[str, ...], Any] = {}

    def answer(sample: Sample, output: Tensor) -> dict[str, Any]:
        labels = tuple(labels_in(sample.words))
        if labels not in known:
            known.clear()
            known[labels] = texts.names(labels)
        shares = known[labels].probabilities(output)[0].tolist()
        return {"labels": dict(zip(labels, shares))}

    return ImageEncoder(
        clip.load_clip(),
        clip.IMAGE_SIZE,
        clip.PATCH_SIZE,
        clip.preprocess,
        clip.embed,
        answer,
        "CLIP's image tower",
        mean=lambda loaded: loaded.encode(loaded.model, loaded.prepare([p.image for p in demo_photos()[:7]])).mean(0),
    )


def _load_saliency() -> ImageEncoder:
    from turbovlm.visualize import heatmap
    from turbovlm_lab.demo.saliency import SALIENT

    model = saliency.load_saliency_vit()

    def heat_of(tokens: Tensor) -> Tensor:
        found: Tensor = model.head(tokens[:, 1:])
        return found

    def encode(backbone: nn.Module, pixels: Tensor) -> Tensor:
        """Every position's token; where some have merged, each gets its own back."""
        tokens: Tensor = backbone(pixel_values=pixels).last_hidden_state
        whole = 1 + (pixels.shape[-1] // saliency.PATCH_SIZE) ** 2
        return tokens if tokens.shape[1] == whole else turbovlm.get_handle(backbone).restore(tokens)

    def answer(sample: Sample, output: Tensor) -> dict[str, Any]:
        assert sample.image is not None
        square = saliency.centre_square(sample.image)
        return {"picture": heatmap(heat_of(output)[0, 0], square, high=1.0, outline=SALIENT)}

    return ImageEncoder(
        *(model.backbone, saliency.IMAGE_SIZE, saliency.PATCH_SIZE, saliency.preprocess, encode, answer),
        "the ViT, without the head",
        mean=lambda loaded: loaded.encode(loaded.model, loaded.prepare([p.image for p in demo_photos()[:7]])).mean(0),
        notes=("Lighter is more salient; inside the white line the map reaches half of its largest value.",),
    )


CLIP = Subject(
    key="clip",
    title="CLIP ViT-B/16 · names an image",
    about="OpenAI's image tower. It says which of your labels fits best.",
    takes=IMAGE,
    load=_load_clip,
    words="Labels, separated by commas",
    default_words=LABELS,
    encodes=True,
    needs=packages(clip.FILE, minilm.FILE),
)
SALIENCY = Subject(
    key="saliency",
    title="ViT-S/14 · finds what stands out",
    about="DINOv2's ViT-S/14, fine-tuned for saliency. Its head reads every position: each gets its token back.",
    takes=IMAGE,
    load=_load_saliency,
    encodes=True,
    needs=packages(saliency.FILE),
)
BUILT_IN = (CLIP, SALIENCY)
