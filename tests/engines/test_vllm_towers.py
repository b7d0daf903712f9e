"""vLLM with tokens merged inside its CLIP and SigLIP towers generates what `transformers` generates with `r`."""

from __future__ import annotations

import pytest
from test_vllm import PROMPTS, by_transformers, by_vllm, job
from tiny_served import TOWERS, save

SETTINGS = {
    "off": None,
    "r": {"r": 5},
    "keep, everywhere": {"keep": 0.3, "blocks": "every", "restore": "copy", "partition": "random", "reduce": "merge"},
    "and in rounds": {"r": 5, "visual_keep": 0.5, "visual_select": "information", "proportional": False},
    "and the default": {"r": 5, "visual_keep": 5},
    "and pruned": {"flops": 0.8, "visual_keep": 0.3, "visual_select": "redundancy", "reduce": "prune"},
}


@pytest.fixture(scope="module", params=[*TOWERS])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return request.param, folder


@pytest.fixture(scope="module")
def answers(family):
    """Two rounds of each of the settings."""
    name, folder = family
    # vLLM makes its cache of images for OneVision's largest one as published, of which this model has 90 tokens of 114
    room = {"max_num_batched_tokens": 128} if name == "onevision" else {}
    jobs = [job(name, folder, settings, rounds=2, **room) for settings in SETTINGS.values()]
    return dict(zip(SETTINGS, by_vllm(folder, jobs)))


@pytest.mark.parametrize("how", SETTINGS)
def test_tokens_are_those_of_transformers(family, answers, how):
    expected = by_transformers(*family, SETTINGS[how])
    for answered in answers[how]["rounds"]:  # the second from what is cached
        assert [tokens for tokens, _, _ in answered] == [tokens for tokens, _ in expected]
        if "visual_keep" not in (SETTINGS[how] or {}):  # every position has its token back
            assert [length for _, length, _ in answered] == [length for _, length in expected]


def test_settings_change_what_is_generated(answers):
    said = [[tuple(tokens) for tokens, _, _ in answers[how]["rounds"][0]] for how in SETTINGS]
    of_images = {tuple(tokens for tokens, (_, seeds) in zip(each, PROMPTS) if seeds) for each in said}
    of_text = {tuple(tokens for tokens, (_, seeds) in zip(each, PROMPTS) if not seeds) for each in said}
    assert len(of_images) == len(SETTINGS) and len(of_text) == 1
