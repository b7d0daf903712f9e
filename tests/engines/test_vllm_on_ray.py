"""Captions of a corpus by `ray.data.llm`, whose engine is vLLM with the plug-in: `make test-engines`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from answer import image
from served import ENGINE, NEW, SETTINGS, environment
from tiny_served import PLACEHOLDER, save

import turbovlm

PROMPT, IMAGES, SIZE = f"w3 w4 {PLACEHOLDER['llava']} w5 w6", 4, (48, 48)

if any(importlib.util.find_spec(name) is None for name in ("ray", "vllm")):
    pytest.skip("ray and vllm are not both installed: make test-engines installs them", allow_module_level=True)
if "TURBOVLM_TEST_VLLM" in os.environ:
    pytest.skip("vLLM is to run in another environment, which has no Ray", allow_module_level=True)


def test_captions_are_those_of_transformers(tmp_path):
    save("llava", tmp_path)
    settings = [None, SETTINGS["prune"]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(tmp_path), json.dumps(settings)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "captions.json").read_text())
    for captions, asked in zip(found, settings):
        assert [row["tokens"] for row in captions] == by_transformers(tmp_path, asked)
    assert found[1][0]["prompt"] == found[0][0]["prompt"] - 36 + round(36 * settings[1]["visual_keep"])


def by_transformers(folder: Path, settings):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if settings is not None:
        turbovlm.apply(model, **settings)
    found = []
    for seed in range(IMAGES):
        inputs = processor(text=PROMPT, images=[image(seed, SIZE)], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def captions(folder: str, settings):
    """A row for each image, in order."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    given = {} if settings is None else {"additional_config": {"turbovlm": settings}}
    config = vLLMEngineProcessorConfig(
        model_source=folder,
        engine_kwargs={**ENGINE, **given},
        batch_size=2,
        concurrency=1,
        log_engine_metrics=False,
        placement_group_config={"bundles": [{"CPU": 1}]},  # else Ray waits for a GPU
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        prepare_multimodal_stage=False,
    )
    sampling = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
    captioned = build_processor(
        config,
        preprocess=lambda row: {
            "prompt": PROMPT,
            "multimodal_data": {"image": image(row["id"], SIZE)},
            "sampling_params": sampling,
            "id": row["id"],
        },
        postprocess=lambda row: {
            "id": row["id"],
            "tokens": [int(token) for token in row["generated_tokens"]],
            "prompt": int(row["num_input_tokens"]),
        },
    )(ray.data.range(IMAGES))
    return sorted(captioned.take_all(), key=lambda row: row["id"])


def main() -> None:
    import ray

    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    Path(folder, "captions.json").write_text(json.dumps([captions(folder, each) for each in settings]))


if __name__ == "__main__":
    main()
