"""A ViT with merging that can be designed in ways that the library leaves out, to see what they would bring.

A DINOv2 of `transformers`, its blocks run by hand: attention with `log s` added, merge, MLP. Every position gets its
token back behind the last block, and what set it apart from it. With `pairs="alternate"` it gives what `turbovlm.apply`
gives with `partition="alternate"`; the default's random halves are another draw than the library's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Design:
    """How tokens are matched, ranked and merged.

    Attributes:
        features: what is compared: keys, queries or values of all heads, `"heads"`, `"queries"`, `"values"`; `"keys"`,
            their mean over heads; `"centred"`: all heads' keys less the image's mean; `"hidden"`: the MLP's input;
            `"tokens"`.
        pairs: `"halves"` drawn at random; `"alternate"`; `"important"`: the half that A is largest of are
            partners; `"order"`: any token whose A is larger; `"any"`: the pairs of highest E first, greedily.
        degree: see `degree_of`.
        alpha: of it.
        weight: of a token, A: `"attention"` CLS pays it, `"value"`: times the length of its value, `"received"`: the
            mean over all queries.
        reduce: `"keep_norm"`: the mean, as long as what it is of was on average; `"mean"`, or `"prune"`.
        rounds: merges per block, each of its share, after one attention.
        proportional: whether attention adds `log s`.
    """

    features: str = "heads"
    pairs: str = "halves"
    degree: str = "weighted distance"
    alpha: float = 1.0
    weight: str = "attention"
    reduce: str = "keep_norm"
    rounds: int = 1
    proportional: bool = True


@dataclass
class Tokens:
    """Of a batch while it goes through the blocks; `own`: the token of every position; `apart`: what it lost."""

    x: Tensor
    sizes: Tensor
    own: Tensor
    apart: Tensor
    compared: int = 0


@torch.inference_mode()
def merged_tokens(model: Any, pixels: Tensor, amounts: list[int], design: Design) -> tuple[Tensor, int]:
    """All positions behind the last norm, `[batch, tokens, width]`, and the multiply-accumulates of comparing."""
    x = model.embeddings(pixels)
    batch, count, _ = x.shape
    places = torch.arange(count).expand(batch, -1)
    tokens = Tokens(x, torch.ones(batch, count), places, torch.zeros_like(x))
    for number, (block, amount) in enumerate(zip(model.encoder.layer, amounts)):
        q, k, v = _heads(block, tokens.x)
        bias = tokens.sizes.log()[:, None, None] if design.proportional else None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        tokens.x = tokens.x + block.layer_scale1(block.attention.o_proj(mixed))
        for turn in range(design.rounds):
            if amount:
                weight = _weight(q, k, v, bias, design.weight)
                features = _features(block, tokens.x, q, k, v, design.features)
                r = amount // design.rounds + (turn < amount % design.rounds)
                gone, into = _pairs(features, weight, tokens, r, design, seed=100 * number + turn)
                to = _merge(tokens, gone, into, design.reduce)
                q, k, v = (_moved(each, to, gone) for each in (q, k, v))
                bias = tokens.sizes.log()[:, None, None] if design.proportional else None
        tokens.x = tokens.x + block.layer_scale2(block.mlp(block.norm2(tokens.x)))
    out = tokens.x.gather(1, tokens.own[..., None].expand_as(tokens.apart)) + tokens.apart
    return model.layernorm(out), tokens.compared


def _heads(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed, attention = block.norm1(x), block.attention
    q, k, v = (
        project(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return q, k, v


def _weight(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """A of the patches, `[batch, patches]`."""
    queries = q if kind == "received" else q[:, :, :1]
    scores = queries @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    paid = (scores if bias is None else scores + bias).softmax(-1).mean(2)
    if kind == "value":
        paid = paid * v.norm(dim=-1)
    return paid.mean(1)[:, 1:]


def _features(block: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """Of the patches, of length 1, `[batch, patches, width]`."""
    if kind in ("hidden", "tokens"):
        found = block.norm2(x) if kind == "hidden" else x
    elif kind == "keys":
        found = k.mean(1)
    else:
        found = {"queries": q, "values": v}.get(kind, k).transpose(1, 2).flatten(2)
    found = found[:, 1:]
    if kind == "centred":
        found = found - found.mean(1, keepdim=True)
    return F.normalize(found, dim=-1)


def _pairs(f: Tensor, weight: Tensor, tokens: Tokens, r: int, design: Design, seed: int) -> tuple[Tensor, Tensor]:
    """The r patches that go and those that they go into, `[batch, r]` each, counted from the first patch."""
    batch, patches, width = f.shape
    if design.pairs in ("order", "any"):
        candidates = partners = torch.arange(patches).expand(batch, -1)
    else:
        candidates, partners = _halves(weight, patches, design.pairs, seed)
    tokens.compared += candidates.shape[1] * partners.shape[1] * width

    def of(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index if values.ndim == 2 else index[..., None].expand(-1, -1, values.shape[-1]))

    similar = of(f, candidates) @ of(f, partners).transpose(1, 2)
    if design.pairs == "order":
        rank = weight.argsort(1).argsort(1)
        similar = similar.masked_fill(rank[:, None] <= rank[:, :, None], -2)
    elif design.pairs == "any":
        similar.diagonal(dim1=1, dim2=2).fill_(-2)
    sizes = tokens.sizes[:, 1:]
    if design.degree in ("pairwise", "pairwise Ward"):
        score = degree_of(
            similar,
            of(weight, candidates)[..., None],
            of(weight, partners)[:, None],
            of(sizes, candidates)[..., None],
            of(sizes, partners)[:, None],
            design,
        )
        degree, nearest = score.max(-1)
    else:
        best, nearest = similar.max(-1)
        there = partners.gather(1, nearest)
        degree = degree_of(
            best, of(weight, candidates), of(weight, there), of(sizes, candidates), of(sizes, there), design
        )
    if design.pairs == "any":
        return _greedily(degree, nearest, r)
    top = degree.topk(r, dim=1).indices
    gone, into = candidates.gather(1, top), partners.gather(1, nearest.gather(1, top))
    if design.pairs == "order":
        next_of = torch.arange(patches).repeat(batch, 1).scatter(1, gone, into)
        for _ in range(patches.bit_length()):
            next_of = next_of.gather(1, next_of)
        into = next_of.gather(1, gone)
    return gone, into


def degree_of(
    similar: Tensor, weight: Tensor, weight_there: Tensor, size: Tensor, size_there: Tensor, design: Design
) -> Tensor:
    """E: those of highest are merged; of candidates `[batch, k]`, or of all pairs."""
    alpha, mean = design.alpha, weight.mean(1, keepdim=True)
    match design.degree:
        case "redundancy":
            return similar
        case "difference":
            return similar - alpha * weight
        case "division":
            return similar / (weight + 1e-3)
        case "semantics":
            return -weight.expand_as(similar)
        case "random":
            return torch.rand(similar.shape, generator=torch.Generator().manual_seed(similar.shape[1]))
        case "weighted distance":
            return (similar - 1) * (1 + alpha * (weight / mean).sqrt())
        case "weighted, not the root":
            return (similar - 1) * (1 + alpha * weight / mean)
        case "both ends" | "pairwise":
            return (similar - 1) * (1 + alpha * ((weight / mean).sqrt() + (weight_there / mean).sqrt()) / 2)
        case "Ward" | "pairwise Ward":
            return (similar - 1) * size * size_there / (size + size_there) * (1 + alpha * (weight / mean).sqrt())
    raise ValueError(design.degree)


def _halves(weight: Tensor, patches: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    batch, half = len(weight), patches // 2
    if kind == "important":
        order = weight.argsort(1)
        return order[:, :half].sort(1).values, order[:, half:].sort(1).values
    if kind == "alternate":
        order = torch.cat([torch.arange(1, patches, 2), torch.arange(0, patches, 2)])
    else:
        order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    return order[:half].sort().values.expand(batch, -1), order[half:].sort().values.expand(batch, -1)


def _greedily(degree: Tensor, nearest: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The pairs of highest E, none of which takes what another has taken or goes where another has gone."""
    gone, into = [], []
    for order, there in zip(degree.argsort(1, descending=True).tolist(), nearest.tolist()):
        away: dict[int, int] = {}
        targets: set[int] = set()
        for token in order:
            if len(away) == r:
                break
            if token not in targets and there[token] not in away:
                away[token] = there[token]
                targets.add(there[token])
        if len(away) < r:
            raise RuntimeError(f"{len(away)} pairs were found, {r} are needed")
        gone.append(list(away))
        into.append(list(away.values()))
    return torch.tensor(gone), torch.tensor(into)


