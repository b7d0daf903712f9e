"""The forwards of blocks that merge whole: tokens are merged before a stack of blocks, and restored behind it.

In between run the model's own blocks, on fewer tokens. Only their self-attention is told of it, in which merged tokens
count by their sizes, and what they are given of every token, such as rotary angles, is gathered. Behind the stack each
position keeps its own input and receives what its token has gained (Turbo, §3.3, and `restore_update`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.diffusion.attend import Attending, CountSizes, attend_merged, ends_in_sdpa
from turbovlm.diffusion.choose import Site, choice_of
from turbovlm.diffusion.families import Block
from turbovlm.diffusion.positions import beside_text, split_text
from turbovlm.diffusion.restore import check_has_operator, is_linear, restore_update
from turbovlm.diffusion.run import RUN, THREAD, Cuts, Run, check_class, current_run, run_within
from turbovlm.diffusion.whole import patches_below, reason_to_leave_block_whole, what_stands_on
from turbovlm.ops.merging import Merge
from turbovlm.patching import Patch, slot_of

if TYPE_CHECKING:
    from turbovlm.diffusion.feature import DenoiseFeature


@dataclass(frozen=True)
class Stack:
    """A run of blocks that follow each other.

    Attributes:
        site: of its first block, as a part.
        blocks: their paths in the model that was accelerated.
    """

    site: Site
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a block is.

    Attributes:
        name: its path.
        kind: what it is.
        arguments: names of what its forward takes.
        stack: what it is part of.
        next: the path of the block behind it in the stack; None for the last.
    """

    name: str
    kind: Block
    arguments: tuple[str, ...]
    stack: Stack
    next: str | None


@dataclass(frozen=True, eq=False)
class Stacked:
    """Tokens that are merged at present.

    Attributes:
        merge: what was done.
        x: the image's tokens before, `[batch, N, width]`.
        merged: behind it, `[batch, M, width]`.
        key: `Site.key` of the stack, by which the run keeps what is the same for all of its group.
        cuts: what was cut of the blocks' arguments where autograd records.
    """

    merge: Merge
    x: Tensor
    merged: Tensor
    key: str
    cuts: Cuts = field(default_factory=dict)


COMPILED = "_compiled_call_impl"
"""What a module calls instead of its forward, with its hooks, once it was compiled by itself, in place."""


def block_slot(block: Any) -> str:
    """The method of a block that is patched: tokens are merged outside of what it was compiled to by itself.

    So blocks of a stack are compiled once for all, on fewer tokens.
    """
    return "forward" if getattr(block, COMPILED, None) is None else COMPILED


