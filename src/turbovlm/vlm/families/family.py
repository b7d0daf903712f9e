"""What an entry says of a family of vision-language models, and what can be told of a model by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.layout import fetch
from turbovlm.errors import UnsupportedModelError
from turbovlm.registry import named

MODELS = "transformers.models"
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The argument that carries the pixels of each modality."""
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""Types of layers that read a prompt as a sequence: they can leave out padding in front of it, and no other column."""


def library(module: str, *names: str) -> tuple[str, ...]:
    """Dotted paths of classes of `transformers`, of one of its models."""
    return tuple(f"{MODELS}.{module}.modeling_{module}.{name}" for name in names)


@dataclass(frozen=True)
class Packed:
    """How a block of a tower is spelled that runs all images as one sequence, with rotary positions.

    Args:
        norm: path of the norm in front of attention.
        attention: path of the attention module, with `scaling`.
        project: its projections: one to queries, keys and values, or those to queries and to keys.
        norms: its norms of queries and of keys, where it has some.
        arguments: names of what the block is called with behind its hidden states, by position.
        rotate: the function of the block's module that rotates both, given the cosines and sines.
    """

    norm: str = "norm1"
    attention: str = "attn"
    project: tuple[str, ...] = ("qkv",)
    norms: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ("cu_seqlens", "position_embeddings")
    rotate: str = "apply_rotary_pos_emb_vision"

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all modules that it names, from the block."""
        return (self.norm, self.attention, *(f"{self.attention}.{name}" for name in (*self.project, *self.norms)))


@dataclass(frozen=True)
class VlmFamily:
    """One family of vision-language models.

    Args:
        family: name for people.
        classes: dotted paths of the classes that put visual features in place of placeholders, or attend to them.
        tower: path of the vision encoder in such a class.
        guide: index of the tower's block whose attention is the semantic value: the last one that the features pass.
            None where no row of attention says what is paid to each visual token: tokens are chosen without A there.
        cell: side of the square of patches that one visual token is made of.
        cross_attention: whether visual tokens are read by cross-attention, and no prompt has placeholders for them.
        cross_attends: path of the text model, or what else has queries of its own, whose cross-attention to the
            tower's tokens counts merged ones by size; several spellings are separated by `|`.
        between: paths of modules that each token goes through on its way there, where the model has them.
        cross_layers: path of the text model's layers that cross-attend to the image, for `cross_keep`, in the same way.
        merges_inside: whether tokens can be merged in the tower as well, and restored for the projector.
        packed: how a block of the tower is spelled, where that runs all images as one sequence, as Qwen's do.
        order: `(tower, grid)`: for such a tower, the place of each token among those the tower's blocks see, where
            it reorders them.
        per_token: `(model, row, arguments)`: A of every visual token, from that of the tower's tokens as its blocks see
            them, `[images, tokens]` or `[tokens]`, and what the images were encoded with; where `cell`, of squares of
            patches of square images, does not say it.
        rearrange: methods that rearrange features after the projector; they rearrange the attention too.
        per_image: tokens of one image, where the library joins those of one prompt.
        first_position: position of a prompt's first token.
        features: what has the features of the visual tokens, of what `get_image_features` returns.
        video_token: the config's attribute with the placeholder of videos, which may be that of images.
        frames: how a video's frames come: `"video"`, one after another in the tokens of one video, each as many, and
            at most one token behind all; `"images"`, as images of the prompt. None where they are not known.
    """

    kind: ClassVar[str] = "vlm"

    family: str
    classes: tuple[str, ...]
    tower: str
    guide: Callable[[Any], int] | None = lambda model: -1
    cell: Callable[[Any], int] = lambda model: 1
    cross_attention: bool = False
    cross_attends: str | None = None
    between: tuple[str, ...] = ()
    cross_layers: str | None = None
    merges_inside: bool = False
    packed: Packed | None = None
    order: Callable[[Any, Tensor], Tensor] | None = None
    per_token: Callable[[Any, Tensor, dict[str, Any]], Tensor] | None = None
    rearrange: tuple[str, ...] = ()
    per_image: Callable[[Any], int] | None = None
    first_position: int = 0
    features: str = "pooler_output"
    video_token: str = "video_token_id"
    frames: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> VlmFamily:
        return self

    def __reduce__(self) -> tuple[Callable[[str, str], VlmFamily], tuple[str, str]]:
        return named, (self.kind, self.classes[0])