def _merge(tokens: Tokens, gone: Tensor, into: Tensor, reduce: str) -> Tensor:
    """Brings the tokens up to date; returns which one each became part of, before those that are gone are left out."""
    x, sizes = tokens.x, tokens.sizes
    batch, count, _ = x.shape
    to = torch.arange(count).repeat(batch, 1).scatter(1, gone + 1, into + 1)
    counted = sizes.scatter(1, gone + 1, 0.0) if reduce == "prune" else sizes
    total = torch.zeros_like(sizes).scatter_add(1, to, counted)

    def mean(values: Tensor) -> Tensor:
        weighted = values * counted[..., None]
        summed = torch.zeros_like(values).scatter_add(1, to[..., None].expand_as(values), weighted)
        return summed / total.clamp_min(1e-9)[..., None]

    new = mean(x)
    if reduce == "keep_norm":
        new = new * mean(x.norm(dim=-1, keepdim=True)) / new.norm(dim=-1, keepdim=True).clamp_min(1e-9)
    own = to.gather(1, tokens.own)

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand_as(tokens.apart))

    tokens.apart = tokens.apart + at(x, tokens.own) - at(new, own)
    stays = torch.ones(batch, count, dtype=torch.bool).scatter(1, gone + 1, False)
    tokens.own = (stays.cumsum(1) - 1).gather(1, own)
    tokens.x = new[stays].view(batch, -1, x.shape[-1])
    tokens.sizes = total[stays].view(batch, -1)
    return to


def _moved(heads: Tensor, to: Tensor, gone: Tensor) -> Tensor:
    """Queries, keys or values behind a merge: means, for another round of the same block."""
    batch, count = to.shape
    shares = torch.zeros(batch, count, count).scatter(2, to[..., None], 1.0)
    mean = (shares / shares.sum(1, keepdim=True).clamp_min(1)).transpose(1, 2)[:, None] @ heads
    stays = torch.ones(batch, count, dtype=torch.bool).scatter(1, gone + 1, False)
    rows = stays.nonzero()[:, 1].view(batch, -1)
    return mean.gather(2, rows[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[-1]))
