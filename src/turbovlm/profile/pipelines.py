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
    """One call of the pipeline: marks before and after each forward of its denoiser, and its scheduler's steps."""

    marks: list[tuple[Any, Any]] = field(default_factory=list)
    steps: int = 0

    @property
    def step_seconds(self) -> float:
        """Seconds in the denoiser per step of the scheduler."""
        return sum(elapsed(start, end) for start, end in self.marks) / self.steps


class WatchedPipeline:
    """A twin of a pipeline: the same weights, but a denoiser and a scheduler that are objects of its own.

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
        self._name, denoiser = find_denoiser(pipe)
        self._inputs, self._seeds = inputs, seeds
        self._pipe, self._denoiser = copy.copy(pipe), twin(denoiser)
        setattr(self._pipe, self._name, self._denoiser)
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
        self._arguments: tuple[Any, Any] = (), {}

    def count(self, steps: int) -> float:
        """Multiply-accumulates of a step's forwards of the denoiser, on average over the first `steps` of an image.

        They are counted as the image is made; call it before `watch`.
        """
        total = 0

        def counted(forward: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal total
            self._arguments = args, kwargs
            with counting() as so_far:
                out = forward(*args, **kwargs)
            total += so_far()
            return out

        taken = self._call_with(self._denoiser, counted, steps)
        return total / taken

    def watch(self, compile: bool) -> None:
        """Compile the denoiser if that is wanted, and note from now on when it runs."""
        module: Any = torch.compile(self._denoiser) if compile else self._denoiser
        setattr(self._pipe, self._name, module)
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
        """`peak_memory` of one forward of the denoiser, that decides anew what is merged.

        Where what is kept depends on the step, the most of those of an image of `steps` steps.
        """
        args, kwargs = self._arguments
        module = getattr(self._pipe, self._name)
        if self._over_steps:
            peaks: list[int | None] = []

            def measured(forward: Any, *args: Any, **kwargs: Any) -> Any:
                outs: list[Any] = []
                peaks.append(peak_memory(lambda: outs.append(forward(*args, **kwargs)), self.device))
                return outs[0]

            self._call_with(module, measured, steps)
            return max((peak for peak in peaks if peak is not None), default=None)
        self.calls.append(Call())
        for _ in range(2):  # compiled anew, outside of an image; the second as all that follow
            module(*args, **kwargs)
        peak = peak_memory(lambda: module(*args, **kwargs), self.device)
        self.calls.pop()
        return peak

    def _call_with(self, module: Any, function: Callable[..., Any], steps: int) -> int:
        """Make an image in `steps` steps with `function`, given the module's forward first, in place of it.

        Returns:
            How many steps were taken.
        """
        own = module.__dict__.get("forward")
        module.forward = functools.partial(function, module.forward)
        self.calls.append(Call())
        self._call(steps)
        del module.forward
        if own is not None:
            module.forward = own
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


def find_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """A pipeline's denoiser, and what the pipeline calls it.

    Raises:
        UnsupportedModelError: it has none, or two.
        TurboError: the denoiser is accelerated already.
    """
    found = {} if isinstance(pipe, nn.Module) else denoisers_of(pipe)
    for name, module in found.items():
        if any(True for _ in patches_on(module)):
            raise TurboError("this pipeline is accelerated already: compare against it itself, after handle.remove()")
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{type(pipe).__name__} has several denoisers ({', '.join(found)}), which are not measured together: "
                "turbovlm.profile.compare measures one of them alone"
            )
        return name, module
    raise UnsupportedModelError(
        f"{type(pipe).__name__} is no pipeline with a denoiser ({' or '.join(DENOISERS)}); "
        "turbovlm.profile.compare measures a model alone"
    )


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
    entry = INPUTS.get(type(find_denoiser(pipe)[1]).__name__)
    if entry is None or entry.packed is None or side is None or pixels is None:
        return None
    return side * pixels, side * pixels


def size_multiple(pipe: Any) -> int:
    """What the sides of its images are multiples of, in pixels: of 8, and of what makes a token."""
    per_latent = pixels_per_latent(pipe) or 8
    patch: Any = find_denoiser(pipe)[1].config.get("patch_size") or 1  # type: ignore[union-attr, operator]
    patch = int(patch[-1] if isinstance(patch, tuple | list) else patch)
    processor = getattr(getattr(pipe, "image_processor", getattr(pipe, "video_processor", None)), "config", None)
    packed = 1 if processor is None else int(processor.get("vae_scale_factor") or 1)
    return math.lcm(8, per_latent * patch, packed)
