"""The choice of visual tokens on what the library has encoded: its outputs, and where they stand in the prompt."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.vlm.marks import ATTENTION
from turbovlm.vlm.select import Selection, kept_count, needs_attention, select

if TYPE_CHECKING:
    from turbovlm.vlm.install import ReadFeature


def choose_tokens(
    model: Any, feature: ReadFeature, inputs: dict[str, Any], images: dict[str, Any]
) -> tuple[dict[str, Any], Tensor, tuple[Selection, ...]] | None:
    """Choose the tokens of each image that are left.

    Args:
        model: the part that puts visual features in place of placeholders.
        feature: how it reads.
        inputs: its arguments: a prompt `[batch, N]`, or its embeddings.
        images: the library's outputs, by modality.

    Returns:
        The library's outputs with the features that are left, the columns of the prompt to drop, `[batch, N]`, bool,
        and what became of each image's tokens; None where there are not as many placeholders as features.

    Raises:
        StateError: the choice goes by the tower's attention, which the outputs are without.
    """
    fewer: dict[str, Any] = {}
    dropped: Tensor | None = None
    selections: list[Selection] = []
    for modality, outputs in images.items():
        placeholders = _placeholders(model, inputs, getattr(model.config, f"{modality}_token_id"))
        sizes = [_sizes_of_images(model, feature, len(entry)) for entry in outputs.pooler_output]
        columns = placeholders.flatten().nonzero().squeeze(1)
        counts = [n for entry in sizes for n in entry]
        if len(columns) != sum(counts):
            return None
        chosen = _select(feature, outputs, sizes)
        fewer[modality] = _left(outputs, sizes, chosen)
        dropped = torch.zeros_like(placeholders) if dropped is None else dropped
        for places, selection in zip(torch.split(columns, counts), chosen):  # row after row, image after image
            lost = torch.ones_like(places, dtype=torch.bool).index_fill(0, selection.kept[0], False)
            dropped.view(-1)[places[lost]] = True
        selections += chosen
    assert dropped is not None
    return fewer, dropped, tuple(selections)


def _placeholders(model: Any, inputs: dict[str, Any], token: int) -> Tensor:
    """Where the prompt has that token, or its embedding, `[batch, N]`, bool."""
    ids: Tensor | None = inputs.get("input_ids")
    if ids is not None:
        return ids == token
    embeds: Tensor = inputs["inputs_embeds"]
    equal: Tensor = embeds == model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
    return equal.all(-1)


def _sizes_of_images(model: Any, feature: ReadFeature, tokens: int) -> list[int]:
    """How many tokens each image of an entry of `tokens` has."""
    if feature.family.per_image is None:
        return [tokens]
    one = feature.family.per_image(model)
    return [one] * (tokens // one) if tokens % one == 0 else [tokens]


def _select(feature: ReadFeature, outputs: Any, sizes: list[list[int]]) -> list[Selection]:
    """What becomes of each image's tokens; images of equally many are chosen from together."""
    keep = feature.config.visual_keep
    assert keep is not None
    attention: list[Tensor] | None = getattr(outputs, ATTENTION, None)
    if attention is None and needs_attention(feature.config):
        raise StateError(
            "mm_encoder_outputs without the tower's attention: encode the images with this model's own "
            "get_image_features while it is accelerated, or let generate do it"
        )
    features = _by_image(outputs.pooler_output, sizes)
    semantic = None if attention is None else _by_image(attention, sizes)
    chosen: dict[int, Selection] = {}
    for n in {len(image) for image in features}:
        group = [i for i, image in enumerate(features) if len(image) == n]
        together = torch.stack([features[i] for i in group]).detach()
        row = None if semantic is None else torch.stack([semantic[i] for i in group])
        found = select(together, row, kept_count(keep, n), feature.config)
        chosen |= {i: found.of_image(place) for place, i in enumerate(group)}
    return [chosen[i] for i in range(len(features))]


def _left(outputs: Any, sizes: list[list[int]], chosen: list[Selection]) -> Any:
    """A copy of the library's outputs with the features that are left."""

    def taken(entries: Any) -> list[Tensor]:
        pieces = iter(zip(_by_image(entries, sizes), chosen))
        return [
            torch.cat([selection.take(image.unsqueeze(0))[0] for _, (image, selection) in zip(entry, pieces)])
            for entry in sizes
        ]

    left, planes = copy.copy(outputs), getattr(outputs, "deepstack_features", None)
    features = taken(outputs.pooler_output)
    left.pooler_output = torch.stack(features) if isinstance(outputs.pooler_output, Tensor) else features
    if planes:
        left.deepstack_features = [taken(plane) for plane in planes]
    return left


def _by_image(entries: Any, sizes: list[list[int]]) -> list[Tensor]:
    return [image for entry, counts in zip(entries, sizes) for image in torch.split(entry, counts)]
