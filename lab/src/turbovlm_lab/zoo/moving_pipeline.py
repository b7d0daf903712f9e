"""`WanPipeline` with what the small video model has learnt as defaults; imported where `diffusers` is there."""

from __future__ import annotations

from typing import Any

from diffusers import WanPipeline

from turbovlm_lab.zoo.emoji import WORDS
from turbovlm_lab.zoo.moving import FRAMES, SIDE


class MovingPipeline(WanPipeline):  # type: ignore[misc]
    """Wan's own, for videos of 15 frames of 32×32 pixels and prompts of 16 tokens."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = SIDE,
        width: int = SIDE,
        num_frames: int = FRAMES,
        num_inference_steps: int = 12,
        guidance_scale: float = 3.0,
        max_sequence_length: int = WORDS,
        **others: Any,
    ) -> Any:
        return super().__call__(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            guidance_scale,
            max_sequence_length=max_sequence_length,
            **others,
        )
