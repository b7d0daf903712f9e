"""A check, when Turbo is applied, that a layout gives what the block itself gives on this release of its library."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.encoder.block import unmerged_forward
from turbovlm.encoder.layout import library_version
from turbovlm.encoder.state import State
from turbovlm.encoder.towers import Tower
from turbovlm.errors import UnsupportedModelError

PATCHES = 6
"""Patches of the random input."""


def verify(tower: Tower) -> None:
    """Compare a block's own forward with its two halves on a small random input, in eval mode.

    The first block, and every other whose layers have other shapes than those before: pruned ones. Blocks whose weights
    are not at hand, on the meta device, offloaded or sharded over processes, cannot be compared, and are not.

    Raises:
        UnsupportedModelError: the outputs differ, so this release spells the block in a way the layout does not know.
    """
    seen = set()
    for name, block in tower.blocks:
        shapes = tuple(parameter.shape for parameter in block.parameters())
        if shapes not in seen:
            seen.add(shapes)
            _verify(tower, name, block)


def _verify(tower: Tower, name: str, block: nn.Module) -> None:
    weights = [parameter for parameter in block.parameters() if parameter.is_floating_point()]
    if any(weight.device.type == "meta" or hasattr(weight, "full_tensor") for weight in weights):
        return
    count = tower.prefix + PATCHES + tower.suffix
    tokens = torch.randn(2, count, tower.hidden_size, generator=torch.Generator().manual_seed(0))
    x = tokens.to(weights[0])
    example = tower.layout.example(block, PATCHES) if tower.layout.example is not None else {}
    arguments = {key: value.to(x) if isinstance(value, Tensor) else value for key, value in example.items()}
    training = [module for module in block.modules() if module.training]
    try:
        block.eval()
        with torch.no_grad():
            own = type(block).forward(block, x, **_required(block), **arguments)
            state = State(0, (), tower.prefix, tower.suffix)
            ours = unmerged_forward(block, tower.layout, TurboConfig(r=0), x, state, arguments)
    finally:
        for module in training:
            module.training = True
    own = own[0] if tower.layout.returns_tuple else own
    gap = (ours - own).abs().max() / own.abs().max()
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 5e-2
    if not gap <= tolerance:
        raise UnsupportedModelError(
            f"{name} ({tower.layout.family}): its two halves differ from its own forward by {gap:.1%} on a random "
            f"input, so {library_version(type(block))} computes this block in a way turbovlm does not know"
        )


def _required(block: nn.Module) -> dict[str, Any]:
    """None for every argument without a default, as the library passes where there is no mask."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None for p in parameters if p.default is p.empty and p.kind in kinds}
