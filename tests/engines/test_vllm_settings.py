"""The vLLM plug-in's settings and positions, which need no vLLM."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from turbovlm import ReadConfig
from turbovlm.engines.vllm.configure import refuse_features
from turbovlm.engines.vllm.positions import (
    DIGITS,
    ImagePlace,
    full_columns,
    resolve,
    split_offsets,
    unresolved,
    with_offsets,
)
from turbovlm.engines.vllm.settings import RELEASES, family_served, put_settings, reading_from, settings_of
from turbovlm.engines.vllm.tower import guide_rows
from turbovlm.errors import ConfigError, UnsupportedModelError

RELEASE = f"{RELEASES[-1]}.0"
GIVEN = {"visual_keep": 0.5, "visual_select": "redundancy"}


def test_settings_become_a_read_config():
    assert reading_from(GIVEN, RELEASE) == ReadConfig(**GIVEN)
    assert reading_from({**GIVEN, "min_visual_tokens": 4}, f"{RELEASES[0]}.1+cpu").min_visual_tokens == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0.5, "must be settings by name"),
        ({}, "give visual_keep"),
        ({"visual_select": "redundancy"}, "give visual_keep"),
        ({**GIVEN, "keep": 0.5}, "keep=0.5: no such setting; there are visual_keep"),
        ({**GIVEN, "visual_keep": 1.5}, "visual_keep=1.5"),
        ({**GIVEN, "reduce": "drop"}, "reduce='drop'"),
        ({**GIVEN, "alpha": 2}, "alpha=2"),
        ({"visual_keep": 0.5, "visual_select": "coverage", "alpha": 0, "question": 1}, "question=1: cannot be served"),
        ({**GIVEN, "visual_tolerance": 0.2}, "visual_tolerance=0.2: cannot be served"),
        ({"cross_keep": 0.5}, "cross_keep=0.5: cannot be served"),
        ({"visual_keep": 0.5, "visual_select": len}, "a function cannot be sent"),
    ],
)
def test_bad_settings_are_named(given, said):
    with pytest.raises(ConfigError, match=said):
        reading_from(given, RELEASE)


def test_another_release_is_refused_with_its_number():
    with pytest.raises(ConfigError, match=r"vLLM 0\.1\.2: .*0\.31"):
        reading_from(GIVEN, "0.1.2")


def llava(vision="clip_vision_model", **rope):
    text = SimpleNamespace(rope_parameters=rope)
    return SimpleNamespace(vision_config=SimpleNamespace(model_type=vision), get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("LlamaForCausalLM", SimpleNamespace(), "LlamaForCausalLM: visual_keep=0.5 is served of Llava"),
        ("LlavaForConditionalGeneration", llava("pixtral"), "tower of type pixtral"),
        ("LlavaForConditionalGeneration", llava(rope_type="yarn"), "rope_type='yarn'"),
    ],
)
def test_models_that_are_not_known_are_refused(architecture, config, said):
    with pytest.raises(UnsupportedModelError, match=said):
        family_served(architecture, config, reading_from(GIVEN, RELEASE))


def test_a_config_takes_settings_along():
    config = llava()
    assert settings_of(config) is None
    reading = reading_from({**GIVEN, "seed": 3}, RELEASE)
    put_settings(config, reading, 512)
    assert settings_of(config) == (reading, 512)


def engine(**asked):
    """A config of vLLM's as far as it is read."""
    multimodal = {"video_pruning_rate": None, "mm_encoder_tp_mode": "weights", "enable_mm_embeds": False}
    parallel = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1, "use_ubatching": False}
    compilation = {"cudagraph_mm_encoder": False, "compile_mm_encoder": False}
    beside = dict.fromkeys(("speculative_config", "kv_transfer_config", "ec_transfer_config", "lora_config"))
    parts = (multimodal, parallel, compilation, beside)
    for name, value in asked.items():
        next(part for part in parts if name in part)[name] = value
    multimodal, parallel, compilation = (SimpleNamespace(**part) for part in parts[:3])
    model = SimpleNamespace(multimodal_config=multimodal, runner_type="generate")
    return SimpleNamespace(model_config=model, parallel_config=parallel, compilation_config=compilation, **beside)


def test_features_that_do_not_go_with_shorter_prompts_are_refused():
    refuse_features(engine(), attention=True)
    with pytest.raises(ConfigError, match="pipeline_parallel_size, video_pruning_rate: does not go"):
        refuse_features(engine(pipeline_parallel_size=2, video_pruning_rate=0.5), attention=False)
    refuse_features(engine(compile_mm_encoder=True), attention=False)
    with pytest.raises(ConfigError, match=r"compile_mm_encoder: .* by no attention"):
        refuse_features(engine(compile_mm_encoder=True), attention=True)


def test_a_row_of_the_tower_is_what_the_reference_says():
    query, key = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    for first in (True, False):
        for image, row in enumerate(guide_rows(query, key, heads=2, scale=0.5, first=first, lengths=None)):
            heads = []
            for head in (slice(0, 3), slice(3, 6)):
                guide = query[image, 0, head] if first else query[image, :, head].mean(0)
                heads.append(torch.softmax(key[image, :, head] @ guide * 0.5, dim=0))
            torch.testing.assert_close(row, torch.stack(heads).mean(0))
    alone = [guide_rows(query[:1, part], key[:1, part], 2, 0.5, False, None)[0] for part in (slice(2), slice(2, 5))]
    for row, other in zip(guide_rows(query[:1], key[:1], 2, 0.5, False, [2, 3]), alone):
        torch.testing.assert_close(row, other)


IMAGES = [ImagePlace(first=2, kept=2, tokens=5), ImagePlace(first=4, kept=1, tokens=3), ImagePlace(6, 2, 2)]


def test_text_keeps_the_columns_of_the_full_prompt():
    # full: t t A A A A A B B B t C C t
    assert full_columns(9, IMAGES).tolist() == [0, 1, 2, 2, 7, 10, 11, 11, 13]


def test_placeholders_get_the_position_of_the_token_that_is_left():
    full = torch.arange(14).expand(3, 14)
    positions = unresolved(full, 9, IMAGES)
    assert (positions[:, [2, 3, 4, 6, 7]] < 0).all() and (positions[:, [0, 1, 5, 8]] >= 0).all()
    offsets = torch.zeros(3, 9, dtype=torch.int64)
    offsets[:, [2, 3, 4, 6, 7]] = torch.tensor([1, 4, 2, 0, 1])
    for _ in range(2):  # once resolved they stay
        resolve(positions, offsets)
        assert (positions == torch.tensor([0, 1, 3, 6, 9, 10, 11, 12, 13])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_offsets_travel_behind_features_exactly(dtype):
    features, offsets = torch.randn(6, 8).to(dtype), torch.tensor([0, 1, 255, 256, 575, 65535]).expand(3, 6)
    joined = with_offsets(features, offsets)
    assert joined.dtype == dtype and joined.shape == (6, 8 + DIGITS)
    left, found = split_offsets(joined)
    assert torch.equal(left, features) and torch.equal(found, offsets)


def test_the_entry_point_needs_no_vllm_to_be_found():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    point = next((point for point in points if point.name == "turbovlm"), None)
    if point is None:
        pytest.skip("turbovlm was installed before it had the entry point: pip install -e .")
    assert point.value == "turbovlm.engines.vllm:register"
    code = "import sys; from turbovlm.engines.vllm import register; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
