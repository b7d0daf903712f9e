"""The encoder costs that the Turbo paper prints, and ours for the same models.

Every model is the library's own, built from its config on the meta device, so nothing is downloaded or computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from turbovlm.apply import apply
from turbovlm.config import TurboConfig
from turbovlm.profile.macs import macs


@dataclass(frozen=True)
class PaperRow:
    """One printed row whose cost is that of an image encoder alone.

    Attributes:
        table: number of the paper's table; `model`, `dataset`: as printed.
        r: tokens merged per block; 0 is the model itself.
        deduced: whether r is not printed, but deduced: from the printed cost; in Table 7 from ToMe's release, where
            the same models have the same accuracies.
        printed_gmacs: the printed cost in 1e9 multiply-accumulates, None where only a speed-up is printed.
        printed_speedup: ratio of the printed throughputs, measured on an RTX 3090.
        encoder: key into `ENCODERS`.
        remark: what a reader should know about the printed number.
    """

    table: int
    model: str
    dataset: str
    r: int
    deduced: bool
    printed_gmacs: float | None
    printed_speedup: float | None
    encoder: str
    remark: str = ""


@dataclass(frozen=True)
class PaperCost:
    """A printed row and our count: `gmacs` with merging, `full_gmacs` without, both in 1e9 multiply-accumulates."""

    row: PaperRow
    gmacs: float
    full_gmacs: float

    @property
    def difference(self) -> float | None:
        """Ours over the printed cost, minus 1."""
        return None if self.row.printed_gmacs is None else self.gmacs / self.row.printed_gmacs - 1


def _blip(image_size: int) -> nn.Module:
    from transformers import BlipVisionConfig, BlipVisionModel

    config = BlipVisionConfig(
        image_size=image_size, patch_size=16, hidden_size=768, intermediate_size=3072, num_hidden_layers=12
    )
    model: nn.Module = BlipVisionModel(config)
    return model


def _blip2() -> nn.Module:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    model: nn.Module = Blip2VisionModel(Blip2VisionConfig(image_size=364))
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _torchvision(name: str, image_size: int) -> nn.Module:
    from torchvision import models

    model: nn.Module = getattr(models, name)(image_size=image_size)
    return model


ENCODERS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "blip-384": (384, lambda: _blip(384)),
    "blip-480": (480, lambda: _blip(480)),
    "blip2-364": (364, _blip2),
    "augreg-s": (224, lambda: _timm("vit_small_patch16_224")),
    "augreg-b": (224, lambda: _timm("vit_base_patch16_224")),
    "augreg-l": (224, lambda: _timm("vit_large_patch16_224")),
    "swag-b": (384, lambda: _torchvision("vit_b_16", 384)),
    "swag-l": (512, lambda: _torchvision("vit_l_16", 512)),
    "swag-h": (518, lambda: _torchvision("vit_h_14", 518)),
}
"""Image size in pixels, and the model."""

ROWS = (
    PaperRow(2, "BLIP-B", "VQAv2", 0, False, 92.1, None, "blip-480"),
    PaperRow(2, "BLIP-B", "VQAv2", 40, False, 65.7, 1.25, "blip-480", "the printed cost is what r=39 costs: 65.74"),
    PaperRow(2, "BLIP-B", "VQAv2", 60, False, 52.5, 1.57, "blip-480"),
    PaperRow(5, "BLIP2", "Flickr30k", 0, False, 717.5, None, "blip2-364"),
    PaperRow(5, "BLIP2", "Flickr30k", 16, True, 376.0, 1.84, "blip2-364"),
    PaperRow(5, "BLIP2", "COCO", 15, True, 396.5, 1.72, "blip2-364"),
    PaperRow(5, "BLIP-B", "Flickr30k", 0, False, 55.5, None, "blip-384"),
    PaperRow(5, "BLIP-B", "Flickr30k", 30, True, 37.0, 1.33, "blip-384"),
    PaperRow(5, "BLIP-B", "Flickr30k", 40, True, 31.1, 1.60, "blip-384"),
    PaperRow(5, "BLIP-B", "COCO", 30, True, 36.8, 1.34, "blip-384", "printed as 37.0 on Flickr30k, for the same r"),
    PaperRow(5, "BLIP-B", "COCO", 35, True, 34.1, 1.49, "blip-384"),
    PaperRow(7, "AugReg ViT-S/16", "ImageNet-1k", 13, True, None, 1.53, "augreg-s"),
    PaperRow(7, "AugReg ViT-B/16", "ImageNet-1k", 13, True, None, 1.62, "augreg-b"),
    PaperRow(7, "AugReg ViT-L/16", "ImageNet-1k", 7, True, None, 1.71, "augreg-l"),
    PaperRow(7, "SWAG ViT-B/16", "ImageNet-1k", 45, True, None, 1.85, "swag-b"),
    PaperRow(7, "SWAG ViT-L/16", "ImageNet-1k", 40, True, None, 1.98, "swag-l"),
    PaperRow(7, "SWAG ViT-H/14", "ImageNet-1k", 40, True, None, 1.91, "swag-h"),
)


def encoder_macs(
    *, image_size: int, patch_size: int, depth: int, width: int, mlp_width: int, head_dim: int, r: int = 0
) -> int:
    """What a pre-norm ViT with a CLS token costs by the paper's formula, in multiply-accumulates for one image.

    Per block `4·N·D² + 2·N²·D + ⌈N/2⌉·⌊N/2⌋·d + 2·N'·D·D_mlp + 5·D·(N + N')`, the third term only where tokens are
    merged; plus the patch embedding and the final norm.

    Args:
        image_size, patch_size: pixels per side.
        depth: number of blocks.
        width, mlp_width, head_dim: D, D_mlp and d.
        r: tokens merged per block, at most `(N − 1) // 2`.
    """
    patches = (image_size // patch_size) ** 2
    total, before = patches * 3 * patch_size**2 * width, patches + 1
    for _ in range(depth):
        after = before - min(r, (before - 1) // 2)
        total += 4 * before * width**2 + 2 * before**2 * width
        total += (before + 1) // 2 * (before // 2) * head_dim if after < before else 0
        total += 2 * after * width * mlp_width + 5 * width * (before + after)
        before = after
    return total + 5 * width * before


def paper_costs(rows: Iterable[PaperRow] = ROWS) -> list[PaperCost]:
    """Count every row's encoder, without merging and with `TurboConfig.paper(r)`.

    Raises:
        ModuleNotFoundError: `transformers`, `timm` or `torchvision` is not installed.
    """
    models: dict[str, nn.Module] = {}
    counted: dict[tuple[str, int], float] = {}
    costs = []
    for row in rows:
        size, build = ENCODERS[row.encoder]
        if row.encoder not in models:
            with torch.device("meta"):
                models[row.encoder] = build().eval()
        for r in (0, row.r):
            if (row.encoder, r) not in counted:
                counted[row.encoder, r] = _count(models[row.encoder], size, r)
        costs.append(PaperCost(row, counted[row.encoder, row.r], counted[row.encoder, 0]))
    return costs


def _count(model: Any, size: int, r: int) -> float:
    image = torch.empty(1, 3, size, size, device="meta")
    with apply(model, TurboConfig.paper(r)):
        return macs(model, image) / 1e9
