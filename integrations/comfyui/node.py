"""A node that merges tokens in a model's denoiser."""

from __future__ import annotations

import logging
import math
from typing import Any

from comfy.patcher_extension import WrappersMP

from turbovlm import DenoiseConfig
from turbovlm.diffusion.scoped import Scoped
from turbovlm.errors import ConfigError

KEY = "turbovlm"
"""By which a model knows this node's wrapper; of two nodes in a row the later one counts."""


class Merging:
    """Runs a model's denoiser on fewer tokens, in those steps whose noise is in a range.

    Args:
        scoped: the settings.
        above, up_to: the noise, σ: more than the first, and at most the second.
    """

    def __init__(self, scoped: Scoped, above: float, up_to: float) -> None:
        self.scoped, self.above, self.up_to = scoped, above, up_to

    def __call__(self, executor: Any, x: Any, sigma: Any, *args: Any, **kwargs: Any) -> Any:
        """What ComfyUI calls around a step of a model; of every other copy of the model it knows nothing."""
        everywhere = self.above == 0 and self.up_to == math.inf  # without a look at σ, which waits for a GPU
        if not everywhere and not self.above < float(sigma.max()) <= self.up_to:
            return executor(x, sigma, *args, **kwargs)
        denoiser = executor.class_obj.diffusion_model
        with self.scoped.on(getattr(denoiser, "_orig_mod", denoiser)):  # below torch.compile
            return executor(x, sigma, *args, **kwargs)


class TurboMerge:
    """Merge tokens in front of the denoiser's blocks and restore them behind."""

    CATEGORY = "model_patches/unet"
    DESCRIPTION = (
        "Merges similar tokens in front of stacks of the denoiser's blocks and restores them behind: fewer "
        "multiply-accumulates, nearly the same image. SD 1.x, SD 2.x, SDXL and FLUX.1. keep = 1 changes nothing."
    )
    FUNCTION = "merge"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "keep": (
                    "FLOAT",
                    {"default": 0.5, "min": 0.25, "max": 1.0, "step": 0.01, "tooltip": "share of tokens that are left"},
                ),
            },
            "optional": {
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **share, "tooltip": "of the steps, from where on to merge"},
                ),
                "end_percent": ("FLOAT", {"default": 1.0, **share, "tooltip": "of the steps, up to where to merge"}),
                "span": (
                    "INT",
                    {
                        "default": 4,
                        "min": 1,
                        "max": 16,
                        "tooltip": "blocks that share a merge, at most; 1: each its own",
                    },
                ),
                "min_tokens": (
                    "INT",
                    {"default": 0, "min": 0, "max": 1 << 20, "tooltip": "resolutions with fewer tokens stay whole"},
                ),
                "proportional": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "merged tokens count by their sizes in self-attention, with a mask"},
                ),
            },
        }

    def merge(
        self,
        model: Any,
        keep: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        span: int = 4,
        min_tokens: int = 0,
        proportional: bool = True,
    ) -> tuple[Any]:
        """A copy of the model that merges; it shares the weights, and the model itself stays as it is.

        Args:
            model: a `ModelPatcher`.
            keep, span, min_tokens, proportional: as in `turbovlm.DenoiseConfig`.
            start_percent, end_percent: which part of the steps merges, in [0, 1].

        Raises:
            UnsupportedModelError: its denoiser is none that turbovlm knows.
            ConfigError: a setting is out of its range.
        """
        copy = model.clone()
        copy.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
        if start_percent >= end_percent:
            raise ConfigError(f"start_percent={start_percent}: must be less than end_percent, which is {end_percent}")
        if keep == 1:
            return (copy,)
        config = DenoiseConfig(keep, span=span, min_tokens=min_tokens, proportional=proportional)
        scoped = Scoped(config)
        denoiser: Any = copy.get_model_object("diffusion_model")
        feature = scoped.find(getattr(denoiser, "_orig_mod", denoiser))
        logging.info("turbovlm:%s", feature.describe()[0].removeprefix(" "))
        sampling = copy.get_model_object("model_sampling")
        above = 0.0 if end_percent == 1 else float(sampling.percent_to_sigma(end_percent))
        up_to = math.inf if start_percent == 0 else float(sampling.percent_to_sigma(start_percent))
        copy.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, Merging(scoped, above, up_to))
        return (copy,)


NODE_CLASS_MAPPINGS: dict[str, type] = {"TurboMerge": TurboMerge}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"TurboMerge": "Turbo: merge tokens"}