def placeholder_of(family: VlmFamily, model: Any, modality: str) -> int | None:
    """The token that a prompt has where features of `"image"`s or `"video"`s are to stand; None where it has none."""
    token: int | None = getattr(model.config, placeholder_name(family, modality), None)
    return token


def placeholder_name(family: VlmFamily, modality: str) -> str:
    """The config's attribute with the placeholder of a modality."""
    return family.video_token if modality == "video" else f"{modality}_token_id"


def sum_cells(values: Tensor, side: int) -> Tensor:
    """The sum over squares of `side`×`side` patches of a square image: `[images, patches]` to `[images, tokens]`."""
    images, patches = values.shape
    length = math.isqrt(patches)
    squares = values.view(images, length // side, side, length // side, side)
    return squares.sum(dim=(2, 4)).flatten(1)


def sum_grids(values: Tensor, grids: list[tuple[int, int]], side: int) -> Tensor:
    """The sum over squares of `side`×`side` patches, where images of a sequence have grids of their own.

    Args:
        values: of the patches, row after row, image after image, `[patches]`.
        grids: rows and columns of each image; what is over behind whole squares is left out.
        side: of the squares.
    """
    found = []
    for image, (rows, columns) in zip(torch.split(values, [rows * columns for rows, columns in grids]), grids):
        squares = image.view(rows, columns)[: rows // side * side, : columns // side * side]
        found.append(squares.reshape(rows // side, side, columns // side, side).sum(dim=(1, 3)).flatten())
    return torch.cat(found)


def states_read(model: Any, depth: int, layers: Any = None) -> list[int]:
    """Indices, from 0 on, of the tower's hidden states that a projector reads, the patch embeddings first.

    Args:
        depth: how many blocks the tower has.
        layers: `vision_feature_layer` of a call; that of the config if None.
    """
    found = model.config.vision_feature_layer if layers is None else layers
    return [layer if layer >= 0 else depth + 1 + layer for layer in ([found] if isinstance(found, int) else found)]


def read_layer(model: Any, depth: int | None = None, layers: Any = None) -> int:
    """The block, counted from the end, whose output the projector reads; the last of them, where it reads several.

    Raises:
        UnsupportedModelError: it reads the patch embeddings, which no block has seen, or blocks that are not there.
    """
    depth = len(blocks_of(model.vision_tower)) if depth is None else depth
    last = max(states_read(model, depth, layers))
    if not 0 < last <= depth:
        found = model.config.vision_feature_layer if layers is None else layers
        raise UnsupportedModelError(
            f"vision_feature_layer={found}: the output of a block is read by {type(model).__name__} where turbovlm "
            f"shortens anything: an index from 1 to {depth}, or from -{depth} to -1"
        )
    return last - depth - 1


def block_read(family: VlmFamily, model: Any, depth: int, layers: Any = None) -> int:
    """The guide's index, as the config, or `vision_feature_layer` of a call, has it now, of `depth` blocks."""
    assert family.guide is not None
    return read_layer(model, depth, layers) if family.guide is read_layer else family.guide(model)


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """A tower's blocks: its longest list of modules of one class."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    return max(lists, key=len)


def native_pixels(family: VlmFamily, model: Any) -> int:
    """Side of the images, or tiles of them, that a family's tower is made for; 448 where images keep their own."""
    size = getattr(_tower_config(family, model), "image_size", None) or 448
    return int(size[0] if isinstance(size, list | tuple) else size)


def tokens_per_image(family: VlmFamily, model: Any, pixels: int) -> int | None:
    """Visual tokens of a square image, or tile of one, of `pixels` a side; `model` is the part that reads them.

    None where they are not made of the tower's patches, and the config does not tell how many there are.
    """
    if family.per_image is not None:
        return family.per_image(model)
    if family.guide is None:
        return None
    patch = _tower_config(family, model).patch_size
    side = int(patch[0] if isinstance(patch, list | tuple) else patch) * family.cell(model)
    return int((pixels // side) ** 2)


def _tower_config(family: VlmFamily, model: Any) -> Any:
    return getattr(fetch(model, family.tower), "config", model.config)


def is_recurrent(model: Any) -> bool:
    """Whether some of the language model's layers read a prompt as a sequence."""
    return not RECURRENT.isdisjoint(getattr(model.config.get_text_config(), "layer_types", None) or ())


def several_layers(model: Any) -> bool:
    """Whether the projector reads the output of more than one block."""
    layers = getattr(model.config, "vision_feature_layer", -1)
    return not isinstance(layers, int) and len(layers) > 1
