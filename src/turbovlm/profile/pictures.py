"""`compare_pictures`: what Turbo saves when pictures are generated on this machine, and how it changes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from turbovlm.config import DenoiseConfig
from turbovlm.errors import ConfigError
from turbovlm.profile.compare import BASELINE, check_integers, describe_device, named, ratios
from turbovlm.profile.pipelines import Prompt, WatchedPipeline, find_denoiser, inputs_of
from turbovlm.profile.timing import CLOCKS, Quartiles, interleaved


@dataclass(frozen=True)
class Drift:
    """How far a picture is from the one that the pipeline itself makes of the same seed.

    Attributes:
        latent: relative root mean square error of the last latent; 0 is the same.
        psnr: of the decoded picture, in dB; infinite where it is the same.
        difference: mean absolute difference of its pixels, of which white is 1.
    """

    latent: float
    psnr: float
    difference: float


@dataclass(frozen=True)
class PictureRun:
    """One version of the pipeline, measured.

    Attributes:
        name: `"model"` for the pipeline itself.
        macs: multiply-accumulates in the denoiser, per step, of the whole batch.
        seconds: of one call of the pipeline, text to decoded pictures, in every round.
        wall_seconds: the same by the wall's clock.
        step_seconds: in the denoiser, per step of the whole batch, in every round.
        peak_bytes: the most memory that a call had allocated at once, beside the weights; None where the device does
            not tell.
        step_peak_bytes: the same of one forward of the denoiser.
        drifts: of each picture of the batch, as the last round made it, from the pipeline's own in its first: where
            it makes the same pictures every time, its own are 0.
    """

    name: str
    macs: float
    seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]
    peak_bytes: int | None
    step_peak_bytes: int | None
    drifts: tuple[Drift, ...]

    @property
    def drift(self) -> Drift:
        """The mean over the batch."""
        columns = zip(*((one.latent, one.psnr, one.difference) for one in self.drifts))
        return Drift(*(sum(column) / len(column) for column in columns))


@dataclass(frozen=True)
class PictureComparison:
    """A pipeline and accelerated versions of it, measured in turn in one process.

    Attributes:
        runs: the pipeline itself first.
        size: of the pictures, height and width in pixels.
        batch, steps, seed: pictures per call, denoising steps asked for, seed of the first picture.
        device, dtype, clock: where and how it was measured; `threads` of the CPU.
        compiled: whether every version's denoiser, the pipeline's own included, went through `torch.compile`.
    """

    runs: tuple[PictureRun, ...]
    size: tuple[int, int]
    batch: int
    steps: int
    seed: int
    device: str
    dtype: str
    threads: int
    clock: str
    compiled: bool

    @property
    def baseline(self) -> PictureRun:
        """The pipeline itself."""
        return self.runs[0]

    def run(self, name: str) -> PictureRun:
        """The run of that name.

        Raises:
            ConfigError: there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise ConfigError(f"{name!r}: no such run; there are {', '.join(repr(run.name) for run in self.runs)}")

    def speedup(self, name: str) -> Quartiles:
        """How many times faster a picture is made than by the pipeline itself, over the rounds."""
        return ratios(self.baseline.seconds, self.run(name).seconds)

    def step_speedup(self, name: str) -> Quartiles:
        """The same of the denoiser alone."""
        return ratios(self.baseline.step_seconds, self.run(name).step_seconds)

    def macs_ratio(self, name: str) -> float:
        """How many times fewer multiply-accumulates in the denoiser."""
        return self.baseline.macs / self.run(name).macs

    def seconds_per_picture(self, name: str) -> float:
        """At the median, by `clock`."""
        return Quartiles.of(self.run(name).seconds).median / self.batch

    def seconds_per_step(self, name: str) -> float:
        """Of the denoiser for one picture of the batch, at the median, by `clock`."""
        return Quartiles.of(self.run(name).step_seconds).median / self.batch

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, for JSON: every sample, and what follows from them.

        Where pictures are the same, their PSNR is None.
        """
        runs = []
        for run in self.runs:
            picture, step = self.speedup(run.name), self.step_speedup(run.name)
            runs.append(
                {
                    **asdict(run),
                    "drifts": [_plain(drift) for drift in run.drifts],
                    "drift": _plain(run.drift),
                    "seconds_per_picture": self.seconds_per_picture(run.name),
                    "seconds_per_step": self.seconds_per_step(run.name),
                    "speedup": picture.median,
                    "speedup_quartiles": [picture.low, picture.high],
                    "step_speedup": step.median,
                    "step_speedup_quartiles": [step.low, step.high],
                    "macs_ratio": self.macs_ratio(run.name),
                }
            )
        fields = ("batch", "steps", "seed", "device", "dtype", "threads", "clock", "compiled")
        about = {name: getattr(self, name) for name in fields}
        size = {"height": self.size[0], "width": self.size[1]}
        return {**size, **about, "rounds": len(self.baseline.seconds), "runs": runs}

    @property
    def conditions(self) -> str:
        """How it was measured, in one line."""
        device = f"{self.device}, {self.threads} threads" if self.clock == CLOCKS["cpu"] else self.device
        how, rounds = "compiled" if self.compiled else "eager", len(self.baseline.seconds)
        made = f"{self.steps} steps, batch {self.batch}, seed {self.seed}"
        return f"{made}; {device}, {self.dtype}, {how}, {rounds} rounds, {self.clock}"

    def __str__(self) -> str:
        height, width = self.size
        names = max(len(run.name) for run in self.runs) + 1
        lines = [
            f"{width}×{height} pixels, {self.conditions}",
            f"{'':{names}}{'s/picture':>10}{'speed-up':>10}{'s/step':>9}{'speed-up':>10}{'MACs ratio':>12}"
            f"{'peak MB':>9}{'drift':>8}{'PSNR dB':>9}",
        ]
        for run in self.runs:
            peak = "" if run.peak_bytes is None else f"{run.peak_bytes / 1e6:.1f}"
            lines.append(
                f"{run.name:{names}}{self.seconds_per_picture(run.name):10.4g}{self.speedup(run.name).median:9.3f}x"
                f"{self.seconds_per_step(run.name):9.4g}{self.step_speedup(run.name).median:9.3f}x"
                f"{self.macs_ratio(run.name):11.3f}x{peak:>9}{run.drift.latent:8.4f}{run.drift.psnr:9.2f}"
            )
        return "\n".join(lines)


def compare_pictures(
    pipe: Any,
    configs: DenoiseConfig | Sequence[DenoiseConfig] | Mapping[str, DenoiseConfig],
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    steps: int = 4,
    seed: int = 0,
    prompt: Prompt = None,
    inputs: Mapping[str, Any] | None = None,
    rounds: int = 3,
    warmup: int = 1,
    compile: bool = False,
    progress: Callable[[int], object] | None = None,
) -> PictureComparison:
    """Let a pipeline and accelerated versions of it make the same pictures in turn, A B … B A, in one process.

    Every version has the pipeline's own weights, of which there are no copies; the pipeline is left as it is. Timed are
    whole calls (text, denoising, decoding) and, inside them, the denoiser, by process CPU time on the CPU (all
    threads), CUDA events on a GPU, else the wall's clock. A safety checker is left out.

    Args:
        pipe: a `diffusers` pipeline from text or classes to pictures, on the device and in the dtype to be measured.
        configs: the settings to compare, alone or by name.
        size: height and width of the pictures in pixels; None for the pipeline's own.
        batch: pictures per call, ≥ 1; more of them make a steadier drift.
        steps: denoising steps per picture, ≥ 1.
        seed: of the first picture; the next one has the next.
        prompt: one or several, which the pictures take in turn; class numbers for DiT; None for some.
        inputs: what else the pipeline's call is given, such as `guidance_scale`, or in place of `prompt` and so on:
            with `prompt_embeds` there is no prompt.
        rounds: how often each version is timed, ≥ 1.
        warmup: rounds before that, which do not count; ≥ 1 where something must be compiled first.
        compile: compile every version's denoiser with `torch.compile`'s defaults.
        progress: called with 1 after each of the `(warmup + rounds) · versions` calls.

    Raises:
        ConfigError: a setting or a size that is not possible, no config, or one named `"model"`.
        UnsupportedModelError: no pipeline, or a denoiser in which nothing can be accelerated.
        TurboError: the pipeline is accelerated already, or takes neither words nor classes.
    """
    versions = named(configs)
    for name, config in versions.items():
        if not isinstance(config, DenoiseConfig):
            raise ConfigError(f"configs[{name!r}]={config!r}: must be a DenoiseConfig")
    check_integers(batch=(batch, 1), steps=(steps, 1), rounds=(rounds, 1), warmup=(warmup, 1 if compile else 0))
    _, denoiser = find_denoiser(pipe)
    given = inputs_of(pipe, size, batch, steps, prompt, inputs or {})
    watched, costs = [], []
    for config in (None, *versions.values()):
        watched.append(WatchedPipeline(pipe, given, range(seed, seed + batch), config))
        refresh = 1 if config is None else config.refresh
        costs.append(
            watched[-1].count(min(steps, max(2, refresh)))
        )  # some pipelines take a single step for another method
        watched[-1].watch(compile)
    own: list[tuple[Tensor, Tensor]] = []

    def first() -> None:
        watched[0].draw()
        if not own:
            own.append((watched[0].latent, watched[0].picture))

    draws = [first, *(one.draw for one in watched[1:])]
    device = watched[0].device
    # All twins have one forward, whose compiled versions would otherwise give way to eager ones from the ninth on.
    with torch._dynamo.config.patch(recompile_limit=max(8, 4 * len(watched))):
        clock, wall = interleaved(draws, device, rounds, warmup, progress or (lambda _: None))
        drifts = [_drifts(*own[0], one.latent, one.picture, batch) for one in watched]
        step_peaks = [one.peak_of_step() for one in watched]
        peaks = [one.peak(min(steps, 2)) for one in watched]
    runs = [
        PictureRun(
            name=name,
            macs=costs[i],
            seconds=tuple(clock[i]),
            wall_seconds=tuple(wall[i]),
            step_seconds=tuple(call.step_seconds for call in watched[i].calls[-rounds:]),
            peak_bytes=peaks[i],
            step_peak_bytes=step_peaks[i],
            drifts=drifts[i],
        )
        for i, name in enumerate((BASELINE, *versions))
    ]
    height, width = own[0][1].shape[-2:]
    return PictureComparison(
        runs=tuple(runs),
        size=(height, width),
        batch=batch,
        steps=steps,
        seed=seed,
        device=describe_device(device),
        dtype=str(denoiser.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        clock=CLOCKS.get(device.type, "wall-clock time"),
        compiled=compile,
    )


def _drifts(own: Tensor, own_picture: Tensor, latent: Tensor, picture: Tensor, batch: int) -> tuple[Drift, ...]:
    """Of each picture. Classes are guided in a batch of twice as many latents, of which the first half is decoded."""
    drifts = []
    for i in range(batch):
        a, b, p, q = (x[i].double() for x in (own, latent, own_picture, picture))
        error = float((p - q).square().mean())
        drifts.append(
            Drift(
                latent=float((a - b).norm() / a.norm()),
                psnr=math.inf if error == 0 else -10 * math.log10(error),
                difference=float((p - q).abs().mean()),
            )
        )
    return tuple(drifts)


def _plain(drift: Drift) -> dict[str, float | None]:
    return {**asdict(drift), "psnr": None if math.isinf(drift.psnr) else drift.psnr}
