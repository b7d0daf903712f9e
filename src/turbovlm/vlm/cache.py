"""A cache of keys and values that holds shortened prompts: it knows which of their columns it has.

The user's prompts are longer than what is in the cache. Two lengths are told apart throughout: `columns` are those of
the prompts as the user has them, `held` those in the cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.vlm.marks import CACHED_PROMPTS


@dataclass(frozen=True)
class CachedPrompts:
    """The prompts in a cache up to the last one with an image; the text that follows it is held column by column.

    Attributes:
        columns: columns of these prompts, all turns together.
        seen: whether each column held of them is a token and no padding, `[batch, held]`, bool.
        after_images: how many columns follow the last one that was dropped.
    """

    columns: int
    seen: Tensor
    after_images: int

    @property
    def dropped(self) -> int:
        """How many columns the cache does not hold."""
        return self.columns - self.seen.shape[1]

    def held_mask(self, mask: Tensor) -> Tensor:
        """The attention mask over what the cache holds and the columns behind it.

        Args:
            mask: over all columns, `[batch, columns + more]`, as the user has it.

        Returns:
            `[batch, held + more]`, of the same dtype.
        """
        return torch.cat([self.seen.to(mask), mask[:, self.columns :]], dim=1)

    def held_types(self, types: Tensor) -> Tensor:
        """Token types `[batch, columns + more]` by their place in the cache, whose own are text to all that follows."""
        return F.pad(types[..., self.columns :], (self.seen.shape[1], 0))

    def cropped(self, held: int) -> CachedPrompts:
        """The same when only the first `held` columns of the cache are left.

        Raises:
            StateError: they end before an image does, of which the cache has fewer columns than the prompt.
        """
        lost = self.seen.shape[1] - held
        if lost <= 0:
            return self
        if lost > self.after_images:
            raise StateError(
                f"{lost} columns were to be taken out of a cache that has {self.after_images} behind its last image, "
                "whose columns visual_keep has shortened: start again from the whole prompt"
            )
        return CachedPrompts(self.columns - lost, self.seen[:, :held], self.after_images - lost)


class _ShortenedCache:
    """What the class of a cache gets in front of its own methods while it holds shortened prompts."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._call("reorder_cache", beam_idx)
        self._follow(lambda seen: seen.index_select(0, beam_idx.to(seen.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._call("batch_select_indices", indices)
        self._follow(lambda seen: seen[indices.to(seen.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._call("batch_repeat_interleave", repeats)
        self._follow(lambda seen: seen.repeat_interleave(repeats, dim=0))

    def crop(self, tokens: int) -> None:
        """Take `-tokens` columns out; older releases pass a positive number, of columns that are left."""
        cache: Any = self
        left = getattr(self, CACHED_PROMPTS).cropped(tokens if tokens > 0 else cache.get_seq_length() + tokens)
        self._call("crop", tokens)
        setattr(self, CACHED_PROMPTS, left)

    def reset(self) -> None:
        """Forget everything, and be a cache of the user's class again."""
        self._call("reset")
        delattr(self, CACHED_PROMPTS)
        self.__class__ = type(self).__mro__[2]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_cache, (type(self).__mro__[2],), self.__dict__

    def _call(self, name: str, *args: Any) -> None:
        getattr(super(), name)(*args)

    def _follow(self, change: Any) -> None:
        prompts: CachedPrompts = getattr(self, CACHED_PROMPTS)
        setattr(self, CACHED_PROMPTS, replace(prompts, seen=change(prompts.seen)))


def remember_prompts(cache: Any, prompts: CachedPrompts) -> None:
    """Have a cache carry what is known of its prompts, through changes of its rows and its length, until its reset.

    Its class becomes one that is derived from it and has the same name; none of its own methods is replaced.
    """
    setattr(cache, CACHED_PROMPTS, prompts)
    if not isinstance(cache, _ShortenedCache):
        base: type = type(cache)
        cache.__class__ = _shortened(base)


def prompts_in(cache: Any) -> CachedPrompts | None:
    """What a cache knows of its prompts; None where none of them was shortened."""
    prompts: CachedPrompts | None = getattr(cache, CACHED_PROMPTS, None)
    return prompts


def columns_in(cache: Any) -> int:
    """How many columns of the user's prompts a cache stands for."""
    if cache is None:
        return 0
    prompts = prompts_in(cache)
    return int(cache.get_seq_length()) + (0 if prompts is None else prompts.dropped)


@functools.cache
def _shortened(base: type) -> type:
    return type(base.__name__, (_ShortenedCache, base), {"__module__": base.__module__})


def _new_cache(base: type) -> Any:
    """Unpickle, or copy: the state follows."""
    cls: Any = _shortened(base)
    return cls.__new__(cls)
