"""What the parts of one accelerated denoiser share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.diffusion.parts import Part
from turbovlm.functional.matching import Merge
from turbovlm.functional.partition import Partition


@dataclass(frozen=True)
class Spot:
    """One part of one block, and the group of blocks whose tokens are merged alike.

    Attributes:
        name: path of the part in the denoiser.
        part: what it is.
        group: names the blocks that compare their tokens once.
        index: of the group in the denoiser, from 0.
        leads: whether it is the group's first part of its kind, on whose tokens the merge is decided.
        guide: path of the self-attention whose queries and keys say what matters, from the denoiser.
    """

    name: str
    part: Part
    group: str
    index: int
    leads: bool
    guide: str

    @property
    def merge(self) -> str:
        """Names the parts that share a merge: those of a group that are guided alike."""
        return f"{self.group}, by the text" if self.part.by_text else self.group


@dataclass(frozen=True)
class Pairs:
    """Each candidate's most similar partner, and how similar: R and its argument, `[batch, candidates]` each."""

    split: Partition
    redundancy: Tensor
    partner: Tensor


@dataclass(eq=False)
class DiffusionPlan:
    """How one denoiser's tokens are merged.

    Attributes:
        config: the settings.
        family: for people: the kinds of blocks found.
        spots: the parts, in the order of the denoiser.
        active: whether anything is merged; not after removal, for forwards that another library holds on to.
        pipe: the pipeline, whose scheduler says when a step ends; None where only the denoiser was given.
        grid: rows and columns of the tokens under way; None where nothing says.
        twins: for each picture of the batch under way, the share of each that has the same latent, `[batch, batch]`:
            both halves of guidance denoise one latent; None where each merges by itself.
        pairs: what each group's tokens were found to be most similar to, in the forward under way.
        held: the merges in force, by `Spot.merge`.
        scheduler: the one whose steps are counted, and `steps` how many there were.
        seen: of each group, the tokens that it last read, before and after; of eager forwards.
        again: whether the next forward may merge as the last did.
        decides: whether the forward under way decides anew.

    The state of a run is neither copied nor pickled.
    """

    config: TurboConfig
    family: str
    spots: tuple[Spot, ...]
    active: bool = True
    pipe: Any = field(default=None, repr=False)
    grid: tuple[int, int] | None = None
    twins: Tensor | None = field(default=None, repr=False)
    pairs: dict[str, Pairs] = field(default_factory=dict, repr=False)
    held: dict[str, Merge | None] = field(default_factory=dict, repr=False)
    scheduler: Any = field(default=None, repr=False)
    steps: int = 0
    seen: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    again: bool = False
    decides: bool = True

    def __getstate__(self) -> dict[str, Any]:
        return dict(DiffusionPlan(self.config, self.family, self.spots, self.active).__dict__)
