"""What merged blocks come to, by the model's own blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.diffusion.feature import DenoiseFeature
from turbovlm.ops.merging import Merge


class Doubled:
    """In place of a block's forward: all tokens, of which those of one merged token are equal, stand for it.

    Equal keys count as many times as they are, so sizes that count come to the same. Of one image, restored by copies.
    """

    def __init__(self, block: Any, place: Any, merge: Merge, shared: dict[str, Any]) -> None:
        self.own, self.place, self.merge, self.shared = block.forward, place, merge, shared
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place = self.place
        given = {**dict(zip(place.arguments, args)), **kwargs}
        first, output = place.arguments[0], place.kind.output
        if place.name == place.stack.blocks[0]:
            self.shared["x"], words = self.split(given[first])
            self.shared["doubled"] = self.merge.unmerge(self.merge.merge(self.shared["x"]))
            given[first] = self.join(self.shared["doubled"], words)
        for cut in place.kind.cuts:
            value = given.get(cut.name)
            if isinstance(value, tuple):
                some = range(len(value)) if cut.item is None else (cut.item,)
                given[cut.name] = tuple(self.doubled(x, cut) if i in some else x for i, x in enumerate(value))
            elif value is not None:
                given[cut.name] = self.doubled(value, cut)
        by_place = [given.pop(name) for name in place.arguments[: len(args)]]
        out = self.own(*by_place, **given)
        if place.name == place.stack.blocks[-1]:
            image, words = self.split(out if output is None else out[output])
            image = self.join(self.shared["x"] + image - self.shared["doubled"], words)
            out = image if output is None else tuple(image if i == output else each for i, each in enumerate(out))
        return out

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image's tokens and the words in a sequence."""
        tokens = self.merge.weights.shape[1]
        words = x.shape[1] - tokens
        if self.place.kind.text == "front":
            return x[:, words:], x[:, :words]
        return x[:, :tokens], x[:, tokens:]

    def join(self, image: Tensor, words: Tensor) -> Tensor:
        return torch.cat((words, image) if self.place.kind.text == "front" else (image, words), dim=1)

    def doubled(self, value: Tensor, cut: Any) -> Tensor:
        """What there is of every token, those of a merged one being given that of its place."""
        index, tokens = self.merge.kept.gather(1, self.merge.source)[0], self.merge.weights.shape[1]
        words = torch.arange(value.shape[cut.axis] - tokens)
        index = torch.cat((words, len(words) + index) if cut.text == "front" else (index, tokens + words))
        return value.index_select(cut.axis, index)


def double(model: Any, feature: DenoiseFeature) -> None:
    """Let a model run as it did when it was last merged by a feature that was taken off since."""
    shared: dict[str, dict[str, Any]] = {}
    for place in feature.places:
        choice = feature.last[place.stack.site.key]
        Doubled(model.get_submodule(place.name), place, choice.merge, shared.setdefault(place.stack.blocks[0], {}))
