"""The operations on plain tensors: any sizes, ties, padding, zeros and dtypes, against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st

import reference
from fuzz.drawing import fuzz
from fuzz.models import ALPHAS, DTYPES
from reference_encoders import PARTITIONS, windows_of
from turbovlm.ops import (
    LayeredDegree,
    information_degree,
    match,
    merge_ranked,
    mutual_redundancy,
    partition_tokens,
    plain,
    proportional_attention,
    rank_candidates,
    semantic_value,
    size_bias,
)
from turbovlm.ops.partition import positions

CLOSE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}
KINDS = ("noise", "ties", "zeros", "some zeros", "twins", "opposites", "faint", "bright")


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    with mock.patch.multiple(PARTITIONS, WINDOW=8, WINDOWED_FROM=17):
        yield


def tensor_of(shape, kind, seed):
    """In float64: noise; of few values, so that many are equal; zeros; pairs that are equal, or opposite."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=generator).double()
    if kind == "zeros":
        return torch.zeros_like(noise)
    if kind == "some zeros":
        return noise * torch.randint(0, 2, (*shape[:-1], 1), generator=generator)
    if kind in ("twins", "opposites"):
        tokens = shape[-2]
        paired = noise[..., torch.arange(tokens) // 2, :]
        signs = 1 - 2 * (torch.arange(tokens) % 2) if kind == "opposites" else torch.ones(tokens)
        return paired * signs.unsqueeze(-1)
    return noise * {"noise": 1, "faint": 1e-4, "bright": 100}[kind]


@dataclass(frozen=True)
class Case:
    """Tokens, and how they are split."""

    batch: int
    tokens: int
    prefix: int
    suffix: int
    width: int
    kind: str
    partition: str
    grid: tuple[int, int] | None
    block: int
    dtype: str
    content: str
    padding: str
    seed: int

    def tensor(self, offset, *shape):
        return tensor_of(shape, self.content, self.seed + offset).to(DTYPES[self.dtype])

    def split(self):
        return partition_tokens(
            self.tokens,
            self.prefix,
            self.partition,
            suffix=self.suffix,
            block=self.block,
            seed=self.seed,
            grid=self.grid,
        )

    def sizes(self):
        """Patches that each token stands for; 0 for padding, at the end; None for ones."""
        if self.padding == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 5)
        sizes = torch.randint(1, 9, (self.batch, self.tokens), generator=generator)
        sizes[:, : self.prefix] = 1
        sizes[:, self.tokens - self.suffix :] = 1
        if self.padding == "padded":
            for image in range(self.batch):
                real = int(torch.randint(0, self.tokens + 1, (), generator=generator))
                sizes[image, max(real, self.prefix, 1) :] = 0
        return sizes.to(torch.promote_types(DTYPES[self.dtype], torch.float32))


@st.composite
def cases(draw, dtypes=tuple(DTYPES), partitions=("alternate", "random", "grid"), suffix=True):
    kind = draw(st.sampled_from(partitions))
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    prefix, behind = draw(st.integers(0, 5)), draw(st.integers(0, 3)) if suffix else 0
    patches = rows * columns if kind == "grid" else draw(st.integers(0, 70))
    tokens = max(prefix + patches + behind, 1)
    return Case(
        batch=draw(st.integers(1, 3)),
        tokens=tokens,
        prefix=prefix,
        suffix=behind,
        width=draw(st.sampled_from([1, 2, 3, 8, 16])),
        kind=kind,
        partition=kind,
        grid=(rows, columns) if kind == "grid" else None,
        block=draw(st.integers(0, 12)),
        dtype=draw(st.sampled_from(dtypes)),
        content=draw(st.sampled_from(KINDS)),
        padding=draw(st.sampled_from(["none", "sizes", "padded"])),
        seed=draw(st.integers(0, 10**6)),
    )


def as_lists(split):
    return [positions(index, torch.device("cpu")).tolist() for index in (split.candidates, split.destinations)]


