"""Subclasses of vLLM's models that hand on fewer tokens of each image, at the positions of the full prompt.

Without settings they do what their bases do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration as InternVL
from vllm.model_executor.models.llava import LlavaForConditionalGeneration as Llava
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration as LlavaOnevision
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Qwen2_5_VL
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Qwen3VL
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from turbovlm.apply import Handle, apply
from turbovlm.config import ReadConfig, TurboConfig
from turbovlm.encoder.feature import EncoderFeature
from turbovlm.encoder.layout import fetch
from turbovlm.engines.vllm.encoders import LAYOUTS
from turbovlm.engines.vllm.families import ServedFamily, served
from turbovlm.engines.vllm.positions import PLANES, ImagePlace, resolve, split_offsets, unresolved, with_offsets
from turbovlm.engines.vllm.processing import IMAGE, TOKENS, register_fewer
from turbovlm.engines.vllm.settings import settings_of
from turbovlm.engines.vllm.tower import GuideRows, rows_of_attention, rows_of_merged
from turbovlm.registry import register
from turbovlm.vlm.select import kept_count, needs_attention, select

register(*LAYOUTS)


class FewerTokens:
    """Mixed into a model of vLLM's, in front of it.

    An image's features come from the model's own `embed_multimodal`; here they are selected from, and each token that
    is left carries its place within the image until `embed_input_ids`, which runs before each forward and leaves it for
    `forward`, where positions are known.
    """

    encoder: TurboConfig | None = None
    reading: ReadConfig | None = None
    family: ServedFamily
    width: int
    offsets: Tensor
    rows: GuideRows | None = None
    merging: Handle | None = None
    supports_mrope = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        found = settings_of(vllm_config.model_config.hf_config)
        family = served(vllm_config.model_config.architecture)
        if found is not None and family is not None:
            self.encoder, self.reading, self.family = found[0].encoder, found[0].reading, family
        if self.reading is not None:
            self.width = vllm_config.model_config.hf_text_config.hidden_size
            if self.encoder is None and needs_attention(self.reading):
                self.rows = rows_of_attention(self.family, self)
            # graphs that were captured read it where it is
            self.offsets = torch.zeros(PLANES, vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int64)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The features of each image's tokens that are left, `[k, width + DIGITS]`; the library's if all are read."""
        if self.encoder is not None and self.merging is None:
            self._merge_inside(self.encoder)
        counts = kwargs.pop(TOKENS, None)
        if self.reading is None or counts is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        shapes = None if self.family.shape is None else kwargs[self.family.shape]
        if self.rows is not None:
            self.rows.start(shapes if self.family.packed else None)
        encoded = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        each = [None] * len(encoded) if shapes is None else [*shapes]
        tiles = [1] * len(encoded) if self.family.tiles is None else self.family.tiles(kwargs)
        rows = [None] * len(encoded) if self.rows is None else self.rows.of_images(tiles)
        return tuple(self._fewer(*image) for image in zip(encoded, each, rows, tiles))

    def _merge_inside(self, encoder: TurboConfig) -> None:
        """Have the tower merge. Called at the first image: by then its weights are there, on which it is tried.

        Raises:
            UnsupportedModelError: its blocks compute something else than their layout says.
        """
        assert self.family.merges is not None
        tower = fetch(self, self.family.merges)
        self.merging = apply(tower, encoder)
        (feature,) = self.merging.features
        assert isinstance(feature, EncoderFeature)
        init_logger("vllm.plugins.turbovlm").info("turbovlm: %s", feature.describe()[0].strip())
        if self.reading is not None and needs_attention(self.reading):
            self.rows = rows_of_merged(tower, feature, self.reading)

    @torch.no_grad()
    def _fewer(self, features: Tensor, shape: Tensor | None, rows: list[Tensor] | None, tiles: int) -> Tensor:
        reading = self.reading
        assert reading is not None and reading.visual_keep is not None
        parts = tiles if self.family.apart else 1
        n = len(features) // parts
        k = kept_count(reading.visual_keep, n, fewest=reading.min_visual_tokens)
        semantic = None if rows is None else self.family.per_token(self, rows, len(features), shape).view(parts, n)
        each = features.view(parts, n, -1)
        selection = select(each[..., : self.width], semantic, k, reading)
        first = torch.arange(parts, device=features.device).unsqueeze(1) * n
        offsets = self._offsets(len(features), shape).to(features.device)[:, (first + selection.kept).flatten()]
        return with_offsets(selection.take(each).flatten(0, 1), offsets)

    def _offsets(self, n: int, shape: Tensor | None) -> Tensor:
        """The positions of an image's n tokens in front of a prompt, `[3, n]`."""
        if not self.family.packed or shape is None:
            return torch.arange(n).expand(PLANES, n)
        elem = MultiModalFieldElem(data=shape.cpu(), field=MultiModalBatchedField(keep_on_cpu=True))
        item = MultiModalKwargsItem({self.family.shape: elem})
        alone = MultiModalFeatureSpec(item, IMAGE, "", PlaceholderRange(0, n))
        token = self.config.image_token_id  # type: ignore[attr-defined]
        positions: Tensor = super().get_mrope_input_positions([token] * n, [alone])[0]  # type: ignore[misc]
        return positions.long()

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """The library's, and the offsets of the tokens of images for the forward that follows."""
        if self.reading is not None:
            self.offsets.zero_()
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                assert is_multimodal is not None
                parts = [split_offsets(features) for features in multimodal_embeddings]
                multimodal_embeddings = [features for features, _ in parts]
                columns = is_multimodal.nonzero().flatten().to(self.offsets.device)
                self.offsets[:, columns] = torch.cat([offsets for _, offsets in parts], dim=1)
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt, `[3, columns]`, those of placeholders open, and what is added behind it."""
        if self.reading is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc,no-any-return]
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        images = [_place(feature) for feature in features]
        dropped = sum(image.tokens - image.kept for image in images)
        columns = len(input_tokens) + dropped
        full, delta = torch.arange(columns).expand(PLANES, columns), 0
        if self.family.packed:
            tokens, shifted = _full_prompt(input_tokens, features, images)
            full, delta = super().get_mrope_input_positions(tokens, shifted)  # type: ignore[misc]
        return unresolved(full, len(input_tokens), images), delta + dropped

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The library's, at the positions of the full prompt."""
        if self.reading is not None:
            resolve(positions, self.offsets[:, : positions.shape[1]])
            if not self.family.packed:
                positions = positions[0]
        return super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds, **kwargs
        )


