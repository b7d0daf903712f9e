"""Any encoder, any image, any settings that are valid together: against the reference, and what must always hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

import reference_encoders
import turbovlm
from fuzz.drawing import fuzz
from fuzz.models import (
    ALPHAS,
    DTYPES,
    ENCODERS,
    MASKED,
    Drawn,
    drawn_encoders,
    layered,
    snapshot,
    tower_of,
    turbo_settings,
)
from reference_encoders import PARTITIONS, Chosen
from turbovlm.encoder.layout import Layout
from turbovlm.encoder.schedule import spread

WITH_SUFFIX = ("yolos",)
UNKNOWN_TO_THE_REFERENCE = (*MASKED, *WITH_SUFFIX, "vit_mae", "wav2vec2_stable")
"""Padding is compared by `test_reference.py`; the reference knows no suffix, and no adapter behind a block, which this
Wav2Vec2 has; MAE's blocks get patches out of order."""


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    """So that a few tokens are several windows."""
    with mock.patch.multiple(PARTITIONS, WINDOW=8, WINDOWED_FROM=17):
        yield


@dataclass(frozen=True)
class Spelled:
    """An encoder in the words of `reference_encoders.py`, whose modules its layout names; for one image at a time."""

    model: Any
    layout: Layout
    blocks: list[Any]
    arguments: dict[Any, dict[str, Any]]

    def heads(self, block, x, home):
        parts = self.layout.parts(block)
        normed = x[None] if parts.norm1 is None else parts.norm1(x[None])
        project = parts.project
        if callable(project):
            flat = project(block, normed)
        elif len(project) == 1:
            flat = project[0](normed).chunk(3, dim=-1)
        else:
            flat = [each(normed) for each in project]
        q, k, v = (each.view(1, len(x), parts.heads, -1).transpose(1, 2) for each in flat)
        q = q if parts.query_norm is None else parts.query_norm(q)
        k = k if parts.key_norm is None else parts.key_norm(k)
        content = q[0], k[0]
        if self.layout.rotary is not None:
            q, k = self.layout.rotary(block, q, k, home[None], self.arguments[block])
        scale = q.shape[-1] ** -0.5 if parts.scale is None else parts.scale
        return (q[0], k[0], v[0]), content, scale

    def attended(self, block, x, mixed):
        parts = self.layout.parts(block)
        x = x + steps(parts.after_attention, mixed.transpose(0, 1).flatten(1)[None])[0]
        return x if parts.norm_after_attention is None else parts.norm_after_attention(x)

    def compared(self, block, x):
        parts = self.layout.parts(block)
        return x if parts.norm_after_attention is not None else parts.mlp[0](x[None])[0]

    def second_half(self, block, x):
        parts = self.layout.parts(block)
        x = x + steps(parts.mlp, x[None])[0]
        return x if parts.norm_after_mlp is None else parts.norm_after_mlp(x)


def steps(applied, x):
    for step in applied:
        if step is not None:
            x = step(x) if callable(step) else x * step
    return x


def spelled(drawn: Drawn) -> Spelled:
    """The drawn model, and the arguments that its own loop gives each block."""
    tower, found = tower_of(drawn.name, drawn.depth), {}
    model, layout = drawn.model, tower.layout
    blocks = [model.get_submodule(name) for name, _ in tower.blocks]

    def note(block, args, kwargs):
        found[block] = {**dict(zip(layout.arguments, args[1:])), **kwargs}

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    drawn.run()
    for hook in hooks:
        hook.remove()
    return Spelled(model, layout, blocks, found)


@st.composite
def compared_with_the_reference(draw):
    names = [name for name in ENCODERS if name not in UNKNOWN_TO_THE_REFERENCE]
    drawn = draw(drawn_encoders(names=names, dtypes=("float64",), contents=("noise", "bright")))
    tower = tower_of(drawn.name, drawn.depth)
    patches = drawn.tokens - tower.prefix
    # where patches are no grid, such as a video's, none is asked for
    partitions = ["all", "alternate", "random", *(["grid"] if patches == drawn.rows * drawn.columns else [])]
    partition = draw(st.sampled_from(partitions))
    degree = draw(st.sampled_from([*reference_encoders.DEGREES.values(), layered]))
    chosen = Chosen(
        r=tuple(draw(st.lists(st.integers(0, 24), min_size=drawn.depth, max_size=drawn.depth))),
        prefix=tower.prefix,
        guidance=draw(st.sampled_from(["cls", "mean"])) if tower.cls else "mean",
        similarity=draw(st.sampled_from(["heads", "keys", "queries", "hidden"])),
        degree=degree,
        alpha=draw(ALPHAS.filter(lambda alpha: alpha is None or alpha < 100)),
        partition=partition,
        order="spatial" if partition == "all" else draw(st.sampled_from(["partition", "spatial"])),
        reduce=draw(st.sampled_from(["merge", "keep_norm", "prune"])),
        proportional=draw(st.booleans()),
        min_tokens=draw(st.sampled_from([0, 0, 0, 20, 35])),
        seed=draw(st.integers(0, 9)),
        restore=draw(st.sampled_from(["copy", "residual"] if tower.restore else [None, "copy", "residual"])),
        grid=(drawn.rows, drawn.columns) if partition == "grid" else None,
    )
    return drawn, chosen


