"""What a check is, where it is entered, and how values are compared."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from matrix_cases import Case

ATOL = 1e-4


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        applies: of which families it can be asked at all.
        only: families that it is run for, where a cell takes seconds; they stand for the others.
    """

    name: str
    run: Callable[[Case], None]
    applies: Callable[[Case], bool]
    only: tuple[str, ...]


CHECKS: dict[str, Check] = {}
Run = Callable[[Case], None]


def check(
    name: str, applies: Callable[[Case], bool] = lambda case: True, only: tuple[str, ...] = ()
) -> Callable[[Run], Run]:
    """Enter a function in the table under a name."""

    def enter(run: Run) -> Run:
        CHECKS[name] = Check(name, run, applies, only)
        return run

    return enter


def in_transformers(case: Case) -> bool:
    return case.library == "transformers"


def has_head(case: Case) -> bool:
    return case.head is not None


def close(found: torch.Tensor, wanted: torch.Tensor, atol: float = ATOL) -> None:
    scale = max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * scale)


def differ(found: torch.Tensor, other: torch.Tensor, by: float = 1e-4) -> None:
    assert found.shape != other.shape or (found - other).abs().max() > by, "no effect"


class Flat(nn.Module):
    """A model as a function of its input tensors, by position."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.model, self.case = model, case
        leaves, self.spec = tree_flatten(case.inputs())
        self.others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        leaves, _ = tree_flatten(self.case.inputs(seed))
        return tuple(leaves[i] for i in self.places)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        leaves = list(self.others)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        return self.case.run(self.model, tree_unflatten(leaves, self.spec))


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A weighted mean: outputs of length 1 have one too that is not constant."""
    weights = torch.arange(out.numel(), dtype=out.dtype).cos().view(out.shape)
    return (out * weights).sum() / out.numel() ** 0.5


def gradients(model: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(run()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield
