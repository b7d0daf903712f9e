"""The plain alternative to fewer visual tokens: a smaller image, with as many tokens as `visual_keep` would leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbovlm.config import ReadConfig
from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.vlm.select import kept_count

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 400
"""Sizes that are tried."""
TOLERANCE = 0.1
"""How far from the tokens asked for, relatively, an image's may be."""


def downsample(processor: Any, image: Image, visual_keep: float | int) -> Image:
    """Make an image so much smaller that the model reads about `visual_keep` of its visual tokens.

    It is the control that `visual_keep` has to beat: without turbovlm, at equal tokens for the language model, and
    with a cheaper tower. Works for processors that keep an image's own size, such as Qwen's; others make the same
    number of tokens of every image.

    Args:
        processor: the model's `transformers` processor.
        image: a PIL image.
        visual_keep: as in `ReadConfig`: a share of the tokens that the processor makes of `image`, or a count.

    Returns:
        The image in the size whose number of tokens is closest; of several, the largest.

    Raises:
        ConfigError: an impossible `visual_keep`, or no size comes within 10 % of it.
        UnsupportedModelError: the processor does not say how many tokens an image becomes.
    """
    keep = ReadConfig(visual_keep).visual_keep
    assert keep is not None
    target = kept_count(keep, _tokens(processor, image.height, image.width))
    sizes = [
        (max(1, round(image.height * step / STEPS)), max(1, round(image.width * step / STEPS)))
        for step in range(STEPS, 0, -1)
    ]
    found = {size: _tokens(processor, *size) for size in sizes}
    height, width = min(found, key=lambda size: abs(found[size] - target))
    if abs(found[height, width] - target) > TOLERANCE * target:
        possible = ", ".join(map(str, sorted(set(found.values()))))
        raise ConfigError(
            f"visual_keep={visual_keep}: {type(processor).__name__} makes {possible} tokens of this image in smaller "
            f"sizes, and nothing near {target}"
        )
    return image if (height, width) == (image.height, image.width) else image.resize((width, height))


def _tokens(processor: Any, height: int, width: int) -> int:
    """Visual tokens of an image of that size."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        raise UnsupportedModelError(
            f"{type(processor).__name__} does not say how many tokens an image becomes; the processors of "
            "vision-language models in transformers ≥ 4.56 do"
        )
    (tokens,) = count(image_sizes=[(height, width)])["num_image_tokens"]
    return int(tokens)
