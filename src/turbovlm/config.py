"""The settings: one frozen dataclass for each of the three workflows.

`TurboConfig` is for encoders, `ReadConfig` for what a language model reads of an image, `DenoiseConfig` for denoisers.
Each field is valid wherever its class is, and refused where no other setting lets it have an effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from turbovlm.checks import (
    brief,
    check_choice,
    check_flag,
    check_grid,
    check_integer,
    check_number,
    check_seed,
    check_share,
    is_list,
)
from turbovlm.denoise_config import COMPONENTS, DenoiseConfig
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import DegreeFunction, LayeredDegree, needs_semantic
from turbovlm.read_config import GUIDANCES, READINGS, READS, ReadConfig
from turbovlm.settings import REDUCTIONS, WITHOUT_ALPHA, Settings

SIMILARITIES = ("heads", "keys", "queries", "hidden", "auto")
PARTITIONS = ("auto", "all", "random", "alternate", "grid", "cells")
ORDERS = ("partition", "spatial")
RESTORES = ("auto", "copy", "residual")
BLOCKS = ("auto", "every")
AMOUNTS = ("r", "keep", "flops")
"""Fields of `TurboConfig` that say how much is merged; one of them is set."""

PAPER_ALPHA_SCALE = 30.0
"""The authors' code multiplies the published alpha by 30 before it multiplies A."""


