"""What one accelerated vision-language model's parts share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from turbovlm.adapters.layout import Spelling
from turbovlm.config import TurboConfig
from turbovlm.language.readers import Reader
from turbovlm.language.select import Selection


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
