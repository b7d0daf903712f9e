"""Tiny encoders of every family, of any depth, dtype and image size, and the settings that are valid for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from hypothesis import strategies as st

import turbovlm
from families import FAMILIES, Family, _hidden, _images, _itself, _timm, _transformers
from turbovlm.encoder.towers import Tower, find_towers
from turbovlm.ops import LayeredDegree

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATCH = 8
"""Pixels per side of a patch, in all of them."""
NATIVE = (6, 6)
"""Rows and columns of patches of an image of native size, in all of them."""
INTERPOLATING = ("vit", "deit", "vit_msn", "ijepa", "clip", "siglip", "blip", "blip_2", "instructblip")
"""Families of transformers that take any image size where they are told to."""
ANY_SIZE = ("dinov2", "dinov2_swiglu", "dinov2_registers", "dinov3")
"""Those that take it anyway."""


def _text(batch: int) -> dict[str, Any]:
    """Texts of different lengths, padded."""
    ids = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(b))[:24] + 5 for b in range(batch)])
    mask = torch.stack([torch.arange(24) < 24 - 7 * b for b in range(batch)]).long()
    return {"input_ids": ids, "attention_mask": mask}


def _yolos() -> nn.Module:
    settings = {"image_size": [48, 48], "num_detection_tokens": 3, "use_mid_position_embeddings": False}
    return _transformers("YolosModel", "YolosConfig", **settings)()


def _bert() -> nn.Module:
    return _transformers("BertModel", "BertConfig", vocab_size=100, max_position_embeddings=24)()


OTHERS: dict[str, Family] = {
    "timm_dynamic": Family(_timm("vit_tiny_patch16_224", dynamic_img_size=True), _images(key="x"), _itself),
    "timm_registers_dynamic": Family(
        _timm("vit_tiny_patch16_224", reg_tokens=2, qk_norm=True, dynamic_img_size=True), _images(key="x"), _itself
    ),
    "timm_no_cls_dynamic": Family(
        _timm("vit_tiny_patch16_224", class_token=False, global_pool="avg", dynamic_img_size=True),
        _images(key="x"),
        _itself,
        cls=False,
    ),
    "timm_eva02_dynamic": Family(
        _timm("eva02_tiny_patch14_224", global_pool="token", qkv_fused=True, dynamic_img_size=True),
        _images(key="x"),
        _itself,
    ),
    "timm_dinov3_dynamic": Family(_timm("vit_small_patch16_dinov3", dynamic_img_size=True), _images(key="x"), _itself),
    "yolos": Family(_yolos, _images(), _hidden),
    "bert": Family(_bert, _text, _hidden),
}
ENCODERS = {**FAMILIES, **OTHERS}
RESIZABLE = (*INTERPOLATING, *ANY_SIZE, *(name for name in OTHERS if name.endswith("_dynamic")))
MASKED = {"bert": "attention_mask", "siglip2": "pixel_attention_mask"}
"""The argument that says what is no padding, in the families that have it."""
CONTENTS = ("noise", "faint", "bright", "constant", "tiled", "halves")


@functools.cache
def encoder(name: str, depth: int, dtype: str) -> nn.Module:
    """A family's model with its first `depth` blocks, in eval mode; whoever changes it gives it back as it was."""
    model = ENCODERS[name].make()
    (tower,) = find_towers(model)
    blocks: Any = model.get_submodule(tower.blocks[0][0].rpartition(".")[0])
    del blocks[depth:]
    return model.eval().to(DTYPES[dtype])


@functools.cache
def tower_of(name: str, depth: int) -> Tower:
    """What `turbovlm` finds in a family's model."""
    (tower,) = find_towers(encoder(name, depth, "float64"))
    return tower


@dataclass(frozen=True)
class Drawn:
    """A model, and what goes into it: images of `rows`×`columns` patches."""

    name: str
    depth: int
    dtype: str
    batch: int
    rows: int
    columns: int
    content: str
    seed: int

    @property
    def model(self) -> nn.Module:
        return encoder(self.name, self.depth, self.dtype)

    @property
    def family(self) -> Family:
        return ENCODERS[self.name]

    @property
    def continuous(self) -> bool:
        """Whether no two tokens are alike but by chance."""
        return self.content in ("noise", "faint", "bright")

    @property
    def tokens(self) -> int:
        """Tokens of the encoder's input, prefix and suffix included."""
        tower = tower_of(self.name, self.depth)
        native = (self.rows, self.columns) == NATIVE
        return tower.tokens if native else tower.prefix + self.rows * self.columns + tower.suffix

    def inputs(self, batch: int | None = None) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        batch = self.batch if batch is None else batch
        given = self.family.inputs(batch)
        dtype = DTYPES[self.dtype]
        for key, value in given.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or key == "noise":
                continue
            shape = list(value.shape)
            if value.ndim >= 4:
                shape[-2:] = [PATCH * self.rows, PATCH * self.columns]
            given[key] = pixels(shape, self.content, self.seed).to(dtype)
        if self.name in INTERPOLATING and (self.rows, self.columns) != NATIVE:
            given["interpolate_pos_encoding"] = True
        return given

    @torch.no_grad()
    def run(self, model: nn.Module | None = None, batch: int | None = None) -> torch.Tensor:
        """What the model hands on; in training, every time with the same weights dropped."""
        torch.manual_seed(0)
        return self.family.output((self.model if model is None else model)(**self.inputs(batch)))


