"""A cache of keys and values that carries what is known of its prompts through changes of its rows and its length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from turbovlm.vlm.marks import CACHED_PROMPTS
from turbovlm.vlm.prompt import CachedPrompts


def remember_prompts(cache: Any, prompts: CachedPrompts) -> None:
    """Have a cache of the library or the user carry what is known of its prompts, until its reset.

    Its class becomes one that is derived from it and has its name; none of its own methods is replaced.
    """
    setattr(cache, CACHED_PROMPTS, prompts)
    if not isinstance(cache, _ShortenedCache):
        base: type = type(cache)
        cache.__class__ = _shortened(base)


class _ShortenedCache:
    """The class in front of a cache's own while it holds shortened prompts."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._call("reorder_cache", beam_idx)
        self._change_rows(lambda seen: seen[beam_idx.to(seen.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._call("batch_select_indices", indices)
        self._change_rows(lambda seen: seen[indices.to(seen.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._call("batch_repeat_interleave", repeats)
        self._change_rows(lambda seen: seen.repeat_interleave(repeats, dim=0))

    def crop(self, tokens: int) -> None:
        """Take `-tokens` columns out; in older releases, a positive number is that of columns left."""
        cache: Any = self
        prompts: CachedPrompts = getattr(self, CACHED_PROMPTS)
        cropped = prompts.cropped(tokens if tokens > 0 else int(cache.get_seq_length()) + tokens)
        self._call("crop", tokens)
        setattr(self, CACHED_PROMPTS, cropped)

    def reset(self) -> None:
        """Forget everything, and be of the user's class again."""
        self._call("reset")
        delattr(self, CACHED_PROMPTS)
        self.__class__ = self._own_class()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_cache, (self._own_class(),), self.__dict__

    def _own_class(self) -> Any:
        return type(self).__mro__[2]

    def _call(self, name: str, *args: Any) -> None:
        getattr(super(), name)(*args)

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        prompts: CachedPrompts = getattr(self, CACHED_PROMPTS)
        setattr(self, CACHED_PROMPTS, replace(prompts, seen=change(prompts.seen)))


_CLASSES: dict[type, type] = {}
"""The classes made so far, by that of the cache."""


def _shortened(base: type) -> type:
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (_ShortenedCache, base), {"__module__": base.__module__})
    return _CLASSES[base]


def _new_cache(base: type) -> Any:
    """A cache of that class with shortened prompts, for copies and pickles, whose state follows."""
    cls: Any = _shortened(base)
    return cls.__new__(cls)
