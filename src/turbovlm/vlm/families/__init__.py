"""Vision-language models, as data: where the tower is, whose attention says what matters, how patches become tokens.

A language model reads visual tokens in place of placeholders in its prompt, or by cross-attention. A new family is a
new `VlmFamily` in one of these files' `FAMILIES`.
"""

from turbovlm.vlm.families import across, packed, projected
from turbovlm.vlm.families.family import (
    PIXELS,
    Packed,
    VlmFamily,
    block_read,
    blocks_of,
    is_recurrent,
    native_pixels,
    placeholder_name,
    placeholder_of,
    several_layers,
    states_read,
    sum_cells,
    tokens_per_image,
)

__all__ = [
    "PIXELS",
    "Packed",
    "VlmFamily",
    "block_read",
    "blocks_of",
    "is_recurrent",
    "native_pixels",
    "placeholder_name",
    "placeholder_of",
    "several_layers",
    "states_read",
    "sum_cells",
    "tokens_per_image",
]

FAMILIES = (*projected.FAMILIES, *packed.FAMILIES, *across.FAMILIES)
