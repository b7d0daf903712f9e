"""A check, before anything is patched, that a tower does what its layout says, on this release of its library.

Two things are compared: the tokens that reach the first block with those that the layout counts, and every block's own
forward with its two halves. No hook of the user's runs meanwhile, and no random state is used up.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.modules.module as torch_module
from torch import Tensor
from torch.utils._pytree import tree_map_only

from turbovlm.config import TurboConfig
from turbovlm.encoder.block import unmerged_forward
from turbovlm.encoder.layout import library_version
from turbovlm.encoder.passed import Calls, Passed, watch_calls
from turbovlm.encoder.state import State
from turbovlm.encoder.towers import Tower
from turbovlm.errors import UnsupportedModelError
from turbovlm.ops.segments import segments_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
"""Those that `torch.nn.modules.module` runs for every module."""

PATCHES = 6
"""Patches of the random tokens that blocks are tried on."""


def verify(tower: Tower, passed: Passed) -> Calls | None:
    """Compare a tower with its layout, in eval mode, on random inputs.

    Where weights are not at hand, on the meta device, offloaded or sharded over processes, nothing can be compared.

    Args:
        tower: the encoder.
        passed: modules of each block that its halves never call.

    Returns:
        What the first block's own forward did with these; None where nothing was compared.

    Raises:
        UnsupportedModelError: they differ: the tower has other tokens than its layout says, special tokens where the
            layout has patches, or blocks that compute something else than its halves.
    """
    weights = [p for p in tower.module.parameters() if p.is_floating_point()]
    if any(weight.device.type == "meta" or hasattr(weight, "full_tensor") for weight in weights):
        return None
    with _undisturbed(tower.module), torch.no_grad():
        _verify_tokens(tower, weights[0])
        calls = [_verify_block(tower, name, block, passed) for name, block in tower.blocks]
    return calls[0]


def _verify_tokens(tower: Tower, like: Tensor) -> None:
    """See that two different images of native size differ in every patch, and in no token of prefix and suffix."""
    hidden, which = _first_hidden(tower, like), f"{tower.title} ({tower.layout.family})"
    if tower.layout.packed:
        hidden = hidden.view(2, -1, hidden.shape[-1])
    end = tower.tokens - tower.suffix
    if hidden.shape[1] != tower.tokens:
        raise UnsupportedModelError(
            f"{which}: {hidden.shape[1]} tokens reach its first block of an input of native size, and not "
            f"{tower.tokens}, as its layout counts: prefix {tower.prefix}, patches {end - tower.prefix}, suffix "
            f"{tower.suffix}"
        )
    if tower.layout.text:  # any word may be the same in two texts
        return
    constant = (hidden[0] == hidden[1]).all(dim=-1).tolist()
    for position, same in enumerate(constant):
        special = position < tower.prefix or position >= end
        if same and not special:
            raise UnsupportedModelError(
                f"{which}: token {position} does not depend on the image, so it is no patch and must not merge, but "
                f"its layout has a prefix of {tower.prefix} and a suffix of {tower.suffix} tokens"
            )
        if special and not same:
            part = "prefix" if position < tower.prefix else "suffix"
            raise UnsupportedModelError(
                f"{which}: token {position} depends on the image, so it is a patch, but its layout counts it to the "
                f"{part}"
            )


class _FirstBlockReached(Exception):
    """Ends a tower's forward where its first block begins."""


def _first_hidden(tower: Tower, like: Tensor) -> Tensor:
    """The tokens that the first block gets of two random inputs of native size, `[2, tokens, width]`."""
    reached: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(args[0] if args else next(iter(kwargs.values())))
        raise _FirstBlockReached

    inputs = tower.random_inputs(2, like.dtype, like.device)
    try:
        inspect.signature(type(tower.module).forward).bind(tower.module, **inputs)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{tower.title} ({tower.layout.family}): its forward does not take {', '.join(inputs)}, the inputs of its "
            f"layout: {error}"
        ) from error
    hook = tower.blocks[0][1].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(_FirstBlockReached):
            tower.module(**inputs)
    finally:
        hook.remove()
    if not reached:
        raise UnsupportedModelError(f"{tower.title} ({tower.layout.family}): its forward does not run its blocks")
    return reached[0]


def _verify_block(tower: Tower, name: str, block: nn.Module, passed: Passed) -> Calls:
    """See that a block's own forward is what its two halves give, and which modules it calls beside theirs."""
    weight = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
    count = tower.prefix + PATCHES + tower.suffix
    x = torch.randn(2, count, tower.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    example = tower.layout.example(block, PATCHES) if tower.layout.example is not None else {}
    arguments = {key: tree_map_only(Tensor, lambda tensor: _like(tensor, x), value) for key, value in example.items()}
    with watch_calls(block, passed, tower.layout.attention) as calls:
        packed = tower.layout.packed
        own = type(block).forward(block, x[0] if packed else x, **{**_required(block), **arguments})
    own = own[0] if tower.layout.returns_tuple else own
    segments = segments_of(arguments["cu_seqlens"]) if packed else None
    x = x[:1] if packed else x
    state = State(0, (), tower.prefix, tower.suffix, segments=segments)
    ours = unmerged_forward(block, tower.layout, TurboConfig(r=0), x, state, arguments)
    gap = (ours - own).abs().max() / own.abs().max()
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 5e-2
    if not gap <= tolerance:
        raise UnsupportedModelError(
            f"{name} ({tower.layout.family}): its two halves differ from its own forward by {gap:.1%} on a random "
            f"input, so {library_version(type(block))} computes this block in a way turbovlm does not know"
        )
    return calls[0]


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """On the device of `x`, and numbers with a fraction in its dtype."""
    return tensor.to(x) if tensor.is_floating_point() else tensor.to(x.device)


def _required(block: nn.Module) -> dict[str, Any]:
    """None for every argument without a default, as the library passes where there is no mask."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None for p in parameters if p.default is p.empty and p.kind in kinds}


@contextlib.contextmanager
def _undisturbed(tower: nn.Module) -> Iterator[None]:
    """Within it, the tower is in eval mode, without the user's hooks, and draws from random states of its own."""
    training = [module for module in tower.modules() if module.training]
    hooks: list[tuple[Any, str, Any]] = [
        (module, name, getattr(module, name)) for module in tower.modules() for name in HOOKS
    ]
    hooks += [(torch_module, name, getattr(torch_module, name)) for name in GLOBAL_HOOKS]
    devices = {p.device for p in tower.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            tower.eval()
            for module, name, _ in hooks:
                setattr(module, name, OrderedDict())
            yield
        finally:
            for module, name, own in hooks:
                setattr(module, name, own)
            for module in training:
                module.training = True
