"""The benchmark of vLLM's throughput runs, and counts what it says that it counts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
from served import environment, python_of_vllm

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: make test-engines sets up an environment with it", allow_module_level=True)

if "TURBOVLM_TEST_VLLM" in os.environ:
    pytest.skip(
        "the benchmark counts with transformers ≥ 5.18, which is beside the newest vLLM", allow_module_level=True
    )

ROOT = Path(__file__).parents[2]
PROMPT = 8 + 64 + 32
"""Words, an image's tokens, and words behind it."""


def test_the_quick_form(tmp_path):
    paths = [str(ROOT / "lab/src"), *environment().get("PYTHONPATH", "").split(os.pathsep)]
    command = [python_of_vllm(), "-W", "ignore", str(ROOT / "benchmarks/serving.py"), "--quick", "--out", str(tmp_path)]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tiny = json.loads((tmp_path / "serving.json").read_text())["sizes"]["tiny"]
    distinct, repeated, none = ({keep: rounds[0] for keep, rounds in each["served"].items()} for each in tiny["loads"])
    assert [distinct[keep]["prompt"] for keep in ("1", "0.5")] == [4 * PROMPT, 4 * (PROMPT - 32)]
    assert distinct["1"]["cached"] == 0 < repeated["1"]["cached"]
    assert distinct["0.5"]["blocks"] < distinct["1"]["blocks"]
    assert none["0.5"]["prompt"] == none["1"]["prompt"]
    for served in (*distinct.values(), *repeated.values(), *none.values()):
        assert all(0 < first <= whole <= served["seconds"] for first, whole in zip(served["first"], served["whole"]))
    assert tiny["macs"]["0.5"] < tiny["macs"]["1"]
    assert "Where fewer tokens do not serve more requests" in (tmp_path / "serving.md").read_text()
