"""What the parts of one accelerated denoiser share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.diffusion.families import Part
from turbovlm.ops.merging import Merge
from turbovlm.ops.partition import Partition


@dataclass(frozen=True)
class Spot:
    """One part of one block, and the group of blocks whose tokens are merged alike.

    Attributes:
        name: path of the part in the denoiser.
        part: what it is.
        group: names the blocks that compare their tokens once.
        index: of the group in the denoiser, from 0.
        guide: path of the self-attention whose queries and keys say what matters, from the denoiser.
    """

    name: str
    part: Part
    group: str
    index: int
    guide: str

    @property
    def merge(self) -> str:
        """Names the parts that share a merge: those of a group that are guided alike."""
        return f"{self.group}, by the text" if self.part.by_text else self.group


@dataclass(frozen=True)
class Pairs:
    """Each candidate's most similar destination, and how similar: R and its argument, `[batch, candidates]` each."""

    split: Partition
    redundancy: Tensor
    nearest: Tensor


@dataclass(eq=False)
class DiffusionPlan:
    """How one denoiser's tokens are merged.

    Attributes:
        config: the settings.
        family: for people: the kinds of blocks found.
        spots: the parts, in the order of the denoiser.
        active: whether anything is merged; not after removal, for forwards that another library holds on to.
        pipe: the pipeline, whose scheduler says when a step ends; None where nobody counts.
        scheduler: the one whose steps are counted, `steps` how many there were in this run, `counting` whether a run
            is under way, and `due` whether its next forward decides anew.
        thread: the thread whose forward is under way, where it is known; `running` whether there is one.
        batch: latents in it.
        grid: rows and columns of the tokens at hand; None where nothing says.
        finest: tokens of the largest resolution that the denoiser could have them of.
        twins: for each latent of the batch, the share of each that is the same, `[batch, batch]`: both halves of
            guidance denoise one; None where each merges by itself.
        pairs: what each group's tokens were found to be most similar to, in this forward.
        held: the merges in force, by `Spot.merge`, and `decided` those that need not be decided again.
        seen: of each group, the tokens that it last read, before and after; of eager forwards.

    The state of a run is neither copied nor pickled.
    """

    config: TurboConfig
    family: str
    spots: tuple[Spot, ...]
    active: bool = True
    pipe: Any = field(default=None, repr=False)
    scheduler: Any = field(default=None, repr=False)
    steps: int = 0
    counting: bool = False
    due: bool = True
    thread: int | None = None
    running: bool = False
    batch: int = 0
    grid: tuple[int, int] | None = None
    finest: int = 1
    twins: Tensor | None = field(default=None, repr=False)
    pairs: dict[str, Pairs] = field(default_factory=dict, repr=False)
    held: dict[str, Merge | None] = field(default_factory=dict, repr=False)
    decided: set[str] = field(default_factory=set, repr=False)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return dict(DiffusionPlan(self.config, self.family, self.spots, self.active).__dict__)
