"""What the tests of vLLM's plug-in share: settings of engines, and the interpreter that runs them."""

from __future__ import annotations

import os
import sys

NEW, LONG = 8, 40
"""Tokens that are generated."""
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # less than the longest prompt: it is read in chunks
    "block_size": 32,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 4},
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "distributed_executor_backend": "uni",
}
ALONE = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
SETTINGS = {
    "off": None,
    "in rounds": {"visual_keep": 0.5, "visual_select": "information"},
    "prune": {"visual_keep": 0.3, "visual_select": "redundancy", "reduce": "prune"},
    "the default": {"visual_keep": 0.25},
}


def python_of_vllm():
    """The interpreter that runs vLLM: `TURBOVLM_TEST_VLLM`, for a release that needs another `transformers`."""
    return os.environ.get("TURBOVLM_TEST_VLLM", sys.executable)


def environment(**changes):
    """Variables of a process of vLLM's."""
    here = {} if "TURBOVLM_TEST_VLLM" in os.environ else {"PYTHONPATH": os.pathsep.join(sys.path)}
    return {**os.environ, **ALONE, **here, **changes}
