"""A pipeline of `diffusers` that is watched as it makes images: when its denoiser runs, and what comes out."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.apply import DENOISERS, apply, denoisers_of
from turbovlm.config import DenoiseConfig
from turbovlm.diffusion.inputs import INPUTS
from turbovlm.errors import ConfigError, TurboError, UnsupportedModelError
from turbovlm.patching import patches_on
from turbovlm.profile.macs import counting
from turbovlm.profile.timing import elapsed, mark, peak_memory
from turbovlm.sharing import twin

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a bowl of fruit on a wooden table, oil painting",
    "a lighthouse at dusk, waves against the rocks",
    "a red fox in the snow, close up",
)
"""What images are made of where nothing else is asked for."""
CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)
"""The same for ImageNet's classes: golden retriever, otter, red panda, geyser, macaw, valley, balloon, arctic fox."""

Prompt = str | int | Sequence[str | int] | None


@dataclass
class Call:
    """One call of the pipeline: marks before and after each forward of its denoisers, and its scheduler's steps."""

    marks: list[tuple[Any, Any]] = field(default_factory=list)
    steps: int = 0

    @property
    def step_seconds(self) -> float:
        """Seconds in the denoisers per step of the scheduler."""
        return sum(elapsed(start, end) for start, end in self.marks) / self.steps


