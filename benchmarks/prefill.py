"""Prefill with fewer visual tokens: models of LLaVA-1.5's and Qwen2.5-VL's shapes, random weights, layers cut.

    python benchmarks/prefill.py                        # writes benchmarks/results/prefill.{json,md}

Widths, heads and MLPs are those of LLaVA-1.5-7B and Qwen2.5-VL-7B; of their language models two layers are left, and of
Qwen's tower eight, so that it fits and ends. One image and 64 words. *Prefill* is the language model alone, the
image encoded before; *all* begins with the pixels. Layers add up, so prefill's ratios are nearly those of the whole
language model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from cases import DTYPES, RESULTS, compare_shown, described, machine, save

import turbovlm
from turbovlm import ReadConfig

KEEPS = (0.5, 0.33, 0.22, 0.11)
WORDS, LAYERS, TOWER_BLOCKS = 64, 2, 8
IMAGE = 31999


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS), metavar="MODEL")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "dtype": args.dtype}
    versions = {f"{keep:g}": ReadConfig(keep) for keep in KEEPS}
    for name in args.models:
        model, inputs = MODELS[name](DTYPES[args.dtype])
        results[name] = {"prompt": int(inputs["input_ids"].shape[1]), "cache": caches(model, inputs)}
        results[name]["all"] = compare_shown(model, inputs, versions, f"{name}, all", args.rounds).to_dict()
        encoded = encode(model, inputs)
        shown = compare_shown(model, encoded, versions, f"{name}, prefill", args.rounds)
        results[name]["prefill"] = shown.to_dict()
        save(RESULTS / "prefill.json", results)
    (RESULTS / "prefill.md").write_text(report(results))
    print(report(results))


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

    vision = {"depth": TOWER_BLOCKS, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    vision |= {"out_hidden_size": 3584, "fullatt_block_indexes": [TOWER_BLOCKS - 1]}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": LAYERS, "vocab_size": 32064, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE - 1)
    inputs = prompt(784)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    inputs["pixel_values"] = noise(56 * 56, 3 * 2 * 14 * 14).to(dtype)
    inputs["image_grid_thw"] = torch.tensor([[1, 56, 56]])
    return _made(lambda: Qwen2_5_VLForConditionalGeneration(config), dtype), inputs


MODELS = {"LLaVA-1.5": llava, "Qwen2.5-VL": qwen2_5_vl}


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
    lines = ["# Prefill with fewer visual tokens", "", described(results["machine"]), ""]
    lines += [f"{results['dtype']}, batch 1, random weights; two layers of the language model. Medians.", ""]
    for name in (name for name in MODELS if name in results):
        lines += [f"## {name}'s shape, a prompt of {results[name]['prompt']} tokens", ""]
        lines += ["| visual_keep | in the cache | prefill, s | speed-up | MACs | all, s | speed-up | peak MB |"]
        lines += ["|--:|--:|--:|--:|--:|--:|--:|--:|"]
        for prefill, whole in zip(results[name]["prefill"]["runs"], results[name]["all"]["runs"]):
            keep = "1" if prefill["name"] == "model" else prefill["name"]
            seconds = [sorted(run["wall_seconds"])[len(run["wall_seconds"]) // 2] for run in (prefill, whole)]
            columns = results[name]["cache"][prefill["name"]]
            lines.append(
                f"| {keep} | {columns} | {seconds[0]:.2f} | **{prefill['speedup']:.2f}×** "
                f"| {prefill['macs_ratio']:.2f}× | {seconds[1]:.2f} | {whole['speedup']:.2f}× "
                f"| {prefill['peak_bytes'] / 1e6:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
