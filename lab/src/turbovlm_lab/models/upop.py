"""BLIP from its authors' files, pruned by UPop or whole, in the classes of `transformers`. (Shi et al., ICML 2023.)

UPop takes the same columns out of every head of an attention, and hidden units out of every MLP: each layer has as many
heads as before, and its own width. What else a checkpoint says of its model is read off its shapes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
)
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.models.blip_nlvr2 import RENAMES, VISION_RENAMES, BlipForNLVR2
from turbovlm_lab.models.checkpoint import load_checkpoint, read_checkpoint, rename

PARTS = {
    "retrieval": ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head"),
    "captioning": ("visual_encoder", "text_decoder"),
    "vqa": ("visual_encoder", "text_encoder", "text_decoder"),
    "nlvr2": ("visual_encoder", "text_encoder", "cls_head"),
}
"""What each task's model is made of, as the authors name it. Momentum encoders and queues are left out."""
UNUSED = r"(?!.*position_ids)(?!visual_encoder\.head\.)"
"""Their buffers, and the tower's unused classifier, are left out too."""
NARROWED = (
    (r"(.*\.self_attn)\.qkv", r"\1.projection"),
    (r"(.*\.mlp)\.fc1", r"\1.fc2"),
    (r"(.*attention)\.self\.(query|key|value)", r"\1.output.dense"),
    (r"(.*crossattention)\.self([01])\.(query|key|value)", r"\1.output.dense\2"),
    (r"(.*)\.intermediate\.dense", r"\1.output.dense"),
)
"""The layers that pruning leaves with fewer outputs, and those which read them."""


def load_upop(path: str | Path, task: str | None = None, head_dim: int = 64) -> Any:
    """The model of a checkpoint of UPop's, or of BLIP's authors, with its weights, in eval mode.

    Args:
        path: such as `model_base_retrieval_coco_2x_compressed.pth`, or `model_base_retrieval_coco.pth`.
        task: `"retrieval"` gives a `BlipForImageTextRetrieval`, `"captioning"` a `BlipForConditionalGeneration`,
            `"vqa"` a `BlipForQuestionAnswering`, and `"nlvr2"` turbovlm's `BlipForNLVR2`; None goes by what the
            checkpoint has.
        head_dim: of BLIP before it was pruned: how many heads there are, and the scale of the image encoder's
            attention, do not show in a checkpoint.

    Raises:
        ConfigError: a task that is unknown, or that the checkpoint has no parts for; a `head_dim` that does not divide
            the width.
        TurboError: there is no such file; it is none of BLIP's; tensors are missing, or do not fit together.
    """
    stored = read_checkpoint(path, UNUSED + ".*")
    task = _task(stored, task, path)
    stored = {name: tensor for name, tensor in stored.items() if name.partition(".")[0] in PARTS[task]}
    model = _model(stored, task, head_dim)
    found = rename(stored, RENAMES if task == "nlvr2" else VISION_RENAMES)
    _narrow(model, found)
    load_checkpoint(model, found, ())
    return model.eval()


class BlipHeads(BlipAttention):  # type: ignore[misc]
    """BLIP's image attention with heads of any width, which keep the scale that they had when they were whole.

    Args:
        config: of the image encoder, before it was pruned.
        width: heads × head_dim.
    """

    def __init__(self, config: Any, width: int) -> None:
        super().__init__(config)
        self.head_dim = width // self.num_heads
        self.qkv = nn.Linear(self.embed_dim, 3 * width)
        self.projection = nn.Linear(width, self.embed_dim)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attention's output, `[batch, tokens, width of a token]`, and its maps where `output_attentions` asks."""
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if kwargs.get("output_attentions") or self.config.output_attentions:
            maps = self.dropout((q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1))
            mixed = maps @ v
        else:
            maps, dropout = None, self.dropout.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.projection(mixed.transpose(1, 2).flatten(2)), maps


def _task(stored: dict[str, Tensor], task: str | None, path: str | Path) -> str:
    if task is not None and task not in PARTS:
        raise ConfigError(f"task={task!r}: one of {', '.join(map(repr, PARTS))} expected, or None")
    parts = {name.partition(".")[0] for name in stored}
    fitting = [known for known, wanted in PARTS.items() if parts.issuperset(wanted)]
    if not fitting:
        known = "; ".join(f"{task}: {', '.join(wanted)}" for task, wanted in PARTS.items())
        raise TurboError(f"{path}: no model of BLIP's ({known}); found: {', '.join(sorted(parts)) or 'nothing'}")
    if task is None:
        return max(fitting, key=lambda known: len(PARTS[known]))
    if task not in fitting:
        missing = [part for part in PARTS[task] if part not in parts]
        raise ConfigError(f"task={task!r}: {path} has no {', '.join(missing)}; it has a model for {', '.join(fitting)}")
    return task


