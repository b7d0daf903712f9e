"""Any value in any setting: it works, or a `TurboError` says so at `apply`, in one line; nothing else."""

from __future__ import annotations

import copy
import dataclasses
import functools
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import reject
from hypothesis import strategies as st

import turbovlm
from denoisers import DENOISERS
from fuzz.drawing import fuzz
from fuzz.models import encoder, snapshot
from turbovlm import DenoiseConfig, ReadConfig, TurboConfig, TurboError
from turbovlm.ops import LayeredDegree
from turbovlm.patching import patches_on
from vlms import VLMS, seeded

NAN, INF = float("nan"), float("inf")


class Unhashable:
    """A degree that is right, and cannot be a key."""

    __hash__ = None

    def __call__(self, R, A, block):
        return R - A


NUMBERS = st.one_of(
    st.integers(-3, 60),
    st.sampled_from([-(10**400), 10**400, 2**31, 2**32 - 1, 2**63, 2**64, 2**70, -1, 0, 1]),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.floats(0, 1),
    st.floats(0, 1, width=16),
    st.sampled_from([NAN, INF, -INF, -0.0, 0.0, 1.0, 5e-324, 1e308, 3e38]),
    st.booleans(),
    st.builds(complex, st.floats(0, 1), st.floats(0, 1)),
    st.builds(Fraction, st.integers(0, 9), st.integers(1, 9)),
    st.builds(Decimal, st.sampled_from(["0.5", "NaN", "1e5"])),
    st.builds(np.float32, st.floats(0, 1)),
    st.builds(np.int64, st.integers(-2, 30)),
    st.builds(np.bool_, st.booleans()),
)
OBJECTS = st.one_of(
    st.none(),
    st.sampled_from(["", "auto", "cls", "mean", "random", "AUTO", "r", "0.5", "16", "ü\n", "x" * 300, b"auto"]),
    st.text(max_size=5),
    st.builds(torch.tensor, st.floats(0, 1)),
    st.builds(torch.tensor, st.integers(0, 9)),
    st.sampled_from([torch.zeros(0), torch.ones(2), torch.ones(3, dtype=torch.int64), torch.ones(40, 40)]),
    st.sampled_from([np.ones(2), np.array(4), np.zeros((3, 3))]),
    st.sampled_from([object(), int, TurboConfig, Unhashable(), LayeredDegree(1, 1, 0), max, lambda R, A, block: R]),
    st.sampled_from([range(2), range(0), {}, set(), {"attention"}, {"r": 1}, (), []]),
)
SIMPLE = st.one_of(NUMBERS, OBJECTS)
VALUES = st.one_of(SIMPLE, st.lists(SIMPLE, max_size=4), st.lists(SIMPLE, max_size=4).map(tuple))
NESTED = st.lists(st.lists(SIMPLE, max_size=2), min_size=1, max_size=2)
ANYTHING = st.one_of(VALUES, NESTED)
VALID = {
    TurboConfig: {
        "r": 3,
        "partition": "random",
        "degree": "weighted_distance",
        "order": "spatial",
        "similarity": "keys",
    },
    ReadConfig: {"visual_keep": 0.5, "visual_select": "information", "degree": "redundancy", "reduce": "prune"},
    DenoiseConfig: {"keep": 0.5, "components": ["ffn"], "degree": "redundancy", "reduce": "prune"},
}


@functools.cache
def subject(kind: type) -> tuple[Any, dict[str, Any]]:
    """A model of that workflow, and what goes into it."""
    if kind is TurboConfig:
        generator = torch.Generator().manual_seed(0)
        return encoder("timm_vit", 2, "float32"), {"x": torch.randn(1, 3, 48, 48, generator=generator)}
    if kind is ReadConfig:
        family = VLMS["llava"]
        return seeded(family.make), family.inputs([5, 6, "image", 7, 8])
    small = DENOISERS["pixart"]
    return small().eval(), small.inputs(1, 16, 16)


@functools.cache
def own_output(kind: type) -> torch.Tensor:
    model, inputs = subject(kind)
    with torch.no_grad():
        return tensor_of(model(**inputs))