@fuzz(core=30, nightly=2000, case=cases())
def test_partition(case):
    """Every patch is a candidate or a destination, prefix and suffix are neither, and halves are halves."""
    candidates, destinations = as_lists(case.split())
    assert as_lists(case.split()) == [candidates, destinations]
    assert candidates == sorted(candidates) and destinations == sorted(destinations)
    assert sorted(candidates + destinations) == list(range(case.prefix, max(case.tokens - case.suffix, case.prefix)))
    if case.partition == "grid":
        rows, columns = case.grid
        corners = [case.prefix + i * columns + j for i in range(0, rows, 2) for j in range(0, columns, 2)]
        assert destinations == corners
    elif case.partition == "random":
        assert len(candidates) - len(destinations) in (0, 1)
    else:
        assert abs(len(candidates) - len(destinations)) <= 1
        assert all(i % 2 == 0 for i in candidates) and all(i % 2 == 1 for i in destinations)


@fuzz(
    core=25,
    nightly=1500,
    case=cases(),
    degree=st.one_of(
        st.sampled_from([*reference.DEGREES, "random"]),
        st.builds(LayeredDegree, ALPHAS.filter(bool), st.just(0.5), st.integers(0, 9)),
    ),
    alpha=ALPHAS,
    share=st.floats(0, 1),
    order=st.sampled_from(["partition", "spatial"]),
    reduce=st.sampled_from(["merge", "keep_norm", "prune"]),
)
def test_merging(case, degree, alpha, share, order, reduce):
    """R and E are the reference's; the r of highest E go to a most similar one; means, sizes, the way back."""
    split, sizes = case.split(), case.sizes()
    candidates, destinations = as_lists(split)
    features, x = case.tensor(1, case.batch, case.tokens, case.width), case.tensor(2, case.batch, case.tokens, 4)
    A = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(case.seed)).double()
    A = (A / A.sum(1, keepdim=True)).to(torch.promote_types(DTYPES[case.dtype], torch.float32))
    settings = {"degree": degree, "alpha": alpha, "seed": case.seed % 1000}
    ranking = rank_candidates(
        features, split, A, case.block, **settings, sizes=sizes if case.padding == "padded" else None
    )
    tolerance = CLOSE["float32" if case.dtype != "float64" else "float64"]
    check_ranking(case, ranking, features.double(), A, sizes, candidates, destinations, settings, tolerance)
    r = round(share * len(candidates)) if destinations else 0
    merge, merged = merge_ranked(ranking, r, x, sizes=sizes, order=order, reduce=reduce)
    later, none = merge_ranked(ranking, r, sizes=sizes, order=order, reduce=reduce)
    assert none is None and torch.equal(later.source, merge.source) and torch.equal(later.sizes, merge.sizes)
    assert torch.equal(later.merge(x), merged) and torch.equal(merge.merge(x), merged)
    assert merged.dtype == x.dtype and merged.isfinite().all() and merge.sizes.isfinite().all()
    assert merged.shape == (case.batch, case.tokens - r, 4)
    for image in range(case.batch):
        check_merge(case, ranking, merge, merged, x, sizes, image, candidates, destinations, r, order, reduce)
    check_way_back(case, merge, merged, x, sizes)


