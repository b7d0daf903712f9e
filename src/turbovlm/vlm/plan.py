"""What one accelerated vision-language model's parts share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from turbovlm.config import TurboConfig
from turbovlm.encoder.layout import Spelling
from turbovlm.vlm.families import Reader
from turbovlm.vlm.select import Selection


@dataclass(eq=False)
class ReadingPlan:
    """How one model's visual tokens are chosen.

    Attributes:
        config: the settings.
        reader: the family.
        name: path of the model's part that reads visual tokens; empty where it is the model itself.
        guide: path of the block whose attention is A.
        spelling: of that block; None for a packed tower.
        prefix: tokens at the front of the tower's, which no visual token is made of.
        guidance: `"cls"` or `"mean"`: whose attention row is A.
        last: what became of the visual tokens in the last prompt, an entry per image; not copied or pickled.
    """

    config: TurboConfig
    reader: Reader
    name: str
    guide: str
    spelling: Spelling | None
    prefix: int
    guidance: str
    last: tuple[Selection, ...] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}


def arguments_by_name(method: Any, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, without those left out."""
    bound = inspect.signature(method).bind(owner, *args, **kwargs)
    named = dict(bound.arguments)
    rest = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    extra = named.pop(rest, {}) if rest is not None else {}
    del named[next(iter(bound.signature.parameters))]
    return {**named, **extra}
