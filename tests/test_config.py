"""What TurboConfig accepts, and how it says no."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from turbovlm import ConfigError, TurboConfig, TurboError
from turbovlm.ops import LayeredDegree

WRONG = [
    ({}, "exactly one of r, keep and flops"),
    ({"r": 8, "keep": 0.5}, "r=8, keep=0.5"),
    ({"keep": 0.5, "flops": 0.5}, "exactly one"),
    ({"r": -4}, "r=-4: the number of tokens merged per block must be an integer ≥ 0"),
    ({"r": 2.5}, "r=2.5"),
    ({"r": 4.0}, "r=4.0"),
    ({"r": True}, "r=True"),
    ({"r": "16"}, "r='16'"),
    ({"r": float("nan")}, "r=nan"),
    ({"r": []}, "r=\\[\\]"),
    ({"r": [4, -1]}, "r=\\[4, -1\\]"),
    ({"r": [4, 2.5]}, "r=\\[4, 2.5\\]"),
    ({"r": [4, True]}, "r=\\[4, True\\]"),
    ({"keep": []}, "needs a share per resolution"),
    ({"keep": [0.5, 2]}, "keep=2.0: must be a share in"),
    ({"keep": 0}, "keep=0.*must be a share in"),
    ({"keep": 1.5}, "keep=1.5"),
    ({"keep": -0.1}, "keep=-0.1"),
    ({"keep": float("nan")}, "keep=nan"),
    ({"keep": True}, "keep=True"),
    ({"keep": "half"}, "keep='half'"),
    ({"flops": 0.0}, "flops=0.0"),
    ({"flops": 2}, "flops=2"),
    ({"flops": float("inf")}, "flops=inf"),
    ({"r": 1, "min_tokens": -1}, "min_tokens=-1"),
    ({"r": 1, "min_tokens": 1.5}, "min_tokens=1.5"),
    ({"r": 1, "degree": "entropy"}, "degree='entropy': must be one of weighted_distance"),
    ({"r": 1, "degree": None}, "degree=None"),
    ({"r": 1, "alpha": float("nan")}, "alpha=nan"),
    ({"r": 1, "alpha": -1}, "alpha=-1"),
    ({"r": 1, "alpha": "6"}, "alpha='6'"),
    ({"r": 1, "alpha": False}, "alpha=False"),
    ({"r": 1, "similarity": "values"}, "similarity='values': must be one of heads, keys, queries, hidden"),
    ({"r": 1, "guidance": "text"}, "guidance='text'"),
    ({"r": 1, "partition": "halves"}, "partition='halves'"),
    ({"r": 1, "order": 3}, "order=3"),
    ({"r": 1, "reduce": "drop"}, "reduce='drop'"),
    ({"r": 1, "proportional": 1}, "proportional=1: must be True or False"),
    ({"r": 1, "trace": "yes"}, "trace='yes'"),
    ({"r": 1, "thresholds": [0.1]}, "thresholds=.*need a list of r beside them"),
    ({"r": [1, 2], "thresholds": [0.1]}, "thresholds=.*of as many blocks"),
    ({"r": [1], "thresholds": [float("nan")]}, "thresholds=nan"),
    ({"r": [1], "thresholds": 0.1}, "thresholds=0.1: must be a number per block"),
    ({"r": [1], "thresholds": [0.1], "degree": "random"}, "degree='random' says nothing"),
    ({"r": 1, "dense": 1}, "dense=1: must be True or False"),
    ({"r": 1, "restore": "full"}, "restore='full': must be one of auto, copy, residual"),
    ({"r": 1, "seed": -1}, "seed=-1"),
    ({"r": 1, "seed": 0.5}, "seed=0.5"),
    ({"r": 1, "grid": (4, 4)}, 'only partition="grid"'),
    ({"r": 1, "partition": "grid", "grid": (4, 0)}, "grid=\\(4, 0\\)"),
    ({"r": 1, "partition": "grid", "grid": 4}, "grid=4"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(s) for s, _ in WRONG])
def test_wrong_settings_raise_when_the_config_is_made(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        TurboConfig(**settings)
    assert isinstance(error.value, TurboError) and isinstance(error.value, ValueError)


def test_is_frozen_hashable_and_equal_by_value():
    config = TurboConfig(r=[4, 2], degree="redundancy")
    assert config == TurboConfig(r=(4, 2), degree="redundancy") and hash(config) == hash(
        TurboConfig(r=(4, 2), degree="redundancy")
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3
    assert dataclasses.replace(config, r=8).degree == "redundancy"
    with pytest.raises(ConfigError):
        dataclasses.replace(config, r=-8)


def test_numpy_numbers_are_numbers():
    config = TurboConfig(r=np.int64(4), alpha=np.float32(2), min_tokens=np.int32(3))
    assert type(config.r) is int and type(config.alpha) is float and type(config.min_tokens) is int
    assert TurboConfig(keep=np.float64(0.5)).keep == 0.5


def test_paper_multiplies_alpha_by_30():
    config = TurboConfig.paper(16, alpha=6)
    assert (config.alpha, config.similarity, config.partition, config.order) == (180, "keys", "alternate", "partition")
    assert config.degree == "weighted_difference" and config.proportional and config.reduce == "merge"
    assert TurboConfig.paper(16, beta=0.9, gamma=3).degree == LayeredDegree(180, 0.9, 3)
    assert TurboConfig.paper(16, degree="layered", alpha=2).degree == LayeredDegree(60, 1, 0)
    assert TurboConfig.paper(16, degree="redundancy").degree == "redundancy"
    with pytest.raises(ConfigError, match="alpha='6'"):
        TurboConfig.paper(16, alpha="6")
    with pytest.raises(ConfigError, match="r=-1"):
        TurboConfig.paper(-1)


def test_a_layered_degree_is_saved_and_loaded(tmp_path):
    path, config = tmp_path / "turbo.json", TurboConfig.paper(16, beta=0.9, gamma=3)
    config.save(path)
    assert json.loads(path.read_text())["degree"] == {"layered": {"alpha": 180.0, "beta": 0.9, "gamma": 3.0}}
    assert TurboConfig.load(path) == config
    path.write_text('{"turbovlm": 1, "r": 1, "degree": {"layered": {"alpha": 1}}}')
    with pytest.raises(ConfigError, match=r"turbo\.json: degree=.*beta"):
        TurboConfig.load(path)
    path.write_text('{"turbovlm": 1, "r": 1, "degree": {"layered": {"alpha": 1, "beta": 0, "gamma": 0}}}')
    with pytest.raises(ConfigError, match=r"beta=0\.0"):
        TurboConfig.load(path)


def test_settings_with_beta_and_gamma_are_still_read(tmp_path):
    path = tmp_path / "turbo.json"

    def loaded(**content):
        path.write_text(json.dumps({"turbovlm": 1, "r": 8, **content}))
        return TurboConfig.load(path)

    assert loaded(degree="damped", alpha=3.0, beta=1.0, gamma=0) == TurboConfig(r=8, degree="damped", alpha=3.0)
    assert loaded(degree="redundancy", beta=0.9, gamma=3) == TurboConfig(r=8, degree="redundancy")
    layered = loaded(degree="layered", alpha=180.0, beta=0.9, gamma=3)
    assert layered == TurboConfig(r=8, degree=LayeredDegree(180, 0.9, 3)) and layered.alpha is None
    assert loaded(degree="layered", alpha=None, beta=1.0, gamma=0).degree == LayeredDegree(2, 1, 0)


@pytest.mark.parametrize(("field", "value"), [("alpha", -1), ("beta", 0), ("beta", float("inf")), ("gamma", None)])
def test_a_layered_degree_names_what_is_wrong(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        LayeredDegree(**{"alpha": 1, "beta": 1, "gamma": 0, field: value})


def test_amount_is_what_was_written():
    assert TurboConfig(r=16).amount == "r=16"
    assert TurboConfig(r=[1, 2]).amount == "r=[1, 2]"
    assert TurboConfig(keep=0.25).amount == "keep=0.25"
