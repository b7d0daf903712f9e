"""The choice of visual tokens on what the library has encoded: its outputs, and where they stand in the prompt."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.vlm.families import placeholder_name, placeholder_of
from turbovlm.vlm.frames import frames_of, join_frames, select_frames
from turbovlm.vlm.marks import ATTENTION
from turbovlm.vlm.pixels import alone, standing_in
from turbovlm.vlm.prompt import placeholders
from turbovlm.vlm.question import NO_TEXT, ImageText, text_around
from turbovlm.vlm.select import kept_count, needs_attention, select, select_within
from turbovlm.vlm.selection import Selection, keep_alone
from turbovlm.vlm.selectors import Grid, grids_of

if TYPE_CHECKING:
    from turbovlm.config import ReadConfig
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
        ConfigError: no token of an image would be left, or a selector of the user's returned something else.
        StateError: the choice goes by the tower's attention, by frames or by pixels, which the outputs are without, or
            by the text of a prompt that has none.
    """
    config = feature.config
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
        if config.change and feature.family.frames == "images":
            sizes, frames = join_frames(sizes, columns, places_of.shape[1])
            counts = [n for entry in sizes for n in entry]
        else:
            frames = frames_of(config, outputs, modality, counts)
        text = NO_TEXT
        if config.question or callable(config.visual_select):
            rows = [int(places[0]) // places_of.shape[1] for places in torch.split(columns, counts)]
            text = text_around(feature.family, model, inputs, rows, config.question)
        grids = grids_of(model, feature, outputs, modality, counts)
        chosen, fewer[modality] = _select(feature, outputs, sizes, text, grids, frames)
        dropped = torch.zeros_like(places_of) if dropped is None else dropped
        for places, selection in zip(torch.split(columns, counts), chosen):  # row after row, image after image
            lost = torch.ones_like(places).index_fill(0, selection.kept[0], 0) > 0  # TorchScript fills no bool
            dropped.view(-1)[places[lost]] = True
        selections += chosen
    assert dropped is not None
    return fewer, dropped, tuple(selections)


def _sizes_of_images(model: Any, feature: ReadFeature, tokens: int) -> list[int]:
    """How many tokens each image of an entry of `tokens` has."""
    if feature.family.per_image is None:
        return [tokens]
    one = feature.family.per_image(model)
    return [one] * (tokens // one) if tokens % one == 0 else [tokens]


def _select(
    feature: ReadFeature,
    outputs: Any,
    sizes: list[list[int]],
    text: ImageText,
    grids: list[Grid | None],
    frames: list[int],
) -> tuple[list[Selection], Any]:
    """What becomes of each image's tokens, and a copy of the library's outputs with the features that are left.

    Images of equally many tokens, on equal grids where these matter, are chosen from together; videos frame by frame.
    """
    config = feature.config
    attention: list[Tensor] | None = getattr(outputs, ATTENTION, None)
    if attention is None and needs_attention(config):
        raise StateError(
            "mm_encoder_outputs without the tower's attention: encode the images with this model's own "
            "get_image_features while it is accelerated, or let generate do it"
        )
    standing = standing_in(outputs, config)
    staying = None if standing is None else [alone(image) for image in standing]
    entries = getattr(outputs, feature.family.features)
    planes = [entries, *(getattr(outputs, "deepstack_features", None) or [])]
    features = [_by_image(plane, sizes) for plane in planes]
    semantic = None if attention is None else _by_image(attention, sizes)
    chosen: dict[int, Selection] = {}
    for (n, grid, over, _), group in _groups(sizes, grids, frames, staying).items():
        together = [torch.stack([images[i] for i in group]) for images in features]
        row = None if semantic is None else torch.stack([semantic[i] for i in group])
        among = None if staying is None else torch.stack([staying[i] for i in group])
        found = _choose(config, together[0].detach(), row, n, text.of_images(group), grid, over, among)
        if staying is not None and standing is not None:
            each = (selection.of_image(image) for selection in found for image in range(len(selection.kept)))
            found = [selection.of_all(staying[i], standing[i]) for i, selection in zip(group, each)]
        for images, stacked in zip(features, together):
            parts = torch.split(stacked, [len(each.kept) for each in found])
            for i, left in zip(group, (left for each, part in zip(found, parts) for left in each.take(part))):
                images[i] = left
        chosen |= dict(zip(group, (each.of_image(i) for each in found for i in range(len(each.kept)))))
    fewer = copy.copy(outputs)
    read, *planes = [[torch.cat([next(left) for _ in entry]) for entry in sizes] for left in map(iter, features)]
    setattr(fewer, feature.family.features, _as_tensor(read) if isinstance(entries, Tensor) else read)
    if planes:
        fewer.deepstack_features = planes
    return [chosen[i] for i in range(len(chosen))], fewer


def _as_tensor(entries: list[Tensor]) -> Tensor:
    """Entries `[tokens, width]` as one tensor `[entries, tokens, width]`; as a single one where they differ in tokens.

    A library that makes one tensor of them puts the tokens into the prompt one after another, whatever they are of.
    """
    if len({len(entry) for entry in entries}) == 1:
        return torch.stack(entries)
    return torch.cat(entries).unsqueeze(0)


def _choose(
    config: ReadConfig,
    features: Tensor,
    semantic: Tensor | None,
    n: int,
    text: ImageText,
    grid: Grid | None,
    frames: int,
    left: Tensor | None,
) -> list[Selection]:
    """What becomes of the tokens of a group's images, `[images, n, width]`: of all together, or one by one.

    Where some are left out already, of those at `left`, `[images, m]`.
    """
    among = n if left is None else left.shape[1]
    k = among
    if config.visual_keep is not None:
        k = min(kept_count(config.visual_keep, n, fewest=config.min_visual_tokens), among)
    if frames > 1 and k < among:
        rows = [None] * len(features) if semantic is None else torch.split(semantic, 1)
        videos = enumerate(zip(torch.split(features, 1), rows))
        return [
            select_frames(video, row, k, frames, config, text.of_images([i]), None if left is None else left[i])
            for i, (video, row) in videos
        ]
    if left is not None:
        features = features.gather(1, left.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        semantic = None if semantic is None else semantic.gather(1, left)
        grid = grid if among == n else None
    if config.visual_keep is None:
        return [keep_alone(torch.arange(among, device=features.device).expand(len(features), -1), among)]
    if config.visual_tolerance is not None:
        return select_within(features, semantic, min(config.min_visual_tokens, k), k, config, text)
    return [select(features, semantic, k, config, text=text, grid=grid)]


def _groups(
    sizes: list[list[int]], grids: list[Grid | None], frames: list[int], left: list[Tensor] | None
) -> dict[tuple[int, Grid | None, int, int], list[int]]:
    """Which images have so many tokens on that grid, so many frames, and so many left, of all entries in a row."""
    groups: dict[tuple[int, Grid | None, int, int], list[int]] = {}
    for i, n in enumerate(n for entry in sizes for n in entry):
        groups.setdefault((n, grids[i], frames[i], n if left is None else len(left[i])), []).append(i)
    return groups


def _by_image(entries: Any, sizes: list[list[int]]) -> list[Tensor]:
    """The features of each image, `[tokens, width]`, or A of its tokens, `[tokens]`, those of all entries in a row."""
    counts = [n for entry in sizes for n in entry]
    return list(torch.split(torch.cat([*entries]), counts))
