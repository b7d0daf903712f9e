"""Any reading of any vision-language model, any merging in any denoiser: against masks, and what must always hold."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import strategies as st

import turbovlm
from denoisers import DENOISERS
from fuzz.drawing import fuzz
from fuzz.models import ALPHAS, DEGREES, DTYPES, of_effect, snapshot
from turbovlm import denoise_config, settings
from turbovlm.read_config import VISUAL_SELECTIONS
from vlms import VLMS, dropped, full_positions, masked_forward, seeded

pytestmark = pytest.mark.filterwarnings("ignore:turbovlm merges nothing")


@functools.cache
def vlm(name):
    return seeded(VLMS[name].make).eval()


@functools.cache
def denoiser(name, dtype):
    return DENOISERS[name]().eval().to(DTYPES[dtype])


WORDS = st.integers(3, 40)
ROWS = st.lists(
    st.lists(st.one_of(WORDS, WORDS, st.just("image")), min_size=1, max_size=8), min_size=1, max_size=3
).filter(lambda rows: any("image" in row for row in rows))
READINGS = st.fixed_dictionaries(
    {
        "visual_keep": st.one_of(st.floats(0.1, 1), st.integers(1, 200)),
        "visual_select": st.sampled_from([name for name in VISUAL_SELECTIONS if name != "pooling"]),
        "question": st.floats(0.1, 10),
        "degree": DEGREES,
        "alpha": ALPHAS,
        "guidance": st.sampled_from(["auto", "mean"]),
        "seed": st.integers(0, 9),
    }
).map(lambda chosen: of_effect(turbovlm.ReadConfig, chosen))


@fuzz(
    core=4,
    nightly=400,
    name=st.sampled_from(list(VLMS)),
    rows=ROWS,
    chosen=READINGS,
    reduce=st.sampled_from(["merge", "prune"]),
)
@torch.no_grad()
def test_reading(name, rows, chosen, reduce):
    """As many tokens as asked for are read of each image; pruned, as if the others were masked."""
    family, model = VLMS[name], vlm(name)
    # as in all chats, words stand between images and at the end
    rows = [[part for item in row for part in ((item, 5) if item == "image" else (item,))] for row in rows]
    inputs = family.inputs(*rows)
    own, before = model(**inputs).logits, snapshot(model)
    with turbovlm.apply(model, **chosen, reduce=reduce) as handle:
        logits = model(**inputs, position_ids=full_positions(model, inputs, family)).logits
        assert repr(handle).startswith("Turbo(visual_keep=")
        check_selections(handle, rows, chosen, reduce)
        gone = dropped(handle, inputs, family)
    assert logits.shape == own.shape and logits[inputs["attention_mask"].bool()].isfinite().all()
    if reduce == "prune":
        seen = inputs["attention_mask"].bool() & ~gone
        masked = masked_forward(model, inputs, gone, family)
        torch.testing.assert_close(logits[seen], masked[seen], rtol=0, atol=2e-4)
    assert snapshot(model) == before and torch.equal(model(**inputs).logits, own)


def check_selections(handle, rows, chosen, reduce):
    assert len(handle.visual) == sum(item == "image" for row in rows for item in row)
    for selection in handle.visual:
        n, k = selection.destination.shape[1], selection.kept.shape[1]
        keep = chosen["visual_keep"]
        assert k == (min(keep, n) if isinstance(keep, int) else int(keep * n + 0.5))
        kept, destination = selection.kept[0].tolist(), selection.destination[0].tolist()
        assert kept == sorted(set(kept)) and all(0 <= j < k for j in destination)
        assert [destination[i] for i in kept] == list(range(k))
        sums = torch.zeros(k).scatter_add(0, selection.destination[0], selection.weights[0].float())
        torch.testing.assert_close(sums, torch.ones(k), rtol=0, atol=1e-4)
        if reduce == "prune" or chosen["visual_select"] in ("random", "uniform"):
            assert (selection.weights[0] > 0).nonzero().flatten().tolist() == kept


SHARES = st.one_of(st.floats(0.25, 1), st.lists(st.floats(0.25, 1), min_size=1, max_size=4))
DENOISING = st.fixed_dictionaries(
    {
        "keep": SHARES,
        "scope": st.sampled_from([None, *denoise_config.SCOPES]),
        "span": st.sampled_from([None, 1, 2, 3]),
        "components": st.none() | st.lists(st.sampled_from(turbovlm.config.COMPONENTS), min_size=1, unique=True),
        "restore": st.sampled_from(denoise_config.DENOISER_RESTORES),
        "min_tokens": st.sampled_from([0, 0, 64, 100, 10**6]),
        "degree": DEGREES,
        "alpha": ALPHAS,
        "proportional": st.booleans(),
        "reduce": st.sampled_from(settings.REDUCTIONS),
        "seed": st.integers(0, 9),
    }
).map(lambda chosen: of_effect(turbovlm.DenoiseConfig, chosen))


@fuzz(
    core=4,
    nightly=200,
    name=st.sampled_from(list(DENOISERS)),
    dtype=st.sampled_from(["float64", "float32", "bfloat16"]),
    size=st.tuples(st.integers(1, 3), st.integers(2, 10), st.integers(2, 10)),
    chosen=DENOISING,
)
@torch.no_grad()
def test_denoising(name, dtype, size, chosen):
    """Of the model's own shape, finite, never more than asked for, to an effect; batches are their images."""
    family, model = DENOISERS[name], denoiser(name, dtype)
    batch, rows, columns = size[0], 4 * size[1], 4 * (size[1] if name == "dit" else size[2])
    inputs = cast(family.inputs(batch, rows, columns), dtype)
    own, before = model(**inputs).sample, snapshot(model)
    try:
        handle = turbovlm.apply(model, **chosen)
    except turbovlm.ConfigError as error:  # a denoiser without such a part
        assert "have no such part" in str(error)
        return
    with handle:
        out = model(**inputs).sample
        merges = [choice.merge for choice in handle.features[0].last.values()]
        least = min(chosen["keep"]) if isinstance(chosen["keep"], list) else chosen["keep"]
        for choice in handle.features[0].last.values():
            if choice.merge is not None:
                left = choice.merge.sizes.shape[1]
                assert least * choice.tokens - 1 <= left <= choice.tokens
                assert choice.tokens >= max(64, chosen["min_tokens"])
                if chosen["reduce"] != "prune":
                    sums = choice.merge.sizes.sum(1).double()
                    torch.testing.assert_close(sums, torch.full_like(sums, choice.tokens), rtol=1e-5, atol=0)
        assert repr(handle).startswith("Turbo(keep=")
    assert out.shape == own.shape and out.dtype == own.dtype and out.isfinite().all()
    if not any(merge is not None and merge.sizes.shape[1] < merge.weights.shape[1] for merge in merges):
        close = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1}[dtype]
        torch.testing.assert_close(out, own, rtol=close, atol=close * float(own.abs().max()))
    elif dtype != "bfloat16":
        assert not torch.equal(out, own), "tokens were merged, to no effect"
    assert snapshot(model) == before and torch.equal(model(**inputs).sample, own)


def cast(inputs, dtype):
    def one(value):
        return value.to(DTYPES[dtype]) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {
        name: {key: one(each) for key, each in value.items()} if isinstance(value, dict) else one(value)
        for name, value in inputs.items()
    }
