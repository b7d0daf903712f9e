"""A model by name, and the words that it is asked in."""

from __future__ import annotations

from dataclasses import dataclass

from turbovlm.loading import ModelSpec


@dataclass(frozen=True)
class AskedModel(ModelSpec):
    """A model by name, how it runs, and how a task asks it.

    Attributes:
        prompt: what it is asked, `{}` standing for question, statement or class; the model family's own if None.
        names: where embeddings of names are, for the zoo's CLIP.
    """

    prompt: str | None = None
    names: str | None = None
