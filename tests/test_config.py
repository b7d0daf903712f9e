"""What the three configs accept, how they say no, and how they are saved."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from turbovlm import Calibration, ConfigError, DenoiseConfig, ReadConfig, TurboConfig, TurboError
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
    ({"keep": [0.5, 0.7]}, "keep=\\[0.5, 0.7\\]: an encoder takes one share"),
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
    ({"flops": 0.6, "blocks": "few"}, "blocks='few': must be one of auto, every or a list of block numbers"),
    ({"r": 1, "blocks": []}, r"blocks=\[\]: must be numbers of blocks, ascending, each once"),
    ({"r": 1, "blocks": [3, 3]}, r"blocks=\[3, 3\]: must be numbers of blocks, ascending"),
    ({"r": 1, "blocks": [5, 3]}, r"blocks=\[5, 3\]: must be numbers of blocks, ascending"),
    ({"r": 1, "blocks": [-1]}, r"blocks=\[-1\]"),
    ({"r": 1, "blocks": [1.5]}, r"blocks=\[1.5\]"),
    ({"r": 1, "blocks": 3}, "blocks=3"),
    ({"r": [1, 2], "blocks": [1]}, r"r=\[1, 2\]: needs one number for each of blocks=\[1\]"),
    ({"r": [1, 2], "blocks": "every"}, r"blocks='every': it would have no effect: a list of r has a number for every"),
    ({"r": [1], "blocks": [1], "thresholds": [0.1]}, "blocks: beside thresholds, give r a number for every block"),
    ({"r": 1, "partition": "all", "order": "partition"}, 'makes no halves to order by; use order="spatial"'),
    ({"r": 1, "partition": "grid", "grid": (4, 0)}, "grid=\\(4, 0\\)"),
    ({"r": 1, "partition": "grid", "grid": 4}, "grid=4"),
]

WRONG_READING = [
    ({}, "give visual_keep or cross_keep"),
    ({"visual_select": "random"}, "give visual_keep or cross_keep"),
    ({"visual_keep": 0}, "visual_keep=0: it must be an integer ≥ 1"),
    ({"visual_keep": 0.0}, r"visual_keep=0\.0: must be a share in \(0, 1\] or an integer ≥ 1"),
    ({"visual_keep": 1.5}, r"visual_keep=1\.5"),
    ({"visual_keep": True}, "visual_keep=True"),
    ({"cross_keep": "half"}, "cross_keep='half'"),
    ({"visual_keep": 0.5, "visual_select": "best"}, "visual_select='best': must be one of information, redundancy"),
    (
        {"cross_keep": 0.5, "visual_select": "pooling"},
        "visual_select='pooling': cross_keep takes tokens layer by layer",
    ),
    ({"visual_keep": 0.5, "visual_select": 3}, r"visual_select=3: .* or a callable \(features, attention, text, grid"),
    ({"visual_keep": 0.5, "visual_select": "dpp", "question": -1}, "question=-1: must be a number ≥ 0"),
    ({"visual_keep": 0.5, "visual_select": "dpp", "question": "what?"}, "question='what\\?': must be a finite number"),
    ({"visual_keep": 0.5, "visual_select": "dpp", "visual_tolerance": 1}, r"visual_tolerance=1: .*\[0, 1\)"),
    ({"visual_keep": 0.5, "visual_select": "dpp", "visual_tolerance": -0.1}, r"visual_tolerance=-0\.1: must be a"),
    ({"visual_keep": 0.5, "min_visual_tokens": 0.5}, r"min_visual_tokens=0\.5: it must be an integer ≥ 0"),
    ({"visual_keep": 8, "min_visual_tokens": 9}, "min_visual_tokens=9: above visual_keep=8"),
    ({"visual_keep": 0.5, "visual_select": "mmr", "alpha": 0}, "alpha=0: visual_select='mmr'"),
    ({"visual_keep": 0.5, "reduce": "keep_norm"}, "reduce='keep_norm': must be one of merge, prune"),
    ({"visual_keep": 0.5, "degree": "auto"}, "degree='auto'"),
    ({"visual_keep": 0.5, "guidance": "text"}, "guidance='text'"),
    ({"visual_keep": 0.5, "seed": -1}, "seed=-1"),
]
WRONG_DENOISING = [
    ({"keep": None}, "keep=None: must be a finite number"),
    ({"keep": []}, "needs a share per resolution"),
    ({"keep": [0.5, 2]}, r"keep=2\.0: must be a share in"),
    ({"keep": 0.2}, r"keep=0\.2: must be ≥ 0\.25: one token in every 2×2 cell stays"),
    ({"keep": [0.5, 0.1]}, r"keep=0\.1: must be ≥ 0\.25"),
    ({"keep": {}}, r"keep={}: the first progress must be 0, from where on a share is kept, as in keep={0: 0\.5"),
    ({"keep": {0.1: 0.5, 0.6: 1.0}}, r"keep={0\.1: 0\.5, 0\.6: 1\.0}: the first progress must be 0"),
    ({"keep": {-0.5: 0.5, 0: 1.0}}, "the first progress must be 0"),
    ({"keep": {0: 0.5, 1: 1.0}}, r"progress must ascend, in \[0, 1\)"),
    ({"keep": {0: 0.5, 0.8: 1.0, 0.4: 0.7}}, r"progress must ascend, in \[0, 1\)"),
    ({"keep": [(0, 0.5), (0, 1.0)]}, r"progress must ascend, in \[0, 1\)"),
    ({"keep": {False: 0.5}}, "keep: progress=False: must be a finite number"),
    ({"keep": {0: 0.5, "0.6": 1.0}}, "keep: progress='0.6': must be a finite number"),
    ({"keep": {0: 0.5, float("nan"): 1.0}}, "keep: progress=nan: must be a finite number"),
    ({"keep": {0: 0.5, 0.6: 0.1}}, r"keep=0\.1: must be ≥ 0\.25"),
    ({"keep": {0: []}}, "needs a share per resolution"),
    ({"keep": {0: {0: 0.5}}}, "must be a finite number"),
    ({"keep": [(0, 0.5), 0.6]}, "over the steps it takes pairs of a progress and a share"),
    ({"keep": [(0, 0.5, 0.6)]}, "over the steps it takes pairs of a progress and a share"),
    (
        {"keep": 0.5, "components": "attention"},
        "components='attention': must be some of attention, cross_attention, ffn",
    ),
    ({"keep": 0.5, "components": []}, "components="),
    ({"keep": 0.5, "components": ["mlp"]}, "components="),
    ({"keep": 0.5, "refresh": 0}, "refresh=0: it must be an integer ≥ 1"),
    ({"keep": 0.5, "restore": "residual"}, "restore='residual': must be one of auto, copy, linear"),
    ({"keep": 0.5, "grid": (4, 0)}, r"grid=\(4, 0\)"),
    ({"keep": 0.5, "min_tokens": -1}, "min_tokens=-1"),
]
WRONG_ANYWHERE = [
    *((TurboConfig, settings, message) for settings, message in WRONG),
    *((ReadConfig, settings, message) for settings, message in WRONG_READING),
    *((DenoiseConfig, settings, message) for settings, message in WRONG_DENOISING),
]


@pytest.mark.parametrize(
    ("kind", "settings", "message"), WRONG_ANYWHERE, ids=[f"{k.__name__}{s}" for k, s, _ in WRONG_ANYWHERE]
)
def test_wrong_settings_raise_when_the_config_is_made(kind, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        kind(**settings)
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
    own = LayeredDegree(3, 1, 0)
    assert (TurboConfig.paper(16, degree=own).degree, TurboConfig.paper(16, degree=own).alpha) == (own, None)
    with pytest.raises(ConfigError, match="alpha=2: it would have no effect"):
        TurboConfig.paper(16, degree=own, alpha=2)
    with pytest.raises(ConfigError, match="alpha='6'"):
        TurboConfig.paper(16, alpha="6")
    with pytest.raises(ConfigError, match="r=-1"):
        TurboConfig.paper(-1)


def test_a_layered_degree_is_saved_and_loaded(tmp_path):
    path, config = tmp_path / "turbo.json", TurboConfig.paper(16, beta=0.9, gamma=3)
    config.save(path)
    assert json.loads(path.read_text())["settings"]["degree"] == {
        "layered": {"alpha": 180.0, "beta": 0.9, "gamma": 3.0}
    }
    assert TurboConfig.load(path) == config
    path.write_text('{"turbovlm": 1, "r": 1, "degree": {"layered": {"alpha": 1}}}')
    with pytest.raises(ConfigError, match=r"turbo\.json: .*beta"):
        TurboConfig.load(path)
    path.write_text('{"turbovlm": 1, "r": 1, "degree": {"layered": {"alpha": 1, "beta": 0, "gamma": 0}}}')
    with pytest.raises(ConfigError, match=r"beta=0\.0"):
        TurboConfig.load(path)


def earlier(**settings):
    """As releases without `blocks` merged: one half into the other, in every block, `r` of each."""
    blocks = {} if isinstance(settings.get("r"), tuple) else {"blocks": "every"}
    return TurboConfig(**settings, partition="random", **blocks)


def test_settings_with_beta_and_gamma_are_still_read(tmp_path):
    path = tmp_path / "turbo.json"

    def loaded(**content):
        path.write_text(json.dumps({"turbovlm": 1, "r": 8, **content}))
        return TurboConfig.load(path)

    assert loaded(degree="damped", alpha=3.0, beta=1.0, gamma=0) == earlier(r=8, degree="damped", alpha=3.0)
    assert loaded(degree="redundancy", beta=0.9, gamma=3) == earlier(r=8, degree="redundancy")
    layered = loaded(degree="layered", alpha=180.0, beta=0.9, gamma=3)
    assert layered == earlier(r=8, degree=LayeredDegree(180, 0.9, 3)) and layered.alpha is None
    assert loaded(degree="layered", alpha=None, beta=1.0, gamma=0).degree == LayeredDegree(2, 1, 0)


@pytest.mark.parametrize(("field", "value"), [("alpha", -1), ("beta", 0), ("beta", float("inf")), ("gamma", None)])
def test_a_layered_degree_names_what_is_wrong(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        LayeredDegree(**{"alpha": 1, "beta": 1, "gamma": 0, field: value})


def test_amount_is_what_was_written():
    assert TurboConfig(r=16).amount == "r=16"
    assert TurboConfig(r=[1, 2]).amount == "r=[1, 2]"
    assert TurboConfig(keep=0.25).amount == "keep=0.25"
    assert DenoiseConfig([0.5, 0.75]).amount == "keep=[0.5, 0.75]"
    over = DenoiseConfig({0: [0.5, 0.75], 0.6: 1})
    assert over.amount == "keep={0: [0.5, 0.75], 0.6: 1.0}"
    assert DenoiseConfig(**eval(f"dict({over.amount})")) == over and over.changed(refresh=2).keep == over.keep


def test_a_keep_over_the_steps_has_one_form(tmp_path):
    over = DenoiseConfig({0: 0.5, 0.6: [0.75, 1]})
    same = DenoiseConfig([(0.0, 0.5), [0.6, (0.75, 1.0)]])
    assert over == same and hash(over) == hash(same) and over.over_steps
    assert DenoiseConfig({0: 0.5}) == DenoiseConfig(0.5) and not DenoiseConfig([0.5, 0.75]).over_steps
    with pytest.raises(ConfigError, match="keep=float: a function cannot be saved"):
        DenoiseConfig(float).save(tmp_path / "turbo.json")
    assert not any(tmp_path.iterdir())


SAVED = [
    TurboConfig(r=[4, 2, 0], thresholds=[0.1, 0.2, 0.3], degree="redundancy", similarity="keys", seed=3),
    TurboConfig(keep=0.5, partition="grid", grid=(4, 6), dense=True),
    ReadConfig(0.5, visual_select="attention", reduce="prune"),
    ReadConfig(cross_keep=12),
    ReadConfig(0.5, visual_select="coverage", alpha=2, question=0.5, visual_tolerance=0.1, min_visual_tokens=16),
    ReadConfig(0.5, visual_select="dpp", change=0.5),
    DenoiseConfig([0.5, 0.75], components=["attention"], refresh=3, grid=(2, 8)),
    DenoiseConfig(0.5, grid=[(8, 12), (10, 14)]),
    DenoiseConfig({0: (0.5, 0.75), 0.6: 1.0}),
]


@pytest.mark.parametrize("config", SAVED, ids=str)
def test_every_config_is_saved_and_loaded(config, tmp_path):
    path = tmp_path / "turbo.json"
    config.save(path)
    assert type(config).load(path) == config
    calibration = Calibration(config, 0.6, 0.01, 0.02, 0.9, 31, None, ((0.6, 0.01), (0.8, 0.001)))
    calibration.save(path)
    assert Calibration.load(path) == calibration and type(config).load(path) == config
    other = ReadConfig if isinstance(config, TurboConfig) else TurboConfig
    kind = type(config).__name__
    with pytest.raises(ConfigError, match=f"holds settings of {kind}: read them with turbovlm.{kind}.load"):
        other.load(path)


FIRST_FORMAT = {
    "keep": None,
    "flops": None,
    "min_tokens": 0,
    "thresholds": None,
    "degree": "auto",
    "alpha": None,
    "beta": 1.0,
    "gamma": 0,
    "similarity": "auto",
    "guidance": "auto",
    "partition": "auto",
    "grid": None,
    "order": "spatial",
    "proportional": True,
    "reduce": "auto",
    "dense": False,
    "trace": False,
    "seed": 0,
    "visual_keep": None,
    "visual_select": "information",
    "cross_keep": None,
    "components": ["attention", "cross_attention", "ffn"],
    "refresh": 1,
    "restore": "auto",
    "share_guidance": True,
    "promise": None,
}
"""Everything that a file of the first format held."""
PROMISE = {
    "flops": 0.6,
    "drift": 0.01,
    "bound": 0.02,
    "coverage": 0.9,
    "images": 31,
    "speedup": None,
    "curve": [[0.6, 0.01]],
}


def test_files_of_the_first_format_still_load(tmp_path):
    path = tmp_path / "turbo.json"

    def write(**changes):
        path.write_text(json.dumps({"turbovlm": 1, "r": None, **FIRST_FORMAT, **changes}))

    write(r=[4, 2], degree="redundancy", partition="random", promise=PROMISE)
    assert TurboConfig.load(path) == earlier(r=(4, 2), degree="redundancy")
    assert Calibration.load(path) == Calibration(
        earlier(r=(4, 2), degree="redundancy"), 0.6, 0.01, 0.02, 0.9, 31, None, ((0.6, 0.01),)
    )
    write(visual_keep=0.5, visual_select="attention")
    assert ReadConfig.load(path) == ReadConfig(0.5, visual_select="attention")
    write(keep=[0.5, 0.7], refresh=2)
    parts = {"scope": "part", "components": FIRST_FORMAT["components"], "degree": "weighted_difference"}
    assert DenoiseConfig.load(path) == DenoiseConfig((0.5, 0.7), refresh=2, **parts)
    write(keep=0.5)
    assert TurboConfig.load(path) == earlier(keep=0.5) and DenoiseConfig.load(path) == DenoiseConfig(0.5, **parts)
    with pytest.raises(ConfigError, match="these settings were not calibrated"):
        Calibration.load(path)
    write(r=8, visual_keep=0.5)
    with pytest.raises(ConfigError, match="save a TurboConfig and a ReadConfig"):
        TurboConfig.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no settings of turbovlm"),
        ("{", "holds no settings of turbovlm"),
        ('{"r": 3}', "holds no settings of turbovlm"),
        ('{"turbovlm": 5}', "is of format 5; this release reads 1 to 4"),
        ('{"turbovlm": 3}', "holds no settings of turbovlm"),
        ('{"turbovlm": 2, "kind": "Config"}', "holds no settings of turbovlm"),
        ('{"turbovlm": 2, "kind": "TurboConfig", "settings": {"r": 1, "speed": 2}}', "does not know: 'speed'"),
        ('{"turbovlm": 2, "kind": "TurboConfig", "settings": {"r": -1}}', "r=-1"),
    ],
)
def test_files_that_hold_no_settings(content, message, tmp_path):
    path = tmp_path / "turbo.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        TurboConfig.load(path)
    with pytest.raises(ConfigError, match=r"none\.json: there is no such file"):
        TurboConfig.load(tmp_path / "none.json")


def own_degree(redundancy, semantic, block):
    return redundancy


UNREAD = [
    (TurboConfig, {"r": 4, "degree": own_degree, "alpha": 3.0}, r"alpha=3\.0: it would have no effect: .*a callable"),
    (TurboConfig, {"r": 4, "degree": LayeredDegree(2, 1, 0), "alpha": 3}, r"alpha=3\.0: .*put it there"),
    *(
        (kind, {**amount, "degree": degree, "alpha": 0}, rf"alpha=0\.0: .*degree='{degree}' has no alpha")
        for kind, amount in (
            (TurboConfig, {"keep": 0.5}),
            (ReadConfig, {"visual_keep": 0.5, "visual_select": "information"}),
            (DenoiseConfig, {"keep": 0.5}),
        )
        for degree in ("coupled_division", "redundancy", "semantics", "random")
    ),
    (TurboConfig, {"r": 4, "degree": "redundancy", "guidance": "mean"}, "guidance='mean': .*needs no attention"),
    (TurboConfig, {"r": 4, "degree": "random", "guidance": "cls"}, "guidance='cls': .*trace=True"),
    *(
        (ReadConfig, {"visual_keep": 0.5, "visual_select": select, name: value}, f"{name}={value!r}: .*'{select}'")
        for select in ("random", "uniform", "pooling")
        for name, value in (("degree", "redundancy"), ("alpha", 2.0), ("guidance", "mean"))
    ),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": "pooling", "reduce": "prune"}, "reduce='prune': .*averages"),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": "attention", "alpha": 1}, r"alpha=1\.0: .*degree of its own"),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": "redundancy", "degree": "damped"}, "degree='damped'"),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": "redundancy", "guidance": "mean"}, "guidance='mean'"),
    (
        ReadConfig,
        {"visual_keep": 0.5, "visual_select": "information", "degree": "redundancy", "guidance": "mean"},
        "guidance='mean'",
    ),
    (ReadConfig, {"cross_keep": 0.5, "guidance": "cls"}, "guidance='cls': .*the words' attention"),
    *(
        (ReadConfig, {"visual_keep": 0.5, "visual_select": "diversity", name: value}, f"{name}={value!r}: .*all tokens")
        for name, value in (("alpha", 2.0), ("guidance", "mean"), ("question", 1.0))
    ),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": "dpp", "degree": "redundancy"}, "degree=.*compares all pairs"),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": "dpp", "alpha": 0, "guidance": "mean"}, "guidance=.*leaves"),
    (ReadConfig, {"visual_keep": 0.5, "degree": "redundancy"}, "degree=.*'coverage' compares all pairs"),
    (
        ReadConfig,
        {"visual_keep": 0.5, "visual_select": "random", "question": 1},
        r"question=1\.0: .*coverage, mmr and dpp can",
    ),
    (
        ReadConfig,
        {"visual_keep": 0.5, "visual_select": "information", "visual_tolerance": 0.1},
        r"visual_tolerance=0\.1: .*coverage, diversity, mmr",
    ),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": own_degree, "question": 1}, "question=.*decides itself"),
    (ReadConfig, {"visual_keep": 0.5, "visual_select": own_degree, "alpha": 1}, "alpha=.*decides itself"),
    *(
        (ReadConfig, {"cross_keep": 0.5, "visual_select": "dpp", name: value}, f"{name}={value!r}: .*")
        for name, value in (("question", 1.0), ("visual_tolerance", 0.1), ("min_visual_tokens", 3))
    ),
    (DenoiseConfig, {"keep": 0.5, "restore": "linear", "components": ["attention"]}, "restore='linear': .*no 'ffn'"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), UNREAD)
def test_a_setting_without_effect_is_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


def test_what_has_an_effect_is_taken():
    TurboConfig(r=4, degree="redundancy", guidance="mean", trace=True)
    TurboConfig(r=4, degree="redundancy", similarity="keys", seed=5)
    ReadConfig(0.5, visual_select="attention", guidance="mean")
    ReadConfig(0.5, visual_select="uniform", reduce="prune")
    ReadConfig(0.5, cross_keep=0.5, guidance="mean")
    ReadConfig(0.5, visual_select="mmr", alpha=0, question=1)
    ReadConfig(0.5, visual_select=own_degree, guidance="mean", reduce="prune", min_visual_tokens=3)
    DenoiseConfig(0.5, restore="linear", components=["ffn"])
    DenoiseConfig(0.5, restore="copy", components=["attention"], seed=3)


def test_a_change_takes_what_nothing_reads_any_more_with_it():
    config = ReadConfig(0.5, visual_select="information", degree="damped", alpha=3, guidance="mean", reduce="prune")
    assert config.changed(visual_select="uniform") == ReadConfig(0.5, visual_select="uniform", reduce="prune")
    assert config.changed(alpha=4) == dataclasses.replace(config, alpha=4)
    assert TurboConfig(r=4, alpha=3).changed(degree="redundancy") == TurboConfig(r=4, degree="redundancy")
    with pytest.raises(ConfigError, match="alpha=-1"):
        config.changed(alpha=-1)


def test_files_of_earlier_releases_with_settings_without_effect_are_read(tmp_path):
    path = tmp_path / "turbo.json"

    def loaded(kind, version=2, **settings):
        content = {"kind": kind.__name__, "settings": settings} if version == 2 else settings
        path.write_text(json.dumps({"turbovlm": version, **content}))
        return kind.load(path)

    assert loaded(TurboConfig, r=8, degree="redundancy", alpha=3.0, guidance="cls") == earlier(r=8, degree="redundancy")
    assert loaded(TurboConfig, 1, r=8, degree="semantics", alpha=3.0) == earlier(r=8, degree="semantics")
    assert loaded(ReadConfig, visual_keep=0.5, visual_select="uniform", degree="damped", alpha=2.0) == ReadConfig(
        0.5, visual_select="uniform"
    )
    layered = {"layered": {"alpha": 2.0, "beta": 0.9, "gamma": 1.0}}
    assert loaded(TurboConfig, r=8, degree=layered, alpha=3.0) == earlier(r=8, degree=LayeredDegree(2, 0.9, 1))
    with pytest.raises(ConfigError, match="degree='entropy'"):
        loaded(TurboConfig, r=8, degree="entropy", alpha=3.0)


@pytest.mark.parametrize(
    ("saved", "same"),
    [
        ({"r": 8, "blocks": "auto"}, {"r": 8, "blocks": "every"}),
        ({"r": 8, "blocks": "every"}, {"r": 8, "blocks": "every"}),
        ({"r": 8, "blocks": [3, 5, 9]}, {"r": (8, 8, 8), "blocks": (3, 5, 9)}),
        ({"r": [8, 0, 4], "blocks": "auto"}, {"r": (8, 0, 4)}),
        ({"r": None, "flops": 0.6, "blocks": "auto"}, {"flops": 0.6}),
        ({"r": None, "keep": 0.5, "blocks": [3, 5]}, {"keep": 0.5, "blocks": (3, 5)}),
        ({"r": 8, "blocks": "auto", "partition": "alternate"}, {"r": 8, "blocks": "every", "partition": "alternate"}),
    ],
)
def test_an_r_of_the_second_format_stays_that_of_each_block(saved, same, tmp_path):
    """What merges is what did: r in each block that was to merge, in an encoder of any depth."""
    path = tmp_path / "turbo.json"
    path.write_text(json.dumps({"turbovlm": 2, "kind": "TurboConfig", "settings": saved, "promise": PROMISE}))
    assert TurboConfig.load(path) == TurboConfig(**same)
    found = Calibration.load(path)
    assert found.config == TurboConfig(**same)
    found.save(path)
    assert json.loads(path.read_text())["turbovlm"] == 4 and Calibration.load(path) == found


def test_an_r_of_this_format_stays_a_mean(tmp_path):
    path = tmp_path / "turbo.json"
    for config in (TurboConfig(r=8), TurboConfig(r=8, blocks=[3, 5]), TurboConfig.paper(8)):
        config.save(path)
        assert TurboConfig.load(path) == config
    assert TurboConfig.paper(8).blocks == "every" and TurboConfig.paper([8, 0]).r == (8, 0)


@pytest.mark.parametrize(("kind", "amount"), [(TurboConfig, "r"), (ReadConfig, "visual_keep"), (DenoiseConfig, "keep")])
def test_seeds_have_32_bits(kind, amount):
    for seed in (2**32, 2**70):
        with pytest.raises(ConfigError, match=f"seed={seed}: must be an integer from 0 to 4294967295"):
            kind(**{amount: 1, "seed": seed})
    assert kind(**{amount: 1, "seed": 2**32 - 1}).seed == 2**32 - 1


def test_large_seeds_draw_like_small_ones():
    from turbovlm.ops.partition import hashed_uniform

    drawn = [hashed_uniform(4096, seed, 3) for seed in (0, 1, 2**28, 2**32 - 1)]
    for values in drawn:
        assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.03
    assert len({tuple(values[:8].tolist()) for values in drawn}) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 3}, r"gamma=3: it would have no effect"),
        ({"beta": 0.5, "degree": "damped"}, r"beta=0\.5: it would have no effect: degree='damped'"),
        ({"gamma": 1, "degree": "redundancy"}, "gamma=1"),
        ({"alpha": 3, "degree": "redundancy"}, "alpha=3: it would have no effect: degree='redundancy' has no alpha"),
    ],
)
def test_the_papers_numbers_have_an_effect_or_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TurboConfig.paper(4, **settings)
