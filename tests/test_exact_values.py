"""What one setting computes, said as a value, where `test_reference.py` does not reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import turbovlm
from reference_encoders import images, vit
from turbovlm import ReadConfig
from turbovlm.ops import information_degree, mutual_redundancy, partition_tokens
from turbovlm.ops.partition import Partition, hashed_uniform
from turbovlm.vlm.select import select
from vlms import VLMS, seeded, vision_encoder_decoder

timm = pytest.importorskip("timm")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("patches", "number"), [(1024, 1), (1025, 3), (1536, 3), (1537, 4)])
def test_windows_begin_at_1025_patches(patches, number):
    """Below, a token may merge into any partner; from there on within windows of at most 512 patches."""
    split = partition_tokens(patches + 1, 1, "random")
    features = randn(1, patches + 1, 8)
    redundancy, partner = mutual_redundancy(features, split)
    candidates, partners = split.candidates.tolist(), split.destinations.tolist()
    assert (len(candidates), len(partners)) == (patches - patches // 2, patches // 2)
    unit = features[0] / features[0].norm(dim=-1, keepdim=True)
    for window in range(number):
        rows = slice(len(candidates) * window // number, len(candidates) * (window + 1) // number)
        columns = slice(len(partners) * window // number, len(partners) * (window + 1) // number)
        assert len(candidates[rows]) + len(partners[columns]) <= (1024 if number == 1 else 512)
        best = (unit[candidates[rows]] @ unit[partners[columns]].T).max(dim=1)
        torch.testing.assert_close(redundancy[0, rows], best.values)
        assert torch.equal(partner[0, rows], best.indices + columns.start)


@torch.no_grad()
def test_min_tokens_is_the_fewest_with_which_a_block_merges():
    """31 tokens, 4 merged in a block: 31, 27, 23, 19 where nothing stops it."""
    model, pixels = vit(2, 1, True).model, images(1, 5, 6, 0)
    for fewest, tokens in ((0, (27, 23, 19)), (23, (27, 23, 19)), (24, (27, 23, 23)), (27, (27, 23, 23))):
        with turbovlm.apply(model, r=4, blocks="every", min_tokens=fewest, trace=True) as handle:
            model(pixels)
            assert tuple(entry.sizes.shape[1] for entry in handle.trace) == tokens
            assert handle.schedule(31).tokens == (31, *tokens)
    for fewest, tokens in ((31, (27, 27, 27)), (32, (31, 31, 31))):
        with turbovlm.apply(model, r=4, blocks="every", min_tokens=fewest, trace=True) as handle:
            model(pixels)
            assert tuple(entry.sizes.shape[1] for entry in handle.trace) == tokens


@torch.no_grad()
def test_half_of_the_dropped_weights_are_kept_and_doubled():
    """Attention's dropout acts on the weights of merged tokens too: its mean over many forwards is attention without.

    Values are all ones, so that a row of attention is the sum of its weights: 1 without dropout, and with dropout of
    a half, of mean 1 and of the variance of N weights that are each 0 or doubled.
    """
    from turbovlm.ops import proportional_attention

    torch.manual_seed(0)
    q, k = randn(2, 50, 2, 20, 8).unbind(0)
    sizes = torch.randint(1, 5, (50, 20)).double()
    sums = proportional_attention(q, k, torch.ones_like(k), sizes, dropout_p=0.5)[..., 0]
    weights = torch.stack([(8**-0.5 * q[b] @ k[b].mT + sizes[b].log()).softmax(-1) for b in range(50)])
    variance = weights.square().sum(-1)  # Σ w² (2² · ½ − 1)
    assert (sums.mean() - 1).abs() < 4 * (variance.mean() / sums.numel()) ** 0.5
    assert (((sums - 1).square() / variance).mean() - 1).abs() < 0.15


class Recorded:
    """A degree that keeps the A it is given, `E = R`."""

    def __init__(self):
        self.semantic = []

    def __call__(self, R, A, block):
        self.semantic.append(A.clone())
        return R


def attention_row(block, names, inputs, run):
    """The queries of CLS and all keys that `block` projects while `run` runs, `[batch, 4, N, 8]` each."""
    seen = {}
    hooks = [
        block.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: seen.update({name: out.unflatten(-1, (4, 8)).transpose(1, 2)})
        )
        for name in names
    ]
    run(**inputs)
    for hook in hooks:
        hook.remove()
    return (seen[name] for name in names)


def of_patches(q, k, before):
    """A of each token of the tower's input, `[37]`: the guide's row, divided among those that a token stands for."""
    row = reference.semantic_value(q[:, 0], k, before.sizes, 8**-0.5)
    return (row / before.sizes)[before.source]


def of_image(trace, b):
    """One image's sizes and sources."""
    return type(trace)(**{**vars(trace), "sizes": trace.sizes[b], "source": trace.source[b]})


