"""What choosing visual tokens costs: milliseconds for one image, beside the prefill of a 7B language model.

    python benchmarks/selections.py                     # writes benchmarks/results/selections.{json,md}

Features are smooth over the image, with noise, from a seed; their width, and the language model's shape, are
Qwen2.5-VL-7B's, of which two layers run, with random weights, and count for all 28. A choice is timed as it is made
before prefill: cosines, steps, averages. On a CPU, times are one core's own, of one thread, so that what else runs on
the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import RESULTS, described, machine, save

from turbovlm import ReadConfig
from turbovlm.vlm.select import kept_count, select

TOKENS = (576, 1024, 2000)
KEEPS = (0.5, 0.25, 0.1)
SELECTIONS = ("coverage", "dpp", "mmr", "diversity", "information", "redundancy")
WIDTH, WORDS, LAYERS, OF_LAYERS = 3584, 64, 2, 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="selections", help="name of the results (default: selections)")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "device": args.device, "rows": []}
    model = language_model(args.device)
    for tokens in TOKENS:
        x, attention = image(tokens, args.device)
        full = timed({"full": prefill(model, tokens)}, args.rounds, args.device)
        for keep in KEEPS:
            k = kept_count(keep, tokens)
            calls = {how: choice(x, attention, k, how) for how in SELECTIONS}
            calls["left"] = prefill(model, k)
            row = {"tokens": tokens, "keep": keep, **full, **timed(calls, args.rounds, args.device)}
            for name in ("full", "left"):
                row[name] *= OF_LAYERS / LAYERS
            results["rows"].append(row)
            print(row)
            save(RESULTS / f"{args.out}.json", results)
    (RESULTS / f"{args.out}.md").write_text(report(results))
    print(report(results))


def image(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a square image, cut to so many tokens, `[1, tokens, width]`, bf16, and A, `[1, tokens]`."""
    generator = torch.Generator().manual_seed(0)
    side = int(tokens**0.5) + 1
    smooth = F.interpolate(torch.randn(1, 256, 8, 8, generator=generator), size=(side, side), mode="bicubic")
    mixed = smooth.flatten(2).transpose(1, 2)[:, :tokens] @ torch.randn(256, WIDTH, generator=generator) / 16
    features = mixed + 0.5 * torch.randn(1, tokens, WIDTH, generator=generator) + 0.5
    attention = torch.randn(1, tokens, generator=generator).mul(2).softmax(-1)
    return features.to(device, torch.bfloat16), attention.to(device)


def choice(x: torch.Tensor, attention: torch.Tensor, k: int, how: str) -> Callable[[], Any]:
    config = ReadConfig(k, visual_select=how)
    return lambda: select(x, attention, k, config).take(x)


def language_model(device: str) -> Any:
    from transformers import Qwen2Config, Qwen2Model

    size = {"hidden_size": WIDTH, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2Config(num_hidden_layers=LAYERS, vocab_size=1000, **size)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen2Model(config).eval()
    finally:
        torch.set_default_dtype(before)


def prefill(model: Any, visual: int) -> Callable[[], Any]:
    device = model.embed_tokens.weight.device
    embeds = torch.randn(1, visual + WORDS, WIDTH, device=device, dtype=torch.bfloat16)
    return lambda: model(inputs_embeds=embeds, use_cache=True)


@torch.inference_mode()
def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """The median milliseconds of each, all in turn in every round, behind one that does not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            before = clock()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                found[name].append((clock() - before) * 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def report(results: dict[str, Any]) -> str:
    lines = ["# What choosing visual tokens costs", "", described(results["machine"]), ""]
    lines += [
        f"{results['device']}, one image of bf16 features {WIDTH} wide, milliseconds, medians. *Prefill* is of "
        f"Qwen2.5-VL-7B's language model with {WORDS} words beside the image ({LAYERS} layers measured, times "
        f"{OF_LAYERS // LAYERS}), with all visual tokens and with those left. In brackets: % of the prefill with all.",
        "",
        f"| tokens | kept | {' | '.join(SELECTIONS)} | prefill, all | prefill, left |",
        f"|--:|--:|{'--:|' * len(SELECTIONS)}--:|--:|",
    ]
    for row in results["rows"]:
        cells = [f"{row[how]:.0f} ({row[how] / row['full']:.1%})".replace("%", "") for how in SELECTIONS]
        lines.append(
            f"| {row['tokens']} | {row['keep']:g} | {' | '.join(cells)} | {row['full']:.0f} | {row['left']:.0f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
