"""One task, one model, several settings: predictions kept in a folder, and what they are worth beside each other."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbovlm.config import Config, ReadConfig
from turbovlm.errors import ConfigError, DataError
from turbovlm.loading import running
from turbovlm.ops import LayeredDegree
from turbovlm_lab.evaluate import statistics
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.run import Predictor, Setting, predict_all, read_predictions
from turbovlm_lab.evaluate.scoring import Score, agreement, scores
from turbovlm_lab.evaluate.settings import mean_macs, named, weights_of
from turbovlm_lab.evaluate.statistics import Interval

LONGEST, DIGITS = 120, 8
"""Characters of a file's name, and of those that stand for what was cut."""


@dataclass(frozen=True)
class Metric:
    """One metric of one setting.

    Attributes:
        value: with its 95 % interval; the value alone, of what is no mean over samples.
        kept: the value as a share of the unmerged model's, over the same samples; None for the unmerged model, and for
            metrics of which less is better.
    """

    name: str
    value: Interval
    kept: Interval | None


@dataclass(frozen=True)
class Row:
    """What one setting came to.

    Attributes:
        setting: its name.
        macs: the vision encoders' multiply-accumulates for one sample; the whole model's in a study with a
            `ReadConfig`, which saves behind the encoders.
        ratio: those as a share of the unmerged model's.
        weights: bytes of the model's weights.
        image_size: pixels a side, where they are not the model's own.
        metrics: the one to compare by first.
        same: how often the answer is the unmerged model's; None for that itself.
    """

    setting: str
    macs: int
    ratio: float
    weights: int
    image_size: int | None
    metrics: tuple[Metric, ...]
    same: Interval | None


@dataclass(frozen=True)
class Study:
    """A finished comparison."""

    task: str
    model: str
    data: str
    samples: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON has."""
        return dataclasses.asdict(self)


Scoring = Callable[[Data, Sequence[Any]], list[Score]]


def run_study(
    task: str,
    model: str,
    predictor: Predictor,
    data: Data,
    settings: Sequence[Setting],
    folder: Path,
    *,
    batch: int = 16,
    workers: int = 0,
    scoring: Scoring | None = None,
    on_progress: Callable[[str, int], object] = lambda setting, done: None,
) -> Study:
    """Asks the model in every setting, and compares each with the first.

    Args:
        task: names the metrics.
        model: its name, which predictions are kept under.
        predictor: the model; it is left as it was.
        data: what it is asked.
        settings: the first is the unmerged model.
        folder: of predictions, a file per setting; what is there already is not made again.
        batch, workers: see `predict_all`.
        scoring: what predictions are worth, instead of the task's own metrics.
        on_progress: given the setting's name and how many more samples are done.

    Raises:
        ConfigError: the first setting merges, or two have one name.
        DataError: the folder holds another study or cannot be written, or an image does not decode.
        TurboError: the model itself, unmerged, does not run.
        UnsupportedModelError: a setting cannot be had. All but images is seen before the model is asked.
    """
    names = [setting.name for setting in settings]
    first = settings[0] if settings else None
    if first is None or first.configs or first.quantize is not None or len({*names}) < len(names):
        raise ConfigError(f"settings={names}: must be of different names, the unmerged model first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: predictions cannot be kept there ({error.strerror})") from error
    headers = {setting.name: header_of(task, model, data, setting, predictor.about) for setting in settings}
    files = {setting.name: folder / f"{name_with_settings(setting)}.jsonl" for setting in settings}
    for name in names:
        read_predictions(files[name], headers[name])
    whole = any(isinstance(config, ReadConfig) for setting in settings for config in setting.configs)
    weights = {kind: weights_of(predictor, kind) for kind in dict.fromkeys(setting.quantize for setting in settings)}
    with running(model):
        costs = {first.name: mean_macs(predictor, data.samples, first, whole)}
    costs |= {setting.name: mean_macs(predictor, data.samples, setting, whole) for setting in settings[1:]}
    judged = scoring or (lambda data, predictions: scores(task, data, predictions))
    rows: list[Row] = []
    own: list[Any] = []
    own_scores: list[Score] = []
    for setting in settings:
        progress = _progress_of(setting.name, on_progress)
        file, header = files[setting.name], headers[setting.name]
        with running(model) if setting is first else contextlib.nullcontext():
            found = predict_all(
                predictor, data.samples, setting, file, header, batch=batch, workers=workers, on_progress=progress
            )
        own = own or found
        reached = judged(data, found)
        own_scores = own_scores or reached
        same = None if setting is settings[0] else _agreement(task, data, found, own)
        metrics = tuple(_metric(a, None if setting is settings[0] else b) for a, b in zip(reached, own_scores))
        macs = costs[setting.name]
        ratio = macs / rows[0].macs if rows else 1.0
        rows.append(Row(setting.name, macs, ratio, weights[setting.quantize], setting.image_size, metrics, same))
    return Study(task, model, data.name, len(data.samples), tuple(rows))


def header_of(
    task: str, model: str, data: Data, setting: Setting, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What predictions depend on; `about` is the predictor's."""
    asked = [[s.id, s.text, s.answers, [image.name for image in s.images]] for s in data.samples]
    content = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    known = {"task": task, "model": model, "data": data.name, "samples": len(data.samples), "content": content}
    configs = {type(config).__name__: _plain(config) for config in setting.configs}
    known |= {**(about or {}), "setting": configs, "image_size": setting.image_size}
    return known if setting.quantize is None else {**known, "quantize": setting.quantize}


