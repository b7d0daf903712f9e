"""Hooks on the modules of a model: those that read, and those that change what they get."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

import turbovlm
from matrix_cases import Case
from matrix_checks.check import check, close, differ


def attention_of(block: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child
        for name, child in block.named_children()
        if "Attention" in type(child).__name__ and any(True for _ in child.parameters())
    }


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks by path: members of a list that have an attention of their own."""
    return {
        f"{path}.{name}" if path else name: block
        for path, holder in model.named_modules()
        if isinstance(holder, nn.ModuleList | nn.Sequential)
        for name, block in holder.named_children()
        if attention_of(block)
    }


def attentions_of(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules of blocks, and what has weights, or drops some, inside them."""
    found: dict[str, nn.Module] = {}
    for path, block in blocks_of(model).items():
        for name, attention in attention_of(block).items():
            found[f"{path}.{name}"] = attention
            for inner, module in attention.named_modules():
                if not list(module.children()) and (list(module.parameters()) or isinstance(module, nn.Dropout)):
                    found[f"{path}.{name}.{inner}"] = module
    return found


def others_of(model: nn.Module) -> dict[str, nn.Module]:
    """Norms and the MLP's layers of blocks."""
    attentions = tuple(attentions_of(model))
    return {
        f"{path}.{name}": module
        for path, block in blocks_of(model).items()
        for name, module in block.named_modules()
        if not list(module.children()) and list(module.parameters()) and not f"{path}.{name}".startswith(attentions)
    }


@contextlib.contextmanager
def watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """How many tokens each module's output had, per call."""
    calls: dict[str, list[int]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            out = first_of(output)
            calls.setdefault(name, []).append(out.shape[-2] if out.ndim > 1 else 0)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def tokens_of(handle: Any, plain: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    """Tokens in each block of an encoder that merges, before the merge and behind it, by path.

    `plain`: what came out of each block when nothing merged.
    """
    if not any(hasattr(feature, "schedule") for feature in getattr(handle, "features", ())):
        return {}
    first = handle.schedules[0].blocks[0]
    schedule = handle.schedule(plain[first][0])
    return dict(zip(schedule.blocks, zip(schedule.tokens, schedule.tokens[1:])))


def first_of(out: Any) -> torch.Tensor:
    """The first tensor of what a module returns."""
    return next(each for each in out if each is not None) if isinstance(out, tuple) else out


def instead_of(out: Any, tensor: torch.Tensor) -> Any:
    """What a module returns, with another first tensor."""
    return tuple(tensor if each is first_of(out) else each for each in out) if isinstance(out, tuple) else tensor


@check("forward hooks on blocks that read")
@torch.no_grad()
def hooks_on_blocks(case: Case) -> None:
    if case.group == "diffusers":  # stacks of blocks would give way to single ones, which are given all tokens
        case = replace(case, settings={**(case.settings or {}), "scope": "block"})
    model, inputs = case.make(), case.inputs()
    with watched(blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model) as handle:
        wanted = case.run(model, inputs)
        with watched(blocks_of(model)) as calls:
            assert torch.equal(case.run(model, inputs), wanted)
        assert {name: len(seen) for name, seen in calls.items()} == {name: len(seen) for name, seen in plain.items()}
        towers = tokens_of(handle, plain)
        for name, (_, behind) in towers.items():
            restored = name == list(towers)[-1] and handle.features[0].restore
            assert calls[name] == (plain[name] if restored else [behind]), name


@check("forward hooks on blocks that change the output")
@torch.no_grad()
def hooks_that_change_blocks(case: Case) -> None:
    """Another tensor given back counts like the same change made in place."""
    model, inputs = case.make(), case.inputs()
    with watched(blocks_of(model)) as plain:
        case.run(model, inputs)
    block = blocks_of(model)[next(iter(plain))]

    def in_place(module: nn.Module, args: Any, out: Any) -> None:
        first_of(out).mul_(1.5)

    def another(module: nn.Module, args: Any, out: Any) -> Any:
        return instead_of(out, first_of(out) * 1.5)

    with case.apply(model):
        unchanged = case.run(model, inputs)
        found = []
        for hook in (in_place, another):
            handle = block.register_forward_hook(hook)
            try:
                found.append(case.run(model, inputs))
            finally:
                handle.remove()
    differ(found[0], unchanged)
    close(found[1], found[0])


@check("forward hooks on attention modules that read")
@torch.no_grad()
def hooks_on_attention(case: Case) -> None:
    """Whatever the model calls in its attention is called, with the tokens that are there."""
    model, inputs = case.make(), case.inputs()
    with watched(attentions_of(model) | blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model) as handle:
        wanted = case.run(model, inputs)
        with watched(attentions_of(model)) as calls:
            found = case.run(model, inputs)
        if "left whole" not in str(handle):  # parts of a denoiser that hooks look into, which it says
            close(found, wanted)
        missing = [name for name in plain if name not in calls and name not in blocks_of(model)]
        assert not missing, f"never called: {', '.join(missing)}"
        for path, (before, _) in tokens_of(handle, plain).items():
            for name in attention_of(model.get_submodule(path)):
                assert set(calls[f"{path}.{name}"]) == {before}, name


@check("forward hooks on attention modules that change the output")
@torch.no_grad()
def hooks_that_change_attention(case: Case) -> None:
    """With nothing merged the hooked model itself, and merged it counts as well."""
    model, inputs = case.make(), case.inputs()
    with watched(blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model):
        unchanged = case.run(model, inputs)

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return instead_of(out, first_of(out) * 3)

    for path in plain:
        for attention in attention_of(blocks_of(model)[path]).values():
            attention.register_forward_hook(hook)
    wanted = case.run(model, inputs)
    with case.apply(model):
        differ(case.run(model, inputs), unchanged, by=0.01)
    if "r" in (case.settings or {}):
        with turbovlm.apply(model, r=0, trace=True):
            close(case.run(model, inputs), wanted)


@check("forward hooks on norms and the MLP's layers")
@torch.no_grad()
def hooks_on_the_rest(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    with watched(others_of(model) | blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model) as handle:
        with watched(others_of(model)) as calls:
            case.run(model, inputs)
        missing = [name for name in plain if name not in calls and name not in blocks_of(model)]
        assert not missing, f"never called: {', '.join(missing)}"
        for path, (before, behind) in tokens_of(handle, plain).items():
            for name in (name for name in calls if name.startswith(f"{path}.")):
                linear = isinstance(model.get_submodule(name), nn.Linear)
                assert set(calls[name]) <= ({behind} if linear else {before, behind}), (name, calls[name])
        if case.group == "diffusers":
            assert "left whole" in str(handle)
        elif "visual_keep" in (case.settings or {}):
            assert any(sum(seen) < sum(plain[name]) for name, seen in calls.items()), "nothing got fewer tokens"
