"""What a block is given of every token beside the token, such as rotary angles, for the tokens that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.merging import Merge


@dataclass(frozen=True)
class Cut:
    """An argument that has something of every token.

    Args:
        name: of the argument: a tensor, or a tuple of them.
        axis: of the tokens in it.
        text: where the text's entries stand: `"front"` or `"behind"` those of the image; None where it has none.
        heads: axis that the library's code gives it for the heads, where it has none for the images of the batch.
        item: index of the tensor in the tuple, or of a tuple of them; None where all of them are of tokens.
        axes: how many axes it has where one of them is of the tokens; None where it always is, or is shorter where all
            tokens have the same.
    """

    name: str
    axis: int = 0
    text: str | None = None
    heads: int | None = None
    item: int | None = None
    axes: int | None = None

    def of_merged(self, value: Any, merge: Merge) -> Any:
        """The same of the tokens that are left, `Merge.kept`, of each image by itself."""
        if self.item is not None and isinstance(value, tuple | list):
            return tuple(self._of(each, merge, {}) if i == self.item else each for i, each in enumerate(value))
        return self._of(value, merge, {})

    def _of(self, value: Any, merge: Merge, made: dict[int, Tensor]) -> Any:
        """Of a tensor, or of each in a tuple; `made` has the entries that are left, by how many words there are."""
        if isinstance(value, tuple | list):
            return tuple(self._of(each, merge, made) for each in value)
        tokens = merge.weights.shape[1]
        if value is None or self.axes not in (None, value.ndim) or value.shape[self.axis] < tokens:
            return value
        words = value.shape[self.axis] - tokens
        if words not in made:
            made[words] = self._index(words, merge)
        return self._gathered(value, made[words])

    def _index(self, words: int, merge: Merge) -> Tensor:
        """The entries that are left, `[batch, words + M]`."""
        index, tokens = merge.kept, merge.weights.shape[1]
        if not words:
            return index
        text = torch.arange(words, device=index.device).expand(len(index), -1)
        both = (text, index + words) if self.text == "front" else (index, text + tokens)
        return torch.cat(both, dim=1)

    def _gathered(self, value: Tensor, index: Tensor) -> Any:
        if self.axis == 0:
            found = value[index]
        else:
            moved, images = value.movedim(self.axis, 1), len(index)
            rows = torch.arange(images, device=index.device).unsqueeze(1)
            found = (moved[0][index] if len(value) != images else moved[rows, index]).movedim(1, self.axis)
        return found if self.heads is None else OfEach(found.unsqueeze(self.heads))


class OfEach:
    """Angles of the tokens of every image, where the library's code expects those that all images share.

    It gives the angles of one sequence axes for images and heads, by an index or a view. These have them already.

    Args:
        angles: `[batch, tokens, 1, …]`, or with the axes of tokens and heads changed places.
    """

    def __init__(self, angles: Tensor) -> None:
        self.angles = angles

    def __getitem__(self, index: Any) -> Tensor:
        return self.angles

    def unsqueeze(self, axis: int) -> Tensor:
        return self.angles

    def view(self, *shape: int) -> Tensor:
        return self.angles

    def to(self, *args: Any, **kwargs: Any) -> OfEach:
        return OfEach(self.angles.to(*args, **kwargs))


def split_text(x: Tensor, tokens: int, text: str | None) -> tuple[Tensor, int]:
    """The image's `tokens` tokens of a sequence, `[batch, words + tokens, width]`, and how many words there are.

    Args:
        text: where they stand: `"front"` or `"behind"`; None where there are none.
    """
    words = x.shape[1] - tokens
    return (x[:, :tokens] if text == "behind" else x[:, words:]), words


def beside_text(x: Tensor, words: int, image: Tensor, text: str | None) -> Tensor:
    """Other tokens of the image, `[batch, any, width]`, with the words of `x`, where these stood."""
    if not words:
        return image
    both = (image, x[:, -words:]) if text == "behind" else (x[:, :words], image)
    return torch.cat(both, dim=1)
