"""What a prompt's text says of its images: its words' embeddings, and how near to them each visual token is.

Both are of the language model's own input space, so nothing has to run for it. All tokens of text count, those of a
chat template too; placeholders, padding and other images do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.tracing import without_autocast
from turbovlm.vlm.families import PIXELS, VlmFamily, placeholder_of
from turbovlm.vlm.prompt import placeholders

LEAST_SPREAD = 1e-6
"""Of cosines, so that those of equal tokens are not divided by 0."""


@dataclass(frozen=True)
class ImageText:
    """The text around each image of a group.

    Attributes:
        words: embeddings of the words of each image's prompt, `[words, width]`; None where no prompt is known.
    """

    words: Sequence[Tensor] | None = None

    def relevance(self, features: Tensor) -> Tensor:
        """Q of every token, `[images, n]`: of mean 0 and standard deviation 1 in each image.

        A token's relevance is the highest of its cosines to a word, each less that word's mean over the image: a word
        that is as near to every token, as those of a template are, says nothing of any.

        Args:
            features: `[images, n, width]`.
        """
        assert self.words is not None
        found = []
        for x, words in zip(features, self.words):
            precise = precise_dtype(x)
            with without_autocast(x.device):
                cosines = F.normalize(x.to(precise), dim=-1) @ F.normalize(words.to(precise), dim=-1).T
            best = (cosines - cosines.mean(dim=0)).amax(dim=1)
            best = best - best.mean()
            found.append(best / best.square().mean().sqrt().clamp(min=LEAST_SPREAD))
        return torch.stack(found)

    def of_images(self, images: Sequence[int]) -> ImageText:
        """That of some images."""
        return ImageText(None if self.words is None else [self.words[image] for image in images])


NO_TEXT = ImageText()


def text_around(
    family: VlmFamily, model: Any, inputs: dict[str, Any], rows: Sequence[int], question: float
) -> ImageText:
    """The text of the prompts that images stand in.

    Args:
        family: the model's.
        model: the part that puts visual features in place of placeholders.
        inputs: its arguments: a batch of prompts, or their embeddings.
        rows: which of the prompts each image stands in.
        question: the setting's value.

    Raises:
        StateError: a prompt has placeholders and padding alone, and `question` goes by its text.
    """
    text = _is_text(family, model, inputs)
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    words: dict[int, Tensor] = {}
    for row in sorted({*rows}):
        seen = text[row]
        if question and not bool(seen.any()):
            raise StateError(
                f"question={question:g}: prompt {row} of the batch has no text, which its images were to be chosen by: "
                "put some beside the placeholders, or leave question out"
            )
        with torch.no_grad():
            words[row] = embeds[row][seen] if ids is None else model.get_input_embeddings()(ids[row][seen])  # type: ignore[index]
    return ImageText([words[row] for row in rows])


def _is_text(family: VlmFamily, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Which of a call's columns are text, and no placeholders or padding, `[batch, N]`, bool."""
    named = [placeholder_of(family, model, modality) for modality in PIXELS]
    named.append(getattr(model.config, "audio_token_id", None))
    words = model.config.get_text_config().vocab_size
    known = [token for token in named if token is not None and (token < words or inputs.get("inputs_embeds") is None)]
    text = ~torch.stack([placeholders(model, inputs, token) for token in known]).any(dim=0)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:  # any other is refused where the prompt is shortened
        text = text & mask[:, -text.shape[1] :].bool()
    return text