def name_with_settings(setting: Setting) -> str:
    """The name of a setting's file, which says the settings too: other settings of the same name are kept apart."""
    size = [] if setting.image_size is None else [f"{setting.image_size} pixels"]
    parts = [text for text in (*map(named, setting.configs), *size) if text not in setting.name]
    return file_name(", ".join((setting.name, *parts)))


def file_name(text: str) -> str:
    """A text as the name of a file; a long one is cut, and what it was is told by a few digits at the end."""
    whole = re.sub(r"[^\w.=-]+", "-", text.lower()).strip("-")
    if len(whole) <= LONGEST:
        return whole
    return f"{whole[: LONGEST - DIGITS - 1]}-{hashlib.sha256(whole.encode()).hexdigest()[:DIGITS]}"


def _plain(config: Config) -> Mapping[str, Any]:
    """Settings that are not the defaults, as JSON gives them back."""
    default = {field.name: field.default for field in dataclasses.fields(config)}
    changed = {name: value for name, value in vars(config).items() if value != default[name]}
    if isinstance(config.degree, LayeredDegree):
        changed["degree"] = str(config.degree)
    elif callable(config.degree):
        changed["degree"] = getattr(config.degree, "__name__", type(config.degree).__name__)
    plain: Mapping[str, Any] = json.loads(json.dumps(changed))
    return plain


def _progress_of(name: str, on_progress: Callable[[str, int], object]) -> Callable[[int], object]:
    return lambda done: on_progress(name, done)


def _agreement(task: str, data: Data, found: Sequence[Any], own: Sequence[Any]) -> Interval | None:
    if task == "text-to-image":
        return None
    return statistics.mean(agreement(task, found, own), groups_of(data))


def groups_of(data: Data) -> list[tuple[str, ...]]:
    """Samples of the same images belong together."""
    return [tuple(image.name for image in sample.images) for sample in data.samples]


def _metric(score: Score, own: Score | None) -> Metric:
    if not score.parts:
        value = Interval(score.value, score.value, score.value)
        share = None if own is None or not score.higher or own.value <= 0 else Interval(*[score.value / own.value] * 3)
        return Metric(score.name, value, share)
    value = statistics.mean(score.parts, score.groups)
    if own is None or not score.higher or own.value <= 0:
        return Metric(score.name, value, None)
    return Metric(score.name, value, statistics.kept(score.parts, own.parts, score.groups))