def _place(feature: Any) -> ImagePlace:
    """Where an image stands, by what its processor said."""
    place = feature.mm_position
    first, kept = 0, place.length
    if place.is_embed is not None:
        first, kept = int(place.is_embed.nonzero()[0]), int(place.is_embed.sum())
    return ImagePlace(place.offset + first, kept, int(feature.data[TOKENS].data))


def _full_prompt(tokens: list[int], features: list[Any], images: list[ImagePlace]) -> tuple[list[int], list[Any]]:
    """The prompt with all placeholders, and where its images stand there."""
    found: list[int] = []
    shifted, done, added = [], 0, 0
    for feature, image in zip(features, images):
        behind, more = image.first + image.kept, image.tokens - image.kept
        found += [*tokens[done:behind], *([tokens[image.first]] * more)]
        place = PlaceholderRange(feature.mm_position.offset + added, feature.mm_position.length + more)
        shifted.append(replace(feature, mm_position=place))
        done, added = behind, added + more
    return [*found, *tokens[done:]], shifted


@register_fewer
class LlavaForConditionalGeneration(FewerTokens, Llava):  # type: ignore[misc]
    pass


@register_fewer
class Qwen2_5_VLForConditionalGeneration(FewerTokens, Qwen2_5_VL):  # type: ignore[misc]
    pass


@register_fewer
class LlavaOnevisionForConditionalGeneration(FewerTokens, LlavaOnevision):  # type: ignore[misc]
    pass


@register_fewer
class Qwen3VLForConditionalGeneration(FewerTokens, Qwen3VL):  # type: ignore[misc]
    pass


@register_fewer
class InternVLForConditionalGeneration(FewerTokens, InternVL):  # type: ignore[misc]
    pass
