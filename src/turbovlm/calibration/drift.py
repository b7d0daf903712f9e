"""Drift: how far what a model gives of a sample moves when tokens are merged, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbovlm.errors import TurboError

Part = Tensor | Sequence[Tensor]
"""`[samples, tokens, width]`, or of samples of several numbers of tokens each `[tokens, width]`."""
ERRORS = 2
"""Standard errors by which one mean drift must be below another to count as less: about 98 % of chance differences are
smaller. What is chosen by less is chosen by chance, and does not hold for other samples."""


class Reference:
    """What a model gives of every sample unmerged, as `drift` compares with it.

    Args:
        parts: tensors `[samples, tokens, width]` that count alike, such as CLS and patches; the mean over the samples
            is taken off each. Samples of several numbers of tokens are a list of `[tokens, width]` instead, and the
            mean over all their tokens is taken off.

    Raises:
        TurboError: some values are NaN or infinite.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not all(each.isfinite().all() for part in parts for each in part):
            raise TurboError("the model's own outputs are NaN or infinite on these samples; nothing was calibrated")
        self._means = [(part if isinstance(part, Tensor) else torch.cat(list(part))).mean(dim=0) for part in parts]
        self._centred = [
            part - mean if isinstance(part, Tensor) else [each - mean for each in part]
            for part, mean in zip(parts, self._means)
        ]

    def drift(self, parts: Sequence[Part], samples: Sequence[int], settings: str) -> Tensor:
        """1 − cosine of what merging gives to what the model itself gives: mean over tokens, then over parts.

        Args:
            parts: of these samples, as those of the reference.
            samples: their places in the reference.
            settings: what was merged, for messages.

        Returns:
            `[len(samples)]`, float32.

        Raises:
            TurboError: NaN, or another shape than the model's own.
        """
        device = self._means[0].device
        found = torch.zeros(len(samples), device=device)
        for part, own, mean in zip(parts, self._centred, self._means):
            if isinstance(part, Tensor) and isinstance(own, Tensor):
                moved = _moved(part - mean, own[torch.as_tensor(list(samples), device=device)])
            else:
                moved = torch.cat([_moved(each[None] - mean, own[i][None]) for each, i in zip(part, samples)])
            found += moved / len(parts)
        if not found.isfinite().all():
            raise TurboError(f"the model's outputs are NaN or infinite with {settings}; nothing was calibrated")
        return found


def _moved(part: Tensor, own: Tensor) -> Tensor:
    """1 − cosine of tensors `[samples, tokens, width]`, the mean over tokens."""
    if part.shape[1:] != own.shape[1:]:
        raise TurboError(
            f"measure: gave {tuple(part.shape[1:])} per image with merging and {tuple(own.shape[1:])} without"
        )
    return (1 - torch.cosine_similarity(part, own, dim=-1)).mean(dim=1)


def clearly_less(drift: Tensor, other: Tensor) -> bool:
    """Whether a mean drift is less than another by more than `ERRORS` standard errors of the paired difference."""
    difference = drift - other
    return bool(difference.mean() < -ERRORS * difference.std() / len(difference) ** 0.5)
