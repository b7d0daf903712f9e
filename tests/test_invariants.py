"""The promises of an accelerated model, on every supported family."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounter

import turbovlm
from families import FAMILIES, Family
from marks import slow_but
from turbovlm import StateError
from turbovlm.encoder.towers import find_towers
from turbovlm.ops import plain

EACH = pytest.mark.parametrize("name", FAMILIES)
STRUCTURES = ("timm_vit", "timm_eva02", "clip", "dinov3", "torchvision")
"""Families whose blocks differ in more than names: packed projections, rotary positions, registers, no packing."""
EACH_PROGRAM = pytest.mark.parametrize("name", slow_but(STRUCTURES, FAMILIES))


class Tower(nn.Module):
    """One forward that returns a tensor, whatever the library returns."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.model = family.make()
        self.family = family

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.family.output(self.model(**inputs))


@pytest.fixture(scope="module")
def towers():
    return {}


@pytest.fixture
def tower(name, towers):
    if name not in towers:
        towers[name] = Tower(FAMILIES[name])
    model = towers[name]
    yield model
    assert not [m for m in model.modules() if "forward" in m.__dict__], "a test left the model accelerated"


def snapshot(model: nn.Module) -> list[Any]:
    return [
        (name, type(module), dict(module.__dict__), type(module).forward, len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@EACH
@torch.no_grad()
def test_r0_changes_nothing(tower, name):
    inputs = FAMILIES[name].inputs(3)
    reference = tower(**inputs)
    with turbovlm.apply(tower, r=0):
        assert torch.equal(tower(**inputs), reference)
    with turbovlm.apply(tower, r=0, trace=True):
        ours = tower(**inputs)
    if FAMILIES[name].bit_identical:
        assert torch.equal(ours, reference)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@EACH
@torch.no_grad()
def test_dropout_is_the_models_own(name):
    """In training, the attention's dropout draws the same numbers and drops the same weights."""
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs(2)
    certain = family.output(model(**inputs))
    for module in model.modules():
        if "Attention" in type(module).__name__:
            drop_attention(module)
    model.train()

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return family.output(model(**inputs))

    own = run()
    assert (own - certain).abs().max() > 0.1
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(run(), own, rtol=0, atol=1e-5)


def drop_attention(module: Any, p: float = 0.4) -> None:
    """Let an attention module drop weights, whatever its library calls the setting."""
    for attribute in ("attn_drop", "dropout", "attention_dropout", "dropout_prob"):
        value = getattr(module, attribute, None)
        if isinstance(value, nn.Dropout):
            value.p = p
        elif isinstance(value, float):
            setattr(module, attribute, p)
    if hasattr(getattr(module, "config", None), "attention_probs_dropout_prob"):
        module.config.attention_probs_dropout_prob = p


@EACH
@torch.no_grad()
def test_remove_restores_everything(tower, name):
    inputs = FAMILIES[name].inputs(2)
    reference, before, keys = tower(**inputs), snapshot(tower), list(tower.state_dict())
    handle = turbovlm.apply(tower, r=4)
    assert list(tower.state_dict()) == keys
    assert not torch.equal(tower(**inputs), reference)
    handle.remove()
    handle.remove()
    assert snapshot(tower) == before
    assert torch.equal(tower(**inputs), reference)


@EACH
@torch.no_grad()
def test_sizes_and_sources(tower, name):
    inputs = FAMILIES[name].inputs(3)
    for settings in (
        {"r": 5},
        {"r": (7, 0, 3, 100)},
        {"keep": 0.3, "order": "spatial"},
        {"r": 4, "partition": "random"},
    ):
        with turbovlm.apply(tower, **settings, trace=True) as handle:
            tower(**inputs)
            trace, schedule = handle.trace, handle.schedules[0]
        assert len(trace) == len(schedule.blocks)
        for entry, tokens in zip(trace, schedule.tokens[1:]):
            assert entry.sizes.shape == (3, tokens)
            assert entry.source.min() == 0 and entry.source.max() == tokens - 1
            counted = torch.zeros_like(entry.sizes).scatter_add(
                1, entry.source, real_tokens(name, inputs, entry.source)
            )
            torch.testing.assert_close(entry.sizes, counted)
            prefix = torch.arange(entry.prefix).expand(3, -1)
            assert torch.equal(entry.source[:, : entry.prefix], prefix)
            assert (entry.sizes[:, : entry.prefix] == 1).all()


def real_tokens(name, inputs, source):
    mask = inputs.get("pixel_attention_mask")
    return torch.ones(source.shape) if mask is None else mask.float()


def of_real_tokens(inputs, output):
    """Without what padding came to: who of it merges into whom hangs on rounding, and nobody reads it."""
    mask = inputs.get("pixel_attention_mask")
    return output if mask is None else output[mask.bool()]


@EACH_PROGRAM
@torch.no_grad()
def test_compiles_once_per_shape(tower, name):
    """One structure each by two shapes, the others by one: tracing takes seconds."""
    with turbovlm.apply(tower, r=5):
        shapes = [FAMILIES[name].inputs(count) for count in ((3, 2) if name in STRUCTURES else (2,))]
        references = [of_real_tokens(inputs, tower(**inputs)) for inputs in shapes]
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(tower, fullgraph=True, backend=counter, dynamic=False)
        for _ in range(2):
            for inputs, reference in zip(shapes, references):
                torch.testing.assert_close(of_real_tokens(inputs, compiled(**inputs)), reference, rtol=0, atol=1e-5)
        assert counter.frame_count == len(shapes)


@EACH_PROGRAM
@torch.no_grad()
def test_exports(tower, name):
    with turbovlm.apply(tower, r=5):
        inputs = FAMILIES[name].inputs(2)
        reference = of_real_tokens(inputs, tower(**inputs))
        exported = torch.export.export(tower, (), inputs).module()
        torch.testing.assert_close(of_real_tokens(inputs, exported(**inputs)), reference, rtol=0, atol=1e-5)


@EACH
@torch.no_grad()
def test_pickle_and_deepcopy(tower, name):
    inputs = FAMILIES[name].inputs(2)
    handle = turbovlm.apply(tower.model, r=5)
    reference = tower(**inputs)
    copies = [copy.deepcopy(tower.model)]
    if FAMILIES[name].pickles:
        copies.append(pickle.loads(pickle.dumps(tower.model)))
    handle.remove()
    plain = tower(**inputs)
    original = tower.model
    for model in copies:
        tower.model = model
        assert torch.equal(tower(**inputs), reference)
        turbovlm.get_handle(model).remove()
        assert torch.equal(tower(**inputs), plain)
    tower.model = original


@EACH
def test_threads_do_not_share_state(tower, name):
    batches = [FAMILIES[name].inputs(batch) for batch in (1, 2, 3)]
    wrong = []

    def run(inputs, reference):
        with torch.no_grad():
            for _ in range(4):
                if not torch.allclose(FAMILIES[name].output(tower.model(**inputs)), reference, atol=1e-5):
                    wrong.append(inputs)

    with turbovlm.apply(tower, r=5):
        with torch.no_grad():
            references = [tower(**inputs) for inputs in batches]
        threads = [threading.Thread(target=run, args=pair) for pair in zip(batches, references)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_and_autocast(tower, name, dtype, monkeypatch):
    """With nothing merged what the model itself gives; R and A before the first merge are those of float32, rounded."""
    # some CPUs multiply bfloat16 fast, and there attention goes another way, which rounds otherwise: see test_routes
    monkeypatch.setattr(plain, "FAST_BFLOAT16_PRODUCTS", False)
    inputs = FAMILIES[name].inputs(2)
    exact_ones = ("noise",)  # by which MAE's patches are ordered, and equals in another order
    rounded = {k: v.to(dtype) if v.is_floating_point() and k not in exact_ones else v for k, v in inputs.items()}
    half = copy.deepcopy(tower).to(dtype)

    def run(autocast: bool) -> torch.Tensor:
        if not autocast:
            return half(**rounded)
        with torch.autocast("cpu", dtype):
            return tower(**inputs)

    eps = torch.finfo(dtype).eps
    with turbovlm.apply(tower, r=5, trace=True) as handle:
        tower(**inputs)
        exact = handle.trace[0]
    for autocast, model in ((True, tower), (False, half)):
        with turbovlm.apply(model, r=5, trace=True) as handle:
            out = run(autocast)
            first = handle.trace[0]
        assert out.isfinite().all() and (autocast or out.dtype == dtype)
        torch.testing.assert_close(first.semantic.float(), exact.semantic, rtol=0, atol=4 * eps)
        apart = FAMILIES[name].rounding * eps
        torch.testing.assert_close(first.redundancy.float(), exact.redundancy, rtol=0, atol=apart, equal_nan=True)
        own = run(autocast)
        assert out.dtype == own.dtype
        tolerance = 0 if FAMILIES[name].bit_identical else 16 * eps * own.abs().max().item()
        with turbovlm.apply(model, r=0, trace=True):
            torch.testing.assert_close(run(autocast), own, rtol=0, atol=tolerance)


@EACH
def test_backward(tower, name):
    inputs = FAMILIES[name].inputs(2)
    tower.train()
    with turbovlm.apply(tower, r=5):
        tower(**inputs).square().mean().backward()
    tower.eval()
    blocks = find_towers(tower)[0].blocks
    for path, block in blocks:
        missing = [key for key, p in block.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing, f"{path} has no gradient for {missing}"
    tower.zero_grad()


@EACH
@torch.no_grad()
def test_batch_equals_single_images(tower, name):
    inputs = FAMILIES[name].inputs(3)
    with turbovlm.apply(tower, r=5, partition="random", degree="weighted_difference"):
        together = tower(**inputs)
        for i in range(3):
            alone = tower(**{key: value[i : i + 1] for key, value in inputs.items()})
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


@EACH
@torch.no_grad()
def test_an_exception_inside_leaves_the_model_usable(tower, name):
    inputs = FAMILIES[name].inputs(2)
    reference = tower(**inputs)

    class Interrupted(Exception):
        pass

    def interrupt(module, args):
        raise Interrupted

    with turbovlm.apply(tower, r=5) as handle:
        accelerated = tower(**inputs)
        last = find_towers(tower)[0].blocks[-1][1]
        hook = last.register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            tower(**inputs)
        hook.remove()
        assert torch.equal(tower(**inputs), accelerated)
        handle.remove()
        assert torch.equal(tower(**inputs), reference)


@EACH
@torch.no_grad()
def test_more_merging_than_tokens(tower, name):
    """Every block merges half of the tokens that may, and whatever is asked beyond it is noted."""
    inputs = FAMILIES[name].inputs(1)
    with turbovlm.apply(tower, r=10_000, trace=True) as handle:
        out = tower(**inputs)
        trace = handle.trace
        assert "r=10000 is more than 4 of 4 merging blocks have to give (from block 0 on)" in repr(handle)
    tokens, prefix = trace[0].source.shape[1], trace[0].prefix
    for entry in trace:
        tokens -= (tokens - prefix) // 2
        assert entry.sizes.shape == (1, tokens)
        assert entry.sizes.sum() == real_tokens(name, inputs, entry.source).sum()
    assert out.isfinite().all()


def test_lost_state_is_an_error():
    tower = Tower(FAMILIES["vit"])
    inputs = FAMILIES["vit"].inputs(1)
    block = find_towers(tower)[0].blocks[1][1]
    block.register_forward_pre_hook(lambda module, args: (args[0][:, :-1].clone(), *args[1:]))  # of another length
    with turbovlm.apply(tower, r=2), pytest.raises(StateError, match=r"layers\.1 got tokens without"):
        tower(**inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = FAMILIES["dinov2"].make().train()
    inputs = FAMILIES["dinov2"].inputs(2)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs).last_hidden_state.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.encoder.parameters()])

    with turbovlm.apply(model, r=5):
        reference = gradient()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert torch.equal(gradient(), reference)
