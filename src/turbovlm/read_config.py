"""The settings of what a language model or a text model reads of an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from turbovlm.checks import (
    brief,
    called,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_seed,
    check_share_or_count,
)
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import DegreeFunction, needs_semantic
from turbovlm.settings import Settings

GUIDANCES = ("auto", "cls", "mean")
GREEDY = ("coverage", "diversity", "mmr", "dpp")
"""Selections of `ReadConfig` that compare all pairs of an image's tokens and choose one after another."""
VISUAL_SELECTIONS = ("information", "redundancy", "attention", *GREEDY, "random", "uniform", "pooling")
SALIENCY = {"coverage": 1.0, "diversity": 0.0, "mmr": 0.2, "dpp": 1.0}
"""α of the greedy selections, where it is not given."""
WEIGHING = ("question", "change")
"""Fields of `ReadConfig` that say what else counts in a token's weight, and how much."""
READINGS = ("visual_keep", "cross_keep")
"""Fields of `ReadConfig` that say how much is read."""
READS = (*READINGS, "pixel_tolerance")
"""Fields of `ReadConfig` that have less be read; one of them at least is set."""

SelectorFunction = Callable[..., Any]
"""`(features, attention, text, grid, *, k) -> which`, positions `[images, k]` or a bool mask `[images, n]`."""


