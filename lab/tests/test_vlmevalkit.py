"""VLMEvalKit's table of models, with a small LLaVA in it."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest

import turbovlm
from turbovlm import ReadConfig, TurboConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.plugins.vlmevalkit import register
from vlms import llava, seeded

pytest.importorskip("transformers")


@pytest.fixture
def table(monkeypatch):
    """As `vlmeval.config` has it: names to what makes a wrapper."""
    kit = ModuleType("vlmeval.config")
    kit.supported_VLM = {
        "small": partial(lambda retry: SimpleNamespace(model=seeded(llava), retry=retry), retry=3),
        "remote": lambda: SimpleNamespace(model="gpt"),
    }
    monkeypatch.setitem(sys.modules, "vlmeval", ModuleType("vlmeval"))
    monkeypatch.setitem(sys.modules, "vlmeval.config", kit)
    return kit.supported_VLM


def test_a_model_that_merges(table, capsys):
    assert register("small", TurboConfig(r=2), ReadConfig(0.5)) == "turbo_small"
    plain, made = table["small"](), table["turbo_small"](retry=5)
    assert made.retry == 5 and {*turbovlm.get_handle(made.model).configs} == {TurboConfig(r=2), ReadConfig(0.5)}
    assert "reads 50% of the visual tokens" in capsys.readouterr().out
    with pytest.raises(TurboError, match="is not accelerated"):
        turbovlm.get_handle(plain.model)


def test_what_is_wrong(table):
    with pytest.raises(ConfigError, match="name='none': VLMEvalKit has no such model"):
        register("none", TurboConfig(r=2))
    register("remote", TurboConfig(r=2))
    with pytest.raises(TurboError, match="SimpleNamespace has no model of PyTorch"):
        table["turbo_remote"]()
