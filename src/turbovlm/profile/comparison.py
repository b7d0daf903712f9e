"""What a comparison found: the model and its versions, each by one or several named timings, and how images changed."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from turbovlm.errors import ConfigError
from turbovlm.profile.timing import CLOCKS, Quartiles

BASELINE = "model"
"""Name of the model's own run."""
FORWARD, IMAGE, STEP = "forward", "image", "step"
"""Names of timings: one forward of a model; one call of a pipeline, text to decoded image; and, in that, the denoiser's
part of one denoising step."""


@dataclass(frozen=True)
class Timing:
    """What one named part of a run took.

    Attributes:
        seconds: of the whole batch, by `Comparison.clock`, in every round.
        peak_bytes: the most memory that it had allocated at once, beside weights and inputs; None where the device
            does not tell.
    """

    seconds: tuple[float, ...]
    peak_bytes: int | None


@dataclass(frozen=True)
class Drift:
    """How far an image is from the one that the pipeline itself makes of the same seed.

    Attributes:
        latent: relative root mean square error of the last latent; 0 is the same.
        psnr: of the decoded image, in dB; infinite where it is the same.
        difference: mean absolute difference of its pixels, of which white is 1.
    """

    latent: float
    psnr: float
    difference: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: PSNR is None where the image is the same."""
        return {**asdict(self), "psnr": None if math.isinf(self.psnr) else self.psnr}


@dataclass(frozen=True)
class Run:
    """One version of the model, measured.

    Attributes:
        name: `"model"` for the model itself.
        macs: multiply-accumulates of one forward of the whole batch; of image generation, in the denoiser per step.
        timings: by name: `"forward"`; of image generation `"image"` and `"step"`. The first is the whole.
        wall_seconds: of the whole, by the wall's clock, in every round.
        weight_bytes: of parameters and buffers as they lie in memory; of image generation, the denoiser's.
        drifts: of each image of the batch, as the last round made it, from the pipeline's own in its first round:
            where it makes the same images every time, its own are 0. Empty where no images are made.
    """

    name: str
    macs: float
    timings: Mapping[str, Timing]
    wall_seconds: tuple[float, ...]
    weight_bytes: int
    drifts: tuple[Drift, ...] = ()

    @property
    def seconds(self) -> tuple[float, ...]:
        """Seconds of the whole, in every round."""
        return next(iter(self.timings.values())).seconds

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the whole."""
        return next(iter(self.timings.values())).peak_bytes

    @property
    def drift(self) -> Drift | None:
        """Mean drift over the batch; None where no images are made."""
        if not self.drifts:
            return None
        columns = zip(*((one.latent, one.psnr, one.difference) for one in self.drifts))
        return Drift(*(sum(column) / len(column) for column in columns))


