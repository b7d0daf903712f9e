"""Several texts about one image in one sequence, so that the image's tokens are read once for all of them.

The sequence begins with `<bos>` and the image's tokens; behind them stands one text after another. A text sees what is
before all texts and itself, and its positions go on from the image's last, so that each is read as if it stood alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import ConfigError

UNASKED = -100
AT_ONCE = 256
"""Columns whose logits over the whole vocabulary are in memory together."""


@dataclass(frozen=True)
class Packed:
    """Texts about some images, a row for each image, padded at its end. N columns, T of them in front of the texts.

    Attributes:
        ids: words of the texts, `[images, N − T]`, int64.
        positions: of all columns, `[images, N]`.
        mask: what each column sees, `[images, 1, N, N]`, bool.
        wanted: the token to be said next at each column of texts, `UNASKED` where none is, `[images, N − T]`.
        weights: of what is wanted; those of a text sum to one, `[images, N − T]`.
        text_of: the number of the text that each column is of, −1 for padding, `[images, N − T]`.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    wanted: Tensor
    weights: Tensor
    text_of: Tensor

    def to(self, device: Any) -> Packed:
        return Packed(*(values.to(device) for values in vars(self).values()))


def pack(rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], front: int) -> Packed:
    """Texts side by side.

    Args:
        rows: for each image, its texts: a question's tokens and its answer's.
        front: columns in front of the texts.
    """
    longest = max(sum(len(q) + len(a) - 1 for q, a in texts) for texts in rows)
    shape = len(rows), longest
    ids, wanted = torch.zeros(shape, dtype=torch.long), torch.full(shape, UNASKED)
    weights, positions = torch.zeros(shape), torch.full(shape, front)
    text_of = torch.full(shape, -1)
    for row, texts in enumerate(rows):
        start = 0
        for number, (question, answer) in enumerate(texts):
            whole = torch.tensor([*question, *answer])
            here, said = slice(start, start + len(whole) - 1), start + len(question) - 1
            ids[row, here], positions[row, here] = whole[:-1], front + torch.arange(len(whole) - 1)
            wanted[row, said : here.stop], weights[row, said : here.stop] = torch.tensor(answer), 1 / len(answer)
            text_of[row, here] = number
            start = here.stop
    return Packed(
        ids,
        torch.cat([torch.arange(front).expand(len(rows), -1), positions], dim=1),
        _mask(text_of, front),
        wanted,
        weights,
        text_of,
    )


def _mask(text_of: Tensor, front: int) -> Tensor:
    """`[images, 1, N, N]`: each column sees those before it that are in front, or of its own text."""
    of = F.pad(text_of, (front, 0), value=-2)
    same, in_front = of[:, :, None] == of[:, None, :], of[:, None, :] == -2
    return (same | in_front).tril()[:, None]


def hidden_of(language_model: Any, visual: Tensor, packed: Packed, bos: int) -> Tensor:
    """What the language model makes of the columns of texts, `[images, N − T, width]`.

    Args:
        language_model: a Gemma 3 without its head, whose windows are wider than a sequence.
        visual: what the projector makes of the images, `[images, T − 1, width]`.
        packed: the texts.
        bos: the token in front.
    """
    words = language_model.get_input_embeddings()
    first = words(torch.full_like(packed.ids[:, :1], bos))
    embeds = torch.cat([first, visual.to(first.dtype), words(packed.ids)], dim=1)
    out = language_model(
        inputs_embeds=embeds,
        attention_mask=_masks(language_model, packed.mask, embeds.dtype),
        position_ids=packed.positions,
        use_cache=False,
    )
    found: Tensor = out.last_hidden_state[:, -packed.ids.shape[1] :]
    return found


def hidden_behind(language_model: Any, cache: Any, packed: Packed) -> Tensor:
    """The same, where a cache holds what stands in front of the texts: all of its columns, or those that are left.

    Args:
        language_model: as in `hidden_of`.
        cache: of keys and values, without padding; it grows by the texts.
        packed: the texts, with the positions of full prompts.
    """
    columns = packed.ids.shape[1]
    own = packed.mask[:, :, -columns:, -columns:]
    seen = torch.cat([own.new_ones(*own.shape[:3], cache.get_seq_length()), own], dim=3)
    embeds = language_model.get_input_embeddings()(packed.ids)
    out = language_model(
        inputs_embeds=embeds,
        attention_mask=_masks(language_model, seen, embeds.dtype),
        position_ids=packed.positions[:, -columns:],
        past_key_values=cache,
        use_cache=True,
    )
    found: Tensor = out.last_hidden_state
    return found


def _masks(language_model: Any, seen: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is added to the scores, for every kind of layer alike."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return dict.fromkeys(language_model.config.layer_types, mask)


def answers_loss(hidden: Tensor, packed: Packed, words: Tensor, among: Tensor | None = None) -> Tensor:
    """Cross-entropy of the answers' tokens, averaged within a text and then over texts.

    Args:
        hidden: as `hidden_of` has it.
        packed: the texts.
        words: the output embeddings, `[vocabulary, width]`.
        among: the tokens that compete, ascending, all that are wanted among them; the whole vocabulary if None.

    Raises:
        ConfigError: `among` lacks one that is wanted.
    """
    asked = packed.wanted != UNASKED
    wanted, weights = packed.wanted[asked], packed.weights[asked]
    if among is not None:
        places = torch.searchsorted(among, wanted).clamp(max=len(among) - 1)
        if not torch.equal(among[places], wanted):
            raise ConfigError(f"among: lacks {sorted({*wanted.tolist()} - {*among.tolist()})}, which answers have")
        words, wanted = words[among], places
    logits = F.linear(hidden[asked], words).float()
    return (F.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()


def right_texts(hidden: Tensor, packed: Packed, words: Tensor) -> list[list[bool]]:
    """Of each image's texts, whether greedy decoding would write the answer: all its tokens are the likeliest.

    Args:
        hidden: as `hidden_of` has it.
        packed: the texts.
        words: the output embeddings, `[vocabulary, width]`.
    """
    wanted = packed.wanted != UNASKED
    wrong = torch.zeros_like(wanted)
    likeliest = torch.cat([F.linear(some, words).argmax(-1) for some in hidden[wanted].split(AT_ONCE)])
    wrong[wanted] = likeliest != packed.wanted[wanted]
    return [
        [not bool(row[text == number].any()) for number in range(int(text.max()) + 1)]
        for row, text in zip(wrong.cpu(), packed.text_of.cpu())
    ]
