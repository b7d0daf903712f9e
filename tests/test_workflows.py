"""Each keyword of `apply` goes to the config that has it, and a wrong one says which does."""

from __future__ import annotations

import pytest

from turbovlm import Calibration, ConfigError, DenoiseConfig, ReadConfig, TurboConfig
from turbovlm.workflows import configs_from


def of(*configs, denoises=False, **settings):
    return configs_from(configs, settings, denoises, "Model")


def test_keywords_go_to_every_class_in_use_that_has_them():
    assert of(r=16) == (TurboConfig(r=16),)
    assert of(visual_keep=0.5) == (ReadConfig(0.5),)
    assert of(r=8, visual_keep=0.5, visual_select="information", degree="redundancy", trace=True, seed=3) == (
        TurboConfig(r=8, degree="redundancy", trace=True, seed=3),
        ReadConfig(0.5, visual_select="information", degree="redundancy", seed=3),
    )
    assert of(keep=0.5, refresh=2, denoises=True) == (DenoiseConfig(0.5, refresh=2),)
    assert of(r=8, visual_keep=None) == (TurboConfig(r=8),)


def test_config_objects_are_taken_as_they_are():
    encoder, reading = TurboConfig(flops=0.6), ReadConfig(12)
    assert of(encoder, reading) == (encoder, reading)
    assert of(Calibration(encoder, 0.6, 0.01, 0.02, 0.9, 31, None, ())) == (encoder,)
    assert of(DenoiseConfig(0.5), denoises=True) == (DenoiseConfig(0.5),)


@pytest.mark.parametrize(
    ("configs", "settings", "denoises", "message"),
    [
        ((), {}, False, "give exactly one of r, keep and flops: got none of them"),
        ((), {"trace": True}, False, "give exactly one of r, keep and flops"),
        ((), {"r": 4, "keep": 0.5}, False, "give exactly one of r, keep and flops: got r=4, keep=0.5"),
        ((), {"keep": 0.5, "components": []}, True, r"components=\[\]: must be some of attention"),
        ((), {"r": 4, "visual_keep": 0.5, "degree": ["damped"]}, False, "degree=.*damped.*must be one of"),
        ((), {"r": 4, "visual_keep": 0.5, "alpha": 3}, False, r"alpha=3: inside the tower .* ReadConfig\(0\.5\)"),
        ((), {"speed": 2}, False, "speed=2: no such setting; there are r, keep, flops"),
        ((), {"r": 4, "refresh": 2}, False, "refresh=2: DenoiseConfig has it, which is for denoisers .* this Model"),
        (
            (),
            {"r": 4, "visual_select": "random"},
            False,
            "visual_select='random': ReadConfig has it, .* visual_keep, cross_keep or",
        ),
        (
            (),
            {"visual_keep": 0.5, "dense": True},
            False,
            "dense=True: TurboConfig has it, which is for encoders: r, keep",
        ),
        (
            (),
            {"r": 4},
            True,
            "r=4: TurboConfig has it, .* this Model is a denoiser, which takes the fields of DenoiseCo",
        ),
        ((), {"visual_keep": 0.5, "keep": 0.5}, True, "visual_keep=0.5: ReadConfig has it"),
        ((), {"refresh": 2}, True, "give keep, the share of its tokens"),
        ((TurboConfig(r=4),), {"r": 4}, False, "a config or settings by name, not both: got r beside a config"),
        ((4,), {}, False, r"config=4: must be a TurboConfig, ReadConfig or DenoiseConfig; .* apply\(model, r=16\)"),
        ((TurboConfig(r=4), TurboConfig(r=5)), {}, False, "several of one kind: TurboConfig, TurboConfig"),
        ((TurboConfig(keep=0.5),), {}, True, "TurboConfig is for encoders: .* DenoiseConfig"),
        ((DenoiseConfig(0.5),), {}, False, "DenoiseConfig is for denoisers of image generation: keep"),
    ],
)
def test_what_has_no_use_says_who_has_it(configs, settings, denoises, message):
    with pytest.raises(ConfigError, match=message):
        configs_from(configs, settings, denoises, "Model")


def test_a_shared_setting_goes_where_it_is_read():
    """It has an effect in one of the classes in use; where it has none in any, it is refused."""
    assert of(r=8, visual_keep=0.5, visual_select="uniform", alpha=3, guidance="mean") == (
        TurboConfig(r=8, alpha=3, guidance="mean"),
        ReadConfig(0.5, visual_select="uniform"),
    )
    with pytest.raises(ConfigError, match=r"alpha=3\.0: it would have no effect"):
        of(r=8, visual_keep=0.5, visual_select="information", degree="redundancy", alpha=3)
