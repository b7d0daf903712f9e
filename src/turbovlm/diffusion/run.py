"""The state of one forward of a denoiser: which one it is, how its tokens lie, what was chosen in it.

Tensors cannot carry it, because convolutions stand between the blocks. The denoiser's forward makes a `Run` and leaves
it to its thread while it lasts, so forwards in several threads, and forwards within forwards, do not meet.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.diffusion.attend import Biases
from turbovlm.diffusion.grids import Grids, Unread
from turbovlm.diffusion.positions import Cut
from turbovlm.errors import StateError
from turbovlm.ops.attention import size_bias
from turbovlm.ops.merging import Merge
from turbovlm.patching import Patch
from turbovlm.shares import Share

if TYPE_CHECKING:
    from turbovlm.diffusion.feature import DenoiseFeature
    from turbovlm.diffusion.merge_stack import Stacked

RUN = "_turbovlm_run"
"""Name of the attribute of a block's hidden states that holds the run, and what was merged at the time, for gradient
checkpointing."""


Cuts = dict[tuple[str, str], tuple[Merge, Any, Any]]
"""What was cut of arguments, by `Site.key` and name, with the merge and what it was cut from."""


@dataclass(frozen=True)
class Choice:
    """What the parts of a group of blocks read.

    Attributes:
        grids: the images of a sequence.
        merge: what merges their tokens; None where all are read.
    """

    grids: Grids
    merge: Merge | None

    @property
    def tokens(self) -> int:
        """N, of all images of a sequence."""
        return sum(map(math.prod, self.grids))

    @property
    def left(self) -> int:
        """M, of all images of a sequence."""
        return self.tokens if self.merge is None else self.merge.sizes.shape[1]

    @property
    def largest(self) -> int:
        """Tokens of the largest image."""
        return max(map(math.prod, self.grids))

    def left_of_first(self) -> list[tuple[int, int]]:
        """Tokens of each image of the first sequence of a batch, and how many of them are left."""
        counts = list(map(math.prod, self.grids))
        if self.merge is None:
            return [(count, count) for count in counts]
        ends = torch.tensor(list(itertools.accumulate(counts)))
        kept = torch.searchsorted(ends, self.merge.kept[0].cpu(), right=True).bincount(minlength=len(counts))
        return list(zip(counts, kept.tolist()))


@dataclass(eq=False)
class Run:
    """What one forward of a denoiser knows.

    Attributes:
        feature: whose denoiser it is.
        denoiser: the denoiser.
        path: `turbovlm.ops.plain` or `turbovlm.ops.fused`, by `path_for` of the latents.
        latents: how many it was given.
        same_latent: for each latent, the share of each that is the same, `[latents, latents]`; None where each merges
            by itself.
        share: what it keeps, of every resolution or of each.
        choices: what was chosen so far, by `Site.key`; those of a pipeline's earlier step, where steps share them.
        grids: frames, rows and columns of each image of the tokens at hand, or what will tell them; None where nothing
            says.
        finest: tokens of the largest resolution that has blocks.
        compared: R of each group's candidates and its argument, by `Site.group`, as `compare` gives them.
        whole: why each part or block that was called read all tokens, by its path; None where merging was up to its
            group.
        inside: what paths of the denoiser's modules begin with in the model that was accelerated.
        apart: whether something is added to tokens between blocks in this forward, so that each is a stack.
        stacked: what is merged at present, in a stack of blocks.
        biases: what lets sizes count, by `Site.key`, and the merge that they are of.
        cuts: what was cut of the blocks' arguments.
    """

    feature: DenoiseFeature
    denoiser: nn.Module
    path: ModuleType
    latents: int
    same_latent: Tensor | None
    share: Share
    choices: dict[str, Choice]
    grids: Grids | Unread | None = None
    finest: int = 1
    compared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole: dict[str, str | None] = field(default_factory=dict)
    inside: str = ""
    apart: bool = False
    stacked: Stacked | None = None
    biases: dict[str, tuple[Merge, Biases]] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=dict)

    def biases_of(self, key: str, merge: Merge, dtype: torch.dtype) -> Biases:
        """Those of the merged tokens' sizes, made once for all that read them."""
        of, found = self.biases.get(key, (None, None))
        if found is None or of is not merge or found.bias.dtype != dtype:
            found = Biases(size_bias(merge.sizes, dtype))
            self.biases[key] = merge, found
        return found

    def cut(self, key: str, merge: Merge, cut: Cut, value: Any, again: Cuts) -> Any:
        """An argument of the tokens that are left; blocks are given one object, which is cut once.

        Args:
            key: `Site.key` of what is given it.
            again: what was cut for the part or stack at hand, which is where autograd records all that is kept:
                gradient checkpointing runs its first block once more, and this with it.
        """
        kept = again if torch.is_grad_enabled() else self.cuts
        of, whole, found = kept.get((key, cut.name), (None, None, None))
        if of is not merge or whole is not value:
            found = cut.of_merged(value, merge)
            kept[key, cut.name] = merge, value, found
        return found

    def module_at(self, path: str) -> Any:
        """The denoiser's module of that path in the model that was accelerated; None where it is gone."""
        return module_at(self.denoiser, path.removeprefix(self.inside))