@fuzz(core=6, nightly=1000, pair=compared_with_the_reference())
def test_reference(pair):
    """Tokens, sizes, sources, R, A and E of every block, in float64."""
    drawn, chosen = pair
    with mock.patch.object(reference_encoders, "DEPTH", drawn.depth):
        reference_encoders.check(spelled(drawn), drawn.inputs(), chosen, atol=1e-9)


@st.composite
def any_setting(draw):
    drawn = draw(drawn_encoders())
    return drawn, draw(turbo_settings(drawn))


@fuzz(core=15, nightly=2000, pair=any_setting(), changed=st.integers(1, 3))
@torch.no_grad()
def test_what_must_always_hold(pair, changed):
    """`changed`: the batch of a second forward."""
    drawn, chosen = pair
    model, tower = drawn.model, tower_of(drawn.name, drawn.depth)
    before, own = snapshot(model), drawn.run()
    handle = turbovlm.apply(model, **chosen, trace=True)
    try:
        for batch in (drawn.batch, changed):
            out = drawn.run(batch=batch)
            check_output(drawn, chosen, handle, out, own if batch == drawn.batch else None)
            check_trace(drawn, chosen, handle, batch)
        assert repr(handle).startswith("Turbo(")
    finally:
        handle.remove()
    assert snapshot(model) == before
    assert torch.equal(drawn.run(), own)
    assert "removed" in repr(handle)
    if drawn.dtype == "float64" and drawn.continuous and drawn.name not in MASKED:
        with turbovlm.apply(model, **chosen):
            untraced = drawn.run(batch=changed)
        # two ways to compute one attention decide alike but for ties, which amounts of many merges come near
        close = torch.isclose(untraced, out, rtol=1e-6, atol=1e-6).all()
        assert close or chosen["degree"] == "coupled_division", (untraced - out).abs().max()
    assert tower.tokens > tower.prefix


def check_output(drawn, chosen, handle, out, own):
    assert out.isfinite().all() and out.dtype == DTYPES[drawn.dtype]
    feature, entries = handle.features[0], handle.trace
    # a pooled output that reads CLS alone never sees what the last block merges, behind its attention
    before = entries if out.ndim == 3 else entries[:-1]
    merged = any(entry.sizes.shape[1] < entry.source.shape[1] for entry in before)
    if own is not None and merged and drawn.content == "noise" and drawn.dtype in ("float64", "float32"):
        assert out.shape != own.shape or not torch.equal(out, own), "tokens were merged, to no effect"
    if own is not None and out.ndim == own.ndim and out.ndim == 3:
        left = entries[-1].source.shape[1] if feature.restore else entries[-1].sizes.shape[1]
        norms_off = own.shape[1] - entries[-1].source.shape[1]  # heads that drop the prefix
        assert out.shape[1] == left + norms_off


