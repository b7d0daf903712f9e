"""What the parts of one accelerated denoiser share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from turbovlm.config import TurboConfig
from turbovlm.diffusion.parts import Part
from turbovlm.functional.matching import Merge


@dataclass(frozen=True)
class Spot:
    """One part of one block, and the group of blocks whose tokens are merged alike.

    Attributes:
        name: path of the part in the denoiser.
        part: what it is.
        group: names the blocks that share a merge.
        leads: whether it is the group's first part, on whose tokens the merge is decided.
        guide: path of the self-attention whose queries and keys say what matters, from the denoiser.
    """

    name: str
    part: Part
    group: str
    leads: bool
    guide: str


@dataclass(eq=False)
class DiffusionPlan:
    """How one denoiser's tokens are merged.

    Attributes:
        config: the settings.
        family: for people: the kinds of blocks found.
        spots: the parts, in the order of the denoiser.
        grid: rows and columns of the tokens under way; None where nothing says.
        held: the merge of each group under way; not copied or pickled.
    """

    config: TurboConfig
    family: str
    spots: tuple[Spot, ...]
    grid: tuple[int, int] | None = None
    held: dict[str, Merge | None] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "grid": None, "held": {}}