@dataclass(frozen=True)
class TurboConfig(Settings):
    """How many tokens the blocks of an encoder merge (one of `r`, `keep`, `flops`), and which.

    The defaults are what kept most of a real ViT's output (docs/defaults.md); `TurboConfig.paper` is the published
    setting.

    Args:
        r: tokens merged per block of the encoder on average, an integer ≥ 0: r times its depth in all, spread evenly
            over `blocks`. Or a sequence of them: how many each block merges, or each of `blocks` where these are given.
        keep: share of the tokens left after the last block, in (0, 1].
        flops: share of the encoder's multiply-accumulates left, in (0, 1].
        blocks: which blocks merge, counted from 0: a sequence, such as `(3, 5, 7, 9)`; `"every"`; or `"auto"`: every
            block for text, for sound, or where `partition` or `order` make halves, as published; else every second
            block, or six of an encoder of more than 12, or, in CLIP's towers, four or five in the middle, which lost
            least there (docs/defaults.md). Where these have not enough to give, every block.
        min_tokens: a block that starts with fewer tokens does not merge (Turbo, §7.2).
        thresholds: one number per block of the encoder, beside a list of `r` of as many: a block merges every token
            whose E is above its own, so that images with more redundancy lose more; `r` then says how many on average.
            In a batch, all lose as many as the image that can spare fewest. Not for `torch.compile`.
        degree: the information degree E; the tokens of highest E are merged.
            `"weighted_distance"` E = −(1 − R)(1 + α√(A/Ā)), Ā the mean A of the candidates,
            `"weighted_difference"` E = R − αA (S1), `"coupled_division"` E = R / (A + 1e-3) (S2),
            `"damped"` E = R(1 − αA) (S3), `"redundancy"` E = R (ToMe), `"semantics"` E = −A, `"random"`, or a callable
            `(R, A, block) -> E`, such as `turbovlm.ops.LayeredDegree` (S4).
        alpha: α, the plain multiplier of A. The authors scale theirs by 30: the paper's α = 6 is `alpha=180`. None is
            1 for `"weighted_distance"`, where α multiplies √(A/Ā), and 2 for the others.
        similarity: the features whose cosine is the redundancy: `"heads"` (keys before rotary positions, those of
            all heads side by side), `"keys"` (the same averaged over heads; the paper's), `"queries"` (averaged),
            `"hidden"` (the normed tokens that the MLP reads), or `"auto"`: `"heads"` for images, `"hidden"` for text.
        guidance: whose attention row is the semantic value A: `"cls"`, `"mean"` (the mean query of the patches),
            or `"auto"`: `"cls"` where the model has one, else `"mean"`.
        partition: who may be merged into whom: `"all"` (every patch into any other, pairs of highest E first),
            `"random"` (one half into the other, drawn anew in every block from `seed`), `"alternate"` (even into odd,
            as published), `"grid"` (one destination in every 2×2 cell), `"cells"` (whole squares of patches, any into
            any other, in towers whose reader joins such squares; the output changes more), or `"auto"`: `"all"` for
            images where half of the blocks or fewer merge, also by `blocks="auto"`; else `"random"`, as for text and
            `order="partition"`.
        grid: patch rows and columns, for `partition="grid"` on images that are not square.
        order: order of the tokens left: `"partition"` (unmerged candidates, then destinations, as published)
            or `"spatial"` (that of the image).
        proportional: attend in proportion to the patches that a token stands for (Turbo, equation 16), in the encoder
            and in what cross-attends to its tokens.
        reduce: `"merge"` averages a token into its destination, weighted by size; `"keep_norm"` also makes the mean,
            which is shorter, as long as its parts are on average; `"prune"` drops the token.
        dense: hand on every position: behind the last block each gets its token back, by `restore`. Encoders whose
            head needs all of them do so unasked.
        trace: keep, for every block of the last forward, what was merged where, and R, A and E.
        seed: of `partition="random"` and `degree="random"`; each is the same in every forward.
        restore: what a position gets back where it does: `"copy"`, what its token came to; `"residual"`, also what
            set it apart from its token when they merged; or `"auto"`: `"residual"` in vision encoders, `"copy"` in
            text encoders, which norm what they hand from block to block.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    _amounts: ClassVar[tuple[str, ...]] = AMOUNTS

    r: int | Sequence[int] | None = None
    _: dataclasses.KW_ONLY
    keep: float | None = None
    flops: float | None = None
    blocks: str | Sequence[int] = "auto"
    min_tokens: int = 0
    thresholds: Sequence[float] | None = None
    degree: str | DegreeFunction = "weighted_distance"
    alpha: float | None = None
    similarity: str = "auto"
    guidance: str = "auto"
    partition: str = "auto"
    grid: tuple[int, int] | None = None
    order: str = "spatial"
    proportional: bool = True
    reduce: str = "keep_norm"
    dense: bool = False
    trace: bool = False
    seed: int = 0
    restore: str = "auto"

    def __post_init__(self) -> None:
        amounts = {name: getattr(self, name) for name in AMOUNTS if getattr(self, name) is not None}
        if len(amounts) != 1:
            found = ", ".join(f"{name}={brief(value)}" for name, value in amounts.items()) or "none of them"
            raise ConfigError(f"give exactly one of r, keep and flops: got {found}")
        self._check_r()
        self._check_blocks()
        for name in ("keep", "flops"):
            if is_list(getattr(self, name)):
                value = brief(getattr(self, name))
                raise ConfigError(f"{name}={value}: an encoder takes one share; give r a value per block")
            if getattr(self, name) is not None:
                self._set(**{name: check_share(name, getattr(self, name))})
        self._set(min_tokens=check_integer("min_tokens", self.min_tokens), seed=check_seed(self.seed))
        self._check_degree()
        check_choice("similarity", self.similarity, SIMILARITIES)
        check_choice("guidance", self.guidance, GUIDANCES)
        check_choice("partition", self.partition, PARTITIONS)
        check_choice("order", self.order, ORDERS)
        check_choice("reduce", self.reduce, REDUCTIONS)
        check_choice("restore", self.restore, RESTORES)
        for name in ("proportional", "dense", "trace"):
            check_flag(name, getattr(self, name))
        self._check_thresholds()
        if self.partition == "all" and self.order == "partition":
            raise ConfigError('order="partition": partition="all" makes no halves to order by; use order="spatial"')
        if self.grid is not None:
            if self.partition != "grid":
                raise ConfigError(
                    f'grid={brief(self.grid)}: only partition="grid" uses it, not {brief(self.partition)}'
                )
            self._set(grid=check_grid(self.grid))
        self._check_unread()

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        found = super()._unread(values)
        degree = values["degree"]
        if not needs_semantic(degree) and not values["trace"]:
            found["guidance"] = f"degree={brief(degree)} needs no attention, and there is no trace=True that records it"
        if is_list(values["r"]) and not is_list(values["blocks"]):
            found["blocks"] = "a list of r has a number for every block, 0 for those that do not merge"
        return found

    @classmethod
    def paper(
        cls,
        r: int | Sequence[int],
        alpha: float = 6.0,
        beta: float = 1.0,
        gamma: float = 0,
        min_tokens: int = 0,
        degree: str | DegreeFunction = "weighted_difference",
        *,
        trace: bool = False,
    ) -> TurboConfig:
        """The authors' implementation to the letter: keys, alternate halves, and α multiplied by 30.

        `r` tokens are merged in every block, or `r[l]` in block l.

        `degree="layered"` is the layered fusion S4, a `LayeredDegree`; so is `"weighted_difference"` with a `beta`
        other than 1, as in their code. Other degrees know neither `beta` nor `gamma`, nor all of them `alpha`.

        Raises:
            ConfigError: naming the field, the value and what is allowed.
        """
        multiplier = check_number("alpha", alpha) * PAPER_ALPHA_SCALE
        beta, gamma = check_number("beta", beta), check_number("gamma", gamma)
        layered = degree == "layered" or (degree == "weighted_difference" and beta != 1)
        without = callable(degree) or degree in WITHOUT_ALPHA
        for name, value, default in (("beta", beta, 1.0), ("gamma", gamma, 0)):
            if value != default and not layered:
                raise ConfigError(
                    f"{name}={value:g}: it would have no effect: degree={degree!r} with beta={beta:g} is not layered"
                )
        if without and alpha != 6.0:
            raise ConfigError(f"alpha={brief(alpha)}: it would have no effect: degree={brief(degree)} has no alpha")
        return cls(
            r=r,
            blocks="auto" if is_list(r) else "every",
            min_tokens=min_tokens,
            degree=LayeredDegree(multiplier, beta, gamma) if layered else degree,
            alpha=None if layered or without else multiplier,
            similarity="keys",
            partition="alternate",
            order="partition",
            reduce="merge",
            restore="copy",
            trace=trace,
        )

    @property
    def summary(self) -> str:
        """The settings that say which tokens are merged."""
        return f"{self.ranking}, partition={self.partition}, {self.reduce}"

    def _check_r(self) -> None:
        if is_list(self.r):
            values = list(self.r)  # type: ignore[arg-type]
            if not values:
                raise ConfigError("r=[]: a list of r needs one integer ≥ 0 per block")
            self._set(r=tuple(check_integer("r", value, shown=self.r) for value in values))
        elif self.r is not None:
            self._set(r=check_integer("r", self.r))

    def _check_blocks(self) -> None:
        if not is_list(self.blocks):
            check_choice("blocks", self.blocks, BLOCKS, extra=" or a list of block numbers")
            return
        numbers = tuple(check_integer("blocks", value, shown=self.blocks) for value in self.blocks)
        if not numbers or list(numbers) != sorted({*numbers}):
            raise ConfigError(f"blocks={brief(self.blocks)}: must be numbers of blocks, ascending, each once")
        if isinstance(self.r, tuple) and len(self.r) != len(numbers):
            raise ConfigError(f"r={brief(list(self.r))}: needs one number for each of blocks={brief(list(numbers))}")
        self._set(blocks=numbers)

    def _check_thresholds(self) -> None:
        if self.thresholds is None:
            return
        if not is_list(self.thresholds):
            raise ConfigError(f"thresholds={brief(self.thresholds)}: must be a number per block")
        if not isinstance(self.r, tuple) or len(self.r) != len(self.thresholds):
            raise ConfigError(
                f"thresholds={brief(list(self.thresholds))}: need a list of r beside them, of as many blocks"
            )
        if is_list(self.blocks):
            raise ConfigError(
                "blocks: beside thresholds, give r a number for every block, 0 for those that do not merge"
            )
        if self.degree == "random":
            raise ConfigError("thresholds: degree='random' says nothing about an image")
        self._set(thresholds=tuple(check_number("thresholds", value) for value in self.thresholds))


Config = TurboConfig | ReadConfig | DenoiseConfig

__all__ = ["COMPONENTS", "READINGS", "READS", "Config", "DenoiseConfig", "ReadConfig", "TurboConfig"]
