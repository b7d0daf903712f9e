"""r, keep, flops and min_tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbovlm import TurboConfig
from turbovlm.encoder.schedule import (
    EncoderShape,
    clamp,
    fixed_destinations,
    make_schedule,
    requested_amounts,
    spread,
    token_counts,
)


def vit(depth=12, width=768, prefix=1):
    return EncoderShape(
        attention_weights=(4 * width * width,) * depth,
        mlp_weights=(8 * width * width,) * depth,
        attention_widths=(width,) * depth,
        hidden_size=width,
        similarity_width=(64,) * depth,
        patch_weights=3 * 16 * 16 * width,
        prefix=prefix,
    )


def schedule(config, tokens=577, shape=None):
    shape = shape or vit()
    return make_schedule(config, shape, tokens, "", tuple(f"blocks.{i}" for i in range(shape.depth)))


def test_r_is_the_same_in_every_block_that_may_merge_and_clamped_to_half():
    assert schedule(TurboConfig(r=35)).tokens == tuple(range(577, 577 - 12 * 35 - 1, -35))
    assert token_counts([80] * 6, 145, 1, 0) == (145, 73, 37, 19, 10, 6, 4)
    assert schedule(TurboConfig(r=35)).note == ""
    assert "from block 2 on" in schedule(TurboConfig(r=80), 257).note


def test_min_tokens_stops_merging():
    assert schedule(TurboConfig(r=20, min_tokens=70), 145, vit(6)).tokens == (145, 125, 105, 85, 65, 65, 65)


def test_published_flops_of_blip():
    """55.5, 37.0 (r=30) and 31.1 (r=40) GMACs of BLIP-B's encoder at 384 px (Turbo, Table 5)."""
    full = sum(schedule(TurboConfig(r=0)).macs_before)
    for r, gmacs in [(0, 55.5), (30, 37.0), (40, 31.1)]:
        s = schedule(TurboConfig.paper(r))
        assert s.ratio * (full + 576 * 3 * 256 * 768 + 5 * 768 * 577) / 1e9 == pytest.approx(gmacs, rel=0.008)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(20, 700),
    depth=st.integers(1, 30),
    prefix=st.integers(0, 5),
    keep=st.floats(0.05, 1.0),
)
def test_keep_is_met_or_the_note_says_so(tokens, depth, prefix, keep):
    s = schedule(TurboConfig(keep=keep), tokens, vit(depth, 64, prefix))
    assert s.tokens[0] == tokens and all(a >= b for a, b in zip(s.tokens, s.tokens[1:]))
    assert (abs(s.tokens[-1] - keep * tokens) > 1) == ("out of reach" in s.note)
    assert not s.note or s.note == f"keep={keep} is out of reach: {s.tokens[-1] / tokens:.3f} of the tokens are left"


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(150, 700), depth=st.integers(4, 24), flops=st.floats(0.4, 1.0))
def test_flops_is_met_exactly_or_the_note_says_so(tokens, depth, flops):
    s = schedule(TurboConfig(flops=flops), tokens, vit(depth, 384))
    assert (abs(s.ratio - flops) > 0.01) == ("out of reach" in s.note)
    assert not s.note or s.note == f"flops={flops} is out of reach: {s.ratio:.3f} is the closest"


def test_flops_is_solved_to_one_token():
    shape = vit()
    config = TurboConfig(flops=0.6)
    total = sum(requested_amounts(config, shape, 577))
    gap = abs(schedule(config).ratio - 0.6)
    for other in (total - 1, total + 1):
        assert abs(schedule(TurboConfig(r=spread(other, 12))).ratio - 0.6) >= gap


FOUR, FIVE = (4, 5, 6, 7), (3, 4, 5, 6, 7)


def test_keep_and_flops_are_spread_over_the_blocks_asked_for():
    for amount in ({"flops": 0.6}, {"keep": 0.3}):
        for config, own, blocks in (
            (TurboConfig(**amount), (), range(12)),
            (TurboConfig(**amount), (FOUR,), FOUR),
            (TurboConfig(**amount), (FOUR, FIVE), FOUR),
            (TurboConfig(**amount, blocks="every"), (FOUR,), range(12)),
            (TurboConfig(**amount, blocks=[1, 5, 6]), FOUR, (1, 5, 6)),
        ):
            found = make_schedule(config, vit(), 577, "", ("",) * 12, own)
            assert {block for block, r in enumerate(found.merged) if r} == {*blocks} and not found.note


def placed(config, own=(), tokens=577, depth=12):
    return make_schedule(config, vit(depth), tokens, "", ("",) * depth, own)


def test_r_is_a_mean_over_all_blocks_in_whatever_blocks_merge():
    """As many tokens go as with r in every block, which stays when it is said."""
    for config, own, merged in (
        (TurboConfig(r=20), (), (20,) * 12),
        (TurboConfig(r=20, blocks="every"), (FOUR,), (20,) * 12),
        (TurboConfig(r=20), (FOUR,), (0, 0, 0, 0, 60, 60, 60, 60, 0, 0, 0, 0)),
        (TurboConfig(r=20, blocks=[3, 9]), (FOUR,), (0, 0, 0, 120, 0, 0, 0, 0, 0, 120, 0, 0)),
        (TurboConfig(r=1, blocks=[3, 4, 5, 6, 9]), (), (0, 0, 0, 2, 2, 3, 2, 0, 0, 3, 0, 0)),
        (TurboConfig(r=[120, 7], blocks=[3, 9]), (), (0, 0, 0, 120, 0, 0, 0, 0, 0, 7, 0, 0)),
    ):
        found = placed(config, own)
        assert found.merged == merged and not found.note
    assert placed(TurboConfig(r=20), (FOUR,)).asked == "r=20 per block on average"
    assert placed(TurboConfig(r=[20] * 12)).asked == f"r={[20] * 12}"


