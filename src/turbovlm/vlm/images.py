"""Images as the library has encoded them, where they stand in the prompt, and which of their tokens are left."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.vlm.families import PIXELS
from turbovlm.vlm.marks import ATTENTION
from turbovlm.vlm.select import Selection, kept_count, needs_attention, select

if TYPE_CHECKING:
    from turbovlm.vlm.install import ReadFeature


def encode_images(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The library's outputs for images and videos, by modality, of one call's inputs.

    Pixels among the inputs are encoded, and taken out.
    """
    encoded = inputs.get("mm_encoder_outputs") or {}
    found = [modality for modality, pixels in PIXELS.items() if inputs.get(pixels) is not None]
    if encoded and found:
        return {}  # the library's own error follows
    for modality in found:
        names = inspect.signature(getattr(type(model), f"get_{modality}_features")).parameters
        arguments = {name: inputs[name] for name in names if inputs.get(name) is not None and name != "kwargs"}
        encoded = {**encoded, modality: getattr(model, f"get_{modality}_features")(**arguments, return_dict=True)}
    if found:
        inputs |= dict.fromkeys({*PIXELS.values(), "pixel_attention_mask"} & set(inputs))
    return encoded


def find_placeholders(model: Any, inputs: dict[str, Any], images: dict[str, Any]) -> dict[str, Tensor] | None:
    """Where each modality's tokens stand in the prompt, `[batch, N]`, bool.

    Returns:
        None where there are not as many placeholders as features.

    Raises:
        StateError: there is no prompt.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and embeds is None:
        raise StateError("a prompt is missing: give input_ids or inputs_embeds")
    found: dict[str, Tensor] = {}
    for modality, outputs in images.items():
        token = getattr(model.config, f"{modality}_token_id")
        if embeds is not None and ids is None:
            embedded = model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
            found[modality] = (embeds == embedded).all(-1)
        else:
            found[modality] = ids == token
        if int(found[modality].sum()) != sum(len(entry) for entry in outputs.pooler_output):
            return None
    return found


def choose_tokens(
    model: Any, feature: ReadFeature, images: dict[str, Any], placeholders: dict[str, Tensor]
) -> tuple[dict[str, Any], Tensor, tuple[Selection, ...]]:
    """Choose the tokens of each image that are left.

    Args:
        model: the part that puts visual features in place of placeholders.
        feature: how it reads.
        images: the library's outputs, by modality.
        placeholders: where their tokens stand, `[batch, N]`, bool: they fill the rows in order, image after image.

    Returns:
        The library's outputs with the features that are left, the columns of the prompt to drop, `[batch, N]`, bool,
        and what became of each image's tokens.

    Raises:
        StateError: the choice goes by the tower's attention, which the outputs are without.
    """
    fewer, selections = {}, []
    dropped = torch.zeros_like(next(iter(placeholders.values())))
    for modality, outputs in images.items():
        sizes = [_sizes_of_images(model, feature, len(entry)) for entry in outputs.pooler_output]
        chosen = _select(feature, outputs, sizes)
        fewer[modality] = _left(outputs, sizes, chosen)
        columns = placeholders[modality].flatten().nonzero().squeeze(1)
        for places, selection in zip(torch.split(columns, [n for entry in sizes for n in entry]), chosen):
            lost = torch.ones_like(places, dtype=torch.bool).index_fill(0, selection.kept[0], False)
            dropped.view(-1)[places[lost]] = True
        selections += chosen
    return fewer, dropped, tuple(selections)


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
