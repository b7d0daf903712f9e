"""Encoders and operations in every setting against `reference.py`, block by block, to 1e-10.

All data is drawn continuously, so that no two tokens are equally similar or of equal degree: what happens at ties is
not compared here.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference_encoders import DEGREES, DEPTH, PARTITIONS, Chosen, bert, check, eva, images, layered, vit, windows_of
from turbovlm.ops import (
    Ranking,
    information_degree,
    match,
    merge_ranked,
    mutual_redundancy,
    partition_tokens,
    proportional_attention,
    semantic_value,
)

WINDOW, WINDOWED_FROM = 8, 17
"""In place of 512 and 1,025 patches, so that a few tokens are several windows."""


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    with mock.patch.multiple(PARTITIONS, WINDOW=WINDOW, WINDOWED_FROM=WINDOWED_FROM):
        yield


AMOUNTS = st.one_of(
    st.integers(0, 20).map(lambda r: (r,) * DEPTH), st.tuples(*[st.integers(0, 20) for _ in range(DEPTH)])
)
SETTINGS = {
    "r": AMOUNTS,
    "similarity": st.sampled_from(["heads", "keys", "queries", "hidden"]),
    "degree": st.sampled_from(list(DEGREES)),
    "alpha": st.one_of(st.none(), st.floats(0, 50)),
    "order": st.sampled_from(["partition", "spatial"]),
    "reduce": st.sampled_from(["merge", "keep_norm", "prune"]),
    "proportional": st.booleans(),
    "partition": st.sampled_from(["alternate", "random", "all"]),
    "seed": st.integers(0, 5),
    "restore": st.sampled_from([None, "copy", "residual"]),
}


@settings(deadline=None, max_examples=300)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 4]),
    prefix=st.integers(0, 5),
    guide=st.sampled_from(["cls", "mean"]),
    boundary=st.sampled_from([None, -1, 0, 1]),
    **SETTINGS,
)
def test_encoders(batch, rows, columns, heads, prefix, guide, boundary, **chosen):
    """`boundary`: `min_tokens` beside the number of tokens with which the second block starts."""
    cls = prefix > 0 and guide == "cls"
    family = vit(heads, prefix, cls)
    tokens = rows * columns + prefix
    second = tokens - reference.clamped(chosen["r"][0], tokens, prefix, 0)
    chosen["degree"] = DEGREES[chosen["degree"]]
    if chosen["partition"] == "all":
        chosen["order"] = "spatial"  # there are no halves to order by
    if not cls:
        chosen["restore"] = chosen["restore"] or "copy"  # its head reads the mean of all positions
    chosen = Chosen(
        **chosen,
        prefix=prefix,
        guidance=guide if cls else "mean",
        min_tokens=0 if boundary is None else max(second + boundary, 0),
    )
    check(family, {"x": images(batch, rows, columns, chosen.seed)}, chosen)


@settings(deadline=None, max_examples=15)
@given(r=AMOUNTS, guidance=st.sampled_from(["cls", "mean"]), similarity=SETTINGS["similarity"])
def test_the_mean_guides_a_model_that_has_a_cls_token(r, guidance, similarity):
    check(vit(2, 3, True), {"x": images(2, 5, 6, 0)}, Chosen(r=r, prefix=3, guidance=guidance, similarity=similarity))


@settings(deadline=None, max_examples=15)
@given(r=AMOUNTS, rows=st.integers(1, 6), columns=st.integers(1, 6), order=SETTINGS["order"], reduce=SETTINGS["reduce"])
def test_one_partner_in_every_cell(r, rows, columns, order, reduce):
    chosen = Chosen(r=r, partition="grid", grid=(rows, columns), order=order, reduce=reduce)
    check(vit(2, 1, True), {"x": images(2, rows, columns, 0)}, chosen)


@settings(deadline=None, max_examples=15)
@given(r=AMOUNTS, similarity=SETTINGS["similarity"], order=SETTINGS["order"], restore=SETTINGS["restore"])
def test_rotary_positions(r, similarity, order, restore):
    """A merged token is rotated by the position at which it stands; what is compared has no position."""
    chosen = Chosen(r=r, similarity=similarity, order=order, restore=restore)
    check(eva(), {"x": images(2, 6, 6, 3)}, chosen)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(4, 30),
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=3),
    guidance=st.sampled_from(["cls", "mean"]),
    **{name: strategy for name, strategy in SETTINGS.items() if name not in ("order", "reduce", "restore")},
    reduce=st.sampled_from(["merge", "keep_norm"]),
    restore=st.sampled_from(["copy", "residual"]),
)
def test_padded_texts(tokens, lengths, **chosen):
    """Padding goes first, weighs nothing and is attended by nobody. Of itself nothing is said.

    All padding is of equal degree, so which of it goes is open: in spatial order no word's place depends on it, and
    what is left of it is all alike, unless it is pruned.
    """
    mask = torch.stack([torch.arange(tokens) < length for length in lengths]).long()
    # all different, so that no two words are alike
    ids = torch.stack(
        [torch.randperm(90, generator=torch.Generator().manual_seed(b))[:tokens] + 5 for b in range(len(mask))]
    )
    chosen["degree"] = DEGREES[chosen["degree"]]
    check(bert(), {"input_ids": ids, "attention_mask": mask}, Chosen(**chosen), mask)


# Operations on plain tensors


def tokens_of(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes_of(batch, tokens, prefix, seed):
    sizes = torch.randint(1, 6, (batch, tokens), generator=torch.Generator().manual_seed(seed)).double()
    sizes[:, :prefix] = 1
    return sizes


SHAPES = {
    "batch": st.integers(1, 3),
    "tokens": st.integers(4, 40),
    "heads": st.integers(1, 4),
    "prefix": st.integers(0, 5),
    "seed": st.integers(0, 1000),
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@settings(deadline=None, max_examples=50)
@given(**SHAPES, sized=st.booleans(), scale=st.sampled_from([None, 0.3]))
def test_attention_and_its_guides_row(batch, tokens, heads, prefix, seed, sized, scale):
    q, k, v = tokens_of((3, batch, heads, tokens, 6), seed)
    sizes = sizes_of(batch, tokens, prefix, seed)
    known = sizes if sized else None
    factor = 6**-0.5 if scale is None else scale
    mixed = proportional_attention(q, k, v, known, scale=scale)
    rows = semantic_value(q[:, :, :1] * factor, k, known)
    for b in range(batch):
        s = sizes[b] if sized else torch.ones(tokens).double()
        torch.testing.assert_close(mixed[b], reference.attention(q[b], k[b], v[b], s, factor), **EXACT)
        guide = reference.guide_of(q[b], s, prefix, "cls")
        torch.testing.assert_close(rows[b], reference.semantic_value(guide, k[b], s, factor), **EXACT)


@settings(deadline=None, max_examples=60)
@given(
    **{**SHAPES, "tokens": st.integers(4, 60)},
    kind=st.sampled_from(["alternate", "random", "all"]),
    degree=st.sampled_from(list(DEGREES)),
    alpha=SETTINGS["alpha"],
    sized=st.booleans(),
    r=st.integers(0, 30),
    order=SETTINGS["order"],
    reduce=SETTINGS["reduce"],
    block=st.integers(0, 3),
)
def test_matching(batch, tokens, heads, prefix, seed, kind, degree, alpha, sized, r, order, reduce, block):
    prefix = min(prefix, tokens - 1)
    order = "spatial" if kind == "all" else order
    x, features = tokens_of((batch, tokens, 5), seed), tokens_of((batch, tokens, 3 * heads), seed + 1)
    A = tokens_of((batch, tokens), seed + 2).softmax(dim=1)
    sizes = sizes_of(batch, tokens, prefix, seed)
    split = partition_tokens(tokens, prefix, kind, block=block, seed=seed)
    windows = windows_of(tokens, prefix, kind, block, seed)
    given_ = {"degree": DEGREES[degree], "alpha": alpha, "seed": seed, "block": block}
    known = sizes if sized else None
    merge = match(features, r, A, sizes=known, prefix=prefix, partition=kind, order=order, reduce=reduce, **given_)
    redundancy, partner = mutual_redundancy(features, split)
    merged, lost = merge.merge(x), merge.lost(x, merge.merge(x))
    for b in range(batch):
        R, nearest = reference.mutual_redundancy(features[b], windows)
        places = windows_places(split)
        torch.testing.assert_close(redundancy[b], torch.tensor(list(R.values())).double(), **EXACT)
        if windows[0][1] and -1 not in nearest.values():
            assert [places[1][j] for j in partner[b].tolist()] == [nearest[i] for i in R]
        E = ranks(degree, redundancy[b], A[b, list(R)], alpha, block, seed)
        torch.testing.assert_close(information_degree(redundancy, A[:, list(R)], **given_)[b], E, **EXACT)
        goes = min(r, (tokens - prefix) // 2)
        best = sorted(R, key=lambda i: -E[places[0].index(i)])[:goes]
        into = reference.paired(dict(zip(R, E)), nearest, goes) if kind == "all" else {i: nearest[i] for i in best}
        s = sizes[b] if sized else torch.ones(tokens).double()
        kept, y, left, source = reference.merge(x[b], s, into, windows, order, reduce)
        if best or order == "spatial":
            assert merge.kept[b].tolist() == kept
            assert torch.equal(merge.source[b], source)
            torch.testing.assert_close(merge.sizes[b], left, **EXACT)
            torch.testing.assert_close(merged[b], y, **EXACT)
            torch.testing.assert_close(merge.unmerge(merged)[b], y[source], **EXACT)
        torch.testing.assert_close(merge.unmerge(merged, lost)[b], x[b], **EXACT)
    e = information_degree(redundancy, A[:, list(R)], **given_)
    ranking = Ranking(split, tokens, redundancy, partner, e)
    direct, _ = merge_ranked(ranking, len(best), sizes=known, order=order, reduce=reduce)
    assert torch.equal(direct.source, merge.source) and torch.equal(direct.sizes, merge.sizes)


def windows_places(split):
    """The candidates and the partners, as lists of tokens."""
    return [
        list(range(index.start, index.stop, index.step)) if isinstance(index, slice) else index.tolist()
        for index in (split.candidates, split.destinations)
    ]


def ranks(degree, R, A, alpha, block, seed):
    if degree == "random":
        return information_degree(R[None], None, block, degree="random", seed=seed)[0]
    if degree == "a callable":
        return layered(R, A, block)
    return reference.DEGREES[degree](R, A, reference.OWN_ALPHA.get(degree, 2.0) if alpha is None else alpha)