@settings(deadline=None, max_examples=60)
@given(r=st.integers(0, 60), tokens=st.integers(20, 700), depth=st.integers(2, 30), data=st.data())
def test_the_blocks_that_merge_end_with_as_many_tokens_as_every_block(r, tokens, depth, data):
    """Unless one of them has not its share to give: then every block merges, as far as it can."""
    blocks = tuple(sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1))))
    found, every = placed(TurboConfig(r=r), (blocks,), tokens, depth), placed(TurboConfig(r=r), (), tokens, depth)
    shares, left = spread(r * depth, len(blocks)), tokens - 1
    enough = True
    for share in shares:
        enough, left = enough and 2 * share <= left, left - share
    if enough:
        assert found.tokens[-1] == tokens - r * depth and not found.note
        assert found.merged == tuple(dict(zip(blocks, shares)).get(block, 0) for block in range(depth))
    else:
        assert found.merged == every.merged


def test_another_set_of_blocks_merges_where_the_first_has_less_than_r_asks_for():
    for r, merging in ((12, FOUR), (13, FOUR), (14, range(12))):  # 197 tokens: 168 are too many for four or five blocks
        found = placed(TurboConfig(r=r), (FOUR, FIVE), 197)
        assert [i for i, n in enumerate(found.merged) if n] == [*merging] and not found.note
        assert found.tokens[-1] == 197 - 12 * r
    second = (tuple(range(0, 12, 2)),)
    for r, merging in ((14, second[0]), (15, range(12))):
        assert [i for i, n in enumerate(placed(TurboConfig(r=r), second, 197).merged) if n] == [*merging]
    short = placed(TurboConfig(r=30, blocks=FOUR), tokens=197)
    assert "r=30 is more than 3 of 4 merging blocks have to give (from block 5 on)" in short.note


def test_another_block_merges_where_the_first_few_have_not_enough():
    for flops, first, count in ((0.8, 4, 4), (0.61, 4, 4), (0.5, 3, 5), (0.35, 0, 12)):
        found = make_schedule(TurboConfig(flops=flops), vit(), 197, "", ("",) * 12, (FOUR, FIVE))
        merging = [block for block, r in enumerate(found.merged) if r]
        assert not found.note and merging == list(range(first, first + count))
    assert "out of reach" in schedule(TurboConfig(flops=0.3, blocks=FOUR), 197).note


def test_keep_1_and_flops_1_merge_nothing():
    assert schedule(TurboConfig(keep=1.0)).merged == (0,) * 12
    assert schedule(TurboConfig(flops=1.0)).merged == (0,) * 12


@given(total=st.integers(0, 1000), depth=st.integers(1, 50))
def test_spread_is_even_and_complete(total, depth):
    amounts = spread(total, depth)
    assert sum(amounts) == total and len(amounts) == depth and max(amounts) - min(amounts) <= 1


@given(r=st.integers(0, 100), tokens=st.integers(0, 100), prefix=st.integers(0, 5), least=st.integers(0, 100))
def test_clamp(r, tokens, prefix, least):
    merged = clamp(r, tokens, prefix, least)
    assert 0 <= merged <= r and 2 * merged <= max(tokens - prefix, 0)
    assert merged == 0 or tokens >= least


def test_a_grid_keeps_a_destination_in_every_cell():
    """64 patches in 8 rows have 16 cells: keep is met above 16 of them and CLS, and not below."""
    config = TurboConfig(keep=0.5, partition="grid")
    assert schedule(config, 65, vit(4, 64)).tokens == (65, 57, 49, 41, 32)
    assert schedule(config, 69, vit(4, 64, prefix=5)).tokens == (69, 61, 52, 43, 34)
    fewest = schedule(TurboConfig(keep=0.1, partition="grid"), 65, vit(4, 64))
    assert fewest.tokens == (65, 53, 41, 29, 17) and "0.262 of the tokens are left" in fewest.note


def test_cells_that_are_cut_off_have_a_destination_too():
    for grid, cells in [((3, 5), 6), ((5, 3), 6), ((3, 4), 4), ((4, 3), 4), ((4, 4), 4), ((1, 1), 1)]:
        assert fixed_destinations(TurboConfig(r=1, partition="grid", grid=grid), grid[0] * grid[1]) == cells
    assert fixed_destinations(TurboConfig(r=1, partition="grid"), 25) == 9
    assert fixed_destinations(TurboConfig(r=1), 25) == 0


def test_a_single_block_gives_half_of_its_patches():
    assert schedule(TurboConfig(keep=0.1), 65, vit(1, 64)).tokens == (65, 33)
    assert schedule(TurboConfig(keep=0.8), 65, vit(1, 64)).tokens == (65, 52)


def test_the_cost_of_an_encoder_by_hand():
    """Weights, attention and norms (5 a value) of two blocks, the patches' projection, and the last norm."""
    block = 65 * 12 * 64**2 + 2 * 65**2 * 64 + 5 * 64 * 2 * 65
    assert vit(2, 64).macs((65, 65, 65)) == 2 * block + 64 * 3 * 16 * 16 * 64 + 5 * 64 * 65
