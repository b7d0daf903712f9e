"""The information degree E: how much can be spared by merging a token, made of its redundancy R and its semantics A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbovlm.checks import check_number
from turbovlm.errors import ConfigError
from turbovlm.ops.partition import hashed_uniform

DegreeFunction = Callable[[Tensor, Tensor, int], Tensor]
"""`(R, A, block) -> E`: redundancy and semantic value of the candidates, `[batch, candidates]` each."""

Values = Any
"""Tensors or arrays of NumPy: the formulas are written in what both have."""

TINY = torch.finfo(torch.float32).tiny

DIVISION_EPSILON = 1e-3
"""Added to A before S2 divides by it, as in the authors' code."""


def weighted_distance(redundancy: Values, semantic: Values, alpha: float) -> Values:
    """E = −(1 − R)(1 + α√(A/Ā)), ours: the distance from the destination, weighed by the attention a token gets."""
    mean = semantic.mean(-1, keepdims=True).clip(min=TINY)
    return (redundancy - 1) * (1 + alpha * (semantic / mean) ** 0.5)


def weighted_difference(redundancy: Values, semantic: Values, alpha: float) -> Values:
    """E = R − αA (Turbo, equation 12; S1, equation 17)."""
    return redundancy - alpha * semantic


def coupled_division(redundancy: Values, semantic: Values, alpha: float) -> Values:
    """E = R / A (Turbo, S2, equation 18); α has no part in it."""
    return redundancy / (semantic + DIVISION_EPSILON)


def damped(redundancy: Values, semantic: Values, alpha: float) -> Values:
    """E = R(1 − αA) (Turbo, S3, equation 19)."""
    return redundancy * (1 - alpha * semantic)


def semantics(redundancy: Values, semantic: Values, alpha: float) -> Values:
    """E = −A: the semantic value alone."""
    return -semantic


@dataclass(frozen=True)
class LayeredDegree:
    """E = R − β^|γ−l|·αA, l the merging block counted from 0 (Turbo, S4, equation 20): a `degree` for `TurboConfig`.

    Args:
        alpha: α, the plain multiplier of A, ≥ 0; the authors' code multiplies theirs by 30.
        beta: β, > 0; 1 makes it `weighted_difference`.
        gamma: γ, the merging block in which A weighs α.

    Raises:
        ConfigError: a value that is no finite number in its range.
    """

    alpha: float
    beta: float
    gamma: float

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            object.__setattr__(self, name, check_number(name, value))
        if self.alpha < 0:
            raise ConfigError(f"alpha={self.alpha!r}: must be a number ≥ 0")
        if self.beta <= 0:
            raise ConfigError(f"beta={self.beta!r}: must be a number > 0")

    def __call__(self, redundancy: Tensor, semantic: Tensor, block: int) -> Tensor:
        try:
            weight: float = self.alpha * self.beta ** abs(self.gamma - block)
        except OverflowError:
            raise ConfigError(
                f"beta={self.beta:g}, gamma={self.gamma:g}: β^|γ−{block}| is too large in merging block {block}"
            ) from None
        return redundancy - weight * semantic


FUSIONS: dict[str, Callable[[Values, Values, float], Values]] = {
    "weighted_distance": weighted_distance,
    "weighted_difference": weighted_difference,
    "coupled_division": coupled_division,
    "damped": damped,
    "semantics": semantics,
}
"""The named degrees that need A: `(R, A, alpha) -> E`."""

DEGREES = (*FUSIONS, "redundancy", "random")
"""The names that `degree` can be."""


def information_degree(
    redundancy: Tensor,
    semantic: Tensor | None,
    block: int = 0,
    *,
    degree: str | DegreeFunction = "weighted_difference",
    alpha: float | None = None,
    seed: int = 0,
) -> Tensor:
    """E, by which candidates are ranked: those of highest E are merged (Turbo, equations 12 and 17 to 20).

    Args:
        redundancy: R of the candidates, `[batch, candidates]`.
        semantic: A of the candidates, `[batch, candidates]`; may be None for `"redundancy"` and `"random"`.
        block: the index l of the merging block, counted from 0.
        degree: a name, see `TurboConfig`; or a callable `(R, A, block) -> E`, such as a `LayeredDegree`.
        alpha: α of a named degree; None is `default_alpha(degree)`.
        seed: of `"random"`.

    Returns:
        `[batch, candidates]`.

    Raises:
        ConfigError: an unknown degree, a degree that needs A without it, or a callable whose result has another shape.
    """
    if degree == "redundancy":
        return redundancy
    if degree == "random":
        return hashed_uniform(redundancy.shape[-1], seed, block, redundancy.device).to(redundancy).expand_as(redundancy)
    if semantic is None:
        raise ConfigError(f"degree={degree!r} needs the semantic value A, got None")
    if callable(degree):
        result = degree(redundancy, semantic, block)
        if not isinstance(result, Tensor) or result.shape != redundancy.shape:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ConfigError(f"degree={degree!r} must return a tensor of R's shape {tuple(redundancy.shape)}: {found}")
        return result
    if degree not in FUSIONS:
        raise ConfigError(f"degree={degree!r}: must be one of {', '.join(DEGREES)} or a callable (R, A, block) -> E")
    e: Tensor = FUSIONS[degree](redundancy, semantic, default_alpha(degree) if alpha is None else alpha)
    return e


def check_degree(degree: str | DegreeFunction, blocks: int, device: torch.device) -> None:
    """See that a callable degree can be used in the first and the last of `blocks` blocks, on a few made-up numbers.

    Args:
        device: where the blocks are; weights that are not loaded yet, on `meta`, are no place to try it.

    Raises:
        ConfigError: it cannot be called with R, A and a block, gives no tensor of R's shape, or has no hash.
    """
    if not callable(degree):
        return
    try:
        hash(degree)
    except TypeError:
        raise ConfigError(
            f"degree={degree!r}: must be hashable, as settings are; a dataclass is with frozen=True"
        ) from None
    if device.type == "meta":
        return
    redundancy = torch.linspace(-1, 1, 6, device=device).view(2, 3)
    semantic = redundancy.softmax(dim=-1)
    for block in {0, blocks - 1}:
        try:
            information_degree(redundancy, semantic, block, degree=degree)
        except ConfigError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise ConfigError(
                f"degree={degree!r}: must be a callable (R, A, block) -> E; with R and A of shape (2, 3) and block "
                f"{block} it raises {type(error).__name__}: {error}"
            ) from error


def needs_semantic(degree: str | DegreeFunction) -> bool:
    """Whether E depends on A."""
    return callable(degree) or degree not in ("redundancy", "random")


def default_alpha(degree: str | DegreeFunction) -> float:
    """The α of a degree where none is set: 1 where it multiplies √(A/Ā), 2 where it multiplies A."""
    return 1.0 if degree == "weighted_distance" else 2.0
