"""The pretrained ViT-S/14 of `turbovlm_lab.zoo`, compressed in the ways that are used most.

They are what benchmarks/compression.py measures.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from PIL import ImageOps
from torch import Tensor

from turbovlm.errors import TurboError
from turbovlm.profile import quantize
from turbovlm_lab.zoo import preprocess

STUDIES = Path(__file__).parents[1] / "studies"
CHECKPOINT = STUDIES / "compression" / "data"
"""Where studies/compression/quantise.py leaves the weights in 4 bits."""
SIDE, SEED, BATCH = 224, 0, 16
HIDDEN, HEADS, MULTIPLE = 0.35, 0.15, 8
"""Shares of all blocks' hidden units and heads that are pruned; the widths left are multiples of 8."""
RIDGE = 1e-3
"""Of the least squares, as a share of the mean square of what is fitted to."""
LOW = 0xF

Compress = Callable[[nn.Module, Tensor], nn.Module]
"""`(model, photographs) -> model`: a compressed copy, made with photographs that nothing is measured on."""


def photographs(quick: bool = False) -> tuple[Tensor, Tensor]:
    """Half to compress with and half to measure on, `[photographs, 3, 224, 224]` each.

    Args:
        quick: the 28 images of the demo, instead of the 256 that studies/photos/prepare.py fetches.
    """
    if quick:
        from turbovlm_lab.demo.photos import load_photos

        images = [photo.image for photo in load_photos()]
    else:
        sys.path.insert(0, str(STUDIES / "photos"))
        import prepare

        images = prepare.load_photos()
    pixels = preprocess([ImageOps.fit(image, (SIDE, SIDE)) for image in images], SIDE)
    order = random.Random(SEED).sample(range(len(pixels)), len(pixels))
    return pixels[order[: len(order) // 2]], pixels[order[len(order) // 2 :]]


def unchanged(model: nn.Module, given: Tensor) -> nn.Module:
    return model


def pruned(model: nn.Module, given: Tensor) -> nn.Module:
    """Whole heads and hidden units less, those whose weights matter least by Taylor's first term, over all blocks."""
    import torch_pruning

    smaller = copy.deepcopy(model)
    blocks = blocks_of(smaller)
    # o_proj and fc2 write to the residual stream, whose width stays.
    writers = [layer for block in blocks for layer in (block.attention.o_proj, block.mlp.fc2)]
    heads = {
        getattr(block.attention, name): block.attention.num_attention_heads
        for block in blocks
        for name in ("q_proj", "k_proj", "v_proj")
    }
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters detected", UserWarning)
        pruner = torch_pruning.pruner.BasePruner(
            smaller,
            {"pixel_values": given[:1]},
            importance=torch_pruning.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=HIDDEN,
            head_pruning_ratio=HEADS,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            round_to=MULTIPLE,
            ignored_layers=[smaller.embeddings, smaller.layernorm, *writers],
            output_transform=lambda output: output.last_hidden_state.sum(),
        )
        for chunk in given.split(BATCH):  # what tells photographs apart: the features, their mean taken off
            tokens = smaller(pixel_values=chunk).last_hidden_state
            (tokens - tokens.mean(0).detach()).square().sum().backward()
        pruner.step()
    smaller.zero_grad()
    for block in blocks:
        block.attention.num_attention_heads = pruner.num_heads[block.attention.q_proj]
    return smaller.eval().requires_grad_(False)


def refitted(model: nn.Module, given: Tensor) -> nn.Module:
    """Pruned; then, block by block, o_proj and fc2 are fitted by least squares to the full model's tokens."""
    smaller = pruned(model, given)
    with torch.no_grad():
        full = torch.cat([model.embeddings(chunk) for chunk in given.split(BATCH)])
        tokens = full.clone()
        for own, block in zip(blocks_of(model), blocks_of(smaller)):
            middle, after = _seen(own, own.norm2, full), _run(own, full)
            _fit(block.attention.o_proj, block.layer_scale1.lambda1, block, tokens, middle - tokens)
            _fit(block.mlp.fc2, block.layer_scale2.lambda1, block, tokens, after - _seen(block, block.norm2, tokens))
            full, tokens = after, _run(block, tokens)
    return smaller


def _fit(layer: Any, scale: Tensor, block: nn.Module, tokens: Tensor, wanted: Tensor) -> None:
    """Weights and bias with which the layer, times `scale`, comes nearest to what is wanted of it."""
    taken = _seen(block, layer, tokens).flatten(0, 1)
    given = (wanted / scale).flatten(0, 1)
    centre, target = taken.mean(0), given.mean(0)
    taken, given = taken - centre, given - target
    gram = taken.T @ taken
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    # The ridge pulls towards the weights that are there, not towards zero.
    layer.weight += torch.linalg.solve(gram, taken.T @ (given - taken @ layer.weight.T)).T
    layer.bias.copy_(target - layer.weight @ centre)


def _run(block: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([block(chunk) for chunk in tokens.split(BATCH)])


def _seen(block: nn.Module, layer: nn.Module, tokens: Tensor) -> Tensor:
    """What a layer of the block is given."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _run(block, tokens)
    hook.remove()
    return torch.cat(seen)


def rounded(kind: str, model: nn.Module, given: Tensor) -> nn.Module:
    """Weights in fewer bits; see `turbovlm.profile.quantize` for the kinds."""
    return quantize(copy.deepcopy(model), kind)


class Int4Linear(nn.Module):
    """A linear layer with 4 bits per weight, by PyTorch's own CPU kernel, which is fast in bf16 alone.

    Args:
        whole: weights as integers from −8 to 7, `[out, in]`.
        scales: of groups of weights, `[out, in / group]`.
    """

    def __init__(self, whole: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = whole.shape
        self.group = self.in_features // scales.shape[1]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((whole.int() + 8).contiguous(), 1)
        self.register_buffer("weight", packed)
        scales = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).to(torch.bfloat16)
        self.register_buffer("scales", scales.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group, self.scales)
        out = out.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return out if self.bias is None else out + self.bias


def gptq(model: nn.Module, given: Tensor) -> nn.Module:
    """Weights in 4 bits by GPTQ, as studies/compression/quantise.py has left them (compressed-tensors' format).

    Raises:
        TurboError: it has not.
    """
    from safetensors.torch import load_file

    from turbovlm_lab.zoo.saliency import _rename

    path = CHECKPOINT / "model.safetensors"
    if not path.is_file():
        raise TurboError(f"{path} is missing: python studies/compression/quantise.py writes it")
    stored = {_rename(name): value for name, value in load_file(path).items()}
    smaller = copy.deepcopy(model)
    for name in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        whole, scales = unpacked(stored[f"{name}.weight_packed"]), stored[f"{name}.weight_scale"]
        parent, _, last = name.rpartition(".")
        setattr(smaller.get_submodule(parent), last, Int4Linear(whole, scales, stored[f"{name}.bias"]))
    return smaller


def unpacked(packed: Tensor) -> Tensor:
    """Integers from −8 to 7, eight in each of 32 bits, the first one lowest: `[out, in / 8] -> [out, in]`."""
    return (((packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=packed.dtype)) & LOW) - 8).flatten(1)


VARIANTS: dict[str, Compress] = {
    "none": unchanged,
    "pruned": pruned,
    "pruned, refitted": refitted,
    "int8 weights": functools.partial(rounded, "int8"),
    "int8 dynamic": functools.partial(rounded, "int8-dynamic"),
    "int4 NF4": functools.partial(rounded, "nf4"),
    "int4 GPTQ": gptq,
}


def blocks_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "Dinov2Layer"]