@dataclass(frozen=True)
class Generation:
    """How images were made.

    Attributes:
        size: height and width in pixels.
        steps: denoising steps asked for.
        seed: of the first image of a batch; the next has the next.
    """

    size: tuple[int, int]
    steps: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """The model and its versions, measured in turn in one process.

    Attributes:
        runs: the model itself first.
        batch: images per forward, or per call of a pipeline.
        device, dtype, clock: where and how it was measured; `threads` of the CPU.
        compiled: whether every version, the model itself included, went through `torch.compile`.
        generation: how images were made; None where none were.
    """

    runs: tuple[Run, ...]
    batch: int
    device: str
    dtype: str
    threads: int
    clock: str
    compiled: bool
    generation: Generation | None = None

    @property
    def baseline(self) -> Run:
        """The model itself."""
        return self.runs[0]

    @property
    def timings(self) -> tuple[str, ...]:
        """Names of what was timed, the whole first."""
        return tuple(self.baseline.timings)

    def run(self, name: str) -> Run:
        """Find the run of that name.

        Raises:
            ConfigError: there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise ConfigError(f"{name!r}: no such run; there are {', '.join(repr(run.name) for run in self.runs)}")

    def speedup(self, name: str, timing: str | None = None) -> Quartiles:
        """How many times faster than the model itself, over the rounds.

        Args:
            name: of the run.
            timing: one of `timings`; the whole if None.
        """
        timing = timing or self.timings[0]
        return ratios(self.baseline.timings[timing].seconds, self.run(name).timings[timing].seconds)

    def macs_ratio(self, name: str) -> float:
        """How many times fewer multiply-accumulates than the model itself."""
        return self.baseline.macs / self.run(name).macs

    def efficiency(self, name: str) -> float:
        """The median speed-up over the ratio of multiply-accumulates: 1 where all that arithmetic allows is gained.

        Of image generation it is that of a step, whose multiply-accumulates are counted.
        """
        return self.speedup(name, self.timings[-1]).median / self.macs_ratio(name)

    def seconds_per_image(self, name: str, timing: str | None = None) -> float:
        """Seconds for one image of the batch, at the median, by `clock`; see `speedup` for the arguments."""
        return Quartiles.of(self.run(name).timings[timing or self.timings[0]].seconds).median / self.batch

    def images_per_second(self, name: str) -> float:
        """Images per second of wall-clock time, at the median."""
        return self.batch / Quartiles.of(self.run(name).wall_seconds).median

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, for JSON: every sample, and what follows from them.

        What is of the whole has plain keys, such as `seconds`; what is of a part has its name in front, such as
        `step_seconds`.
        """
        fields = ("batch", "device", "dtype", "threads", "clock", "compiled")
        about = {name: getattr(self, name) for name in fields} | {"rounds": len(self.baseline.seconds)}
        if self.generation is not None:
            height, width = self.generation.size
            about |= {"height": height, "width": width, "steps": self.generation.steps, "seed": self.generation.seed}
        return {**about, "runs": [self._plain(run) for run in self.runs]}

    def _plain(self, run: Run) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "name": run.name,
            "macs": run.macs,
            "wall_seconds": list(run.wall_seconds),
            "weight_bytes": run.weight_bytes,
            "macs_ratio": self.macs_ratio(run.name),
            "efficiency": self.efficiency(run.name),
            "images_per_second": self.images_per_second(run.name),
        }
        for name, timing in run.timings.items():
            prefix, speedup = "" if name == self.timings[0] else f"{name}_", self.speedup(run.name, name)
            plain |= {
                f"{prefix}seconds": list(timing.seconds),
                f"{prefix}peak_bytes": timing.peak_bytes,
                f"{prefix}speedup": speedup.median,
                f"{prefix}speedup_quartiles": [speedup.low, speedup.high],
                f"{prefix}seconds_per_image": self.seconds_per_image(run.name, name),
            }
        if run.drift is not None:
            plain |= {"drifts": [drift.to_dict() for drift in run.drifts], "drift": run.drift.to_dict()}
        return plain

    @property
    def conditions(self) -> str:
        """How it was measured, in one line."""
        device = f"{self.device}, {self.threads} threads" if self.clock == CLOCKS["cpu"] else self.device
        how = "compiled" if self.compiled else "eager"
        made = "" if self.generation is None else f"{self.generation.steps} steps, seed {self.generation.seed}; "
        rounds = len(self.baseline.seconds)
        return f"{made}{device}, {self.dtype}, batch {self.batch}, {how}, {rounds} rounds, {self.clock}"

    def table(self, *, drift: bool = True) -> str:
        """A row per version and timing, in plain text.

        Args:
            drift: whether to show how images changed, where any were made.
        """
        return aligned(*self.columns(drift=drift))

    def columns(self, *, drift: bool = True) -> tuple[list[str], list[list[str]]]:
        """Headings of one line or two, and the cells of each row of `table`; what names a row has an empty heading."""
        columns = ["run", "timing", *_MADE, *(_CHANGED if drift else ())] if self.generation else ["run", *_RUN]
        if any(run.weight_bytes != self.baseline.weight_bytes for run in self.runs):
            columns.append("weights\nMB")
        cells = [self._cells(run, timing) for run in self.runs for timing in self.timings]
        header = ["" if column in ("run", "timing") else column for column in columns]
        return header, [[row[column] for column in columns] for row in cells]

    def _cells(self, run: Run, timing: str) -> dict[str, str]:
        """What the table says of one timing; what is of the whole run stands in the row that it belongs to."""
        is_first, is_last = timing == self.timings[0], timing == self.timings[-1]
        speedup, peak = self.speedup(run.name, timing), run.timings[timing].peak_bytes
        cells = {
            "run": run.name if is_first else "",
            "timing": timing,
            "s/batch": f"{Quartiles.of(run.timings[timing].seconds).median:.4g}",
            "s/image": f"{self.seconds_per_image(run.name, timing):.4g}",
            "images\n/s": f"{self.images_per_second(run.name):.4g}",
            "GMACs": f"{run.macs / 1e9:.2f}",
            "speed-up": f"{speedup.median:.3f}x",
            "quartiles": f"{speedup.low:.3f}–{speedup.high:.3f}",
            "MACs\nratio": f"{self.macs_ratio(run.name):.3f}x" if is_last else "",
            "effi-\nciency": f"{self.efficiency(run.name):.3f}" if is_last else "",
            "peak\nMB": "" if peak is None else f"{peak / 1e6:.1f}",
            "weights\nMB": f"{run.weight_bytes / 1e6:.1f}" if is_last else "",
        }
        if run.drift is not None:
            psnr = "same" if math.isinf(run.drift.psnr) else f"{run.drift.psnr:.1f}"
            cells |= {"drift": f"{run.drift.latent:.4f}", "PSNR\ndB": psnr} if is_first else dict.fromkeys(_CHANGED, "")
        return cells

    def __str__(self) -> str:
        size = "" if self.generation is None else "{1}×{0} pixels, ".format(*self.generation.size)
        return f"{size}{self.conditions}\n{self.table()}"


_RUN = ("s/batch", "images\n/s", "GMACs", "speed-up", "quartiles", "MACs\nratio", "effi-\nciency", "peak\nMB")
_MADE = ("s/image", "speed-up", "quartiles", "MACs\nratio", "peak\nMB")
_CHANGED = ("drift", "PSNR\ndB")
"""Columns of the table: of forwards, of image generation, and of how images changed."""


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text: columns without a header to the left, the others to the right.

    Args:
        header: of each column, of one line or two.
        rows: a cell per column.
    """
    above = [name.rpartition("\n")[0] for name in header]
    below = [name.rpartition("\n")[2] for name in header]
    widths = [max(map(len, column)) for column in zip(above, below, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if name else cell.ljust(w) for name, cell, w in zip(header, cells, widths))
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, (above, below, *rows)))


def ratios(baseline: Sequence[float], other: Sequence[float]) -> Quartiles:
    """How many times less the other took, round by round."""
    return Quartiles.of([a / b for a, b in zip(baseline, other)])


def measured_on(device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """The fields of a `Comparison` that say where and how it was measured."""
    return {
        "device": describe_device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "clock": CLOCKS.get(device.type, "wall-clock time"),
        "compiled": compiled,
    }


def describe_device(device: torch.device) -> str:
    """For people: the GPU's name, or the kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else str(device)
