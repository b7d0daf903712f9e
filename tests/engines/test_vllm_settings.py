"""The vLLM plug-in's settings and positions, which need no vLLM."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from turbovlm import ReadConfig, TurboConfig
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
from turbovlm.engines.vllm.settings import (
    KEY,
    RELEASES,
    Serving,
    family_served,
    put_settings,
    serving_from,
    settings_of,
)
from turbovlm.engines.vllm.tower import guide_rows
from turbovlm.errors import ConfigError, UnsupportedModelError

RELEASE = f"{RELEASES[-1]}.0"
GIVEN = {"visual_keep": 0.5, "visual_select": "redundancy"}


def test_settings_become_configs():
    assert serving_from(GIVEN, RELEASE) == Serving(None, ReadConfig(**GIVEN))
    assert serving_from({**GIVEN, "min_visual_tokens": 4}, f"{RELEASES[0]}.1+cpu").reading.min_visual_tokens == 4
    merges = {"keep": 0.4, "blocks": [1, 2], "min_tokens": 9}
    assert serving_from(merges, RELEASE) == Serving(TurboConfig(**merges), None)
    both = serving_from({**GIVEN, "r": 8, "reduce": "prune", "proportional": False, "partition": "random"}, RELEASE)
    assert both.encoder == TurboConfig(r=8, reduce="prune", proportional=False, partition="random")
    assert both.reading == ReadConfig(**GIVEN, reduce="prune", proportional=False)
    assert both.amount == "r=8, visual_keep=0.5"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0.5, "must be settings by name"),
        ({}, "give visual_keep"),
        ({"visual_select": "redundancy"}, "give visual_keep"),
        ({**GIVEN, "tokens": 0.5}, "tokens=0.5: no such setting; there are visual_keep"),
        ({"blocks": "every"}, "give visual_keep, how many of an image's tokens are read, or r, keep, flops"),
        ({**GIVEN, "blocks": "every"}, "blocks='every': TurboConfig has it"),
        ({"r": 4, "visual_select": "dpp"}, "visual_select='dpp': ReadConfig has it"),
        ({"r": 4, "keep": 0.5}, "exactly one of r, keep and flops"),
        ({"r": -1}, "r=-1"),
        ({"r": [2, 2], "thresholds": [0, 0]}, r"thresholds=\[0, 0\]: cannot be served"),
        ({"r": 4, "partition": "cells"}, "partition='cells': no projector"),
        ({"r": 4, "partition": "grid", "grid": [6, 6]}, r"grid=\[6, 6\]: cannot be served"),
        ({"r": 4, "dense": True}, "dense=True: cannot be served"),
        ({**GIVEN, "proportional": False}, "proportional=False: it would have no effect: no tokens merge"),
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
        serving_from(given, RELEASE)


def test_another_release_is_refused_with_its_number():
    with pytest.raises(ConfigError, match=r"vLLM 0\.1\.2: .*0\.31"):
        serving_from(GIVEN, "0.1.2")


def llava(vision="clip_vision_model", layer=-2, **rope):
    text = SimpleNamespace(rope_parameters=rope)
    tower = SimpleNamespace(model_type=vision, num_hidden_layers=4)
    return SimpleNamespace(vision_config=tower, vision_feature_layer=layer, get_text_config=lambda: text)


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
        family_served(architecture, config, serving_from(GIVEN, RELEASE))


@pytest.mark.parametrize("layer", [-2, 3])
def test_settings_have_to_fit_the_blocks_that_vllm_builds(layer):
    config = llava(layer=layer)
    for fitting in ({"r": [1, 2, 3]}, {"r": 4, "blocks": [2]}, {"flops": 0.7}):
        assert family_served("LlavaForConditionalGeneration", config, serving_from(fitting, RELEASE)).merges
    with pytest.raises(ConfigError, match="r has 4 entries, but the encoder in 'vision_tower' has 3 blocks"):
        family_served("LlavaForConditionalGeneration", config, serving_from({"r": [1, 2, 3, 4]}, RELEASE))
    with pytest.raises(ConfigError, match=r"blocks=\[3\]: .* has 3 blocks"):
        family_served("LlavaForConditionalGeneration", config, serving_from({"r": 4, "blocks": [3]}, RELEASE))


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("Qwen3VLForConditionalGeneration", llava(), "Qwen3VL.*: r=4 merges inside the towers of Llava"),
        ("InternVLForConditionalGeneration", llava(), "r=4 merges inside the towers of Llava.*give visual_keep alone"),
        ("LlavaForConditionalGeneration", llava(layer=[-2, -1]), r"vision_feature_layer=\[-2, -1\]: r=4 merges"),
    ],
)
def test_towers_that_cannot_merge_are_refused(architecture, config, said):
    with pytest.raises(UnsupportedModelError, match=said):
        family_served(architecture, config, serving_from({**GIVEN, "r": 4}, RELEASE))


def test_rotary_positions_do_not_matter_to_a_tower_alone():
    config = llava(rope_type="yarn")
    assert family_served("LlavaForConditionalGeneration", config, serving_from({"r": 4}, RELEASE)).merges


@pytest.mark.parametrize("more", [{}, {"r": [2, 0, 4]}, {"keep": 0.5, "blocks": [0, 2]}])
def test_a_config_takes_settings_along(more):
    config = llava()
    assert settings_of(config) is None
    serving = serving_from({**GIVEN, "seed": 3, **more}, RELEASE)
    put_settings(config, serving, 512)
    assert settings_of(copy.deepcopy(config)) == (serving, 512)
    assert json.loads(json.dumps(getattr(config, KEY)))["columns"] == 512  # what caches hash


def engine(**asked):
    """A config of vLLM's as far as it is read."""
    multimodal = {"video_pruning_rate": None, "mm_encoder_tp_mode": "weights", "enable_mm_embeds": False}
    multimodal |= {"mm_encoder_attn_dtype": None}
    parallel = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1, "use_ubatching": False}
    compilation = {"cudagraph_mm_encoder": False, "compile_mm_encoder": False}
    beside = dict.fromkeys(("speculative_config", "kv_transfer_config", "ec_transfer_config", "lora_config"))
    moved, grouped, model = {"cpu_offload_gb": 0}, {"offload_group_size": 0}, {"quantization": None}
    parts = (multimodal, parallel, compilation, beside, moved, grouped, model)
    for name, value in asked.items():
        next(part for part in parts if name in part)[name] = value
    multimodal, parallel, compilation = (SimpleNamespace(**part) for part in parts[:3])
    beside["model_config"] = SimpleNamespace(multimodal_config=multimodal, runner_type="generate", **model)
    beside["offload_config"] = SimpleNamespace(uva=SimpleNamespace(**moved), prefetch=SimpleNamespace(**grouped))
    return SimpleNamespace(parallel_config=parallel, compilation_config=compilation, **beside)


