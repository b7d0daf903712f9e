"""vLLM with the plug-in generates what `transformers` generates with `visual_keep`: `make test-engines`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from answer import images
from served import ENGINE, LONG, NEW, SETTINGS, environment, python_of_vllm
from tiny_served import MAKE, PLACEHOLDER, save

import turbovlm

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: make test-engines sets up an environment with it", allow_module_level=True)

SIZES = {
    "llava": [[48, 48]],
    "llava_siglip": [[48, 48]],
    "onevision": [[48, 48], [96, 48], [40, 90]],
    "qwen2_5": [[112, 112], [112, 168], [224, 112], [168, 168]],
    "qwen3": [[128, 128], [128, 192], [256, 128], [192, 192]],
    "internvl": [[48, 48], [96, 48], [40, 90]],
}
"""Of images, by their number."""
PROMPTS = [
    ("w3 w4 I w5 w6", [0]),
    ("w9 w8 w7", []),
    ("I w5 I w6 w9 w11", [1, 2]),
    ("w9 w8 w7 w5 w5 w5 w1 w2 I I w1 I", [0, 3, 1]),
    ("w3 w4 I w5 w6 w7", [0]),
]


@pytest.fixture(scope="module", params=[*MAKE])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return request.param, folder


def prompts(name):
    return [(text.replace("I", PLACEHOLDER[name]), seeds) for text, seeds in PROMPTS]


def by_transformers(name, folder, settings, new=NEW):
    """What `transformers` generates for each prompt, and how many tokens it has."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if settings is not None:
        turbovlm.apply(model, **settings)
    found = []
    for text, seeds in prompts(name):
        inputs = processor(text=text, images=images(seeds, SIZES[name]) or None, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)
        found.append((out[0, length:].tolist(), length))
    return found


def job(name, folder, settings, rounds=1, new=NEW, **engine):
    given = {} if settings is None else {"additional_config": {"turbovlm": settings}}
    asked = {"model": str(folder), "engine": {**ENGINE, **given, **engine}, "prompts": prompts(name), "new": new}
    return {**asked, "rounds": rounds, "sizes": SIZES[name]}


def by_vllm(folder, jobs, **changes):
    jobs_file, out = folder / "jobs.json", folder / "answers.json"
    jobs_file.write_text(json.dumps(jobs))
    script = [python_of_vllm(), "-W", "ignore", str(Path(__file__).with_name("answer.py")), str(jobs_file), str(out)]
    done = subprocess.run(script, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def answers(family):
    """Two rounds of each of the settings, and one in which requests are preempted."""
    name, folder = family
    jobs = [job(name, folder, settings, rounds=2) for settings in SETTINGS.values()]
    few = {"num_gpu_blocks_override": 9, "max_model_len": 256, "disable_log_stats": False}
    jobs.append(job(name, folder, SETTINGS["in rounds"], new=LONG, **few))
    return dict(zip([*SETTINGS, "preempted"], by_vllm(folder, jobs)))


@pytest.mark.parametrize("how", SETTINGS)
def test_tokens_are_those_of_transformers(family, answers, how):
    expected = by_transformers(*family, SETTINGS[how])
    for answered in answers[how]["rounds"]:  # the second from what is cached
        assert [tokens for tokens, _, _ in answered] == [tokens for tokens, _ in expected]


def test_settings_change_what_is_generated(answers):
    said = [answers[how]["rounds"][0] for how in SETTINGS]
    with_images = [i for i, (_, seeds) in enumerate(PROMPTS) if seeds]
    for i in with_images:
        assert len({tuple(tokens[i][0]) for tokens in said}) > 1
    assert len({tuple(tokens[1][0]) for tokens in said}) == 1  # of text alone


@pytest.mark.parametrize("how", ["in rounds", "prune"])
def test_prompts_are_as_much_shorter(family, answers, how):
    """Placeholders, and with them blocks of the cache: of prompts with images alone."""
    name, folder = family
    full = by_transformers(name, folder, None)
    keep = SETTINGS[how]["visual_keep"]
    for (_, seeds), (_, length), (_, shorter, _) in zip(PROMPTS, full, answers[how]["rounds"][0]):
        assert shorter < length if seeds else shorter == length
        if name == "llava":
            assert length - shorter == len(seeds) * (36 - round(36 * keep))


def test_prefixes_are_cached(answers):
    first, second = answers["in rounds"]["rounds"]
    assert sum(cached for _, _, cached in second) > 0
    assert [tokens for tokens, _, _ in first] == [tokens for tokens, _, _ in second]


def test_a_preempted_request_goes_on(family, answers):
    assert answers["preempted"]["preempted"] > 0
    expected = by_transformers(*family, SETTINGS["in rounds"], new=LONG)
    assert [tokens for tokens, _, _ in answers["preempted"]["rounds"][0]] == [tokens for tokens, _ in expected]
