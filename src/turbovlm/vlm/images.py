"""The choice of visual tokens on what the library has encoded: its outputs, and where they stand in the prompt."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.vlm.families import placeholder_name, placeholder_of
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
        token = placeholder_of(feature.family, model, modality)
        if token is None:
            name = placeholder_name(feature.family, modality)
            raise StateError(f"{name}: the model's config has None, so it cannot be told where its {modality}s stand")
        places_of = placeholders(model, inputs, token)
        sizes = [_sizes_of_images(model, feature, len(entry)) for entry in getattr(outputs, feature.family.features)]
        columns = places_of.flatten().nonzero().squeeze(1)
        counts = [n for entry in sizes for n in entry]
        if len(columns) != sum(counts):
            return None
        chosen, fewer[modality] = _select(feature, outputs, sizes)
        dropped = torch.zeros_like(places_of) if dropped is None else dropped
        for places, selection in zip(torch.split(columns, counts), chosen):  # row after row, image after image
            lost = torch.ones_like(places).index_fill(0, selection.kept[0], 0) > 0  # TorchScript fills no bool
            dropped.view(-1)[places[lost]] = True
        selections += chosen
    assert dropped is not None
    return fewer, dropped, tuple(selections)


def placeholders(model: Any, inputs: dict[str, Any], token: int) -> Tensor:
    """Where a call's prompt has that token, or its embedding, `[batch, N]`, bool."""
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


def _select(feature: ReadFeature, outputs: Any, sizes: list[list[int]]) -> tuple[list[Selection], Any]:
    """What becomes of each image's tokens, and a copy of the library's outputs with the features that are left.

    Images of equally many tokens are chosen from together.
    """
    keep = feature.config.visual_keep
    assert keep is not None
    attention: list[Tensor] | None = getattr(outputs, ATTENTION, None)
    if attention is None and needs_attention(feature.config):
        raise StateError(
            "mm_encoder_outputs without the tower's attention: encode the images with this model's own "
            "get_image_features while it is accelerated, or let generate do it"
        )
    entries = getattr(outputs, feature.family.features)
    planes = [entries, *(getattr(outputs, "deepstack_features", None) or [])]
    features = [_by_image(plane, sizes) for plane in planes]
    semantic = None if attention is None else _by_image(attention, sizes)
    chosen: dict[int, Selection] = {}
    for n, group in _groups(sizes).items():
        together = [torch.stack([images[i] for i in group]) for images in features]
        row = None if semantic is None else torch.stack([semantic[i] for i in group])
        found = select(together[0].detach(), row, kept_count(keep, n), feature.config)
        for images, stacked in zip(features, together):
            for i, left in zip(group, found.take(stacked)):
                images[i] = left
        chosen |= {i: found.of_image(place) for place, i in enumerate(group)}
    fewer = copy.copy(outputs)
    read, *planes = [[torch.cat([next(left) for _ in entry]) for entry in sizes] for left in map(iter, features)]
    setattr(fewer, feature.family.features, torch.stack(read) if isinstance(entries, Tensor) else read)
    if planes:
        fewer.deepstack_features = planes
    return [chosen[i] for i in range(len(chosen))], fewer


def _groups(sizes: list[list[int]]) -> dict[int, list[int]]:
    """Which images have so many tokens, the images of all entries in a row."""
    groups: dict[int, list[int]] = {}
    for i, n in enumerate(n for entry in sizes for n in entry):
        groups.setdefault(n, []).append(i)
    return groups


def _by_image(entries: Any, sizes: list[list[int]]) -> list[Tensor]:
    """The features of each image, `[tokens, width]`, or A of its tokens, `[tokens]`, those of all entries in a row."""
    return [image for entry, counts in zip(entries, sizes) for image in torch.split(entry, counts)]
