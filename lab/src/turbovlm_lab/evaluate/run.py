"""Predictions of one setting for all samples, kept as they are made: a run that was stopped goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

import turbovlm
from turbovlm.config import Config, TurboConfig
from turbovlm.errors import DataError
from turbovlm.loading.spec import of_library, reason
from turbovlm.profile.pipelines import find_denoiser
from turbovlm.profile.quantize import quantized
from turbovlm_lab.evaluate.data import Sample


@dataclass(frozen=True)
class Setting:
    """One row of a comparison.

    Attributes:
        name: for tables and file names.
        configs: how tokens are merged, one config of each workflow at most; none for the model itself.
        image_size: pixels a side instead of the model's own: the control that makes images smaller.
        quantize: how its weights are quantised before tokens are merged, of `turbovlm.profile.QUANTIZATIONS`.
    """

    name: str
    configs: tuple[Config, ...] = ()
    image_size: int | None = None
    quantize: str | None = None

    @property
    def per_image(self) -> bool:
        """Whether how much is merged depends on the image."""
        return any(isinstance(config, TurboConfig) and config.thresholds is not None for config in self.configs)


@dataclass(frozen=True)
class Predictor:
    """A model and how a task asks it.

    Attributes:
        model: what `turbovlm.apply` is given.
        prepare: a sample as the model wants it, on the CPU; runs in the workers; its second argument is the image size,
            None for the model's own. Raises DataError for an image that does not decode.
        predict: a list of prepared samples to one prediction each, of what JSON has.
        image_sizes: pixels a side that it can be asked for, its own last; empty if it takes its own alone.
        dense: whether it reads every position, so that encoders are applied with `dense=True`.
        about: what predictions depend on besides model, data and setting, where it is not the default; as JSON has it.
        note: what a reader of the scores should know of how the model was asked, one sentence; empty if nothing.
    """

    model: Any
    prepare: Callable[[Sample, int | None], Any]
    predict: Callable[[list[Any]], list[Any]]
    image_sizes: Sequence[int] = ()
    dense: bool = False
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


def predict_all(
    predictor: Predictor,
    samples: Sequence[Sample],
    setting: Setting,
    file: Path,
    header: Mapping[str, Any],
    *,
    batch: int = 16,
    workers: int = 0,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[Any]:
    """The predictions, in the order of `samples`; batches that `file` has are not made again.

    Batches are the same whether a run was stopped or not, and so is what comes of them.

    Args:
        predictor: the model; it is left as it was.
        samples: with different ids.
        setting: how the model runs.
        file: JSON lines, the header first; written batch by batch.
        header: what the predictions depend on; a file with another one is refused.
        batch: samples in one forward.
        workers: processes that read images; 0 reads them in this one.
        on_progress: given the number of samples, after every batch, and first those that were there.

    Raises:
        DataError: the file is of another run, or an image does not decode.
        ConfigError, UnsupportedModelError: see `turbovlm.apply`.
    """
    done = read_predictions(file, header)
    groups = [samples[start : start + batch] for start in range(0, len(samples), batch)]
    missing = [number for number, group in enumerate(groups) if any(sample.id not in done for sample in group)]
    on_progress(len(samples) - sum(len(groups[number]) for number in missing))
    if missing:
        todo = [sample for number in missing for sample in groups[number]]
        with arranged(predictor, setting), file.open("a", encoding="utf-8") as lines:
            if not lines.tell():
                lines.write(json.dumps(dict(header)) + "\n")
            for number, prepared in zip(missing, batches(predictor, todo, setting.image_size, batch, workers)):
                made = predictor.predict(prepared)
                if len(made) != len(prepared):
                    raise RuntimeError(f"{len(made)} predictions for {len(prepared)} samples")
                for sample, prediction in zip(groups[number], made):
                    if sample.id not in done:
                        lines.write(json.dumps({"id": sample.id, "prediction": prediction}) + "\n")
                        done[sample.id] = prediction
                lines.flush()
                on_progress(len(prepared))
    return [done[sample.id] for sample in samples]


def read_predictions(file: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds, by sample; nothing if there is none. A last line that is not whole is cut off the file.

    Raises:
        DataError: it is of another run, or no such file.
    """
    if not file.exists():
        return {}
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with file.open("r+b") as cut:
            cut.truncate(len(whole))
    if not whole:
        return {}
    try:
        first, *rest = [json.loads(line) for line in whole.splitlines()]
        done = {entry["id"]: entry["prediction"] for entry in rest}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is no file of predictions ({error}); remove it, or give another folder") from error
    differs = sorted(name for name in {*first, *header} if first.get(name) != header.get(name))
    if differs:
        told = ", ".join(f"{name} was {first.get(name)!r} and is {header.get(name)!r}" for name in differs)
        raise DataError(f"{file}: was made otherwise ({told}); remove it, or give another folder")
    return done


@contextlib.contextmanager
def arranged(predictor: Predictor, setting: Setting) -> Iterator[None]:
    """The model as a setting wants it: quantised, then merging."""
    with contextlib.ExitStack() as changes:
        if setting.quantize is not None:
            changes.enter_context(quantized(module_of(predictor.model), setting.quantize))
        if setting.configs:
            configs = [_dense(config) if predictor.dense else config for config in setting.configs]
            changes.enter_context(turbovlm.apply(predictor.model, *configs))
        yield


def _dense(config: Config) -> Config:
    """The same settings; an encoder's hand on every position."""
    return dataclasses.replace(config, dense=True) if isinstance(config, TurboConfig) else config


def module_of(model: Any) -> nn.Module:
    """The model, or a pipeline's denoiser."""
    return model if isinstance(model, nn.Module) else find_denoiser(model)


def batches(
    predictor: Predictor, samples: Sequence[Sample], image_size: int | None, batch: int, workers: int
) -> Iterator[list[Any]]:
    """What samples were prepared to, in order."""
    prepared = _Prepared(predictor.prepare, samples, image_size)
    # processors are not to be pickled, so workers are copies of this process, which Python 3.14 no longer does unasked
    how = {"multiprocessing_context": "fork"} if workers and sys.platform == "linux" else {}
    loader: DataLoader[Any] = DataLoader(
        prepared,  # type: ignore[arg-type]
        batch,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_leave_interruptions if workers else None,
        **how,  # type: ignore[arg-type]
    )
    for ready in loader:
        for item in ready:
            if isinstance(item, DataError):
                raise item
        yield ready


def _leave_interruptions(_: int) -> None:
    """Ctrl-C reaches the workers too; the process that they read images for ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _Prepared:
    """A data set of torch's. Errors travel from workers as values, so that their message stays one line."""

    prepare: Callable[[Sample, int | None], Any]
    samples: Sequence[Sample]
    image_size: int | None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        sample = self.samples[index]
        try:
            return self.prepare(sample, self.image_size)
        except DataError as error:
            return error
        except Exception as error:  # processors have many kinds, such as for an image of one row
            if not of_library(error):
                raise
            names = ", ".join(image.name for image in sample.images) or "no image"
            return DataError(f"{sample.id} ({names}): the model's processor does not take it: {reason(error)}")