READING, BY_A = serving_from(GIVEN, RELEASE), serving_from({"visual_keep": 0.5}, RELEASE)
MERGING, BOTH = serving_from({"r": 4}, RELEASE), serving_from({"r": 4, "visual_keep": 0.5}, RELEASE)


def test_features_that_do_not_go_with_shorter_prompts_are_refused():
    refuse_features(engine(), BY_A)
    with pytest.raises(ConfigError, match="pipeline_parallel_size, video_pruning_rate: does not go"):
        refuse_features(engine(pipeline_parallel_size=2, video_pruning_rate=0.5), READING)
    refuse_features(engine(compile_mm_encoder=True), READING)
    with pytest.raises(ConfigError, match=r"compile_mm_encoder: .* by no attention"):
        refuse_features(engine(compile_mm_encoder=True), BY_A)


@pytest.mark.parametrize(
    "asked",
    [
        {"tensor_parallel_size": 2},
        {"compile_mm_encoder": True},
        {"cudagraph_mm_encoder": True},
        {"quantization": "awq"},
        {"mm_encoder_attn_dtype": "fp8"},
        {"lora_config": SimpleNamespace(enable_tower_connector_lora=True)},
        {"cpu_offload_gb": 4.0},
        {"offload_group_size": 8},
        {"enable_mm_embeds": True},
    ],
)
def test_features_that_do_not_go_with_merged_tokens_are_refused(asked):
    (name,) = asked
    said = "enable_tower_connector_lora" if name == "lora_config" else name
    for serving in (MERGING, BOTH):
        with pytest.raises(ConfigError, match=f"^{said}: does not go with"):
            refuse_features(engine(**asked), serving)


def test_what_reads_positions_elsewhere_goes_with_merged_tokens():
    beside = {"speculative_config": object(), "pipeline_parallel_size": 2}
    refuse_features(engine(**beside), MERGING)
    with pytest.raises(ConfigError, match="pipeline_parallel_size, speculative_config: does not go"):
        refuse_features(engine(**beside), BOTH)


def test_a_refusal_says_which_settings_to_leave_out():
    refuse_features(engine(tensor_parallel_size=2), BY_A)
    with pytest.raises(ConfigError, match=r"leave out one of the two, or leave out r=4$"):
        refuse_features(engine(tensor_parallel_size=2), BOTH)
    with pytest.raises(ConfigError, match=r"one of the two, or choose tokens by no attention and leave out r=4$"):
        refuse_features(engine(compile_mm_encoder=True), BOTH)
    with pytest.raises(ConfigError, match=r"leave out one of the two$"):
        refuse_features(engine(tensor_parallel_size=2, kv_transfer_config=object()), BOTH)


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
