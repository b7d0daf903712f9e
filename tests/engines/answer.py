"""Answers prompts with vLLM in a process of its own: `python answer.py JOBS OUT`, both JSON.

A job has the model's folder, vLLM's settings, and prompts of words and seeds of images; what comes out has, for each
round and prompt, the tokens, how many the prompt had, and how many of them were cached.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = 6
"""Squares of colour a side of an image."""


def image(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image of squares of random colours."""
    import numpy as np

    colours = np.random.default_rng(seed).integers(0, 255, (COLOURS, COLOURS, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size)


def images(seeds: list[int], sizes: list[list[int]]) -> list[Image.Image]:
    """Images by seeds, each of the size that its seed says."""
    return [image(seed, tuple(sizes[seed % len(sizes)])) for seed in seeds]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(model=job["model"], **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True)
    requests = []
    for text, seeds in job["prompts"]:
        request: dict[str, Any] = {"prompt": text}
        if seeds:
            request["multi_modal_data"] = {"image": images(seeds, job["sizes"])}
        requests.append(request)
    rounds = [
        [
            [list(output.outputs[0].token_ids), len(output.prompt_token_ids), output.num_cached_tokens]
            for output in llm.generate(requests, sampling, use_tqdm=False)
        ]
        for _ in range(job.get("rounds", 1))
    ]
    counted = {}
    if not job["engine"].get("disable_log_stats", True):
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    del llm
    gc.collect()
    return {"rounds": rounds, "preempted": counted.get("vllm:num_preemptions", 0)}


def main() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    found = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found.append(answer(job))
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
