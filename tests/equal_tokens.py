"""What a merged run has to be: the model's own blocks on all tokens, of which those of one merged token are equal."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from turbovlm.ops.merging import Merge


def stand_for(model: Any, places: Any, choices: dict[str, Any], alone: bool = False) -> None:
    """Have the blocks of a model run on equal tokens.

    Args:
        places, choices: what a feature that was on the model had, `last`, for one image.
        alone: whether each block merges by itself, whatever stack it is in.
    """
    for place in places:
        stack = (place.name,) if alone else place.stack.blocks
        Equal(model.get_submodule(place.name), place, stack, choices[place.stack.site.key].merge)


class Equal:
    """In place of a block's forward: equal tokens, of which each has the rotary angles and the like of the kept one.

    Equal keys count as many times as they are, so sizes that count come to the same. Which arguments are of tokens is
    told by their shapes alone: no text has as many words, and no layer as many features, as there are tokens.
    """

    before: ClassVar[dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}

    def __init__(self, block: Any, place: Any, stack: tuple[str, ...], merge: Merge) -> None:
        self.own, self.place, self.stack, self.merge = block.forward, place, stack, merge
        self.index = merge.kept.gather(1, merge.source)[0]
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names, output = self.place.arguments, self.place.kind.output
        given = {**dict(zip(names, args)), **kwargs}
        stack, x = self.stack, given.pop(names[0])
        if self.place.name == stack[0]:
            doubled = self.merge.unmerge(self.merge.merge(x))
            self.before[stack[0]] = x, doubled
            x = doubled
        rest = [self.of_equal(given.pop(name)) for name in names[1 : len(args)]]
        out = self.own(x, *rest, **{name: self.of_equal(value) for name, value in given.items()})
        if self.place.name != stack[-1]:
            return out
        x, doubled = self.before[stack[0]]
        image = x + (out if output is None else out[output]) - doubled
        return image if output is None else tuple(image if i == output else each for i, each in enumerate(out))

    def of_equal(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self.of_equal(each) for each in value)
        if not torch.is_tensor(value) or len(self.index) not in value.shape:
            return value
        return value.index_select(value.shape.index(len(self.index)), self.index)