@fuzz(
    core=25,
    nightly=1500,
    case=cases(partitions=("all",)),
    degree=st.sampled_from(["weighted_distance", "weighted_difference", "redundancy", "random"]),
    share=st.floats(0, 1),
    reduce=st.sampled_from(["merge", "keep_norm", "prune"]),
)
def test_all_pairs(case, degree, share, reduce):
    """Any patch goes into any other of its window, however alike they are; none goes into one that goes itself."""
    split, sizes = case.split(), case.sizes()
    patches = max(case.tokens - case.suffix - case.prefix, 0)
    features, x = case.tensor(1, case.batch, case.tokens, case.width), case.tensor(2, case.batch, case.tokens, 4)
    A = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(case.seed)).softmax(dim=1)
    padded = sizes if case.padding == "padded" else None
    ranking = rank_candidates(features, split, A, case.block, degree=degree, sizes=padded)
    unit = features.double() / features.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    number = -(-patches // 8) if patches >= 17 else 1
    for image in range(case.batch):
        for i in range(patches):
            window = next(w for w in range(number) if i < patches * (w + 1) // number)
            others = set(range(patches * window // number, patches * (window + 1) // number)) - {i}
            if padded is not None:
                others = {j for j in others if padded[image, case.prefix + j] > 0}
            cosines = [float(unit[image, case.prefix + i] @ unit[image, case.prefix + j]) for j in others]
            tolerance = 1e-9 if case.dtype == "float64" else 1e-4
            assert float(ranking.redundancy[image, i]) == pytest.approx(max([*cosines, -1]), abs=tolerance)
            assert not others or int(ranking.nearest[image, i]) in others
    r = round(share * (patches // 2))
    merge, merged = merge_ranked(ranking, r, x, sizes=sizes, order="spatial", reduce=reduce)
    assert merged.isfinite().all() and merged.shape == (case.batch, case.tokens - r, 4)
    for image in range(case.batch):
        src, source, kept = (part[image].tolist() for part in (merge.src, merge.source, merge.kept))
        assert len({*src}) == r and all(case.prefix <= i < case.prefix + patches for i in src)
        assert kept == [i for i in range(case.tokens) if i not in src]
        assert all(source[i] == place for place, i in enumerate(kept))
        into = {i: kept[source[i]] for i in src}
        assert all(case.prefix <= j < case.prefix + patches for j in into.values())
        s = torch.ones(case.tokens).double() if sizes is None else sizes[image].double()
        if padded is not None and r >= (gone := int((s[case.prefix : case.prefix + patches] == 0).sum())) > 0:
            assert (
                number > 1
                or gone >= patches
                or {i for i in range(case.prefix, case.prefix + patches) if s[i] == 0} <= {*src}
            )
        rows = "merge" if reduce == "keep_norm" else reduce
        _, tokens, left, _ = reference.merge(x[image].double(), s, into, [], "spatial", rows)
        torch.testing.assert_close(merge.sizes[image].double(), left, rtol=0, atol=1e-4)
        if reduce != "keep_norm":
            scale = max(float(x.double().abs().max()), 1e-30)
            torch.testing.assert_close(merged[image].double(), tokens, rtol=0, atol=CLOSE[case.dtype] * scale)


def check_ranking(case, ranking, features, A, sizes, candidates, destinations, settings, tolerance):
    assert ranking.redundancy.shape == ranking.degree.shape == ranking.nearest.shape == (case.batch, len(candidates))
    assert not ranking.degree.isnan().any() and ranking.redundancy.isfinite().all()
    unit = features / features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    windows = windows_of_split(case, candidates, destinations)
    for image in range(case.batch):
        for place, i in enumerate(candidates):
            allowed = next(partners for members, partners in windows if i in members)
            R = ranking.redundancy[image, place].double()
            if not allowed:
                assert R == -1
                continue
            cosines = unit[image, allowed] @ unit[image, i]
            partner = destinations[ranking.nearest[image, place]]
            assert partner in allowed
            torch.testing.assert_close(R, cosines.max(), rtol=0, atol=tolerance)
            torch.testing.assert_close(cosines[allowed.index(partner)], cosines.max(), rtol=0, atol=tolerance)
    if settings["degree"] == "random":
        return
    given = A[:, candidates].double()
    redundancy = ranking.redundancy.double()
    if callable(settings["degree"]):
        E = redundancy - settings["degree"].alpha * 0.5 ** abs(settings["degree"].gamma - case.block) * given
    else:
        alpha = settings["alpha"]
        alpha = reference.OWN_ALPHA.get(settings["degree"], 2.0) if alpha is None else alpha
        rows = [reference.DEGREES[settings["degree"]](R, a, alpha) for R, a in zip(redundancy, given)]
        E = torch.stack(rows) if rows else redundancy
    if case.padding == "padded":
        E = E.masked_fill(sizes[:, candidates] == 0, torch.inf)
    torch.testing.assert_close(
        ranking.degree.double(), E, rtol=1e-9 if case.dtype == "float64" else 1e-4, atol=tolerance
    )


def windows_of_split(case, candidates, destinations):
    """Candidates and partners of each window."""
    patches = len(candidates) + len(destinations)
    number = -(-patches // 8) if case.partition == "random" and patches >= 17 else 1

    def share(half, window):
        return half[len(half) * window // number : len(half) * (window + 1) // number]

    return [(share(candidates, w), share(destinations, w)) for w in range(number)]


def check_merge(case, ranking, merge, merged, x, sizes, image, candidates, destinations, r, order, reduce):
    src, source = merge.src[image].tolist(), merge.source[image].tolist()
    assert len(set(src)) == len(src) == r and set(src) <= set(candidates)
    E = dict(zip(candidates, ranking.degree[image].tolist()))
    stay = [E[i] for i in candidates if i not in src]
    if src and stay:
        assert min(E[i] for i in src) >= max(stay)
    nearest = dict(zip(candidates, ranking.nearest[image].tolist()))
    into = {i: destinations[nearest[i]] for i in src}
    s = torch.ones(case.tokens).double() if sizes is None else sizes[image].double()
    windows = windows_of_split(case, candidates, destinations)
    kept = [i for i in range(case.tokens) if i not in into]
    if order == "partition":
        ends = [range(case.prefix), candidates, destinations, range(case.tokens - case.suffix, case.tokens)]
        if case.tokens == case.prefix + case.suffix + len(candidates) + len(destinations):
            kept = [i for part in ends for i in part if i not in into]
    assert merge.kept[image].tolist() == kept
    assert source == [kept.index(into.get(i, i)) for i in range(case.tokens)]
    # the reference orders tokens as the paper does, without a suffix: only its values are compared
    places, tokens, left, _ = reference.merge(
        x[image].double(), s, into, windows, "spatial", "merge" if reduce == "keep_norm" else reduce
    )
    again = [places.index(i) for i in kept]
    torch.testing.assert_close(merge.sizes[image].double(), left[again], rtol=0, atol=1e-4)
    if reduce != "prune":
        assert merge.sizes[image].double().sum() == pytest.approx(float(s.sum()), rel=1e-6)
    wanted, found = tokens[again], merged[image].double()
    scale = max(float(x.double().abs().max()), 1e-30)
    if reduce == "keep_norm":
        check_lengths(wanted, found, x[image].double(), s, source, scale, CLOSE[case.dtype])
    else:
        torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE[case.dtype] * scale)
    alone = [place for place in range(len(kept)) if source.count(place) == 1 and left[again][place] > 0]
    assert torch.equal(merged[image][alone], x[image][[kept[place] for place in alone]])


def check_lengths(mean, found, x, s, source, scale, tolerance):
    """Each is as long as its parts on average, and points where their mean does; a mean of no length stays as it is."""
    for place in range(len(mean)):
        parts = [i for i, where in enumerate(source) if where == place]
        total = s[parts].sum()
        if total == 0:
            continue
        length = (s[parts] / total * x[parts].norm(dim=1)).sum()
        if mean[place].norm() < 1e-2 * scale:  # opposite parts: where rounding errors point
            assert found[place].norm() <= length * (1 + tolerance) + 1e-9
            continue
        torch.testing.assert_close(
            found[place], mean[place] / mean[place].norm() * length, rtol=0, atol=30 * tolerance * scale
        )


def check_way_back(case, merge, merged, x, sizes):
    y = merge.unmerge(merged)
    for image in range(case.batch):
        assert torch.equal(y[image], merged[image][merge.source[image]])
    back = merge.unmerge(merged, merge.lost(x, merged))
    scale = max(float(x.double().abs().max()), 1e-30)
    real = torch.ones(x.shape[:2]) if sizes is None else sizes  # padding becomes zeros
    torch.testing.assert_close(back[real > 0].double(), x[real > 0].double(), rtol=0, atol=CLOSE[case.dtype] * scale)


@fuzz(core=25, nightly=1500, case=cases(), heads=st.integers(1, 4), factor=st.sampled_from([None, 0.0, 0.3, 3.0]))
def test_attention(case, heads, factor):
    """Proportional attention, and the guide's row of it; nobody attends to padding."""
    q, k, v = (case.tensor(i, case.batch, heads, case.tokens, case.width) for i in range(3))
    sizes = case.sizes()
    scale = case.width**-0.5 if factor is None else factor
    mixed = proportional_attention(q, k, v, sizes, scale=factor)
    rows = semantic_value(q[:, :, :1] * scale, k, sizes)
    assert mixed.dtype == q.dtype and mixed.isfinite().all() and rows.isfinite().all()
    s = torch.ones(case.batch, case.tokens).double() if sizes is None else sizes.double()
    precise = case.dtype in ("float64", "float32")
    for image in range(case.batch):
        guide = (q[image, :, 0] * scale).double()  # rounded as the library's was
        row = reference.semantic_value(guide, k[image].double(), s[image], 1.0)
        wanted = reference.attention(*(each[image].double() for each in (q, k, v)), s[image], scale)
        magnitude = max(float(v.double().abs().max()), 1e-30)
        if (precise and case.content != "bright") or case.dtype == "float64":
            torch.testing.assert_close(mixed[image].double(), wanted, rtol=0, atol=10 * CLOSE[case.dtype] * magnitude)
        assert (mixed[image].double().abs() <= magnitude * (1 + CLOSE[case.dtype])).all()
        if case.content != "bright" or precise:
            torch.testing.assert_close(rows[image].double(), row, rtol=0, atol=10 * CLOSE[case.dtype])
        assert (rows[image][s[image] == 0] == 0).all()
    torch.testing.assert_close(
        rows.double().sum(1), torch.ones(case.batch).double(), rtol=0, atol=10 * CLOSE[case.dtype]
    )


@fuzz(
    core=10,
    nightly=500,
    sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_size_bias(sizes, dtype):
    """`log s`, finite in every dtype."""
    bias = size_bias(torch.tensor([sizes]).to(torch.promote_types(DTYPES[dtype], torch.float32)), DTYPES[dtype])
    assert bias.shape == (1, 1, 1, len(sizes)) and bias.dtype == DTYPES[dtype] and bias.isfinite().all()
    for size, found in zip(sizes, bias.flatten().tolist()):
        if size:
            assert found == pytest.approx(torch.tensor(size).double().log().item(), rel=1e-2, abs=1e-6)
        else:
            assert found == pytest.approx(plain.LOG_0, rel=1e-2)


@fuzz(
    core=20,
    nightly=1500,
    case=cases(dtypes=("float64", "float32"), suffix=False),
    r=st.one_of(st.integers(0, 80), st.integers(0, 10**9)),
    degree=st.sampled_from([*reference.DEGREES, "random"]),
    order=st.sampled_from(["partition", "spatial"]),
    reduce=st.sampled_from(["merge", "keep_norm", "prune"]),
)
def test_match(case, r, degree, order, reduce):
    """Any r, clamped to half of the patches, or to the candidates of a grid; as the single steps in a row."""
    features = case.tensor(0, case.batch, case.tokens, case.width)
    A = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(case.seed)).to(features)
    sizes, split = case.sizes(), case.split()
    prefix = min(case.prefix, case.tokens)
    common = {"block": case.block, "seed": case.seed, "degree": degree}
    found = match(
        features,
        r,
        A,
        sizes=sizes,
        prefix=prefix,
        partition=case.partition,
        grid=case.grid,
        order=order,
        reduce=reduce,
        **common,
    )
    candidates, destinations = as_lists(split)
    most = len(candidates) if case.partition == "grid" else max(case.tokens - prefix, 0) // 2
    assert found.sizes.shape == (case.batch, case.tokens - min(r, most))
    redundancy, nearest = mutual_redundancy(features, split)
    E = information_degree(redundancy, A[:, candidates], case.block, degree=degree, seed=case.seed)
    for image in range(case.batch):
        chosen = found.src[image].tolist()
        ranked = dict(zip(candidates, E[image].tolist() if case.padding != "padded" else []))
        stay = [e for i, e in ranked.items() if i not in chosen]
        if ranked and chosen and stay:
            assert min(ranked[i] for i in chosen) >= max(stay)
        source = found.source[image].tolist()
        for i in chosen:
            assert source[i] == source[destinations[nearest[image, candidates.index(i)]]]
    assert windows_of(case.tokens, prefix, "alternate")
