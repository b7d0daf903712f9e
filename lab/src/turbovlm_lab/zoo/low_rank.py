"""Low-rank changes of linear layers (LoRA): trained beside weights that stay as they were, then added to them.

A layer's change is the product of two thin matrices, `up @ down`, of rank at most r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import ConfigError


class LowRank(nn.Module):
    """A frozen linear layer and a trainable change of low rank, which begins at nought.

    Attributes:
        layer: as it was.
        down: `[rank, in]`, fp32.
        up: `[out, rank]`, fp32.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        place = layer.weight.device
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, device=place))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=place))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        out: Tensor = self.layer(x) + change
        return out


def add_low_rank(model: nn.Module, rank: int) -> None:
    """Put a `LowRank` in the place of every linear layer of a model.

    Raises:
        ConfigError: a rank below 1, or a model without linear layers.
    """
    if rank < 1:
        raise ConfigError(f"rank={rank}: must be at least 1")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError(f"{type(model).__name__}: has no linear layer")
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LowRank(layer, rank))


def low_rank_state(model: nn.Module) -> dict[str, Tensor]:
    """The changes alone: `down` and `up` of every layer that has one, by `layer.down` and `layer.up`."""
    return {
        f"{name}.{part}": getattr(module, part).detach()
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
        for part in ("down", "up")
    }


@torch.no_grad()
def merge_low_rank(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add changes to the weights of plain linear layers.

    Args:
        model: as it was before `add_low_rank`; its weights are changed.
        state: as `low_rank_state` has it.

    Raises:
        ConfigError: a change is of no linear layer of the model, or of one of another size.
    """
    for name in sorted({key.rpartition(".")[0] for key in state}):
        change = state[f"{name}.up"].float() @ state[f"{name}.down"].float()
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, nn.Linear) or layer.weight.shape != change.shape:
            raise ConfigError(f"{name}: {type(model).__name__} has no such linear layer of {tuple(change.shape)}")
        layer.weight.add_(change.to(layer.weight))