class WatchedPipeline:
    """A twin of a pipeline: the same weights, but denoisers and a scheduler that are objects of its own.

    So what is put into one leaves the others, and the pipeline itself, as they are. It draws no progress bar, and has
    no safety checker, which would turn an image black.

    Attributes:
        calls: of `draw`, in order.
        latent: what the scheduler gave last, `[batch, …]`.
        image: what the last `draw` gave, `[batch, 3, height, width]` in [0, 1]; videos `[batch, frames, 3, …]`.
        first: latent and image of the first `draw`.
    """

    def __init__(
        self, pipe: Any, inputs: Mapping[str, Any], seeds: Sequence[int], config: DenoiseConfig | None = None
    ) -> None:
        self._inputs, self._seeds = inputs, seeds
        self._pipe = copy.copy(pipe)
        self._denoisers = {name: twin(denoiser) for name, denoiser in find_denoisers(pipe).items()}
        for name, denoiser in self._denoisers.items():
            setattr(self._pipe, name, denoiser)
        self._pipe.scheduler = copy.deepcopy(pipe.scheduler)
        self._pipe.set_progress_bar_config(disable=True)
        if getattr(pipe, "safety_checker", None) is not None:
            self._pipe.safety_checker = None
        self._over_steps = config is not None and config.over_steps
        if config is not None:
            apply(self._pipe, config)
        step = self._pipe.scheduler.step
        self._pipe.scheduler.step = functools.update_wrapper(functools.partial(self._step, step), step)
        self.device = execution_device(self._pipe)
        self.calls: list[Call] = []
        self.latent: Tensor
        self.image: Tensor
        self.first: tuple[Tensor, Tensor] | None = None
        self._arguments: dict[str, tuple[Any, Any]] = {}

    def count(self, steps: int) -> float:
        """Multiply-accumulates of a step's forwards of the denoisers, on average over an image of `steps` steps.

        They are counted as the image is made; call it before `watch`.
        """
        total = 0

        def counted(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal total
            self._arguments[name] = args, kwargs
            with counting() as so_far:
                out = forward(*args, **kwargs)
            total += so_far()
            return out

        taken = self._call_with(counted, steps)
        return total / taken

    def watch(self, compile: bool) -> None:
        """Compile the denoisers if that is wanted, and note from now on when they run."""
        for name, denoiser in self._denoisers.items():
            module: Any = torch.compile(denoiser) if compile else denoiser
            setattr(self._pipe, name, module)
            module.register_forward_pre_hook(lambda *_: self.calls[-1].marks.append((mark(self.device), None)))
            module.register_forward_hook(self._ended)

    def draw(self) -> None:
        """Make the images; the same ones every time."""
        self.calls.append(Call())
        self.image = self._call()
        if self.first is None:
            self.first = self.latent, self.image

    def peak(self, steps: int) -> int | None:
        """`peak_memory` of an image of so few steps, which take as much as many."""
        self.calls.append(Call())
        peak = peak_memory(lambda: self._call(steps), self.device)
        self.calls.pop()
        return peak

    @torch.no_grad()
    def peak_of_step(self, steps: int) -> int | None:
        """`peak_memory` of one forward of a denoiser, that decides anew what is merged; the most of all denoisers.

        Where what is kept depends on the step, the most of those of an image of `steps` steps.
        """
        peaks: list[int | None] = []
        if self._over_steps:

            def measured(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
                outs: list[Any] = []
                peaks.append(peak_memory(lambda: outs.append(forward(*args, **kwargs)), self.device))
                return outs[0]

            self._call_with(measured, steps)
            return max((peak for peak in peaks if peak is not None), default=None)
        self.calls.append(Call())
        for name, (args, kwargs) in self._arguments.items():
            module = getattr(self._pipe, name)
            for _ in range(2):  # compiled anew, outside of an image; the second as all that follow
                module(*args, **kwargs)
            peaks.append(peak_memory(lambda: module(*args, **kwargs), self.device))  # noqa: B023 - called at once
        self.calls.pop()
        return max((peak for peak in peaks if peak is not None), default=None)

    def _call_with(self, function: Callable[..., Any], steps: int) -> int:
        """Make an image in `steps` steps with `function`, given a denoiser's name and forward first, in place of it.

        Returns:
            How many steps were taken.
        """
        modules = {name: getattr(self._pipe, name) for name in self._denoisers}
        own = {name: module.__dict__.get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            module.forward = functools.partial(function, name, module.forward)
        self.calls.append(Call())
        self._call(steps)
        for name, module in modules.items():
            del module.forward
            if own[name] is not None:
                module.forward = own[name]
        return self.calls.pop().steps

    def _call(self, steps: int | None = None) -> Tensor:
        few = {} if steps is None else {"num_inference_steps": steps}
        # One generator per image, on the CPU: the same noise on every device and in every batch.
        generator = [torch.Generator().manual_seed(seed) for seed in self._seeds]
        made = self._pipe(**{**self._inputs, **few}, generator=generator)
        image: Tensor = made.frames if hasattr(made, "frames") else made.images
        return image

    def _step(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls[-1].steps += 1
        out = method(*args, **kwargs)
        self.latent = out[0]
        return out

    def _ended(self, *_: Any) -> None:
        marks = self.calls[-1].marks
        marks[-1] = marks[-1][0], mark(self.device)


def find_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's denoisers, by what the pipeline calls them: Wan 2.2 has one for much noise and one for little.

    Raises:
        UnsupportedModelError: it has none.
        TurboError: one is accelerated already.
    """
    found = {} if isinstance(pipe, nn.Module) else denoisers_of(pipe)
    if any(True for module in found.values() for _ in patches_on(module)):
        raise TurboError("this pipeline is accelerated already: compare against it itself, after handle.remove()")
    if not found:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} is no pipeline with a denoiser ({' or '.join(DENOISERS)}); "
            "turbovlm.profile.compare measures a model alone"
        )
    return found


def find_denoiser(pipe: Any) -> nn.Module:
    """The first of `find_denoisers`; several are alike but for their weights."""
    return next(iter(find_denoisers(pipe).values()))


def execution_device(pipe: Any) -> torch.device:
    """Where it computes, be its weights elsewhere until then."""
    device: torch.device = pipe._execution_device
    return device


def inputs_of(
    pipe: Any, size: tuple[int, int] | None, batch: int, steps: int, prompt: Prompt, more: Mapping[str, Any]
) -> dict[str, Any]:
    """What a pipeline's call takes, by name.

    Args:
        pipe: any pipeline from text or classes to images.
        size: height and width in pixels; None for its own.
        batch: images.
        steps: denoising steps.
        prompt: one or several, taken in turn; class numbers where it makes images of classes; None for some.
        more: what else it is given, or in place of these.

    Raises:
        ConfigError: a size that the pipeline refuses or would change, or a prompt of the wrong kind.
        TurboError: the pipeline takes neither words nor classes, or has no text encoder.
    """
    accepted = _accepted(pipe)
    inputs: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    if size is not None:
        check_size(pipe, size)
        inputs |= {"height": size[0], "width": size[1]}
    if "use_resolution_binning" in accepted:
        inputs["use_resolution_binning"] = False  # else the size would be another, and the image resized
    if takes_classes(pipe):
        inputs["class_labels"] = _in_turn(prompt, CLASSES, int, batch)
    elif "prompt_embeds" not in more:
        if "prompt" not in accepted:
            raise TurboError(f"{type(pipe).__name__} takes neither a prompt nor class labels")
        if all(part is None for name, part in pipe.components.items() if name.startswith("text_encoder")):
            raise TurboError(f"this {type(pipe).__name__} has no text encoder: give inputs with prompt_embeds")
        inputs["prompt"] = _in_turn(prompt, PROMPTS, str, batch)
    return {**inputs, **more}


def takes_classes(pipe: Any) -> bool:
    """Whether it makes images of class numbers, and not of texts."""
    return "class_labels" in _accepted(pipe)


def _accepted(pipe: Any) -> Mapping[str, Any]:
    return inspect.signature(type(pipe).__call__).parameters


def _in_turn(prompt: Prompt, default: Sequence[Any], kind: type, batch: int) -> list[Any]:
    given = default if prompt is None else [prompt] if isinstance(prompt, str | int) else list(prompt)
    if not given or any(not isinstance(one, kind) for one in given):
        what = "class numbers" if kind is int else "texts"
        raise ConfigError(f"prompt={prompt!r}: this pipeline makes images of {what}")
    return [given[i % len(given)] for i in range(batch)]


def check_size(pipe: Any, size: tuple[int, int]) -> None:
    """Refuse a size that the pipeline refuses, or that it would change.

    Raises:
        ConfigError: naming what is allowed.
    """
    shown = f"size={size!r}"
    if "height" not in _accepted(pipe):
        raise ConfigError(f"{shown}: {type(pipe).__name__} makes images of one size only")
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
    if len(size) != 2 or not whole:
        raise ConfigError(f"{shown}: must be two integers ≥ 1, height and width in pixels")
    multiple = size_multiple(pipe)
    if any(side % multiple for side in size):
        raise ConfigError(f"{shown}: {type(pipe).__name__} makes images of multiples of {multiple} pixels a side")


PIXELS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
"""How pipelines call the pixels per side of a latent pixel."""


def pixels_per_latent(pipe: Any) -> int | None:
    """Pixels of the image per side of a latent pixel, as the pipeline's autoencoder has them; None where none tells."""
    found = [int(value) for name in PIXELS if (value := getattr(pipe, name, None)) is not None]
    return found[0] if found else None


def own_size(pipe: Any) -> tuple[int, int] | None:
    """Height and width in pixels that a pipeline makes where its denoiser's config does not say; None where it does.

    Pipelines that pack latents into tokens, such as FLUX's, have them.
    """
    side, pixels = getattr(pipe, "default_sample_size", None), pixels_per_latent(pipe)
    entry = INPUTS.get(type(find_denoiser(pipe)).__name__)
    if entry is None or entry.packed is None or side is None or pixels is None:
        return None
    return side * pixels, side * pixels


def size_multiple(pipe: Any) -> int:
    """What the sides of its images are multiples of, in pixels: of 8, and of what makes a token."""
    per_latent = pixels_per_latent(pipe) or 8
    patch: Any = find_denoiser(pipe).config.get("patch_size") or 1  # type: ignore[union-attr, operator]
    patch = int(patch[-1] if isinstance(patch, tuple | list) else patch)
    processor = getattr(getattr(pipe, "image_processor", getattr(pipe, "video_processor", None)), "config", None)
    packed = 1 if processor is None else int(processor.get("vae_scale_factor") or 1)
    return math.lcm(8, per_latent * patch, packed)