def _model(stored: dict[str, Tensor], task: str, head_dim: int) -> Any:
    """The task's model as it was before it was pruned, with random weights."""
    width, _, _, patch = _shape(stored, "visual_encoder.patch_embed.proj.weight", 4)
    side = math.isqrt(_shape(stored, "visual_encoder.pos_embed", 3)[1] - 1)
    vision = _sizes(stored, width, head_dim, "visual_encoder.blocks") | {
        "image_size": patch * side,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        "initializer_range": 0.02,
    }
    text_model = "text_encoder" if "text_encoder" in PARTS[task] else "text_decoder.bert"
    words, width = _shape(stored, f"{text_model}.embeddings.word_embeddings.weight", 2)
    text = _sizes(stored, width, head_dim, f"{text_model}.encoder.layer") | {
        "vocab_size": words,
        "max_position_embeddings": _shape(stored, f"{text_model}.embeddings.position_embeddings.weight", 2)[0],
        "bos_token_id": words - 2,
    }
    if task == "nlvr2":
        return BlipForNLVR2(BlipVisionConfig(**vision), BertConfig(**text), encode_token=words - 1)
    joint = {"image_text_hidden_size": _shape(stored, "vision_proj.weight", 2)[0]} if task == "retrieval" else {}
    config = BlipConfig(vision_config=vision, text_config=text, **joint)
    if task == "retrieval":
        return BlipForImageTextRetrieval(config)
    if task == "captioning":
        return BlipForConditionalGeneration(config)
    model = BlipForQuestionAnswering(config)
    if width != vision["hidden_size"]:  # the decoder reads the question, in which the encoder has put the image
        model.text_decoder = BlipTextLMHeadModel(BlipTextConfig(**text, encoder_hidden_size=width))
    return model


def _sizes(stored: dict[str, Tensor], width: int, head_dim: int, layers: str) -> dict[str, int]:
    if head_dim < 1 or width % head_dim:
        raise ConfigError(f"head_dim={head_dim}: {layers} have {width} features, which are no multiple of it")
    found = [re.match(rf"{re.escape(layers)}\.(\d+)\.", name) for name in stored]
    depth = 1 + max((int(match[1]) for match in found if match), default=-1)
    if depth == 0:
        raise TurboError(f"the checkpoint has no {layers}.0")
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // head_dim,
    }


def _shape(stored: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in stored:
        raise TurboError(f"the checkpoint has no {name}")
    shape = tuple(stored[name].shape)
    if len(shape) != dimensions:
        raise TurboError(f"{name}: {dimensions} dimensions expected, shape {shape} found")
    return shape


def _narrow(model: Any, found: dict[str, Tensor]) -> None:
    """Give every layer the width that it has in `found`, and every attention the size of its heads."""
    for name, layer in list(model.named_modules()):
        reader = next((match.expand(to) for of, to in NARROWED if (match := re.fullmatch(of, name))), None)
        if reader is None or not {f"{name}.weight", f"{reader}.weight"} <= set(found):
            continue  # what is missing is named when the weights are loaded
        given, width = _shape(found, f"{name}.weight", 2)[0], _shape(found, f"{reader}.weight", 2)[1]
        path = name.rpartition(".")[0]
        owner = model.get_submodule(path)
        copies = 3 if isinstance(owner, BlipAttention) else 1
        heads = getattr(owner, "num_heads", getattr(owner, "num_attention_heads", 1))
        if given != copies * width or width % heads:
            expected = f"{copies} × {width}" if copies > 1 else width
            raise TurboError(
                f"{name}.weight gives {given} features, {expected} expected, as {reader}.weight takes {width}"
                + (f", in {heads} heads of equal width" if heads > 1 else "")
            )
        if isinstance(owner, BlipAttention):
            model.set_submodule(path, BlipHeads(owner.config, width))
            continue
        model.set_submodule(name, nn.Linear(layer.in_features, width))
        model.set_submodule(reader, nn.Linear(width, model.get_submodule(reader).out_features))
        if heads > 1:
            owner.attention_head_size, owner.all_head_size = width // heads, width
            if hasattr(owner, "scaling"):
                owner.scaling = (width // heads) ** -0.5