def tensor_of(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out[0]


def fields_of(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@st.composite
def some_settings(draw, kinds=tuple(VALID)):
    """A workflow, its settings of which one to three are anything, and whether they come as a config."""
    kind = draw(st.sampled_from(kinds))
    names = draw(st.lists(st.sampled_from(fields_of(kind)), min_size=1, max_size=3, unique=True))
    amounts = ("keep",) if kind is DenoiseConfig else kind._amounts
    amount = {name: VALID[kind][name] for name in amounts if name in VALID[kind]}
    chosen = (amount if draw(st.booleans()) else VALID[kind]) | {name: draw(ANYTHING) for name in names}
    if any(name in chosen and name != "r" for name in amounts) and kind is TurboConfig:
        chosen.pop("r", None)
    return kind, chosen, draw(st.booleans())


def says_one_line(error: TurboError, chosen: dict[str, Any]) -> None:
    """The message is one line, of a readable length, and names a setting that was given."""
    text = str(error)
    assert "\n" not in text, f"several lines: {text[:200]!r}"
    assert len(text) < 1500, f"{len(text)} characters: {text[:200]!r}"
    assert any(name in text for name in (*chosen, "keep", "r,", "config")), text


@fuzz(core=40, nightly=3000, drawn=some_settings())
@torch.no_grad()
def test_any_value_works_or_is_refused_at_apply(drawn):
    kind, chosen, as_config = drawn
    model, inputs = subject(kind)
    own, before = own_output(kind), snapshot(model)
    try:
        handle = turbovlm.apply(model, kind(**chosen)) if as_config else turbovlm.apply(model, **chosen)
    except TurboError as error:
        says_one_line(error, chosen)
        assert not list(patches_on(model)) and snapshot(model) == before
        return
    try:
        out = tensor_of(run(model, inputs, handle.config))
        assert out is None or out.isfinite().all()
        assert repr(handle).startswith("Turbo(")
        assert handle.config == handle.config and dataclasses.replace(handle.config) == handle.config
        copy.deepcopy(handle.config)
    finally:
        handle.remove()
    assert snapshot(model) == before and torch.equal(tensor_of(model(**inputs)), own)


def run(model, inputs, config):
    """The forward; only what depends on an input may be refused there, and a degree that is no degree."""
    try:
        return model(**inputs)
    except TurboError as error:
        says_one_line(error, dataclasses.asdict(config))
        assert depends_on_the_input(config), f"refused in the forward: {error}"
        return (torch.zeros(()),)
    except Exception:
        if callable(config.degree) and not isinstance(config.degree, LayeredDegree | Unhashable):
            reject()  # a callable that is no degree raises what it raises
        raise


def depends_on_the_input(config) -> bool:
    return callable(config.degree) or any(
        getattr(config, name, None) is not None for name in ("visual_keep", "cross_keep", "grid")
    )


@fuzz(core=30, nightly=1500, kind=st.sampled_from(list(VALID)), name=st.data())
def test_any_config_is_made_or_refused(kind, name):
    """A config that could be made can be compared, printed, saved or not, and says what was asked for."""
    field = name.draw(st.sampled_from(fields_of(kind)))
    value = name.draw(ANYTHING)
    chosen = {**VALID[kind], field: value}
    try:
        config = kind(**chosen)
    except turbovlm.ConfigError as error:
        says_one_line(error, chosen)
        return
    assert config == config and config.amount and config.summary
    assert repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@fuzz(
    core=15,
    nightly=1000,
    configs=st.lists(
        st.one_of(ANYTHING, st.just(TurboConfig(r=2)), st.just(ReadConfig(0.5)), st.just(DenoiseConfig(0.5))),
        max_size=3,
    ),
    named=st.dictionaries(
        st.one_of(st.sampled_from(["r", "keep", "visual_keep", "components"]), st.text("abc", min_size=1, max_size=3)),
        ANYTHING,
        max_size=2,
    ),
    subject_=st.one_of(st.sampled_from(list(VALID)), ANYTHING),
)
def test_any_call_of_apply(configs, named, subject_):
    """Anything in place of a model, of a config, or of a keyword."""
    model = subject(subject_)[0] if isinstance(subject_, type) and subject_ in VALID else subject_
    try:
        handle = turbovlm.apply(model, *configs, **named)
    except TurboError as error:
        assert len(str(error)) < 3000
        return
    handle.remove()
    assert not list(patches_on(model))


@fuzz(
    core=15,
    nightly=700,
    values=st.tuples(ANYTHING, ANYTHING, ANYTHING),
    which=st.sampled_from(["paper", "layered", "schedule", "restore", "get_handle"]),
)
@torch.no_grad()
def test_any_value_elsewhere(values, which):
    """`TurboConfig.paper`, `LayeredDegree`, and what a handle is asked."""
    model, inputs = subject(TurboConfig)
    with turbovlm.apply(model, r=3) as handle:
        model(**inputs)
        calls = {
            "paper": lambda: TurboConfig.paper(*values),
            "layered": lambda: LayeredDegree(*values),
            "schedule": lambda: handle.schedule(values[0]),
            "restore": lambda: handle.restore(torch.zeros(1, 31, 2), tower=values[0]),
            "get_handle": lambda: turbovlm.get_handle(values[0]),
        }
        try:
            calls[which]()
        except TurboError as error:
            assert len(str(error)) < 1500
