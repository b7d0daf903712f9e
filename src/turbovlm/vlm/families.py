"""Vision-language models, as data: where the tower is, whose attention says what matters, how patches become tokens.

A language model reads visual tokens in place of placeholders in its prompt, or by cross-attention. A new family is a
new `VlmFamily`.
"""

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


@dataclass(frozen=True)
class VlmFamily:
    """One family of vision-language models.

    Args:
        family: name for people.
        classes: dotted paths of the classes that put visual features in place of placeholders, or attend to them.
        tower: path of the vision encoder in such a class.
        guide: index of the tower's block whose attention is the semantic value: the last one that the features pass.
        cell: side of the square of patches that one visual token is made of.
        cross_attention: whether visual tokens are read by cross-attention, and no prompt has placeholders for them.
        cross_layers: path of the text model's layers that cross-attend to the image, for `cross_keep`; several
            spellings are separated by `|`.
        merges_inside: whether tokens can be merged in the tower as well, and restored for the projector.
        packed: whether the tower runs all images as one sequence, as Qwen's do.
        order: `(tower, grid)`: for such a tower, the place of each token among those the tower's blocks see, where
            it reorders them.
        rearrange: methods that rearrange features after the projector; they rearrange the attention too.
        per_image: tokens of one image, where the library joins those of one prompt.
        first_position: position of a prompt's first token.
    """

    kind: ClassVar[str] = "vlm"

    family: str
    classes: tuple[str, ...]
    tower: str
    guide: Callable[[Any], int] = lambda model: -1
    cell: Callable[[Any], int] = lambda model: 1
    cross_attention: bool = False
    cross_layers: str | None = None
    merges_inside: bool = False
    packed: bool = False
    order: Callable[[Any, Tensor], Tensor] | None = None
    rearrange: tuple[str, ...] = ()
    per_image: Callable[[Any], int] | None = None
    first_position: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> VlmFamily:
        return self

    def __reduce__(self) -> tuple[Callable[[str, str], VlmFamily], tuple[str, str]]:
        return named, (self.kind, self.classes[0])


