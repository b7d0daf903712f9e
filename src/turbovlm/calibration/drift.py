"""Drift: how far what a model gives of a sample moves when tokens are merged, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbovlm.errors import TurboError

ERRORS = 2
"""Standard errors by which one mean drift must be below another to count as less: about 98 % of chance differences are
smaller. What is chosen by less is chosen by chance, and does not hold for other samples."""


class Reference:
    """What a model gives of every sample unmerged, as `drift` compares with it.

    Args:
        parts: tensors `[samples, tokens, width]` that count alike, such as CLS and patches; the mean over the samples
            is taken off each.

    Raises:
        TurboError: some values are NaN or infinite.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        if not all(part.isfinite().all() for part in parts):
            raise TurboError("the model's own outputs are NaN or infinite on these samples; nothing was calibrated")
        self._means = [part.mean(dim=0) for part in parts]
        self._centred = [part - mean for part, mean in zip(parts, self._means)]

    def drift(self, parts: Sequence[Tensor], samples: Sequence[int], settings: str) -> Tensor:
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
        device = self._centred[0].device
        places = torch.as_tensor(list(samples), device=device)
        found = torch.zeros(len(places), device=device)
        for part, own, mean in zip(parts, self._centred, self._means):
            if part.shape[1:] != own.shape[1:]:
                raise TurboError(
                    f"measure: gave {tuple(part.shape[1:])} per image with merging and {tuple(own.shape[1:])} without"
                )
            found += (1 - torch.cosine_similarity(part - mean, own[places], dim=-1)).mean(dim=1) / len(parts)
        if not found.isfinite().all():
            raise TurboError(f"the model's outputs are NaN or infinite with {settings}; nothing was calibrated")
        return found


def clearly_less(drift: Tensor, other: Tensor) -> bool:
    """Whether a mean drift is less than another by more than `ERRORS` standard errors of the paired difference."""
    difference = drift - other
    return bool(difference.mean() < -ERRORS * difference.std() / len(difference) ** 0.5)
