"""`TurboConfig`: how many tokens to merge, and which."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from turbovlm.errors import ConfigError
from turbovlm.ops.degree import DEGREES, DegreeFunction, LayeredDegree, default_alpha
from turbovlm.promise import Promise

SIMILARITIES = ("heads", "keys", "queries", "hidden", "auto")
GUIDANCES = ("auto", "cls", "mean")
PARTITIONS = ("alternate", "random", "grid", "auto")
ORDERS = ("partition", "spatial")
REDUCTIONS = ("merge", "keep_norm", "prune", "auto")
VISUAL_SELECTIONS = ("information", "redundancy", "attention", "random", "uniform", "pooling")

COMPONENTS = ("attention", "cross_attention", "ffn")
"""The parts of a block that reads merged tokens and gives all of them back, in image generation."""

RESTORES = ("auto", "copy", "residual", "linear", "weighted")
ENCODER_RESTORES = ("auto", "copy", "residual")
GENERATION = ("components", "refresh", "share_guidance")
"""The fields that only image generation has."""

AMOUNTS = ("r", "keep", "flops")
"""The fields that say how much is merged inside the encoders."""
READINGS = ("visual_keep", "cross_keep")
"""The fields that say how much is read of what they hand on."""

FORMAT = 1
"""Of saved settings."""

LAYERED = "layered"
"""S4's name in saved settings, where its three numbers stand behind it, and in `TurboConfig.paper`."""

PAPER_ALPHA_SCALE = 30.0
"""The authors' code multiplies the published alpha by 30 before it multiplies A."""


