"""Does SGLang with `plugin.py` generate what `transformers` generates with `visual_keep`? A small Qwen3-VL, greedily.

    python studies/sglang/compare.py              # writes studies/sglang/results/compare.{json,md}

Needs Python 3.11 and an environment without CUDA's packages, which SGLang 0.5.23 asks for and does not use here:

    pip install torch==2.13.0 -r tools/engines/vllm-0.32.txt && python tools/install_torchvision_cpu.py
    pip uninstall torchaudio torchcodec && pip install --no-deps -e . -r studies/sglang/requirements.txt
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT / "tests" / "engines"))

from answer import images  # noqa: E402

READING = {"visual_keep": 0.5, "visual_select": "redundancy", "reduce": "prune"}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES = [[128, 128], [128, 192], [256, 128], [192, 192]]
PROMPTS = [
    ("w3 w4 I w5 w6", [0]),
    ("w9 w8 w7", []),
    ("I w5 I w6 w9 w11", [1, 2]),
    ("w9 w8 w7 w5 w5 w5 w1 w2 I I w1 I", [0, 3, 1]),
    ("w3 w4 I w5 w6 w7", [0]),
]
NEW, CHUNK = 8, 16
ENGINE = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "dtype": "float32",
    "context_length": 512,
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.05,
    "chunked_prefill_size": CHUNK,
    "log_level": "error",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=2, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    from tiny_served import save

    versions = {name: metadata.version(name) for name in ("sglang", "torch", "transformers", "turbovlm")}
    results: dict[str, Any] = {"versions": versions, "date": datetime.now(timezone.utc).isoformat(timespec="minutes")}
    with tempfile.TemporaryDirectory() as folder:
        save("qwen3", Path(folder) / "model")
        for how, settings in (("as it is", None), ("with the plug-in", READING)):
            expected = by_transformers(Path(folder) / "model", settings)
            results[how] = {"transformers": expected, "sglang": by_sglang(Path(folder), settings)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "compare.md").write_text(report(results))
    print(report(results))


def prompts() -> list[tuple[str, list[int]]]:
    return [(text.replace("I", IMAGE), seeds) for text, seeds in PROMPTS]


def by_transformers(folder: Path, settings: dict[str, Any] | None) -> list[list[int]]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import turbovlm

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if settings is not None:
        turbovlm.apply(model, **settings)
    found = []
    for text, seeds in prompts():
        inputs = processor(text=text, images=images(seeds, SIZES) or None, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def by_sglang(folder: Path, settings: dict[str, Any] | None) -> list[list[Any]]:
    """Two rounds of answers, the second from what is cached, in a process of its own."""
    installed = folder / "site" / "turbovlm_sglang_study-0.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: turbovlm-sglang-study\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[sglang.srt.plugins]\nturbovlm_study = plugin:register\n")
    paths = [str(installed.parent), str(Path(__file__).parent), *sys.path]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    changes["SGLANG_PLUGINS"] = "none" if settings is None else "turbovlm_study"
    changes["TURBOVLM_SGLANG"] = json.dumps(settings)
    out = folder / "answers.json"
    command = [sys.executable, "-W", "ignore", __file__, "--serve", str(folder / "model"), str(out)]
    subprocess.run(command, env={**os.environ, **changes}, check=True)
    found: list[list[Any]] = json.loads(out.read_text())
    return found


def serve(model: str, out: str) -> None:
    import sglang

    engine = sglang.Engine(model_path=model, **ENGINE)
    sampling = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}
    texts = [text for text, _ in prompts()]
    with_images = [images(seeds, SIZES) or None for _, seeds in prompts()]
    rounds = [engine.generate(texts, sampling, image_data=with_images) for _ in range(2)]
    kept = ("prompt_tokens", "cached_tokens")
    found = [
        [[each["output_ids"], *(each["meta_info"][name] for name in kept)] for each in round_] for round_ in rounds
    ]
    Path(out).write_text(json.dumps(found))
    engine.shutdown()


def report(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = ["# SGLang beside transformers", "", f"{versions}, {results['date']}", ""]
    lines += [f"Prompts in chunks of {CHUNK} tokens, {NEW} tokens generated, {json.dumps(READING)}", ""]
    lines += [
        "| | images | tokens of the prompt | in the cache, second round | tokens as in `transformers`, rounds 1 and 2 |"
    ]
    lines += ["|---|--:|--:|--:|--:|"]
    for how in ("as it is", "with the plug-in"):
        first, second = results[how]["sglang"]
        for (_, seeds), wanted, one, two in zip(PROMPTS, results[how]["transformers"], first, second):
            equal = ", ".join(f"{sum(a == b for a, b in zip(each[0], wanted))} of {NEW}" for each in (one, two))
            lines.append(f"| {how} | {len(seeds)} | {one[1]} | {two[2]} | {equal} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
