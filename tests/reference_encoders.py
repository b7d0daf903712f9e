"""Encoders in the words of `reference.py`: their own modules, everything between them plain."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume

import reference
import turbovlm
from turbovlm.ops import information_degree, partition_tokens

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

DEPTH = 3
PARTITIONS = sys.modules[partition_tokens.__module__]
"""Where the library keeps `WINDOW` and `WINDOWED_FROM`."""


def layered(R, A, merging_block):
    """S4, equation (20), with α = 6, β = 0.9 and γ = 2: what a degree of one's own may look like."""
    return R - 0.9 ** abs(2 - merging_block) * 6 * A


def drawn(R, A, merging_block):
    """`degree="random"` with seed 0."""
    return information_degree(R, None, merging_block, degree="random")


DEGREES = {**{name: name for name in reference.DEGREES}, "random": "random", "a callable": layered}


def windows_of(tokens, prefix, kind, block=0, seed=0):
    """Candidates and partners of each window. The halves drawn at random are the library's; nothing else is."""
    if kind == "alternate":
        return [([i for i in range(prefix, tokens) if i % 2 == 0], [i for i in range(prefix, tokens) if i % 2 == 1])]
    if kind == "all":
        candidates = partners = list(range(prefix, tokens))
    else:
        split = partition_tokens(tokens, prefix, kind, block=block, seed=seed)
        candidates, partners = split.candidates.tolist(), split.destinations.tolist()
    patches = tokens - prefix
    number = 1
    if kind in ("random", "all") and patches >= PARTITIONS.WINDOWED_FROM:
        number = -(-patches // PARTITIONS.WINDOW)

    def share(half, window):
        return half[len(half) * window // number : len(half) * (window + 1) // number]

    return [(share(candidates, w), share(partners, w)) for w in range(number)]


@dataclass(frozen=True)
class Timm:
    """Pre-norm blocks of timm's VisionTransformer and, with `rope`, Eva."""

    model: Any

    @property
    def blocks(self):
        return self.model.blocks

    def heads(self, block, x, home):
        """q, k and v that attend, and the q and k before rotary positions, `[H, N, d]` of the only image."""
        attn = block.attn
        qkv = attn.qkv(block.norm1(x))
        if hasattr(attn, "q_bias"):
            qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = qkv.view(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        content = q, k = attn.q_norm(q), attn.k_norm(k)
        rope = getattr(self.model, "rope", None)
        if rope is not None:
            angles, prefix = rope.get_embed()[home], self.model.num_prefix_tokens
            q, k = (torch.cat([t[:, :prefix], rotated(t[:, prefix:], angles)], dim=1) for t in (q, k))
        return (q, k, v), content, attn.scale

    def attended(self, block, x, mixed):
        out = block.attn.proj(block.attn.norm(mixed.transpose(0, 1).flatten(1)))
        return x + (block.ls1(out) if hasattr(block, "ls1") else block.gamma_1 * out)

    def compared(self, block, x):
        return block.norm2(x)

    def second_half(self, block, x):
        out = block.mlp(block.norm2(x))
        return x + (block.ls2(out) if hasattr(block, "ls2") else block.gamma_2 * out)


def rotated(x, angles):
    """Pairs of neighbouring channels turned by their angles: `angles` is sines, then cosines, `[N, 2d]`."""
    sin, cos = angles.chunk(2, dim=-1)
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin


@dataclass(frozen=True)
class Bert:
    """Post-norm blocks, whose hidden states are compared as they are."""

    model: Any

    @property
    def blocks(self):
        return self.model.encoder.layer

    def heads(self, block, x, home):
        own = block.attention.self
        q, k, v = (
            p(x).view(len(x), own.num_attention_heads, -1).transpose(0, 1) for p in (own.query, own.key, own.value)
        )
        return (q, k, v), (q, k), q.shape[-1] ** -0.5

    def attended(self, block, x, mixed):
        output = block.attention.output
        return output.LayerNorm(x + output.dense(mixed.transpose(0, 1).flatten(1)))

    def compared(self, block, x):
        return x

    def second_half(self, block, x):
        return block.output.LayerNorm(x + block.output.dense(block.intermediate(x)))


@dataclass(frozen=True)
class Chosen:
    """The settings of one run, every `"auto"` settled."""

    r: tuple[int, ...] = (4,) * DEPTH
    prefix: int = 1
    guidance: str = "cls"
    similarity: str = "heads"
    degree: Any = "weighted_distance"
    alpha: float | None = None
    partition: str = "random"
    order: str = "spatial"
    reduce: str = "keep_norm"
    proportional: bool = True
    min_tokens: int = 0
    seed: int = 0
    restore: str | None = None
    grid: tuple[int, int] | None = None

    def apply(self, model, trace=True):
        named = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("prefix", "restore")}
        if self.restore is not None:
            named |= {"restore": self.restore, "dense": True}
        unread = turbovlm.TurboConfig.unread({**named, "trace": trace})
        return turbovlm.apply(model, **{k: v for k, v in named.items() if k not in unread}, trace=trace)


@dataclass
class Expected:
    """Of one image, per block: what the merge did, the place of each input token `[N0]`, and the block's output.

    `comparable`: of which candidates R has a meaning, as neither they nor their partners are padding.
    """

    blocks: list[reference.Block]
    sources: list[torch.Tensor]
    outputs: list[torch.Tensor]
    comparable: list[torch.Tensor]


def expected(family, x, sizes, chosen):
    """The encoder of one image, `x` `[N0, D]`, block by block, by the reference."""
    degree = drawn if chosen.degree == "random" else chosen.degree
    if chosen.degree == "random" and chosen.seed:
        degree = functools.partial(information_degree, degree="random", seed=chosen.seed)
    source, home, prefix = torch.arange(len(x)), torch.arange(len(x) - chosen.prefix), chosen.prefix
    corners = None
    merges, found = [], Expected([], [], [], [])
    for index, block in enumerate(family.blocks):
        (q, k, v), (raw_q, raw_k), scale = family.heads(block, x, home)
        attended = sizes if chosen.proportional else (sizes > 0).double()
        x = family.attended(block, x, reference.attention(q, k, v, attended, scale))
        features = {
            "heads": lambda k=raw_k: torch.cat(list(k), dim=-1),
            "keys": lambda k=raw_k: sum(k) / len(k),
            "queries": lambda q=raw_q: sum(q) / len(q),
            "hidden": lambda x=x, block=block: family.compared(block, x),
        }[chosen.similarity]()
        r = reference.clamped(chosen.r[index], len(x), prefix, chosen.min_tokens)
        if chosen.partition == "grid":
            if corners is None:
                rows, columns = chosen.grid
                corners = [prefix + i * columns + j for i in range(0, rows, 2) for j in range(0, columns, 2)]
            windows = [([i for i in range(prefix, len(x)) if i not in corners], corners)]
            r = min(r, len(windows[0][0]))
        else:
            windows = windows_of(len(x), prefix, chosen.partition, index, chosen.seed)
        step = reference.merging_block(
            x,
            features,
            q,
            k,
            sizes,
            scale=scale,
            prefix=prefix,
            windows=windows,
            r=r,
            guidance=chosen.guidance,
            degree=degree,
            alpha=chosen.alpha,
            merges_before=len(merges),
            order=chosen.order,
            reduce=chosen.reduce,
            proportional=chosen.proportional,
        )
        comparable = torch.tensor(
            [sizes[i] > 0 and (j < 0 or sizes[j] > 0) for i, j in zip(step.candidates, step.partners)], dtype=torch.bool
        )
        if r > 0:
            # which padding went is open, and so is how near a word is to what is left of it
            words_merge = r > int((sizes[step.candidates] == 0).sum())
            assume(not words_merge or bool(comparable[sizes[step.candidates] > 0].all()))
            merges.append((x, step))
            home = home[[i - prefix for i in step.kept[prefix:]]]
            x, sizes, source = step.tokens, step.sizes, step.source[source]
            corners = None if corners is None else [int(step.source[i]) for i in corners]
        x = family.second_half(block, x)
        found.blocks.append(step)
        found.comparable.append(comparable)
        found.sources.append(source)
        found.outputs.append(x)
    if chosen.restore is not None:
        found.outputs[-1] = reference.restored(x, merges, chosen.restore == "residual")
    return found


@torch.no_grad()
def run(family, inputs, chosen, forward=None):
    """What goes into the first block, `[batch, N0, D]`, the trace, and every block's output."""
    entered, left = [], []
    hooks = [family.blocks[0].register_forward_pre_hook(lambda m, args: entered.append(args[0].clone()))]
    for block in family.blocks:
        hooks.append(block.register_forward_hook(lambda m, args, out: left.append(first(out).clone())))
    try:
        with chosen.apply(family.model) as handle:
            entered.clear(), left.clear()
            (forward or family.model)(**inputs)
            return entered[0], handle.trace, left
    finally:
        for hook in hooks:
            hook.remove()


def first(out):
    return out[0] if isinstance(out, tuple) else out


def check(family, inputs, chosen, mask=None, atol=1e-10):
    """Tokens, sizes, sources, R, A and E of every block, for every image of the batch."""
    entered, trace, left = run(family, inputs, chosen)
    assert len(trace) == len(left) == DEPTH
    for b, x in enumerate(entered):
        sizes = torch.ones(len(x)).double() if mask is None else mask[b].double()
        with torch.no_grad():
            wanted = expected(family, x, sizes, chosen)
        places = sizes > 0
        steps = zip(wanted.blocks, wanted.sources, wanted.outputs, wanted.comparable, trace, left)
        for block, source, output, comparable, entry, out in steps:
            last = output is wanted.outputs[-1]
            real = places if last and chosen.restore else block.sizes > 0
            assert torch.equal(entry.source[b][places], source[places])
            close = functools.partial(torch.testing.assert_close, rtol=0, atol=atol)
            close(entry.sizes[b], block.sizes)
            close(out[b][real], output[real])
            close(entry.semantic[b], block.semantic)
            known = ~entry.degree[b].isnan()
            assert known.nonzero().flatten().tolist() == block.candidates
            close(entry.redundancy[b][block.candidates][comparable], block.redundancy[comparable])
            stated = comparable | (block.degree == torch.inf)
            found = entry.degree[b][block.candidates][stated]
            torch.testing.assert_close(found, block.degree[stated], rtol=1e-9, atol=atol)
    return trace


@functools.cache
def vit(heads, prefix, cls):
    """A tiny ViT in float64 of 4×4 patches on up to 24×24 pixels, lively enough that attention is not flat."""
    torch.manual_seed(10 * heads + prefix)
    model = timm.models.VisionTransformer(
        img_size=24,
        patch_size=4,
        embed_dim=8 * heads,
        depth=DEPTH,
        num_heads=heads,
        num_classes=0,
        class_token=cls,
        reg_tokens=prefix - cls,
        global_pool="token" if cls else "avg",
        dynamic_img_size=True,
        qk_norm=heads == 2,
        init_values=0.7 if heads == 2 else None,
    )
    return Timm(livelier(model))


def livelier(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 2.0 * parameter[0].numel() ** -0.5 if parameter.ndim >= 2 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * min(scale, 1.0))
    return model.eval().double()


def images(batch, rows, columns, seed):
    return torch.randn(batch, 3, 4 * rows, 4 * columns, generator=torch.Generator().manual_seed(seed)).double()


@functools.cache
def eva():
    torch.manual_seed(0)
    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 0}
    model = timm.create_model(
        "eva02_tiny_patch14_224", global_pool="token", qkv_fused=True, init_values=0.5, swiglu_mlp=True, **settings
    )
    return Timm(livelier(model))


@functools.cache
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=70,
        pad_token_id=0,
    )
    return Bert(livelier(transformers.BertModel(config)))