@dataclass(frozen=True)
class TurboConfig:
    """How much to merge (one of `r`, `keep`, `flops`, or none beside `visual_keep` or `cross_keep`) and which tokens.

    The defaults are what kept most of a real ViT's output (docs/defaults.md); `TurboConfig.paper` is the published
    setting.

    Args:
        r: tokens merged in every block, an integer ≥ 0; or a sequence of them, one per block.
        keep: share of the tokens left after the last block, in (0, 1]. In image generation of what a block reads, and
            there also a sequence: of the largest resolution that the denoiser can have tokens of, of half as many rows,
            of a quarter, …; smaller ones have the last.
        flops: share of the encoder's multiply-accumulates left, in (0, 1].
        min_tokens: a block that starts with fewer tokens does not merge (Turbo, §7.2).
        thresholds: one number per block: beside a list of `r`, a block merges every token whose E is above its own, so
            that pictures with more redundancy lose more; `r` then says how many on average. In a batch, all lose as
            many as the picture that can spare fewest. Not for `torch.compile`.
        degree: the information degree E; the tokens of highest E are merged.
            `"weighted_distance"` E = −(1 − R)(1 + α√(A/Ā)), Ā the mean A of the candidates,
            `"weighted_difference"` E = R − αA (S1), `"coupled_division"` E = R / (A + 1e-3) (S2),
            `"damped"` E = R(1 − αA) (S3), `"redundancy"` E = R (ToMe), `"semantics"` E = −A, `"random"`, a callable
            `(R, A, block) -> E`, block counting the merging blocks from 0, such as `turbovlm.ops.LayeredDegree` (S4),
            or `"auto"`: `"weighted_distance"` in encoders, else `"weighted_difference"`.
        alpha: α of a named degree, the plain multiplier of A. The authors scale theirs by 30: the paper's α = 6 is
            `alpha=180`. None is 1 for `"weighted_distance"`, where α multiplies √(A/Ā), and 2 for the others.
        similarity: the features whose cosine is the redundancy: `"heads"` (keys before rotary positions, those of
            all heads side by side), `"keys"` (the same averaged over heads; the paper's), `"queries"` (averaged),
            `"hidden"` (the normed tokens that the MLP reads), or `"auto"`: `"heads"` for images, `"hidden"` for text.
        guidance: whose attention row is the semantic value: `"cls"`, `"mean"` (the mean query of the patch tokens),
            or `"auto"`: `"cls"` where the model has one, else `"mean"`.
        partition: which half may be merged into which: `"alternate"` (even into odd, as published), `"random"`
            (halves drawn anew in every block from `seed`), `"grid"` (one destination in every 2×2 cell), or `"auto"`:
            `"random"` in encoders, `"grid"` in image generation.
        grid: patch rows and columns, for `"grid"` on pictures that are not square.
        order: order of the tokens left: `"partition"` (unmerged candidates, then destinations, as published)
            or `"spatial"` (that of the picture).
        proportional: attend in proportion to the patches that a token stands for (equation 16).
        reduce: `"merge"` averages a token into its destination, weighted by size; `"keep_norm"` also makes the mean,
            which is shorter, as long as its parts are on average; `"prune"` drops the token; or `"auto"`: `"keep_norm"`
            in encoders, `"merge"` elsewhere.
        dense: hand on every position: behind the last block each gets its token back, by `restore`. Encoders whose
            head needs all of them do so unasked.
        trace: keep, for every block of the last forward, what was merged where, and R, A and E.
        seed: of `partition="random"`, `degree="random"` and `visual_select="random"`; each is the same in every
            forward.
        visual_keep: how many of each image's visual tokens the language model reads: a share in (0, 1], or a count,
            an integer ≥ 1. Alone it leaves the vision tower as it is.
        visual_select: which of them: `"information"` goes by the degree, R from the projected features and A from the
            tower's attention; `"redundancy"`, `"attention"`, `"random"`, `"uniform"` (every k-th) and `"pooling"`
            (averages of 2×2) are the baselines.
        cross_keep: how many of each image's tokens the last third of a text model's cross-attention layers reads: a
            share, or a count. The first third reads all of them; A is the attention that the words have paid.
        components: in image generation, which parts of a block read merged tokens: some of `"attention"`,
            `"cross_attention"` and `"ffn"`.
        refresh: in image generation, how many denoising steps share what was decided in the first of them, ≥ 1.
        restore: what a position gets back: `"copy"`, what its token came to; `"residual"`, in encoders, also what set
            it apart from its token when they merged. In image generation, `"linear"`, from a feed-forward also what
            linear regression over the tokens says of the difference; `"weighted"`, less of it the less it is like its
            token (equation 14). `"auto"`: `"residual"` in vision encoders, `"copy"` in text encoders, which
            norm what they hand from block to block, in image generation `"linear"` on the CPU and `"copy"` elsewhere.
        share_guidance: in image generation, whether both halves of classifier-free guidance merge alike.
        promise: what `turbovlm.calibrate` measured of these settings; it takes no part in what they do.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    r: int | Sequence[int] | None = None
    _: dataclasses.KW_ONLY
    keep: float | Sequence[float] | None = None
    flops: float | None = None
    min_tokens: int = 0
    thresholds: Sequence[float] | None = None
    degree: str | DegreeFunction = "auto"
    alpha: float | None = None
    similarity: str = "auto"
    guidance: str = "auto"
    partition: str = "auto"
    grid: tuple[int, int] | None = None
    order: str = "spatial"
    proportional: bool = True
    reduce: str = "auto"
    dense: bool = False
    trace: bool = False
    seed: int = 0
    visual_keep: float | int | None = None
    visual_select: str = "information"
    cross_keep: float | int | None = None
    components: Sequence[str] = COMPONENTS
    refresh: int = 1
    restore: str = "auto"
    share_guidance: bool = True
    promise: Promise | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check_amount()
        self._set(min_tokens=_integer("min_tokens", self.min_tokens), seed=_integer("seed", self.seed))
        if not callable(self.degree):
            _check_choice("degree", self.degree, (*DEGREES, "auto"), extra=" or a callable (R, A, block) -> E")
        if self.alpha is not None:
            self._set(alpha=_number("alpha", self.alpha))
            if self.alpha < 0:
                raise ConfigError(f"alpha={self.alpha!r}: must be a number ≥ 0")
        _check_choice("similarity", self.similarity, SIMILARITIES)
        _check_choice("guidance", self.guidance, GUIDANCES)
        _check_choice("partition", self.partition, PARTITIONS)
        _check_choice("order", self.order, ORDERS)
        _check_choice("reduce", self.reduce, REDUCTIONS)
        _check_flag("proportional", self.proportional)
        _check_flag("dense", self.dense)
        _check_flag("trace", self.trace)
        _check_choice("restore", self.restore, RESTORES)
        _check_flag("share_guidance", self.share_guidance)
        self._set(refresh=_integer("refresh", self.refresh, minimum=1))
        _check_choice("visual_select", self.visual_select, VISUAL_SELECTIONS)
        self._check_thresholds()
        self._check_readings()
        self._check_components()
        self._check_grid()

    @classmethod
    def paper(
        cls,
        r: int | Sequence[int],
        alpha: float = 6.0,
        beta: float = 1.0,
        gamma: float = 0,
        min_tokens: int = 0,
        degree: str = "weighted_difference",
        *,
        trace: bool = False,
    ) -> TurboConfig:
        """The authors' implementation to the letter: keys, alternate halves, and α multiplied by 30.

        `degree="layered"` is the layered fusion S4, a `LayeredDegree`; so is `"weighted_difference"` with a `beta`
        other than 1, as in their code. Other degrees know neither `beta` nor `gamma`.
        """
        multiplier = _number("alpha", alpha) * PAPER_ALPHA_SCALE
        layered = degree == LAYERED or (degree == "weighted_difference" and beta != 1)
        return cls(
            r=r,
            min_tokens=min_tokens,
            degree=LayeredDegree(multiplier, beta, gamma) if layered else degree,
            alpha=None if layered else multiplier,
            similarity="keys",
            guidance="auto",
            partition="alternate",
            order="partition",
            reduce="merge",
            restore="copy",
            trace=trace,
        )

    @property
    def amount(self) -> str:
        """What was asked for, as it was written: `"r=16"`, `"keep=0.25"`, `"flops=0.6, visual_keep=0.5"`."""
        given = {name: getattr(self, name) for name in (*AMOUNTS, *READINGS) if getattr(self, name) is not None}
        return ", ".join(
            f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in given.items()
        )

    @property
    def merges(self) -> bool:
        """Whether tokens are merged inside the encoders."""
        return any(getattr(self, name) is not None for name in AMOUNTS)

    def settled(self, degree: str, reduce: str = "merge") -> TurboConfig:
        """The same with `degree` and `reduce` where they are `"auto"`, and with the degree's own alpha."""
        chosen = degree if self.degree == "auto" else self.degree
        alpha = default_alpha(chosen) if self.alpha is None else self.alpha
        reduce = reduce if self.reduce == "auto" else self.reduce
        return dataclasses.replace(self, degree=chosen, alpha=alpha, reduce=reduce)

    def save(self, path: str | Path) -> None:
        """Write the settings, and what they promise, as JSON.

        Raises:
            ConfigError: the degree is a callable other than `LayeredDegree`, which JSON has no word for.
        """
        content = {"turbovlm": FORMAT, **dataclasses.asdict(self)}
        if isinstance(self.degree, LayeredDegree):
            content["degree"] = {LAYERED: dataclasses.asdict(self.degree)}
        elif callable(self.degree):
            raise ConfigError(f"degree={self.degree!r}: a function cannot be saved, a name or a LayeredDegree can")
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TurboConfig:
        """What `save` has written.

        Raises:
            ConfigError: no such file, another format, or a setting that is unknown or wrong.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version = content.pop("turbovlm")
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: holds no settings of turbovlm ({error!r})") from error
        if version != FORMAT:
            raise ConfigError(f"{path}: is of format {version!r}; this release reads {FORMAT}")
        try:
            content = _with_layered_degree(content)
        except TypeError as error:
            raise ConfigError(f"{path}: degree={content['degree']!r}: {error}") from error
        unknown = content.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(f"{path}: settings that this release does not know: {', '.join(sorted(unknown))}")
        promise = content.pop("promise", None)
        try:
            return cls(**content, promise=None if promise is None else Promise.of(promise))
        except TypeError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _check_amount(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        reads = any(getattr(self, name) is not None for name in READINGS)
        if len(given) != 1 and (given or not reads):
            found = ", ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none of them"
            raise ConfigError(f"give exactly one of r, keep and flops: got {found}")
        if isinstance(self.r, Sequence) and not isinstance(self.r, str | bytes):
            if not self.r:
                raise ConfigError("r=[]: a list of r needs one integer ≥ 0 per block")
            self._set(r=tuple(_integer("r", value, shown=self.r) for value in self.r))
        elif self.r is not None:
            self._set(r=_integer("r", self.r))
        if isinstance(self.keep, Sequence) and not isinstance(self.keep, str | bytes):
            if not self.keep:
                raise ConfigError("keep=[]: a list of keep needs a share per resolution")
            self._set(keep=tuple(_share("keep", value) for value in self.keep))
        elif self.keep is not None:
            self._set(keep=_share("keep", self.keep))
        if self.flops is not None:
            self._set(flops=_share("flops", self.flops))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_thresholds(self) -> None:
        if self.thresholds is None:
            return
        if not isinstance(self.thresholds, Sequence) or isinstance(self.thresholds, str | bytes):
            raise ConfigError(f"thresholds={self.thresholds!r}: must be a number per block")
        if not isinstance(self.r, tuple) or len(self.r) != len(self.thresholds):
            raise ConfigError(f"thresholds={list(self.thresholds)}: need a list of r beside them, of as many blocks")
        if self.degree == "random":
            raise ConfigError("thresholds: degree='random' says nothing about a picture")
        self._set(thresholds=tuple(_number("thresholds", value) for value in self.thresholds))

    def _check_readings(self) -> None:
        if all(getattr(self, name) is None for name in READINGS) and self.visual_select != "information":
            raise ConfigError(f"visual_select={self.visual_select!r}: give visual_keep or cross_keep with it")
        if self.cross_keep is not None and self.visual_select == "pooling":
            raise ConfigError("visual_select='pooling': cross_keep takes tokens layer by layer, not squares of them")
        for name in READINGS:
            value: Any = getattr(self, name)
            if value is None:
                continue
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1):
                raise ConfigError(f"{name}={value!r}: must be a share in (0, 1] or an integer ≥ 1, a count per image")
            self._set(**{name: _integer(name, value, minimum=1) if whole else float(value)})

    def _check_components(self) -> None:
        given = self.components
        if isinstance(given, str) or not isinstance(given, Sequence) or not given or set(given) - set(COMPONENTS):
            raise ConfigError(f"components={given!r}: must be some of {', '.join(COMPONENTS)}")
        self._set(components=tuple(name for name in COMPONENTS if name in given))

    def _check_grid(self) -> None:
        if self.grid is None:
            return
        if self.partition != "grid" and (self.partition != "auto" or self.keep is None):
            raise ConfigError(f'grid={self.grid!r}: only partition="grid" uses it, not {self.partition!r}')
        if not isinstance(self.grid, Sequence) or isinstance(self.grid, str | bytes) or len(self.grid) != 2:
            raise ConfigError(f"grid={self.grid!r}: must be two integers ≥ 1, patch rows and columns")
        rows, columns = (_integer("grid", value, minimum=1, shown=self.grid) for value in self.grid)
        self._set(grid=(rows, columns))


def _share(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 < number <= 1:
        raise ConfigError(f"{name}={number!r}: must be a share in (0, 1]")
    return number


def _with_layered_degree(content: dict[str, Any]) -> dict[str, Any]:
    """Saved settings with S4, where they name it, as a `LayeredDegree`.

    Settings that were saved before there was one hold `beta` and `gamma` beside every degree, and S4 as
    `degree="layered"` with its α as `alpha`.
    """
    content = dict(content)
    beta, gamma, degree = content.pop("beta", 1.0), content.pop("gamma", 0.0), content.get("degree")
    if degree == LAYERED:
        alpha = content.pop("alpha", None)
        content["degree"] = LayeredDegree(default_alpha(LAYERED) if alpha is None else alpha, beta, gamma)
    elif isinstance(degree, dict) and degree.keys() == {LAYERED}:
        content["degree"] = LayeredDegree(**degree[LAYERED])
    return content


def _integer(name: str, value: Any, minimum: int = 0, shown: Any = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        what = "the number of tokens merged per block" if name == "r" else "it"
        raise ConfigError(f"{name}={value if shown is None else shown!r}: {what} must be an integer ≥ {minimum}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r}: must be a finite number")
    return float(value)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: must be True or False")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...], extra: str = "") -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}{extra}")
