"""Any order of apply, forward, hook, remove, copies, pickles, exceptions, training and new weights on one model.

Beside the model goes a twin that never saw turbovlm: what is not accelerated is bit for bit the twin, and what is,
bit for bit a fresh copy of the twin to which the same settings were applied.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import turbovlm
from fuzz.drawing import EXAMPLES, profile
from fuzz.models import RESIZABLE, drawn_encoders, snapshot, tower_of, turbo_settings
from turbovlm.patching import Patch, patches_on

BAD = (
    {"r": -1},
    {"r": 4, "keep": 0.5},
    {"keep": float("nan")},
    {"r": [1]},  # of models of several blocks
    {"visual_keep": 0.5},
    {"r": 4, "speed": 2},
    {"r": 4, "components": ["ffn"]},
    {},
)


class Interrupted(Exception):
    """Raised in the middle of a forward."""


def halve(module, args, out):
    """A forward hook of the user's: it changes what a block hands on, and keeps the tensor's attributes."""
    hidden = out[0] if isinstance(out, tuple) else out
    hidden.mul_(0.5)


def interrupt(module, args):
    raise Interrupted


class Lifecycle(RuleBasedStateMachine):
    """One model, its twin, and what is known of it: its settings, or None."""

    def __init__(self):
        super().__init__()
        self.chosen = self.handle = self.model = None
        self.removed = []

    @initialize(drawn=drawn_encoders(dtypes=("float32",), contents=("noise",)))
    def begin(self, drawn):
        self.drawn = drawn
        self.model, self.twin = copy.deepcopy(drawn.model), copy.deepcopy(drawn.model)

    @precondition(lambda self: self.chosen is None)
    @rule(data=st.data(), trace=st.booleans(), as_config=st.booleans())
    def apply(self, data, trace, as_config):
        self.chosen = {**data.draw(turbo_settings(replace(self.drawn, rows=6, columns=6))), "trace": trace}
        if "grid" in self.chosen:  # images of other sizes come
            del self.chosen["grid"]
            self.chosen["partition"] = "random"
        config = turbovlm.TurboConfig(**self.chosen)
        self.handle = turbovlm.apply(self.model, config) if as_config else turbovlm.apply(self.model, **self.chosen)
        assert self.handle.config == config and self.handle.active

    @rule(wrong=st.sampled_from(BAD))
    def apply_wrongly(self, wrong):
        """Settings that are wrong, or a second time: an error that leaves everything as it is."""
        if wrong == {"r": [1]} and self.drawn.depth == 1:
            return
        with pytest.raises(turbovlm.TurboError):
            turbovlm.apply(self.model, **wrong)
        if self.chosen is not None:
            with pytest.raises(turbovlm.TurboError, match="accelerated already"):
                turbovlm.apply(self.model, r=1)

    @rule(batch=st.integers(1, 3), rows=st.integers(1, 8), columns=st.integers(1, 8), native=st.booleans())
    def forward(self, batch, rows, columns, native):
        native = native or self.drawn.name not in RESIZABLE
        size = {} if native else {"rows": rows, "columns": columns}
        drawn = replace(self.drawn, batch=batch, **({"rows": 6, "columns": 6} | size))
        out = drawn.run(self.model)
        if self.chosen is None:
            assert torch.equal(out, drawn.run(self.twin))
            return
        fresh = copy.deepcopy(self.twin)
        handle = turbovlm.apply(fresh, **self.chosen)
        assert torch.equal(out, drawn.run(fresh))
        check_same_reports(self.handle, handle, self.chosen)

    @rule(again=st.booleans(), by_model=st.booleans())
    @precondition(lambda self: self.chosen is not None)
    def remove(self, again, by_model):
        handle = turbovlm.get_handle(self.model) if by_model else self.handle
        handle.remove()
        if again:
            handle.remove()
        assert not handle.active and "removed" in repr(handle)
        self.removed.append(self.handle)
        self.chosen = self.handle = None
        with pytest.raises(turbovlm.TurboError, match="is not accelerated"):
            turbovlm.get_handle(self.model)

    @rule()
    @precondition(lambda self: self.removed)
    def remove_by_an_old_handle(self):
        """It takes nothing off that a later one has put on."""
        self.removed[-1].remove()

    @rule(kind=st.sampled_from(["deepcopy", "pickle"]), keep=st.booleans())
    def duplicate(self, kind, keep):
        """Go on with the copy, or with the original, once the copy was taken off and compared."""
        other = copy.deepcopy(self.model) if kind == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        if keep:
            self.model, other = other, self.model
            if self.chosen is not None:
                old, self.handle = self.handle, turbovlm.get_handle(self.model)
                assert self.handle.config == old.config
                old.remove()
                assert self.handle.active and not old.active
        elif self.chosen is not None:
            turbovlm.get_handle(other).remove()
            assert self.handle.active
        assert torch.equal(self.drawn.run(other), self.drawn.run(self.twin))
        assert snapshot(other) == snapshot(self.twin)

    @rule(place=st.integers(0, 9), before=st.booleans())
    def interrupted(self, place, before):
        """An exception half-way, in a block or in a module inside of one."""
        _, blocks = self.blocks_of(self.model)
        block = blocks[place % len(blocks)]
        modules = [block] if before else [module for module in block.modules() if not list(module.children())]
        hooks = [module.register_forward_pre_hook(interrupt) for module in modules]
        with pytest.raises(Interrupted):
            self.drawn.run(self.model)
        for hook in hooks:
            hook.remove()

    @rule(place=st.integers(0, 9))
    def hook(self, place):
        """A hook that changes what a block hands on."""
        for model in (self.model, self.twin):
            _, blocks = self.blocks_of(model)
            blocks[place % len(blocks)].register_forward_hook(halve)

    @rule(training=st.booleans())
    def train(self, training):
        self.model.train(training)
        self.twin.train(training)

    @rule(seed=st.integers(0, 9))
    def load_state_dict(self, seed):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: value + 0.01 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for name, value in self.model.state_dict().items()
        }
        self.twin.load_state_dict(weights)
        self.model.load_state_dict(weights)

    @rule()
    def backward(self):
        """One step of training: gradients that are finite, for what a fresh copy has them."""
        self.model.zero_grad()
        inputs = self.drawn.inputs(2)
        with torch.enable_grad():
            self.drawn.family.output(self.model(**inputs)).square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters())
        self.model.zero_grad()

    def blocks_of(self, model):
        tower = tower_of(self.drawn.name, self.drawn.depth)
        return tower, [model.get_submodule(name) for name, _ in tower.blocks]

    @invariant()
    def nothing_is_left_behind(self):
        if self.model is None:
            return
        assert self.model.state_dict().keys() == self.twin.state_dict().keys()
        if self.chosen is None:
            assert not list(patches_on(self.model))
            assert snapshot(self.model) == snapshot(self.twin)
        else:
            assert self.handle.active and repr(self.handle).startswith("Turbo(")
            tower, _ = self.blocks_of(self.model)
            added = {
                (name, key)
                for (name, module), twin in zip(self.model.named_modules(), self.twin.modules())
                for key in module.__dict__.keys() - twin.__dict__.keys()
                if isinstance(module.__dict__[key], Patch) or pytest.fail(f"{name}.{key} is left on a module")
            }
            assert added >= {(name, "forward") for name, _ in tower.blocks}

    def teardown(self):
        if self.model is not None and self.chosen is not None:
            self.handle.remove()
            assert snapshot(self.model) == snapshot(self.twin)
            assert torch.equal(self.drawn.run(self.model), self.drawn.run(self.twin))
        EXAMPLES["lifecycle"] += 1


def check_same_reports(handle, fresh, chosen):
    """Two handles tell the same of their last forwards."""
    assert repr(handle) == repr(fresh)
    if not chosen["trace"]:
        with pytest.raises(turbovlm.StateError, match="trace=True"):
            _ = handle.trace
        return
    for ours, theirs in zip(handle.trace, fresh.trace, strict=True):
        for name in ("source", "sizes", "semantic"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    tokens = handle.trace[-1].sizes
    assert torch.equal(handle.restore(tokens), fresh.restore(tokens))


def test_lifecycle():
    run_state_machine_as_test(Lifecycle, settings=profile(core=5, nightly=200, stateful_step_count=12))
