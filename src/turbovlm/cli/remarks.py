"""Remarks that libraries log when they are imported or build a model, and that say nothing of what a user gave."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

REMARKS: dict[str, tuple[str, ...]] = {
    "torchao": ("Failed to load ",),
    "torch.utils._pytree": (" is an Enum subclass ",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    "diffusers.models.modeling_utils": ("should be kept in float32: [].",),
    "huggingface_hub.utils._http": ("Retrying in ", "unauthenticated requests"),
    "matplotlib.font_manager": ("building the font cache",),
}
"""By logger, what the message has in it: compiled parts for other Python releases, deprecations between libraries,
an empty list of modules, tries of a download whose failure ends in an error. All else that they log is shown."""


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Leave `REMARKS` out, and nothing else, for the time of a command."""
    filters = {logging.getLogger(name): _Without(parts) for name, parts in REMARKS.items()}
    for logger, each in filters.items():
        logger.addFilter(each)
    try:
        yield
    finally:
        for logger, each in filters.items():
            logger.removeFilter(each)


class _Without(logging.Filter):
    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in self.parts)
