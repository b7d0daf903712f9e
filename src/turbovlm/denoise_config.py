"""The settings of denoisers, a frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turbovlm.checks import brief, check_choice, check_flag, check_grids, check_integer, check_seed, is_list
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import DegreeFunction
from turbovlm.settings import REDUCTIONS, Settings
from turbovlm.shares import Keep, check_keep, is_over_steps, written

COMPONENTS = ("attention", "cross_attention", "ffn")
"""The parts of a denoiser's block that can read merged tokens."""
DENOISER_RESTORES = ("auto", "copy", "linear")
SCOPES = ("part", "block", "stack")
SPAN = 4
"""Blocks in a stack: two drift as little as eight, and four save nearly as much (benchmarks/stacks.py)."""

LINEAR = "regression is of what feed-forwards add, and components has no 'ffn'"


@dataclass(frozen=True)
class DenoiseConfig(Settings):
    """How many tokens the blocks of a denoiser read, and which; each position gets its token's result back.

    Args:
        keep: share of its tokens that a block reads, in [0.25, 1], of all images of a sequence; or several in a list:
            of the largest resolution that the denoiser has blocks in, of half as many rows, of a quarter, …; smaller
            ones have the last. Over the steps of a pipeline, a mapping from progress to either: `{0: 0.5, 0.6: 1.0}`
            keeps half, and behind 0.6 of the steps all; or a function of the progress. Progress is the place of a step
            in its scheduler's `timesteps`, as a share of them, in [0, 1).
        scope: where tokens stay merged: `"stack"`, over a run of blocks, merged once before it and restored once behind
            it by what they have gained; `"block"`, over one block (Turbo, §3.3); `"part"`, over each part of a block
            (§6.2). None: `"part"` where `components` or `queries_only` are given, else `"stack"`.
        span: blocks in a stack, at most, ≥ 1; of stacks alone. None: 4.
        whole_first: blocks at the front that are left whole, ≥ 0, of transformers, not UNets; of stacks and blocks
            alone. None: 4 where there are 12 or more, else 0.
        components: which parts of a block read merged tokens: some of `"attention"`, `"cross_attention"`, `"ffn"`; of
            parts alone. None: all.
        queries_only: in self-attention merge what asks and leave keys and values whole, so that no sizes have to
            count; of parts alone.
        refresh: how many denoising steps share what was decided in the first of them, ≥ 1; fewer where another share
            is kept.
        restore: what a position gets back: `"copy"`, what its token came to; `"linear"`, also what linear regression
            over the tokens says of the difference between the two; or `"auto"`: `"linear"`, but `"copy"` behind parts
            that run elsewhere than on a CPU.
        min_tokens: images of fewer tokens are left whole; those below 64 always are.
        degree: as in `TurboConfig`.
        alpha: as in `TurboConfig`.
        grid: rows and columns of FLUX's tokens, where they cannot be read off `img_ids`; or of each image of a
            sequence, in a list.
        proportional: attend in proportion to the tokens that a merged one stands for (Turbo, equation 16).
        reduce: `"merge"`, `"keep_norm"` or `"prune"`, as in `TurboConfig`.
        seed: of `degree="random"`; the same in every forward.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    keep: Keep
    _: dataclasses.KW_ONLY
    scope: str | None = None
    span: int | None = None
    whole_first: int | None = None
    components: Sequence[str] | None = None
    queries_only: bool = False
    refresh: int = 1
    restore: str = "auto"
    min_tokens: int = 0
    degree: str | DegreeFunction = "redundancy"
    alpha: float | None = None
    grid: tuple[int, int] | Sequence[tuple[int, int]] | None = None
    proportional: bool = True
    reduce: str = "merge"
    seed: int = 0

    def __post_init__(self) -> None:
        self._set(keep=check_keep(self.keep))
        if self.components is not None:
            parts = self.components
            if not is_list(parts) or not parts or any(part not in COMPONENTS for part in parts):
                raise ConfigError(f"components={brief(parts)}: must be some of {', '.join(COMPONENTS)}, in a list")
            self._set(components=tuple(name for name in COMPONENTS if name in parts))
        self._set(refresh=check_integer("refresh", self.refresh, minimum=1))
        if self.scope is not None:
            check_choice("scope", self.scope, SCOPES)
        if self.span is not None:
            self._set(span=check_integer("span", self.span, minimum=1))
        if self.whole_first is not None:
            self._set(whole_first=check_integer("whole_first", self.whole_first))
        check_flag("queries_only", self.queries_only)
        check_choice("restore", self.restore, DENOISER_RESTORES)
        check_flag("proportional", self.proportional)
        self._set(min_tokens=check_integer("min_tokens", self.min_tokens), seed=check_seed(self.seed))
        self._check_degree()
        check_choice("reduce", self.reduce, REDUCTIONS)
        if self.grid is not None:
            self._set(grid=check_grids(self.grid))
        self._check_unread()

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        found = super()._unread(values)
        scope = _scope_of(values["scope"], values["components"], values["queries_only"])
        if scope != "part":
            found |= dict.fromkeys(("components", "queries_only"), f"scope={scope!r} merges whole blocks")
        elif values["queries_only"] and values["components"] is not None and "attention" not in values["components"]:
            found["queries_only"] = "it is of self-attention, and components has no 'attention'"
        elif not values["queries_only"] and "ffn" not in (values["components"] or ("ffn",)):
            found |= {"restore": LINEAR} if values["restore"] == "linear" else {}
        if scope == "part":
            found["whole_first"] = "scope='part' merges in all blocks"
        if scope != "stack":
            found["span"] = f"scope={scope!r} has no stacks"
        return found

    @property
    def amount(self) -> str:
        """`keep`, as it was written."""
        return f"keep={written(self.keep)}"

    @property
    def over_steps(self) -> bool:
        """Whether `keep` is not the same in all steps."""
        return is_over_steps(self.keep)

    @property
    def where(self) -> str:
        """`scope`, or what None stands for."""
        return _scope_of(self.scope, self.components, self.queries_only)

    @property
    def parts(self) -> tuple[str, ...]:
        """`components`, or what None stands for."""
        return COMPONENTS if self.components is None else tuple(self.components)

    @property
    def sides(self) -> tuple[tuple[int, int], ...] | None:
        """`grid`, of each image of a sequence."""
        given: Any = self.grid
        return given if given is None or isinstance(given[0], tuple) else (given,)

    @property
    def longest(self) -> int:
        """Blocks in a stack, at most; 1 where each merges by itself."""
        if self.where == "block":
            return 1
        return SPAN if self.span is None else self.span

    @property
    def summary(self) -> str:
        """The settings that say which tokens are merged."""
        return f"{self.ranking}, {self.reduce}"


def _scope_of(scope: str | None, components: Sequence[str] | None, queries_only: bool) -> str:
    if scope is None:
        return "stack" if components is None and not queries_only else "part"
    return scope