def block_forward(patch: Patch, block: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a block of a stack: the first one on tokens merged before it, the last one's restored behind it."""
    check_class(patch, block)
    place: Place = patch.detail
    given: dict[str, Any] = {**dict(zip(place.arguments, args)), **kwargs}
    hidden, original = given[place.arguments[0]], _As(original, place.arguments[: len(args)])
    run = THREAD.run
    if (run is None or run.feature is not patch.feature) and (first := getattr(hidden, RUN, None)) is not None:
        # gradient checkpointing runs it once more, in the backward pass
        run, stacked = first
        return run_within(run, _again, run, stacked, place, block, original, given)
    run = current_run(patch)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(hidden, RUN, (run, run.stacked))
    return _run(run, place, block, original, given)


class _As:
    """A function that is called with arguments by name, and gets the first of them as it was given them: by place."""

    def __init__(self, function: Any, by_place: tuple[str, ...]) -> None:
        self.function, self.by_place = function, by_place

    def __call__(self, **given: Any) -> Any:
        named = {name: value for name, value in given.items() if name not in self.by_place}
        return self.function(*(given[name] for name in self.by_place), **named)


def _again(run: Run, stacked: Stacked | None, place: Place, block: Any, original: Any, given: dict[str, Any]) -> Any:
    run.stacked = stacked
    return _run(run, place, block, original, given)


def _run(run: Run, place: Place, block: Any, original: Any, given: dict[str, Any]) -> Any:
    kind = place.kind
    if run.stacked is None:
        if _why_whole(run, place.name, block, kind, given) is None:
            _enter(run, place, given)
        if run.stacked is None:
            return original(**given)
    stacked: Stacked = run.stacked
    for cut in kind.cuts:
        if cut.name in given:
            given[cut.name] = run.cut(stacked.key, stacked.merge, cut, given[cut.name], stacked.cuts)
    if run.feature.config.proportional and kind.attending is not None:
        out = original(**{**given, kind.attending.added: _bias(run, stacked, kind, kind.attending, given)})
    elif run.feature.config.proportional and block_slot(block) == COMPILED:
        out = _run_compiled(run, stacked, kind, block, original, given)
    else:
        out = original(**given)
    if not _goes_on(run, place, block, kind, given):
        run.stacked = None
        out = _left(run, place.name, stacked, kind, out)
    return out


def _bias(run: Run, stacked: Stacked, kind: Block, attending: Attending, given: dict[str, Any]) -> Tensor:
    """What lets sizes count in a block that attends by itself."""
    hidden = next(iter(given.values()))
    words = given[kind.words].shape[1] if kind.text is None else hidden.shape[1] - stacked.merged.shape[1]
    return run.biases_of(stacked.key, stacked.merge, hidden.dtype).beside(attending.text, words)


def _enter(run: Run, place: Place, given: dict[str, Any]) -> None:
    """Merge what a block is given, where its stack merges."""
    hidden = given[place.arguments[0]]
    merge = choice_of(run, place.stack.site, None, hidden, None, {}).merge
    if merge is None:
        return
    x, words = split_text(hidden, merge.weights.shape[1], place.kind.text)
    merged = merge.merge(x, path=run.path)
    run.stacked = Stacked(merge, x, merged, place.stack.site.key)
    read = beside_text(hidden, words, merged, place.kind.text)
    given[place.arguments[0]] = read.clone() if place.kind.in_place else read


def _left(run: Run, name: str, stacked: Stacked, kind: Block, out: Any) -> Any:
    """What the last block gives, of all positions."""
    hidden = out if kind.output is None else out[kind.output]
    image, words = split_text(hidden, stacked.merged.shape[1], kind.text)
    linear = is_linear(run.feature.config, image)
    if linear:
        check_has_operator(run.feature.config, name)
    restored = restore_update(stacked.merge, stacked.x, stacked.merged, image, linear, run.path)
    hidden = beside_text(hidden, words, restored, kind.text)
    if kind.output is None:
        return hidden
    return tuple(hidden if i == kind.output else each for i, each in enumerate(out))


def _why_whole(run: Run, name: str, block: Any, kind: Block, given: dict[str, Any]) -> str | None:
    """Why a block reads all tokens; asked once in a forward."""
    if name not in run.whole:
        run.whole[name] = reason_to_leave_block_whole(block, kind, given)
        if run.whole[name] is None and block_slot(block) == COMPILED:
            run.whole[name] = _why_compiled_whole(run, block, kind)
    return run.whole[name]


def _why_compiled_whole(run: Run, block: Any, kind: Block) -> str | None:
    """Why a block that is compiled by itself reads all tokens; its hooks are compiled with it."""
    if (hook := what_stands_on(block)) is not None:
        return f"it is compiled by itself, with {hook}"
    if run.feature.config.proportional:
        if any(part.attending is not None and part.attending.asked for part in kind.parts):
            return "it is compiled by itself, and other tokens attend to those that would be merged"
        for attention in _attentions(block, kind):
            if not ends_in_sdpa(getattr(attention, "processor", None)):
                return "it is compiled by itself, and does not attend by scaled_dot_product_attention"
    return None


def _attentions(block: Any, kind: Block) -> list[Any]:
    """The self-attentions of a block."""
    found = [getattr(block, part.path, None) for part in kind.parts if part.attending is not None]
    return [attention for attention in found if attention is not None]


def _run_compiled(run: Run, stacked: Stacked, kind: Block, block: Any, original: Any, given: dict[str, Any]) -> Any:
    """Run a block that is compiled by itself, in which sizes count.

    A patch on its attention would be another object in each block, for each of which PyTorch would compile anew.
    """
    hidden = next(iter(given.values()))
    left = stacked.merged.shape[1]
    attending = next((part.attending for part in kind.parts if part.attending is not None), Attending())
    words = 0
    if attending.text is not None:
        words = given[kind.words].shape[1] if kind.text is None else hidden.shape[1] - left
    biases = run.biases_of(stacked.key, stacked.merge, hidden.dtype)
    beside, most = biases.beside(attending.text, words), len(_attentions(block, kind))
    if attending.each:
        most *= len(beside)
    for traced in (True, False):  # where PyTorch has given up compiling, they count in eager mode
        with CountSizes(run.path, attending, biases.bias, beside, most, traced) as counting:
            out = original(**given)
        if counting.counted:
            break
    return out


def _goes_on(run: Run, place: Place, block: Any, kind: Block, given: dict[str, Any]) -> bool:
    """Whether the block behind one reads its merged tokens, and nothing between them does."""
    if place.next is None or run.apart:
        return False
    behind = run.module_at(place.next)
    if behind is None or not _is_in(behind, place.stack):  # taken out, or replaced
        return False
    if what_stands_on(block) is not None or what_stands_on(behind) is not None:
        return False
    return _why_whole(run, place.next, behind, kind, given) is None


def _is_in(module: Any, stack: Stack) -> bool:
    """Whether a module is a block of that stack, as far as what turbovlm has put on it tells."""
    called = module.__dict__.get(slot_of(module, block_slot(module)))
    return any(isinstance(patch.detail, Place) and patch.detail.stack is stack for patch in patches_below(called))


def attention_forward(patch: Patch, module: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a self-attention, in which merged tokens count by their sizes."""
    check_class(patch, module)
    site: Site = patch.detail
    run = current_run(patch)
    feature: DenoiseFeature = patch.feature  # type: ignore[assignment]
    if run.stacked is None or not feature.config.proportional or site.part.attending is None:
        return original(*args, **kwargs)
    x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
    biases = run.biases_of(run.stacked.key, run.stacked.merge, x.dtype)
    return attend_merged(site.part.attending, module, original, run.path, biases, x, rest, kwargs)
