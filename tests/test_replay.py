"""Launches that are recorded and repeated do on other tensors what the function itself would do."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

pytest.importorskip("triton")

from turbovlm.ops import fused  # noqa: E402
from turbovlm.ops.kernels import replay  # noqa: E402
from turbovlm.ops.partition import Split  # noqa: E402
from turbovlm.ops.whole import Guide, Rules, merge_whole  # noqa: E402

ANY_TWO = Split("all", 1)


class Interpreted:
    """Stands for what Triton compiles, where it interprets: launched with all arguments, `constexpr` ones included."""

    def __init__(self, kernel, count, options):
        names = kernel.arg_names[count:]
        self.kernel, self.count, self.names = kernel, count, names
        self.options = {name: value for name, value in options.items() if name not in names}

    def __getitem__(self, grid):
        def launch(*args):
            by_name = dict(zip(self.names, args[self.count :], strict=True))
            self.kernel[grid](*args[: self.count], **by_name, **self.options)

        return launch


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """The recordings so far, none at first; and each repetition, in a list."""
    monkeypatch.setattr(replay, "_REPLAYS", {})
    ran = []

    class Recording(replay.Recording):
        def launch(self, kernel, grid, *args, **options):
            compiled = super().launch(kernel, grid, *args, **options)
            if compiled is None:
                made = Interpreted(kernel, len(args), options)
                self.launches[-1] = (made, *self.launches[-1][1:])
            return compiled

    run = replay.Replay.run
    monkeypatch.setattr(replay, "Recording", Recording)
    monkeypatch.setattr(replay.Replay, "run", lambda self, *args: (ran.append(self), run(self, *args))[1])
    return ran


def inputs(seed, *, tokens=33, dtype=torch.float32, sized=True, guidance="cls", own_content=False, apart=False):
    """`x`, features, guide and sizes of 2 images, 3 heads of 16 channels, cut out of one projection."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, keys, v = (each.view(2, tokens, 3, 16).transpose(1, 2) for each in randn(2, tokens, 144).chunk(3, dim=-1))
    sizes = torch.randint(1, 5, (2, tokens), generator=generator).float().to(DEVICE) if sized else None
    bias = None if sizes is None else sizes.log()[:, None, None]
    by_cls = guidance == "cls"
    content = v if own_content else None
    weights, guides = (None, (0, 1)) if by_cls else (sizes, (1, tokens))
    guide = Guide(q, keys, content, bias, weights, guides, 0.25, True)
    features = (keys if content is None else content).transpose(1, 2).flatten(2)
    return randn(2, tokens, 48), features.clone() if apart else features, guide, sizes


def merged(parts, split=ANY_TWO, r=5, degree="weighted_distance", order="spatial", reduce="keep_norm"):
    x, features, guide, sizes = parts
    rules = Rules(degree, None, 0, order, reduce)
    merge, y = merge_whole(
        fused, x, features, None if degree == "redundancy" else guide, sizes, split, None, rules, r=r, index=0
    )
    return y, merge.rows, merge.src, merge.weights, merge.sizes, merge.logs


def directly(*args, **kwargs):
    """The same without a recording of other tensors."""
    kept = dict(replay._REPLAYS)
    replay._REPLAYS.clear()
    try:
        return merged(*args, **kwargs)
    finally:
        replay._REPLAYS.clear()
        replay._REPLAYS.update(kept)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ({}, {}),
        ({"sized": False}, {}),
        ({"guidance": "mean", "own_content": True}, {"reduce": "merge"}),
        ({"dtype": torch.float16}, {"degree": "redundancy"}),
        ({}, {"split": Split("random", 1, seed=3), "degree": "weighted_difference"}),
        ({"apart": True}, {"split": Split("alternate", 1), "order": "partition"}),
    ],
)
@torch.inference_mode()
def test_other_tensors_of_the_kind_give_what_the_function_gives(kind, how, replays):
    merged(inputs(0, **kind), **how)
    assert len(replay._REPLAYS) == 1 and not replays
    for seed in (1, 2):
        parts = inputs(seed, **kind)
        found = merged(parts, **how)
        assert len(replays) == seed and len(replay._REPLAYS) == 1
        for one, other in zip(found, directly(parts, **how), strict=True):
            assert torch.equal(one, other)


@torch.inference_mode()
def test_what_could_be_told_apart_is_recorded_anew(replays):
    parts = inputs(0)
    kinds = (
        (parts, {}),
        (parts, {"r": 6}),
        (parts, {"reduce": "merge"}),
        (parts, {"degree": "redundancy"}),
        (parts, {"split": Split("all", 2)}),
        (inputs(0, tokens=34), {}),
        (inputs(0, sized=False), {}),
        (inputs(0, guidance="mean"), {}),
        (inputs(0, dtype=torch.float16), {}),
        (inputs(0, apart=True), {}),  # the features are not where the keys are
        ((parts[0].transpose(1, 2).contiguous().transpose(1, 2), *parts[1:]), {}),
        ((torch.cat([parts[0].flatten()[:1], parts[0].flatten()])[1:].view_as(parts[0]), *parts[1:]), {}),  # address
    )
    for count, (other, how) in enumerate(kinds, 1):
        merged(other, **how)
        assert len(replay._REPLAYS) == count and not replays


@torch.inference_mode()
def test_launches_on_copies_are_not_repeated(replays):
    """Sizes that are not adjacent are copied first: what is launched reads neither an input nor a result."""
    for seed in range(2):
        x, features, guide, sizes = inputs(seed)
        wide = torch.stack([sizes, sizes], dim=2)[:, :, 0]
        assert not wide.is_contiguous()
        found = merged((x, features, guide, wide))
        for one, other in zip(found, directly((x, features, guide, sizes)), strict=True):
            assert torch.equal(one, other)
    assert not replay._REPLAYS and not replays


@torch.inference_mode()
def test_recordings_are_bounded_and_a_failure_ends_one(monkeypatch):
    monkeypatch.setattr(replay, "KINDS", 3)
    parts = inputs(0)
    for r in range(1, 9):
        merged(parts, r=r)
        assert len(replay._REPLAYS) <= 3
    with pytest.raises(ZeroDivisionError):
        replay.replayed(lambda: 1 // 0, parts[:1], parts[0], "fails")
    assert replay.recording() is None
