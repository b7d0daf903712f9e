"""Image tokens reduced between the cross-attention layers of a text model: the text's attention says what matters.

The first third of the layers reads all of them, the last third as few as asked for, the layers between half way. A is
the attention that a layer's words have just paid, R is the image tokens'; what is chosen so depends on the text. The
tokens left travel on the words' hidden states from layer to layer; in generation the cache holds each layer's keys and
values, and the sizes of their tokens.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import ReadConfig
from turbovlm.encoder.cross_attention import (
    CrossAttention,
    Merged,
    attach,
    check_whole,
    find_cross_attention,
    merged_into,
)
from turbovlm.encoder.layout import Layout, fetch, library_version, path_of
from turbovlm.encoder.refusals import reads
from turbovlm.encoder.towers import layout_of
from turbovlm.errors import StateError, UnsupportedModelError
from turbovlm.ops.tracing import is_readable
from turbovlm.patching import Patch
from turbovlm.registry import families, family_of
from turbovlm.threads import Remembering
from turbovlm.vlm.families import blocks_of
from turbovlm.vlm.marks import IMAGE, IMAGE_SIZES
from turbovlm.vlm.select import kept_count, select
from turbovlm.vlm.selection import Selection
from turbovlm.vlm.tower import sizes_left

STAGES = 3
"""Groups of layers that read equally many tokens."""


@dataclass(eq=False)
class CrossFeature(Remembering[tuple[Selection, ...]]):
    """How one text model's image tokens become fewer from layer to layer (`cross_keep`).

    Attributes:
        config: the settings.
        family: name of the model's family.
        layers: path of the text model's layers.
        depth: how many there are.
        prefix: image tokens in front that always stay: CLS.
        cross_attention: what the layers cross-attend by, and how many tokens an image of native size has.
        sized: whether tokens are merged before the first layer.
        removed, last: as in `turbovlm.patching.Feature`; `last` is a `Selection` for each time that tokens were left
            out in this thread's last forward.
    """

    setting: ClassVar[str] = "cross_keep"

    config: ReadConfig
    family: str
    layers: str
    depth: int
    prefix: int = 1
    cross_attention: CrossAttention | None = None
    sized: bool = False
    removed: bool = False

    def patches(self, model: nn.Module) -> list[Patch]:
        """The forward of every layer, and of its cross-attention."""
        layers: Any = model.get_submodule(self.layers)
        return [
            patch
            for index, layer in enumerate(layers)
            for patch in (
                Patch(layer, "forward", layer_forward, self, index, by_name=True),
                Patch(layer.crossattention.self, "forward", cross_forward, self, index, by_name=True),
            )
        ]

    def describe(self) -> list[str]:
        """What the text model's layers attend to."""
        keep = self.config.cross_keep
        amount = f"{keep} image tokens" if isinstance(keep, int) else f"{keep:.0%} of the image tokens"
        return [
            f"  {self.layers} ({self.family}): {self.depth} layers, the last third of which cross-attends to {amount}, "
            f"guided by the words ({self.config.reduce})"
        ]

    def tokens_read(self, layer: int, patches: int) -> int:
        """How many of an image's `patches` that layer reads."""
        assert self.config.cross_keep is not None
        patches = operator.index(patches)  # a tensor where torch.jit traces
        fewest = kept_count(self.config.cross_keep, patches, "cross_keep")
        stages = min(STAGES, self.depth)
        return patches - round((patches - fewest) * (layer * stages // self.depth) / (stages - 1))


@dataclass(frozen=True)
class Image:
    """What a layer reads.

    Attributes:
        tokens: `[batch, M, width]`.
        sizes: how many of the image's tokens each stands for, `[batch, M]`.
        words: which of the words are no padding, `[batch or 1, words]`, bool; None for all.
        native: image tokens at first.
        merged: whether some of them stood for several before the first layer.
        selections: what was left from stage to stage.
    """

    tokens: Tensor
    sizes: Tensor
    words: Tensor | None
    native: int
    merged: bool
    selections: tuple[Selection, ...] = ()


def layer_forward(patch: Patch, layer: nn.Module, original: Any, /, **inputs: Any) -> Tensor:
    """Run one text layer on the image that the layer before has left, and leave the next one its own."""
    whole = inputs.get("encoder_hidden_states")
    if whole is None:
        return original(**inputs)  # type: ignore[no-any-return]
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        raise StateError(
            "cross_keep with gradient checkpointing: what the layers read comes with the words' hidden states, which a "
            "checkpoint does not hand on: model.gradient_checkpointing_disable(), or handle.remove()"
        )
    image: Image | None = getattr(inputs["hidden_states"], IMAGE, None)
    feature: CrossFeature = patch.feature  # type: ignore[assignment]
    if patch.detail == 0:
        image = _whole(feature, whole, inputs.get("attention_mask"), inputs.get("encoder_attention_mask"))
    if image is None:
        raise StateError(
            f"{feature.layers}.{patch.detail} got words without the image tokens that the layer before has left: "
            "something between the two layers replaces the hidden states; handle.remove() gives the model back"
        )
    tokens = image.tokens.view_as(image.tokens)
    setattr(tokens, IMAGE, image)
    out: Tensor = original(**{**inputs, "encoder_hidden_states": tokens, "encoder_attention_mask": None})
    setattr(out, IMAGE, getattr(tokens, IMAGE))
    return out


def cross_forward(patch: Patch, attention: nn.Module, original: Any, /, **inputs: Any) -> tuple[Tensor, ...]:
    """Run a layer's cross-attention in proportion to sizes, and choose what the next layer reads."""
    feature: CrossFeature = patch.feature  # type: ignore[assignment]
    index = patch.detail
    tokens, cache = inputs["encoder_hidden_states"], inputs.get("past_key_values")
    image: Image = getattr(tokens, IMAGE)
    held: dict[int, Tensor] = {} if cache is None else cache.__dict__.setdefault(IMAGE_SIZES, {})
    cached = cache is not None and bool(cache.is_updated.get(index))
    sizes = held[index] if cached else image.sizes
    counts = index > 0 or image.merged
    attach(tokens, Merged.of(sizes if counts else None, None, feature.config.proportional))
    outputs: tuple[Tensor, ...] = original(**inputs)
    if cached:
        return outputs
    held[index] = sizes
    if index + 1 < feature.depth:
        setattr(tokens, IMAGE, _left(feature, index, image, outputs[1]))
    else:
        feature.last = image.selections
    return outputs


def _whole(feature: CrossFeature, tokens: Tensor, text_mask: Tensor | None, image_mask: Tensor | None) -> Image:
    """The image as the first layer reads it."""
    if image_mask is not None and is_readable(image_mask):
        seen = image_mask if image_mask.dtype == torch.bool else image_mask > -1
        if not bool(seen.all()):
            raise StateError("encoder_attention_mask: with cross_keep every image token has to be attended to")
    before = merged_into(tokens)
    if before is None and feature.sized and feature.cross_attention is not None:
        check_whole(tokens, feature.cross_attention.attentions[0], feature.config.proportional)
    sizes = None if before is None else before.sizes
    merged = sizes is not None
    if sizes is None:
        sizes = tokens.new_ones(tokens.shape[:2], dtype=torch.promote_types(tokens.dtype, torch.float32))
    words = None
    if text_mask is not None:  # the last word sees every word
        last = text_mask[:, 0, -1]
        words = last if last.dtype == torch.bool else last > -1
    return Image(tokens, sizes, words, tokens.shape[1], merged)


def _left(feature: CrossFeature, index: int, image: Image, attention: Tensor) -> Image:
    """What the next layer reads, where this one has paid `attention`, `[batch, heads, words, M]`."""
    front, patches = image.tokens[:, : feature.prefix], image.tokens[:, feature.prefix :]
    sizes = image.sizes[:, feature.prefix :]
    k = feature.tokens_read(index + 1, image.native - feature.prefix)
    if k == patches.shape[1]:
        return image
    semantic = _row(attention.detach(), image.words)[:, feature.prefix :]
    selection = select(patches.detach(), semantic, k, feature.config, sizes)
    left = sizes_left(selection, sizes)
    return replace(
        image,
        tokens=torch.cat([front, selection.take(patches)], dim=1),
        sizes=torch.cat([image.sizes[:, : feature.prefix], left], dim=1),
        selections=(*image.selections, selection),
    )


def _row(attention: Tensor, words: Tensor | None) -> Tensor:
    """A: the mean over heads and words, `[batch, M]`, sums to 1."""
    rows = attention.mean(dim=1, dtype=torch.float32)
    if words is None:
        return rows.mean(dim=1)
    weights = words.to(rows).expand(rows.shape[:2])
    return torch.einsum("bwm,bw->bm", rows, weights / weights.sum(dim=1, keepdim=True))


def cross_attention_to(model: nn.Module, tower: nn.Module, layout: Layout) -> CrossAttention | None:
    """What cross-attends to a tower's tokens, or None; `layout` is that of its blocks."""
    modules = dict(model.named_modules())
    path = next(path for path, module in modules.items() if module is tower)
    native = layout.of_tower("prefix", tower) + layout.patches(tower) + layout.of_tower("suffix", tower)
    return find_cross_attention(path, modules, native)


def find_cross(model: nn.Module, config: ReadConfig, sized: bool = False) -> CrossFeature:
    """How `model`'s text layers will read an image.

    Args:
        sized: whether its tokens are merged before the first layer.

    Raises:
        UnsupportedModelError: no text model in it that turbovlm knows reads an image by cross-attention, or its
            library keeps the attention to itself.
    """
    amount = f"cross_keep={config.cross_keep}"
    for name, part in model.named_modules():
        family = family_of("vlm", part)
        if family is None or not family.cross_layers:
            continue
        path = path_of(family.family, part, family.cross_layers)
        layers, place = fetch(part, path), f"{name}.{path}".lstrip(".")
        if len(layers) < 2:
            raise UnsupportedModelError(f"{amount}: {place} has one layer, and cross_keep needs one behind it")
        taken = inspect.signature(type(layers[0].crossattention.self).forward).parameters
        if not {"encoder_hidden_states", "encoder_attention_mask", "past_key_values"} <= set(taken):
            raise UnsupportedModelError(
                f"{amount}: the cross-attention of {family.family} in {library_version(type(part))} takes "
                f"{', '.join(taken)}, which turbovlm does not know"
            )
        tower = fetch(part, family.tower)
        layout = layout_of(blocks_of(tower)[-1])
        across = None if layout is None else cross_attention_to(model, tower, layout)
        return CrossFeature(config, family.family, place, len(layers), cross_attention=across, sized=sized)
    known = ", ".join(family.family for family in families("vlm") if family.cross_layers)
    other = "; visual_keep shortens what its language model reads" if reads(model, "visual_keep") else ""
    raise UnsupportedModelError(
        f"{amount}: {type(model).__name__} has no text model that reads an image by cross-attention, as far as "
        f"turbovlm knows; supported: {known}{other}"
    )
