"""Prefill with fewer visual tokens: models of the shapes of LLaVA-1.5, Qwen2.5-VL and Qwen3-VL, random weights.

    python benchmarks/prefill.py                        # writes benchmarks/results/prefill.{json,md}
    python benchmarks/prefill.py --models Qwen3-VL      # this one anew, the others as they are in the file
    python benchmarks/prefill.py --threads 1            # as committed

Widths, heads and MLPs are those of LLaVA-1.5-7B, Qwen2.5-VL-7B and Qwen3-VL-8B; the towers are whole, and of the
language models two layers are left, so that they fit. One image and 64 words. *Prefill* is the language model alone,
the image encoded before, timed. *To the first token* are multiply-accumulates from the pixels on, with the tower as it
is and with `keep=0.5` inside it: those of the tower, and of the language model times the layers that there are for each
that was left (its head counts as often). They are counted and not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import DTYPES, RESULTS, compare_shown, described, machine, save

import turbovlm
from turbovlm import ReadConfig, TurboConfig
from turbovlm.profile.macs import macs

KEEPS, INSIDE = (0.5, 0.25, 0.1), TurboConfig(keep=0.5)
WORDS, LAYERS = 64, 2
IMAGE = 31999


@dataclass(frozen=True)
class Shape:
    """A model whose language model is cut, and how many layers the published one has."""

    make: Callable[[torch.dtype], tuple[Any, dict[str, Any]]]
    layers: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS), metavar="MODEL")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    file = RESULTS / "prefill.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in args.models:
        model, inputs = MODELS[name].make(DTYPES[args.dtype])
        versions: dict[str, Any] = {f"{keep:g}": ReadConfig(keep) for keep in KEEPS}
        found = {"machine": machine(), "dtype": args.dtype, "prompt": int(inputs["input_ids"].shape[1])}
        encoded = encode(model, inputs)
        found["cache"] = caches(model, encoded)
        shown = compare_shown(model, encoded, versions, f"{name}, prefill", args.rounds)
        found["prefill"] = shown.to_dict()
        found["macs"] = {
            inside: {version: counted(model, inputs, config, inside == "tower") for version, config in versions.items()}
            for inside in ("", "tower")
        }
        found["macs"][""]["model"] = macs(model, **inputs)
        found["macs"]["tower"]["model"] = counted(model, inputs, None, True)
        results[name] = found
        save(file, results)
    (RESULTS / "prefill.md").write_text(report(results))
    print(report(results))


def counted(model: Any, inputs: dict[str, Any], reading: ReadConfig | None, inside: bool) -> int:
    """Multiply-accumulates of a prompt."""
    with turbovlm.apply(model, *filter(None, (INSIDE if inside else None, reading))):
        return macs(model, **inputs)


def llava(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """576 visual tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **size)
    text = LlamaConfig(num_hidden_layers=LAYERS, vocab_size=32064)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return _made(lambda: LlavaForConditionalGeneration(config), dtype), {
        **prompt(576),
        "pixel_values": noise(1, 3, 336, 336).to(dtype),
    }


def qwen2_5_vl(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """An image of 784×784 pixels: 784 visual tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    vision |= {"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": LAYERS, "vocab_size": 32064, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE - 1)
    return _made(lambda: Qwen2_5_VLForConditionalGeneration(config), dtype), qwens_prompt(14, dtype)


def qwen3_vl(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """An image of 896×896 pixels: 784 visual tokens, and three deepstack planes."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304}
    vision |= {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]}
    text = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
    text |= {"head_dim": 128, "num_hidden_layers": LAYERS, "vocab_size": 32064, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE - 1)
    return _made(lambda: Qwen3VLForConditionalGeneration(config), dtype), qwens_prompt(16, dtype)


MODELS = {"LLaVA-1.5": Shape(llava, 32), "Qwen2.5-VL": Shape(qwen2_5_vl, 28), "Qwen3-VL": Shape(qwen3_vl, 36)}


def _made(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make().eval()
    finally:
        torch.set_default_dtype(before)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def prompt(visual: int) -> dict[str, Any]:
    """Half of the words, the image's placeholders, the other half."""
    words = torch.arange(100, 100 + WORDS)
    ids = torch.cat([words[: WORDS // 2], torch.full((visual,), IMAGE), words[WORDS // 2 :]]).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}


def qwens_prompt(patch: int, dtype: torch.dtype) -> dict[str, Any]:
    """With an image of 56×56 patches of so many pixels a side, two frames deep, of which four make a token."""
    inputs = prompt(28 * 28)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    inputs["pixel_values"] = noise(56 * 56, 3 * 2 * patch * patch).to(dtype)
    inputs["image_grid_thw"] = torch.tensor([[1, 56, 56]])
    return inputs


@torch.inference_mode()
def encode(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the image encoded, by the tower itself and with its attention taken down."""
    with turbovlm.apply(model, visual_keep=0.5):
        features = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        outputs = model.model.get_image_features(**features, return_dict=True)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return {**rest, "mm_encoder_outputs": {"image": outputs}}


@torch.inference_mode()
def caches(model: Any, inputs: dict[str, Any]) -> dict[str, int]:
    """Columns in the cache after the prompt."""
    found = {"model": int(model(**inputs).past_key_values.get_seq_length())}
    for keep in KEEPS:
        with turbovlm.apply(model, visual_keep=keep):
            found[f"{keep:g}"] = int(model(**inputs).past_key_values.get_seq_length())
    return found


def report(results: dict[str, Any]) -> str:
    lines = ["# Prefill with fewer visual tokens", ""]
    lines += ["Batch 1, random weights; two layers of the language model. Medians of process CPU time.", ""]
    for name in (name for name in MODELS if name in results):
        found = results[name]
        lines += [f"## {name}'s shape, a prompt of {found['prompt']} tokens", ""]
        lines += [f"{described(found['machine'])}, {found['dtype']}", ""]
        heads = ["visual_keep", "in the cache", "prefill, s", "speed-up", "MACs", "peak MB", "MACs to the first token"]
        lines += [f"| {' | '.join(heads)} | and `{INSIDE.amount}` in the tower |"]
        lines += ["|--:|--:|--:|--:|--:|--:|--:|--:|"]
        runs = {run["name"]: run for run in found["prefill"]["runs"]}
        own = whole(MODELS[name], found["macs"][""]["model"], runs["model"])
        for version, run in runs.items():
            fewer = [own / whole(MODELS[name], found["macs"][inside][version], run) for inside in ("", "tower")]
            seconds = statistics.median(run["seconds"])
            lines.append(
                f"| {1 if version == 'model' else version} | {found['cache'][version]} | {seconds:.2f} "
                f"| **{run['speedup']:.2f}×** | {run['macs_ratio']:.2f}× | {run['peak_bytes'] / 1e6:.0f} "
                f"| {fewer[0]:.2f}× | {fewer[1]:.2f}× |"
            )
        lines.append("")
    return "\n".join(lines)


def whole(shape: Shape, found: int, prefill: dict[str, Any]) -> float:
    """Multiply-accumulates to the first token of the model that is not cut."""
    return found + (shape.layers / LAYERS - 1) * prefill["macs"]


if __name__ == "__main__":
    main()