def module_at(module: Any, path: str) -> Any:
    """The module of that path in another; None where it is gone. Much faster than `get_submodule`."""
    for step in path.split("."):
        module = None if module is None else module._modules.get(step)
    return module


class _Thread(threading.local):
    def __init__(self) -> None:  # called in every thread; a default of the class would be a guard that fails once
        self.run: Run | None = None


THREAD = _Thread()
"""`THREAD.run` is the run that is under way in this thread; None where there is none."""


def run_within(run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function as a part of that run."""
    around = THREAD.run
    THREAD.run = run
    try:
        return function(*args, **kwargs)
    finally:
        THREAD.run = around


def check_class(patch: Patch, module: Any) -> None:
    """See that the forward which a patch stands in for is still that of the module's class.

    Raises:
        StateError: another library, such as tomesd, has given the module another class, or the class another forward.
    """
    own: Any = type(module)
    if patch.name == "forward" and own.forward is not patch.method:
        raise StateError(
            f"a {own.__qualname__} of {own.__module__} has had another forward since turbovlm.apply, which would not "
            "be called: take that off, or remove turbovlm's and apply again"
        )


def current_run(patch: Patch) -> Run:
    """The run that a patch's module is called in.

    Raises:
        StateError: it is called outside of its denoiser's forward.
    """
    run = THREAD.run
    if run is None or run.feature is not patch.feature:
        raise StateError(
            f"{patch.detail.name or 'the denoiser'} runs outside of its denoiser's forward, or that was replaced since "
            "turbovlm.apply: remove and apply again"
        )
    return run


def find_same_latents(latents: Tensor) -> Tensor:
    """For each latent of a batch, the share of each that is the same one, `[batch, batch]`; rows sum to 1.

    Both halves of classifier-free guidance denoise one latent, and so do the thirds of some other kinds. This tells
    which belong together without asking the pipeline; other latents are never taken for the same.
    """
    batch = len(latents)
    place = torch.arange(batch, device=latents.device)
    same = place.unsqueeze(0) == place.unsqueeze(1)
    parts = [_equal_parts(latents, batch // count) for count in (2, 3) if batch % count == 0]
    if len(parts) == 2:  # three prompts in halves, or two in thirds
        same = same | torch.where(parts[0].sum() == batch, parts[0], parts[1])
    elif parts:
        same = same | parts[0]
    return same / same.sum(dim=-1, keepdim=True)


def _equal_parts(latents: Tensor, length: int) -> Tensor:
    """Which latents of a batch are the same and in the same place of parts of `length`, `[batch, batch]`."""
    place, flat = torch.arange(len(latents), device=latents.device), latents.flatten(1)
    same = (flat == flat.roll(length, dims=0)).all(dim=1)  # as the one that many before, around the end
    before = (place.unsqueeze(1) - place.unsqueeze(0)) % len(latents) == length
    one_way = before & same.unsqueeze(1)
    return one_way | one_way.T