def sum_cells(values: Tensor, side: int) -> Tensor:
    """The sum over squares of `side`×`side` patches of a square image: `[images, patches]` to `[images, tokens]`."""
    images, patches = values.shape
    length = math.isqrt(patches)
    squares = values.view(images, length // side, side, length // side, side)
    return squares.sum(dim=(2, 4)).flatten(1)


def states_read(model: Any, depth: int, layers: Any = None) -> list[int]:
    """Indices, from 0 on, of the tower's hidden states that a projector reads, the patch embeddings first.

    Args:
        depth: how many blocks the tower has.
        layers: `vision_feature_layer` of a call; that of the config if None.
    """
    found = model.config.vision_feature_layer if layers is None else layers
    return [layer if layer >= 0 else depth + 1 + layer for layer in ([found] if isinstance(found, int) else found)]


def _read_layer(model: Any, depth: int | None = None, layers: Any = None) -> int:
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
    return _read_layer(model, depth, layers) if family.guide is _read_layer else family.guide(model)


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """A tower's blocks: its longest list of modules of one class."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    return max(lists, key=len)


def native_pixels(family: VlmFamily, model: Any) -> int:
    """Side of the images, or tiles of them, that a family's tower is made for; 448 where images keep their own."""
    size = getattr(_tower_config(family, model), "image_size", None) or 448
    return int(size[0] if isinstance(size, list | tuple) else size)


def tokens_per_image(family: VlmFamily, model: Any, pixels: int) -> int:
    """Visual tokens of a square image, or tile of one, of `pixels` a side; `model` is the part that reads them."""
    if family.per_image is not None:
        return family.per_image(model)
    patch = _tower_config(family, model).patch_size
    side = int(patch[0] if isinstance(patch, list | tuple) else patch) * family.cell(model)
    return int((pixels // side) ** 2)


def _tower_config(family: VlmFamily, model: Any) -> Any:
    return fetch(model, family.tower).config


def several_layers(model: Any) -> bool:
    """Whether the projector reads the output of more than one block."""
    layers = getattr(model.config, "vision_feature_layer", -1)
    return not isinstance(layers, int) and len(layers) > 1


def _last_full_attention(model: Any) -> int:
    """The last block of Qwen2.5-VL with full attention; its last one, where all attend within windows."""
    depth = len(model.visual.blocks)
    return max((block for block in model.visual.fullatt_block_indexes if 0 <= block < depth), default=depth - 1)


def _windows(tower: Any, grid: Tensor) -> Tensor:
    """Where Qwen2.5-VL's tower has put each token for its windowed attention."""
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return torch.argsort(index)


def _merge_side(model: Any) -> int:
    return int(model.visual.spatial_merge_size)


def _shuffle(model: Any) -> int:
    return int(1 / model.config.downsample_ratio)


def _gemma_cell(model: Any) -> int:
    return int(model.multi_modal_projector.kernel_size)


LLAVA = VlmFamily(
    "LLaVA", (f"{MODELS}.llava.modeling_llava.LlavaModel",), "vision_tower", _read_layer, merges_inside=True
)
LLAVA_NEXT = VlmFamily(
    "LLaVA-NeXT",
    (f"{MODELS}.llava_next.modeling_llava_next.LlavaNextModel",),
    "vision_tower",
    _read_layer,
    merges_inside=True,
    rearrange=("pack_image_features",),
)
LLAVA_ONEVISION = VlmFamily(
    "LLaVA-OneVision",
    (f"{MODELS}.llava_onevision.modeling_llava_onevision.LlavaOnevisionModel",),
    "vision_tower",
    _read_layer,
    merges_inside=True,
    rearrange=("pack_image_features", "apply_pooling"),
)
QWEN2_VL = VlmFamily(
    "Qwen2-VL",
    (f"{MODELS}.qwen2_vl.modeling_qwen2_vl.Qwen2VLModel",),
    "visual",
    cell=_merge_side,
    packed=True,
    merges_inside=True,
)
QWEN2_5_VL = VlmFamily(
    "Qwen2.5-VL",
    (f"{MODELS}.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLModel",),
    "visual",
    _last_full_attention,
    _merge_side,
    packed=True,
    order=_windows,
    merges_inside=True,
)
QWEN3_VL = VlmFamily(
    "Qwen3-VL",
    (f"{MODELS}.qwen3_vl.modeling_qwen3_vl.Qwen3VLModel",),
    "visual",
    cell=_merge_side,
    packed=True,
    merges_inside=True,
)
INTERN_VL = VlmFamily(
    "InternVL",
    (f"{MODELS}.internvl.modeling_internvl.InternVLModel",),
    "vision_tower",
    _read_layer,
    cell=_shuffle,
    merges_inside=True,
)
IDEFICS3 = VlmFamily(
    "Idefics3",
    (f"{MODELS}.idefics3.modeling_idefics3.Idefics3Model",),
    "vision_model",
    cell=lambda model: int(model.config.scale_factor),
    per_image=lambda model: int(model.image_seq_len),
    merges_inside=True,
)
SMOL_VLM = VlmFamily(
    "SmolVLM",
    (f"{MODELS}.smolvlm.modeling_smolvlm.SmolVLMModel",),
    "vision_model",
    cell=lambda model: int(model.config.scale_factor),
    per_image=lambda model: int(model.image_seq_len),
    merges_inside=True,
)
PALI_GEMMA = VlmFamily(
    "PaliGemma",
    (f"{MODELS}.paligemma.modeling_paligemma.PaliGemmaModel",),
    "vision_tower",
    merges_inside=True,
    first_position=1,
)
GEMMA3 = VlmFamily(
    "Gemma 3",
    (f"{MODELS}.gemma3.modeling_gemma3.Gemma3Model",),
    "vision_tower",
    cell=_gemma_cell,
    merges_inside=True,
)
BLIP = VlmFamily(
    "BLIP",
    tuple(
        f"{MODELS}.blip.modeling_blip.BlipFor{task}"
        for task in ("ConditionalGeneration", "QuestionAnswering", "ImageTextRetrieval")
    ),
    "vision_model",
    cross_attention=True,
    cross_layers="text_encoder.encoder.layer|text_decoder.bert.encoder.layer",
)
BLIP_2 = VlmFamily(
    "BLIP-2",
    tuple(
        f"{MODELS}.blip_2.modeling_blip_2.Blip2{name}"
        for name in ("Model", "ForConditionalGeneration", "ForImageTextRetrieval")
    ),
    "vision_model",
    cross_attention=True,
)
INSTRUCT_BLIP = VlmFamily(
    "InstructBLIP",
    tuple(
        f"{MODELS}.instructblip.modeling_instructblip.InstructBlip{name}"
        for name in ("Model", "ForConditionalGeneration")
    ),
    "vision_model",
    cross_attention=True,
)
VISION_ENCODER_DECODER = VlmFamily(
    "VisionEncoderDecoderModel",
    (f"{MODELS}.vision_encoder_decoder.modeling_vision_encoder_decoder.VisionEncoderDecoderModel",),
    "encoder",
    cross_attention=True,
)

FAMILIES = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    INTERN_VL,
    IDEFICS3,
    SMOL_VLM,
    PALI_GEMMA,
    GEMMA3,
    BLIP,
    BLIP_2,
    INSTRUCT_BLIP,
    VISION_ENCODER_DECODER,
)
