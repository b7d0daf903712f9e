"""Any image, any setting: what must always hold, drawn by hypothesis."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turbovlm

timm = pytest.importorskip("timm")
DEPTH = 3
WITHOUT_ALPHA = ("coupled_division", "redundancy", "semantics", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AMOUNTS = st.one_of(
    st.fixed_dictionaries({"r": st.integers(0, 60)}),
    st.fixed_dictionaries({"r": st.lists(st.integers(0, 60), min_size=DEPTH, max_size=DEPTH)}),
    st.fixed_dictionaries({"keep": st.floats(0.01, 1.0)}),
    st.fixed_dictionaries({"flops": st.floats(0.2, 1.0)}),
)
SETTINGS = st.fixed_dictionaries(
    {
        "degree": st.sampled_from(turbovlm.ops.degree.DEGREES),
        "alpha": st.floats(0, 200),
        "similarity": st.sampled_from(turbovlm.config.SIMILARITIES),
        "guidance": st.sampled_from(["auto", "mean"]),
        "partition": st.sampled_from(["alternate", "random"]),
        "order": st.sampled_from(turbovlm.config.ORDERS),
        "proportional": st.booleans(),
        "reduce": st.sampled_from(turbovlm.config.REDUCTIONS),
        "min_tokens": st.integers(0, 40),
        "seed": st.integers(0, 9),
    }
)
IMAGES = st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8))
KINDS = {
    "cls": {},
    "registers": {"reg_tokens": 2},
    "no_cls": {"class_token": False, "global_pool": "avg"},
}


@functools.cache
def model_of(kind, dtype):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        embed_dim=32,
        depth=DEPTH,
        num_heads=2,
        img_size=64,
        patch_size=8,
        num_classes=4,
        dynamic_img_size=True,
        **KINDS[kind],
    )
    return model.eval().to(DTYPES[dtype])


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(list(DTYPES)),
    image=IMAGES,
    amount=AMOUNTS,
    chosen=SETTINGS,
)
@torch.no_grad()
def test_what_must_always_hold(kind, dtype, image, amount, chosen):
    batch, rows, columns = image
    model = model_of(kind, dtype)
    generator = torch.Generator().manual_seed(rows * columns)
    chosen = {**chosen, "alpha": None} if chosen["degree"] in WITHOUT_ALPHA else chosen
    images = torch.randn(batch, 3, 8 * rows, 8 * columns, generator=generator).to(DTYPES[dtype])
    reference = model(images)
    tokens = rows * columns + model.num_prefix_tokens
    with turbovlm.apply(model, **amount, **chosen, trace=True) as handle:
        out = model(images)
        trace, schedule = handle.trace, handle.schedule(tokens)
        restored = handle.restore(torch.arange(schedule.tokens[-1]).expand(batch, -1))
    assert out.isfinite().all() and out.dtype == DTYPES[dtype]
    assert tuple(entry.sizes.shape[1] for entry in trace) == schedule.tokens[1:]
    for entry in trace:
        assert entry.source.shape == (batch, tokens)
        assert torch.equal(entry.source[:, : entry.prefix], torch.arange(entry.prefix).expand(batch, -1))
        assert (entry.sizes[:, : entry.prefix] == 1).all()
        assert entry.semantic.isfinite().all()
        if chosen["reduce"] != "prune":
            counted = torch.zeros_like(entry.sizes).scatter_add(1, entry.source, torch.ones_like(entry.source).float())
            assert torch.equal(entry.sizes, counted)
    assert torch.equal(restored, trace[-1].source)
    assert torch.equal(model(images), reference)
