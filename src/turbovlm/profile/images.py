"""`compare_images`: what Turbo saves when images are generated on this machine, and how it changes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turbovlm.config import DenoiseConfig
from turbovlm.errors import ConfigError
from turbovlm.profile.compare import check_integers, named
from turbovlm.profile.comparison import BASELINE, IMAGE, STEP, Comparison, Drift, Generation, Run, Timing, measured_on
from turbovlm.profile.pipelines import Prompt, WatchedPipeline, find_denoisers, inputs_of
from turbovlm.profile.quantize import weight_bytes
from turbovlm.profile.timing import interleaved

FEW_STEPS = 2
"""Denoising steps of the image by which memory is measured: more take no more. Some pipelines take a single step for
another method."""


def compare_images(
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
) -> Comparison:
    """Let a pipeline and accelerated versions of it make the same images in turn, A B … B A, in one process.

    Every version has the pipeline's own weights, of which there are no copies; the pipeline is left as it is. Timed are
    whole calls (`"image"`: text, denoising, decoding) and, inside them, the denoisers (`"step"`), by process CPU time
    on the CPU (all threads), CUDA events on a GPU, else the wall's clock. A safety checker is left out.

    Args:
        pipe: a `diffusers` pipeline from text or classes to images, on the device and in the dtype to be measured.
        configs: the settings to compare, alone or by name.
        size: height and width of the images in pixels; None for the pipeline's own.
        batch: images per call, ≥ 1; more of them make a steadier drift.
        steps: denoising steps per image, ≥ 1.
        seed: of the first image; the next one has the next.
        prompt: one or several, which the images take in turn; class numbers for DiT; None for some.
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
    versions = _checked(configs)
    check_integers(batch=(batch, 1), steps=(steps, 1), rounds=(rounds, 1), warmup=(warmup, 1 if compile else 0))
    denoisers: list[Any] = list(find_denoisers(pipe).values())
    arguments, seeds = inputs_of(pipe, size, batch, steps, prompt, inputs or {}), range(seed, seed + batch)
    watched = [WatchedPipeline(pipe, arguments, seeds, config) for config in (None, *versions.values())]
    costs = [_macs_per_step(each, config, steps) for each, config in zip(watched, (None, *versions.values()))]
    for each in watched:
        each.watch(compile)
    device = watched[0].device
    # All twins have one forward, whose compiled versions would otherwise give way to eager ones from the ninth on.
    with torch._dynamo.config.patch(recompile_limit=max(8, 4 * len(watched))):
        draws = [each.draw for each in watched]
        clock, wall = interleaved(draws, device, rounds, warmup, progress or (lambda _: None))
        drifts = [_drifts(watched[0], each, batch) for each in watched]
        step_peaks = [each.peak_of_step(steps) for each in watched]
        peaks = [each.peak(min(steps, FEW_STEPS)) for each in watched]
    runs = []
    for i, name in enumerate((BASELINE, *versions)):
        step_seconds = tuple(call.step_seconds for call in watched[i].calls[-rounds:])
        timings = {IMAGE: Timing(tuple(clock[i]), peaks[i]), STEP: Timing(step_seconds, step_peaks[i])}
        runs.append(Run(name, costs[i], timings, tuple(wall[i]), sum(map(weight_bytes, denoisers)), drifts[i]))
    height, width = watched[0].image.shape[-2:]
    made = Generation((height, width), steps, seed)
    return Comparison(tuple(runs), batch, **measured_on(device, denoisers[0].dtype, compile), generation=made)


def _checked(configs: Any) -> dict[str, DenoiseConfig]:
    versions = named(configs)
    for name, config in versions.items():
        if not isinstance(config, DenoiseConfig):
            raise ConfigError(f"configs[{name!r}]={config!r}: must be a DenoiseConfig")
    return versions


def _macs_per_step(watched: WatchedPipeline, config: DenoiseConfig | None, steps: int) -> float:
    """Multiply-accumulates of a step, over as many as share one decision of what is merged; over all that differ."""
    if config is not None and config.over_steps:
        return watched.count(steps)
    refresh = 1 if config is None else config.refresh
    return watched.count(min(steps, max(FEW_STEPS, refresh)))


def _drifts(own: WatchedPipeline, other: WatchedPipeline, batch: int) -> tuple[Drift, ...]:
    """Drift of each image of the other's last call from the pipeline's own first.

    Classes are guided in a batch of twice as many latents, of which the first half is decoded.
    """
    assert own.first is not None
    return tuple(_drift(*(x[i].double() for x in (*own.first, other.latent, other.image))) for i in range(batch))


def _drift(own_latent: Tensor, own_image: Tensor, latent: Tensor, image: Tensor) -> Drift:
    error = float((own_image - image).square().mean())
    return Drift(
        latent=float((own_latent - latent).norm() / own_latent.norm()),
        psnr=math.inf if error == 0 else -10 * math.log10(error),
        difference=float((own_image - image).abs().mean()),
    )