def check_trace(drawn, chosen, handle, batch):
    tower, entries = tower_of(drawn.name, drawn.depth), handle.trace
    assert [entry.block for entry in entries] == list(range(drawn.depth))
    tokens = entries[0].source.shape[1]
    prefix, suffix = entries[0].prefix, entries[0].suffix
    assert (prefix, suffix) == (tower.prefix, tower.suffix)
    if drawn.name not in ("siglip2",):
        assert tokens == drawn.tokens
    schedule = handle.schedule(tokens)
    counts = [tokens, *(entry.sizes.shape[1] for entry in entries)]
    if "thresholds" in chosen:
        check_thresholds(chosen, entries, counts, prefix + suffix)
    else:
        assert tuple(counts) == schedule.tokens
    check_amount(chosen, counts, prefix + suffix)
    real = torch.ones(batch, tokens)
    if drawn.name in MASKED:
        real = drawn.inputs(batch)[MASKED[drawn.name]].float()
    ends = torch.cat([torch.arange(prefix), torch.arange(tokens - suffix, tokens)])
    for entry, before in zip(entries, counts):
        assert entry.source.shape == (batch, tokens)
        left = entry.sizes.shape[1]
        assert entry.source.min() >= 0 and entry.source.max() < left
        # every token left stands for one at least; special ones for themselves alone, at the ends
        joined = torch.zeros(batch, left).scatter_add(1, entry.source, torch.ones(batch, tokens))
        assert (joined >= 1).all()
        assert (joined[:, :prefix] == 1).all() and (joined[:, left - suffix :] == 1).all()
        assert torch.equal(
            entry.source[:, ends], torch.where(ends < prefix, ends, ends - tokens + left).expand(batch, -1)
        )
        if chosen["reduce"] != "prune":
            counted = torch.zeros(batch, left).scatter_add(1, entry.source, real)
            torch.testing.assert_close(entry.sizes.float(), counted, rtol=0, atol=1e-3)
        assert entry.semantic.shape == (batch, before) and entry.semantic.isfinite().all()
        torch.testing.assert_close(entry.semantic.sum(1).double(), torch.ones(batch).double(), rtol=0, atol=1e-2)
        assert entry.redundancy.shape == entry.degree.shape == (batch, before)
        known = ~entry.redundancy.isnan()
        assert not entry.degree[known].isnan().any()
        assert (entry.redundancy[known].abs() <= 1 + 1e-3).all()
    numbers = torch.arange(counts[-1]).expand(batch, -1)
    assert torch.equal(handle.restore(numbers), entries[-1].source)


def check_thresholds(chosen, entries, counts, protected):
    """Every block merges what each image of the batch has above its threshold, as far as the clamp lets it."""
    for entry, threshold, before, after in zip(entries, chosen["thresholds"], counts, counts[1:]):
        most = 0 if before < chosen["min_tokens"] else (before - protected) // 2
        spared = (entry.degree.nan_to_num(-torch.inf) > threshold).sum(1).min()
        assert before - after == min(most, spared)


def check_amount(chosen, counts, protected):
    """What was asked for is what came, as far as the paper's clamp lets it."""
    r, keep, depth = chosen.get("r"), chosen.get("keep"), len(counts) - 1
    assert all(before >= after for before, after in pairwise(counts))
    if r is not None and "thresholds" not in chosen and chosen["partition"] != "grid":
        blocks = chosen.get("blocks")
        in_every = clamped(chosen, counts[0], protected, [r] * depth if isinstance(r, int) else r)
        if isinstance(blocks, list):
            shares = dict(zip(blocks, r if isinstance(r, list) else spread(r * depth, len(blocks))))
            assert counts == clamped(chosen, counts[0], protected, [shares.get(i, 0) for i in range(depth)])
        elif counts != in_every:  # fewer blocks merge by themselves where they have all of it to give
            assert isinstance(r, int) and blocks is None and counts[0] - counts[-1] == r * depth
    if keep is not None and chosen["min_tokens"] == 0 and chosen["partition"] != "grid":
        least, blocks = counts[0], chosen.get("blocks")
        for _ in blocks if isinstance(blocks, list) else counts[1:]:
            least -= (least - protected) // 2
        assert abs(counts[-1] - max(keep * counts[0], least)) <= 1, "not the share asked for"


def clamped(chosen, tokens, protected, amounts):
    """Tokens before each block and behind the last, by the paper's clamp."""
    counts = [tokens]
    for r in amounts:
        most = 0 if counts[-1] < chosen["min_tokens"] else (counts[-1] - protected) // 2
        counts.append(counts[-1] - min(r, most))
    return counts


@fuzz(
    core=3,
    nightly=300,
    drawn=drawn_encoders(dtypes=("float64",), contents=("noise",)),
    r=st.integers(1, 12),
    data=st.data(),
)
@torch.no_grad()
def test_images_do_not_depend_on_their_batch(drawn, r, data):
    """Each image of a batch comes to what it comes to alone."""
    assume(drawn.name not in (*MASKED, "vit_mae"))
    chosen = {"order": data.draw(st.sampled_from(["spatial", "partition"])), "dense": data.draw(st.booleans())}
    inputs = drawn.inputs(3)
    with turbovlm.apply(drawn.model, r=r, **chosen):
        together = drawn.family.output(drawn.model(**inputs))
        for image in range(3):
            one = {k: v[image : image + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            alone = drawn.family.output(drawn.model(**one))
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-8, atol=1e-8)