@dataclass(frozen=True)
class ReadConfig(Settings):
    """How much of an image a language model or a text model reads, and which tokens.

    Args:
        visual_keep: how many of each image's visual tokens are read: a share in (0, 1], or a count, an integer ≥ 1;
            `1.0` is all of them, and `1` one.
        cross_keep: how many of each image's tokens the last third of a text model's cross-attention layers reads: a
            share, or a count. The first third reads all of them; A is the attention that the words have paid.
        pixel_tolerance: cells, the squares of patches that one visual token is made of, are left out before the vision
            tower, and not read, where the cell that stands for the one to their left, or else above them, differs from
            them by at most this in every value that the model gets. 0 leaves out equal cells alone; None none. For
            Qwen2-VL, Qwen2.5-VL and Qwen3-VL. `visual_keep` counts from all cells, and chooses among those left.
        visual_select: which of them. Over all pairs of an image's tokens, one token after another: `"coverage"`, the
            default, takes the one that adds most to what is covered of all tokens, times its weight; `"dpp"` the one of
            which most is not explained by those taken, times its weight; `"mmr"` weighs it against its similarity to
            those taken (log weight less cosine); `"diversity"` takes the one farthest from them. A token's weight is
            w = (A/Ā)^α · e^(question · Q) · D^change, A from the tower's attention, Ā the image's mean.
            `"information"` goes by the degree, R from the projected features and A, in rounds. `"redundancy"`,
            `"attention"`, `"random"`, `"uniform"` (every k-th) and `"pooling"` (averages of 2×2) are the baselines. Or
            a function of yours, `(features, attention, text, grid, *, k) -> which`: see docs/language.md.
        degree: as in `TurboConfig`, for `"information"`.
        alpha: α: with `"information"` as in `TurboConfig`; with `"coverage"`, `"dpp"` (None is 1) and `"mmr"` (0.2) the
            power of A in a token's weight; 0 leaves A out.
        question: how much Q counts in the weight: the cosines of a token to the words of its prompt, in the language
            model's input space. Which tokens are read then depends on the text, so that a prompt's prefix can no
            longer be reused for another question. 0 is off, 1 makes a token that is one standard deviation nearer to
            a word e times as heavy.
        change: how much D counts in the weight, in videos: how far a token is from the one at its place in the frame
            before, 1 in the first frame. A frame then keeps tokens in proportion to the sum of their weights, one at
            least where there are enough, and they are chosen frame by frame. 0 is off: a video's tokens are chosen as
            those of one image. Images are chosen from as without it.
        visual_tolerance: an image is read with as few tokens as leave a cosine of 1 − this, at least, from each of its
            tokens to one that is read, taken in the same order; `visual_keep` is then the most. 0 spares equal tokens.
            For selections over all pairs.
        min_visual_tokens: how many tokens each image keeps at least; an image that has no more is left whole.
        guidance: whose attention row in the tower is A: `"cls"`, `"mean"`, or `"auto"`: `"cls"` where it has one.
        proportional: attend in proportion to the patches that a token stands for, where the tower has merged some and
            in cross-attention.
        reduce: `"merge"` averages a token into its destination, weighted by size; `"prune"` drops it.
        seed: of the halves of every round, `visual_select="random"` and `degree="random"`; the same in every forward.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    _amounts: ClassVar[tuple[str, ...]] = READS

    visual_keep: float | int | None = None
    _: dataclasses.KW_ONLY
    cross_keep: float | int | None = None
    pixel_tolerance: float | None = None
    visual_select: str | SelectorFunction = "coverage"
    degree: str | DegreeFunction = "weighted_difference"
    alpha: float | None = None
    question: float = 0.0
    change: float = 0.0
    visual_tolerance: float | None = None
    min_visual_tokens: int = 0
    guidance: str = "auto"
    proportional: bool = True
    reduce: str = "merge"
    seed: int = 0

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in READS):
            raise ConfigError(
                "give visual_keep or cross_keep: how much of an image is read; or pixel_tolerance: which of its cells "
                "are as good as equal"
            )
        for name in READINGS:
            if getattr(self, name) is not None:
                self._set(**{name: check_share_or_count(name, getattr(self, name))})
        if not callable(self.visual_select):
            extra = " or a callable (features, attention, text, grid, *, k) -> which"
            check_choice("visual_select", self.visual_select, VISUAL_SELECTIONS, extra=extra)
        if self.cross_keep is not None and self.visual_select == "pooling":
            raise ConfigError("visual_select='pooling': cross_keep takes tokens layer by layer, not squares of them")
        if self.pixel_tolerance is not None:
            self._set(pixel_tolerance=check_number("pixel_tolerance", self.pixel_tolerance, minimum=0))
            if self.visual_select == "pooling":
                raise ConfigError("visual_select='pooling': with pixel_tolerance, what is left has no squares to pool")
        self._check_degree()
        for name in ("question", "change"):
            self._set(**{name: check_number(name, getattr(self, name), minimum=0)})
        self._check_budget()
        check_choice("guidance", self.guidance, GUIDANCES)
        check_flag("proportional", self.proportional)
        check_choice("reduce", self.reduce, ("merge", "prune"))
        self._set(seed=check_seed(self.seed))
        self._check_unread()
        if self.visual_select == "mmr" and not (self.saliency or self.question or self.change):
            raise ConfigError(
                "alpha=0: visual_select='mmr' weighs tokens by A or by the question; 'diversity' by neither"
            )

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        select = values["visual_select"]
        how = f"visual_select={brief(select)}"
        found: dict[str, str] = {}
        if callable(select):
            found = dict.fromkeys(("degree", "alpha", *WEIGHING), "a visual_select that is a callable decides itself")
        elif select in ("random", "uniform", "pooling"):
            found = dict.fromkeys(("degree", "alpha", "guidance"), f"{how} goes by no degree and no attention")
            if select == "pooling":
                found["reduce"] = f"{how} averages"
        elif select in GREEDY:
            found["degree"] = f"{how} compares all pairs, and goes by no degree"
            if select == "diversity":
                found |= dict.fromkeys(("alpha", "guidance", *WEIGHING), f"{how} weighs all tokens alike")
            elif isinstance(values["alpha"], int | float) and values["alpha"] == 0:
                found["guidance"] = "alpha=0 leaves attention out"
        else:
            found = cls._unread_by_degree(values, select, how)
        if select not in GREEDY:
            found["visual_tolerance"] = f"{how} knows no distances; {', '.join(GREEDY)} do"
            found.setdefault("question", f"{how} goes by no text; coverage, mmr and dpp can")
            found.setdefault("change", f"{how} knows no frames; coverage, mmr and dpp can")
        elif values["change"]:
            found["visual_tolerance"] = "change says how many tokens of each frame are read"
        if values["visual_keep"] is None and values["cross_keep"] is None:
            chosen = ("visual_select", "degree", "alpha", "reduce", "guidance", *WEIGHING)
            reason = "without visual_keep, all that pixel_tolerance leaves is read"
            found |= dict.fromkeys((*chosen, "visual_tolerance", "min_visual_tokens"), reason)
        elif values["visual_keep"] is None:
            found["guidance"] = "cross_keep goes by the words' attention, and not by the tower's"
            found["question"] = "cross_keep goes by the words' attention already"
            found |= dict.fromkeys(("change", "visual_tolerance", "min_visual_tokens"), "it belongs to visual_keep")
        return found

    @classmethod
    def _unread_by_degree(cls, values: Mapping[str, Any], select: Any, how: str) -> dict[str, str]:
        degree = values["degree"]
        found = super()._unread(values)
        if select != "information":
            found |= dict.fromkeys(("degree", "alpha"), f"{how} is a degree of its own, without alpha")
        if select == "redundancy" or (select == "information" and not needs_semantic(degree)):
            found["guidance"] = f"{how if select == 'redundancy' else f'degree={brief(degree)}'} needs no attention"
        return found

    def _check_budget(self) -> None:
        self._set(min_visual_tokens=check_integer("min_visual_tokens", self.min_visual_tokens))
        if self.visual_tolerance is not None:
            tolerance = check_number("visual_tolerance", self.visual_tolerance, minimum=0)
            if tolerance >= 1:
                raise ConfigError(f"visual_tolerance={tolerance:g}: must be a distance in [0, 1): 1 less a cosine")
            self._set(visual_tolerance=tolerance)
        if type(self.visual_keep) is int and self.visual_keep < self.min_visual_tokens:
            raise ConfigError(
                f"min_visual_tokens={self.min_visual_tokens}: above visual_keep={self.visual_keep}, which would have "
                "no effect: give it at most as many, or visual_keep a share"
            )

    @property
    def saliency(self) -> float:
        """α, the power of A in a token's weight in selections over all pairs; 0 in others."""
        known = SALIENCY.get(self.visual_select, 0.0) if isinstance(self.visual_select, str) else 0.0
        return known if self.alpha is None or not known else self.alpha

    @property
    def selection(self) -> str:
        """Which tokens are read, in words: `"visual_select=coverage, alpha=1, question=0.5, merge"`."""
        select = self.visual_select
        parts = [f"visual_select={select if isinstance(select, str) else called(select)}"]
        if select in SALIENCY and select != "diversity":
            parts.append(f"alpha={self.saliency:g}")
        parts += [f"{name}={value:g}" for name in WEIGHING if (value := getattr(self, name))]
        return ", ".join([*parts, self.reduce])

    @property
    def of_images(self) -> str:
        """What was asked for of what a prompt has of images: `"visual_keep=0.5, pixel_tolerance=0.0"`."""
        return self._written(("visual_keep", "pixel_tolerance"))

    @property
    def summary(self) -> str:
        """The settings that say which tokens are read."""
        if self.visual_keep is None and self.cross_keep is None:
            return "cells that another stands for are left out"
        how, _, reduce = self.selection.rpartition(", ")
        return f"{how}, {self.ranking}, {reduce}" if self.visual_select == "information" else self.selection
