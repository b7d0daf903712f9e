"""Files, numbers, and what else than its result a model hands out."""

from __future__ import annotations

import copy
import pickle
import tempfile
from typing import Any

import torch

import turbovlm
from matrix_cases import Case
from matrix_checks.check import check, close, differ, in_transformers


@check("`state_dict`, `save_pretrained`, `deepcopy`, `pickle`")
@torch.no_grad()
def persistence(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    weights, plain = {name: value.clone() for name, value in model.state_dict().items()}, case.run(model, inputs)

    def has_weights(state: dict[str, torch.Tensor]) -> None:
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[name], value) for name, value in weights.items())

    model = case.make()  # libraries put hooks that do not pickle on a model that has run
    with case.apply(model):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        wanted = case.run(model, inputs)
        has_weights(model.state_dict())
        for twin in (*twins, copy.deepcopy(model)):
            assert torch.equal(case.run(twin, inputs), wanted)
            if case.settings is not None:
                turbovlm.get_handle(twin).remove()
            assert torch.equal(case.run(twin, inputs), plain)
        fresh = case.make()
        fresh.load_state_dict(model.state_dict())
        close(case.run(fresh, inputs), plain)
        model.load_state_dict({name: value * 0 for name, value in weights.items()})
        model.load_state_dict(weights)
        assert torch.equal(case.run(model, inputs), wanted)
        if hasattr(model, "save_pretrained"):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                loaded = type(model).from_pretrained(folder).eval()
            has_weights(loaded.state_dict())
            close(case.run(loaded, inputs), plain)


@check("autocast to bfloat16")
@torch.no_grad()
def autocast(case: Case) -> None:
    """The model's own dtype; with nothing merged its own numbers; merged nearer to float32 than to the full model."""
    model, inputs = case.make(), case.inputs()
    plain = case.run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = case.run(model, inputs)
    with case.apply(model):
        wanted = case.run(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = case.run(model, inputs)
    assert found.dtype == rounded.dtype and found.isfinite().all() and found.shape == wanted.shape
    scale = float(plain.abs().max())
    assert (found.float() - wanted).abs().mean() < 0.3 * scale
    if "r" in (case.settings or {}):
        with turbovlm.apply(model, r=0, trace=True), torch.autocast("cpu", torch.bfloat16):
            close(case.run(model, inputs).float(), rounded.float(), atol=0.06)


@check("`output_hidden_states=True`", in_transformers)
@torch.no_grad()
def hidden_states(case: Case) -> None:
    """As many as the model's own, each with all positions; those of what was one token behind a block are alike.

    Words that read fewer image tokens are fewer in each alike.
    """
    model, inputs = case.make(), case.inputs()
    inside = {"restore": "copy", "trace": True} if "r" in (case.settings or {}) else {}
    with turbovlm.apply(model, **case.settings, **inside) if case.settings else case.apply(model):
        bare = case.run(model, inputs)
    plain = hidden_of(model(**inputs, output_hidden_states=True))
    with turbovlm.apply(model, **case.settings, **inside) if case.settings else case.apply(model) as handle:
        out = model(**inputs, output_hidden_states=True)
        found, given = hidden_of(out), case.output(out)
        if case.group == "language" or not inside:
            assert len(found) == len(plain) and len({each.shape[1] for each in found[:-1]}) == 1
            close(given, bare)
            return
        assert [each.shape for each in found[:-1]] == [each.shape for each in plain[:-1]]
        close(found[0], plain[0])
        for trace, each in zip(handle.trace, found[1:-1]):
            tokens = each.new_zeros(each.shape[0], trace.sizes.shape[1], each.shape[2])
            source = trace.source[..., None].expand(-1, -1, each.shape[2])
            close(tokens.scatter(1, source, each).gather(1, source), each)
            differ(each, each.roll(1, dims=1))
        close(given, bare)


def hidden_of(out: Any) -> tuple[torch.Tensor, ...]:
    names = ("hidden_states", "decoder_hidden_states", "language_model_outputs")
    found = next(value for name in names if (value := getattr(out, name, None)) is not None)
    return found.hidden_states if hasattr(found, "hidden_states") else found


def maps_of(model: Any, inputs: Any, in_config: bool) -> tuple[torch.Tensor, ...]:
    model.set_attn_implementation("eager")
    if not in_config:
        return attentions_in(model(**inputs, output_attentions=True))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.output_attentions = True
    return attentions_in(model(**inputs))


def attentions_in(out: Any) -> tuple[torch.Tensor, ...]:
    names = ("attentions", "decoder_attentions", "language_model_outputs")
    found = next((value for name in names if (value := getattr(out, name, None)) is not None), ())
    return found.attentions if hasattr(found, "attentions") else found


@torch.no_grad()
def attention_maps(case: Case, in_config: bool) -> None:
    """As many maps as the model has, whose rows sum to 1."""
    inputs = case.inputs()
    plain = maps_of(case.make(), inputs, in_config)
    assert plain and all(each is not None for each in plain)
    model = case.make()
    with case.apply(model):
        found = maps_of(model, inputs, in_config)
    assert len(found) == len(plain) and all(each is not None for each in found)
    for each in found:
        rows = each.sum(-1)
        close(rows[rows > 0.5], torch.ones_like(rows[rows > 0.5]))


@check("`output_attentions=True` in the call", in_transformers)
def attentions_in_the_call(case: Case) -> None:
    attention_maps(case, in_config=False)


@check("`output_attentions=True` in the config", in_transformers)
def attentions_in_the_config(case: Case) -> None:
    attention_maps(case, in_config=True)