@torch.no_grad()
def test_patches_share_the_attention_of_the_token_they_became():
    """The A by which visual tokens are chosen, where the tower gives every position back."""
    family, model = VLMS["llava"], seeded(VLMS["llava"].make).double()
    inputs = family.inputs([5, "image", 6], [7, 8, "image"])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    guide = turbovlm.encoder.towers.find_towers(model)[0].module.encoder.layers[2]  # the last that LLaVA reads
    degree = Recorded()
    information = {"visual_select": "information", "degree": degree}
    with turbovlm.apply(model, r=5, blocks="every", visual_keep=0.5, **information, trace=True) as handle:
        degree.semantic.clear()
        q, k = attention_row(guide, ("self_attn.q_proj", "self_attn.k_proj"), inputs, model)
        before = handle.trace[1]  # as tokens enter the block that guides
        assert len(handle.trace) == 3 and before.sizes.shape == (2, 37 - 10)
    split = partition_tokens(36, 0, "random")
    for b in range(2):
        A = of_patches(q[b], k[b], of_image(before, b))
        assert A.sum() == pytest.approx(1)
        chosen_by = degree.semantic[3][b]  # behind the three blocks' own
        torch.testing.assert_close(chosen_by, A[1:][split.candidates], rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_a_merged_token_has_the_attention_of_all_its_patches():
    """The A by which visual tokens are chosen, where the tower hands on merged ones."""
    model = seeded(vision_encoder_decoder).double()
    guide = turbovlm.encoder.towers.find_towers(model)[0].blocks[-1][1]
    degree = Recorded()
    information = {"visual_select": "information", "degree": degree}
    with turbovlm.apply(model, r=5, blocks="every", visual_keep=0.5, **information, trace=True) as handle:
        degree.semantic.clear()
        pixels = {"pixel_values": randn(2, 3, 48, 48)}
        q, k = attention_row(guide, ("attention.q_proj", "attention.k_proj"), pixels, model.encoder)
        before, after = handle.trace[-2:]
    assert after.sizes.shape == (2, 17)
    split = partition_tokens(16, 0, "random")
    for b in range(2):
        A = of_patches(q[b], k[b], of_image(before, b))
        summed = torch.zeros(17).double().index_add(0, after.source[b], A)
        torch.testing.assert_close(degree.semantic[4][b], summed[1:][split.candidates], rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(8, 40),
    k=st.integers(1, 30),
    degree=st.sampled_from(list(reference.DEGREES)),
    reduce=st.sampled_from(["merge", "prune"]),
    sized=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_visual_tokens_are_chosen_in_rounds(tokens, k, degree, reduce, sized, seed):
    """Each round merges at most a quarter; a merged token has its parts' A together, a pruned one loses its own."""
    k = min(k, tokens)
    x = randn(2, tokens, 6, seed=seed)
    A = randn(2, tokens, seed=seed + 1).softmax(dim=1)
    sizes = torch.randint(1, 4, (2, tokens), generator=torch.Generator().manual_seed(seed)).double()
    config = ReadConfig(0.5, visual_select="information", degree=degree, reduce=reduce).changed(alpha=3)
    found = select(x, A, k, config, sizes if sized else None)
    for b in range(2):
        y, a, s = x[b], A[b], sizes[b] if sized else torch.ones(tokens).double()
        source, rounds = torch.arange(tokens), 0
        weights = torch.ones(tokens).double()
        while len(y) > k:
            r = min(len(y) - k, max(1, len(y) // 4), len(y) // 2)
            split = partition_tokens(len(y), 0, "random", block=rounds)
            if len(y) == 2 and degree not in ("redundancy", "random"):  # the lower A goes
                split = Partition(a.argmin().view(1), 1 - a.argmin().view(1))
            windows = [(split.candidates.tolist(), split.destinations.tolist())]
            R, nearest = reference.mutual_redundancy(y, windows)
            E = reference.DEGREES[degree](torch.stack(list(R.values())), a[list(R)], 3)
            best = [list(R)[i] for i in E.argsort(descending=True)[:r]]
            kept, y_next, s_next, went = reference.merge(
                y, s, {i: nearest[i] for i in best}, windows, "spatial", reduce
            )
            if reduce == "prune":
                weights[[i for i in range(tokens) if int(source[i]) in best]] = 0
                a = a[kept]
            else:
                weights *= (s / s_next[went])[source]
                a = torch.stack([a[went == place].sum() for place in range(len(kept))])
            y, s, source, rounds = y_next, s_next, went[source], rounds + 1
        assert torch.equal(found.destination[b], source)
        torch.testing.assert_close(found.weights[b].double(), weights, rtol=1e-5, atol=1e-6)


def test_degrees_of_three_tokens():
    """By hand: R = 0.9, 0.5, 0.1 and A = 0.2, 0.05, 0; the mean of A is 1/12."""
    R, A = torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.2, 0.05, 0.0]])
    for degree, alpha, E in (
        ("weighted_difference", 3, [0.3, 0.35, 0.1]),
        ("coupled_division", None, [0.9 / 0.201, 0.5 / 0.051, 100.0]),
        ("damped", 2, [0.54, 0.45, 0.1]),
        ("redundancy", None, [0.9, 0.5, 0.1]),
        ("semantics", None, [-0.2, -0.05, 0.0]),
        ("weighted_distance", 2, [-0.1 * (1 + 2 * 2.4**0.5), -0.5 * (1 + 2 * 0.6**0.5), -0.9]),
    ):
        torch.testing.assert_close(information_degree(R, A, degree=degree, alpha=alpha), torch.tensor([E]))


@pytest.mark.parametrize(("seed", "block"), [(0, 0), (3, 2), (1 << 20, 47)])
def test_numbers_for_random_halves_are_those_of_whole_numbers(seed, block):
    """The halves of a seed stay the same in all releases; positions count from 1."""

    def number(position):
        x = position * 2654435761 + (seed * 1000003 + block + 1) * 40503
        for multiplier in (73244475, 73244475, 1):
            x = ((x ^ (x >> 16)) * multiplier) % 2**32
        return (x % 2**24) / 2**24

    assert hashed_uniform(700, seed, block).tolist() == [number(position) for position in range(1, 701)]
    assert hashed_uniform(2, 0, 0).tolist() == [0.6922733783721924, 0.9557108283042908]