def pixels(shape: list[int], content: str, seed: int) -> torch.Tensor:
    """Images, in float64: noise, faint or bright; all pixels alike; one patch repeated; one half repeated."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if content == "constant":
        return torch.zeros_like(noise)
    if content == "tiled":
        return noise[..., :PATCH, :PATCH].repeat(
            *(1,) * (len(shape) - 2), -(-shape[-2] // PATCH), -(-shape[-1] // PATCH)
        )[..., : shape[-2], : shape[-1]]
    if content == "halves":
        half = -(-shape[-2] // 2 // PATCH) * PATCH
        return torch.cat([noise[..., :half, :]] * 3, dim=-2)[..., : shape[-2], :]
    return noise * {"noise": 1, "faint": 1e-3, "bright": 30}[content]


@st.composite
def drawn_encoders(draw, names=tuple(ENCODERS), depths=(1, 2, 3, 4), dtypes=tuple(DTYPES), contents=CONTENTS):
    """Any family, depth, dtype, batch, image size and content."""
    name = draw(st.sampled_from(names))
    rows, columns = NATIVE
    if name in RESIZABLE and draw(st.booleans()):
        rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return Drawn(
        name=name,
        depth=draw(st.sampled_from(depths)),
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(1, 3)),
        rows=rows,
        columns=columns,
        content=draw(st.sampled_from(contents)),
        seed=draw(st.integers(0, 99)),
    )


def layered(R, A, block):
    """A degree of one's own."""
    return R - 0.5 ** abs(1 - block) * A


DEGREES = st.one_of(
    st.sampled_from(turbovlm.ops.degree.DEGREES),
    st.just(layered),
    st.builds(LayeredDegree, st.floats(0, 10), st.floats(0.1, 2), st.integers(0, 3)),
)
ALPHAS = st.one_of(st.none(), st.floats(0, 50), st.floats(0, 1e6))


@st.composite
def amounts(draw, depth: int) -> dict[str, Any]:
    """One of r, a list of r, r with thresholds, keep, flops."""
    r = st.one_of(st.integers(0, 30), st.integers(0, 10**6))
    each = st.lists(r, min_size=depth, max_size=depth)
    kind = draw(st.sampled_from(["r", "list", "thresholds", "keep", "flops"]))
    if kind == "r":
        return {"r": draw(r)}
    if kind == "list":
        return {"r": draw(each)}
    if kind == "thresholds":
        return {"r": draw(each), "thresholds": draw(st.lists(st.floats(-3, 3), min_size=depth, max_size=depth))}
    return {kind: draw(st.floats(0.01, 1))}


@st.composite
def turbo_settings(draw, drawn: Drawn) -> dict[str, Any]:
    """Settings of a `TurboConfig` that are valid together, and for a model and its images."""
    chosen = draw(amounts(drawn.depth))
    tower = tower_of(drawn.name, drawn.depth)
    patches = drawn.tokens - tower.prefix - tower.suffix
    partitions = ["auto", "all", "random", "alternate"]
    whole = drawn.rows * drawn.columns == patches
    if whole:
        partitions.append("grid")
    degrees = DEGREES.filter(lambda degree: degree != "random") if "thresholds" in chosen else DEGREES
    chosen |= {
        "degree": draw(degrees),
        "alpha": draw(ALPHAS),
        "similarity": draw(st.sampled_from(turbovlm.config.SIMILARITIES)),
        "guidance": draw(st.sampled_from(["auto", "mean", *(["cls"] if tower.cls else [])])),
        "partition": draw(st.sampled_from(partitions)),
        "order": draw(st.sampled_from(turbovlm.config.ORDERS)),
        "proportional": draw(st.booleans()),
        "reduce": draw(st.sampled_from(turbovlm.config.REDUCTIONS)),
        "restore": draw(st.sampled_from(turbovlm.config.RESTORES)),
        "dense": draw(st.booleans()),
        "min_tokens": draw(st.sampled_from([0, 0, 0, 10, 30, 1000])),
        "seed": draw(st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1))),
    }
    if chosen["partition"] == "grid":
        chosen["grid"] = (drawn.rows, drawn.columns)
    if chosen["partition"] == "all":
        chosen["order"] = "spatial"  # there are no halves to order by
    if draw(st.booleans()):
        some = st.sets(st.integers(0, drawn.depth - 1), min_size=1).map(sorted)
        blocks = draw(st.one_of(st.just("every"), some))
        if "thresholds" not in chosen:
            chosen["blocks"] = blocks
            if isinstance(blocks, list) and isinstance(chosen.get("r"), list):
                chosen["r"] = [chosen["r"][block] for block in blocks]
    return of_effect(turbovlm.TurboConfig, chosen)


def of_effect(kind: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that nothing reads beside the others, which a config refuses."""
    return {name: value for name, value in chosen.items() if name not in kind.unread(chosen)}


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that turbovlm may not leave behind, of every module."""
    return [
        (name, type(module), sorted(module.__dict__), type(module).forward, len(module._forward_hooks), module.training)
        for name, module in model.named_modules()
    ]
