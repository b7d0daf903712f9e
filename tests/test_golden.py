"""Paper-faithful mode against outputs of the paper authors' own merging code (a tiny BLIP vision encoder)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import turbovlm
from turbovlm import TurboConfig

transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
TENSORS = load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def model():
    config = transformers.BlipVisionConfig(**json.loads((GOLDEN / "config.json").read_text()))
    model = transformers.BlipVisionModel(config).eval()
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    return model


def paper_config(case):
    settings = {"r": case["r"], "min_tokens": case["thr"], "beta": case["beta"], "gamma": case["gamma"]}
    if case["alpha"] is None:
        return TurboConfig.paper(**settings, degree="redundancy", trace=True)
    return TurboConfig.paper(**settings, alpha=case["alpha"], trace=True)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_authors_code(model, name):
    with torch.no_grad(), turbovlm.apply(model, paper_config(CASES[name])) as handle:
        hidden = model(TENSORS["pixel_values"]).last_hidden_state
        trace = handle.trace
        assert handle.schedules[0].tokens[1:] == tuple(CASES[name]["tokens_after_block"])
    torch.testing.assert_close(hidden, TENSORS[f"{name}.last_hidden_state"], rtol=0, atol=1e-4)
    torch.testing.assert_close(trace[-1].sizes, TENSORS[f"{name}.size"].reshape(trace[-1].sizes.shape))
    assert [t.sizes.shape[1] for t in trace] == CASES[name]["tokens_after_block"]
