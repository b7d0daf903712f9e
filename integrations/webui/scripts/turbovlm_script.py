"""A panel in Stable Diffusion WebUI Forge that has the UNet work on fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules import scripts
from modules.ui_components import InputAccordion

from turbovlm import DenoiseConfig, UnsupportedModelError
from turbovlm.diffusion.scoped import Scoped


class Merging:
    """Runs a model on fewer tokens, in a call of its own or of another extension's.

    Args:
        scoped: the settings.
        around: what another extension has put around calls of the model; None where none has.
    """

    def __init__(self, scoped: Scoped, around: Callable[..., Any] | None) -> None:
        self.scoped, self.around = scoped, around

    def __call__(self, apply_model: Callable[..., Any], given: dict[str, Any]) -> Any:
        """What Forge calls in place of a model, with the model's method and what it takes."""
        denoiser = apply_model.__self__.diffusion_model  # type: ignore[attr-defined]
        with self.scoped.on(denoiser):
            if self.around is not None:
                return self.around(apply_model, given)
            return apply_model(given["input"], given["timestep"], **given["c"])


class TurboScript(scripts.Script):
    """The panel."""

    sorting_priority = 13

    def title(self) -> str:
        """Its heading."""
        return "Turbo: merge tokens (SD 1.x, SD 2.x, SDXL)"

    def show(self, is_img2img: bool) -> Any:
        """Shown in both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> tuple[Any, ...]:
        """What can be set, in the order of `process_before_every_sampling`."""
        share = {"minimum": 0.25, "maximum": 1.0, "step": 0.01}
        with InputAccordion(False, label=self.title()) as enabled:
            keep = gr.Slider(**share, value=0.5, label="Share of tokens that are left (keep)")
            keep_hires = gr.Slider(**share, value=0.5, label="The same in the hires. fix pass")
            proportional = gr.Checkbox(True, label="Merged tokens count by their sizes (not with xFormers)")
        self.infotext_fields = [
            (enabled, lambda found: "Turbo keep" in found),
            (keep, "Turbo keep"),
            (keep_hires, "Turbo keep in hires. fix"),
            (proportional, "Turbo proportional"),
        ]
        return enabled, keep, keep_hires, proportional

    def process_before_every_sampling(
        self, p: Any, enabled: bool, keep: float, keep_hires: float, proportional: bool, **kwargs: Any
    ) -> None:
        """Have the passes of an image merge; called before each, with a UNet that no earlier pass has changed.

        Raises:
            UnsupportedModelError: the model, or the program, is none that turbovlm knows.
            ConfigError: a setting is out of its range.
        """
        share = keep_hires if getattr(p, "is_hr_pass", False) else keep
        if not enabled:
            return
        p.extra_generation_params |= {"Turbo keep": keep, "Turbo proportional": proportional}
        if getattr(p, "enable_hr", False):
            p.extra_generation_params["Turbo keep in hires. fix"] = keep_hires
        if share == 1:
            return
        objects = getattr(p.sd_model, "forge_objects", None)
        if objects is None:
            raise UnsupportedModelError(
                f"a {type(p.sd_model).__name__} has no forge_objects: turbovlm merges tokens in Stable Diffusion WebUI "
                "Forge, and in ComfyUI by its node; use one of these, or switch the panel off"
            )
        unet = objects.unet.clone()
        scoped = Scoped(DenoiseConfig(share, proportional=proportional))
        scoped.find(unet.model.diffusion_model)
        unet.set_model_unet_function_wrapper(Merging(scoped, unet.model_options.get("model_function_wrapper")))
        objects.unet = unet
