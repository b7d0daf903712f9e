"""The zoo's CLIP: classification by names that somebody has embedded or that the zoo's map embeds, and retrieval."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import Data, Sample
from turbovlm_lab.evaluate.predictors.encoders import Pair, likeliest, vectors_of
from turbovlm_lab.evaluate.run import Predictor

SIZES = range(16, 225, 16)
NOTE = "texts: by turbovlm's map from MiniLM, which is less exact than CLIP's own text tower"
NAMES_NOTE = f"{NOTE}; --names gives embeddings of names by that tower"


def clip_by_names(spec: AskedModel, data: Data) -> Predictor:
    """Top-5 classes of an image, by how near it is to their names.

    Args:
        spec: its `names` say where the embeddings are, see `turbovlm_lab.zoo.clip_names`; without, they are those of
            `turbovlm_lab.zoo.clip_text`, and the predictor's `note` says so.
        data: its classes must be among the names.

    Raises:
        ConfigError: a class that has no embedding.
        TurboError: CLIP's weights are not installed, or, without `names`, MiniLM's.
    """
    from turbovlm_lab.zoo import clip
    from turbovlm_lab.zoo.clip_names import read_names
    from turbovlm_lab.zoo.clip_text import load_clip_text

    if spec.names is None:
        words = [name.replace("_", " ") for name in data.classes]
        names, note = load_clip_text().names(words), NAMES_NOTE
    else:
        names, note = read_names(spec.names).only(data.classes), ""
    model: Any = clip.load_clip()

    def prepare(sample: Sample, image_size: int | None) -> Tensor:
        return clip.preprocess([sample.images[0].open()], image_size or clip.IMAGE_SIZE)[0]

    @torch.inference_mode()
    def predict(prepared: list[Tensor]) -> list[Any]:
        pixels = torch.stack(prepared)
        return likeliest(names.probabilities(clip.embed(model, pixels)))

    content = hashlib.sha256(names.vectors.numpy().tobytes()).hexdigest()[:16]
    return Predictor(model, prepare, predict, SIZES, about={"names": content}, note=note)


def clip_by_texts() -> Predictor:
    """Vectors of images and, by the zoo's map, of texts; the predictor's `note` says by what.

    Raises:
        TurboError: CLIP's or MiniLM's weights are not installed.
    """
    from turbovlm_lab.zoo import clip
    from turbovlm_lab.zoo.clip_text import load_clip_text

    model: Any = clip.load_clip()

    def pixels(image: Any, image_size: int | None) -> Tensor:
        return clip.preprocess([image], image_size or clip.IMAGE_SIZE)[0]

    pair = Pair(model, pixels, lambda batch, _: clip.embed(model, batch), load_clip_text().embed, SIZES)
    return dataclasses.replace(vectors_of(pair), note=NOTE)
