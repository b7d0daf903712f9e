"""A task's model and metrics together: what a study of it needs beside data and settings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from turbovlm.errors import ConfigError
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.metrics import frechet_distance, needs_java
from turbovlm_lab.evaluate.predictors import load_predictor
from turbovlm_lab.evaluate.predictors.images import DEFAULT, Making, features_named, features_of
from turbovlm_lab.evaluate.run import Predictor
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.evaluate.study import Scoring

LABELS = {"inception": "FID", "vit": "Fréchet distance"}


def beginning(data: Data) -> Data:
    """Text-to-image's data, each prompt with one of the real images to begin with, in their order."""
    pairs = zip(data.samples, itertools.cycle(data.real))
    samples = tuple(dataclasses.replace(sample, images=(image,)) for sample, image in pairs)
    return dataclasses.replace(data, name=f"{data.name}, begun", samples=samples)


def asked(
    task: str, spec: AskedModel, data: Data, making: Making = DEFAULT, features: str = "inception"
) -> tuple[Predictor, Scoring | None]:
    """The model, and what its predictions are worth where that is not the task's own metrics.

    Args:
        task: of `turbovlm evaluate`.
        spec: the model.
        data: what it is asked.
        making, features: of text-to-image: how images are made, and what compares them, `"inception"` or `"vit"`.

    Raises:
        TurboError: there is no such model, or something that the metrics need is not installed.
        ConfigError: it does not fit the data.
    """
    if task == "captioning" and not data.tokenized:
        needs_java()
    if task != "text-to-image":
        return load_predictor(task, spec, data, making, None), None
    if len(data.samples) < 2 or len(data.real) < 2:
        raise ConfigError(
            f"{data.name}: {LABELS[features]} compares distributions: at least 2 prompts and 2 real images are needed, "
            f"better thousands; there are {len(data.samples)} and {len(data.real)}"
        )
    compared = features_named(features, spec.device)
    real = features_of(data.real, compared)
    if making.strength is not None and not any(sample.images for sample in data.samples):
        raise ConfigError(f"strength={making.strength}: the data have no images to begin with")

    def scoring(_: Data, predictions: Sequence[Any]) -> list[Score]:
        return [Score(LABELS[features], frechet_distance(torch.tensor(predictions), real), higher=False)]

    return load_predictor(task, spec, data, making, compared), scoring
