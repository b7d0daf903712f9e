"""Windows attended to one by one and in one call: a tower of Qwen2.5-VL's width, random weights, few blocks.

    python benchmarks/windows.py                        # writes benchmarks/results/windows.{json,md}
    python benchmarks/windows.py --images "448×448" "476×644, ragged edges" "16 images of 112×112"    # as committed

The tower's blocks are those of Qwen2.5-VL-3B and -7B: width 1280, 16 heads, windows of 112 pixels. Three of them
attend within windows and one to whole images, as one in eight does there. Measured are the whole tower, and the
attention of one block with windows, in CPU time of the process. The library's and ours take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from cases import DTYPES, RESULTS, described, machine, save

import turbovlm

BLOCKS, WHOLE = 4, 3
GRIDS = {
    "448×448": [[1, 32, 32]],
    "476×644, ragged edges": [[1, 34, 46]],
    "16 images of 112×112": [[1, 8, 8]] * 16,
    "1344×1344": [[1, 96, 96]],
}
"""Patches of 14 pixels: frames, rows, columns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="forwards of each way, a third of them of large images")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--images", nargs="+", choices=GRIDS, default=tuple(GRIDS), metavar="IMAGE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = tower().to(DTYPES[args.dtype]).eval()
    results: dict[str, Any] = {"machine": machine(), "dtype": args.dtype, "images": {}}
    for name in args.images:
        results["images"][name] = measure(model, torch.tensor(GRIDS[name]), args.rounds)
        print(name, results["images"][name], flush=True)
        save(RESULTS / "windows.json", results)
    (RESULTS / "windows.md").write_text(report(results))
    print(report(results))


def tower() -> Any:
    """Four blocks of Qwen2.5-VL's tower and its merger."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    size = {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 2048}
    config = Qwen2_5_VLVisionConfig(depth=BLOCKS, fullatt_block_indexes=[WHOLE], **size)
    return Qwen2_5_VisionTransformerPretrainedModel(config)


@torch.inference_mode()
def measure(model: Any, grid: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of both ways, of the tower and of one attention, and how far apart their outputs are."""
    tokens = int(grid.prod(dim=1).sum())
    dtype = model.patch_embed.proj.weight.dtype
    pixels = torch.randn(tokens, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    call: dict[str, Any] = {}
    hook = model.blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: call.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    model(pixels, grid_thw=grid)
    hook.remove()
    rounds = rounds if tokens < 4096 else max(rounds // 3, 1)
    found: dict[str, Any] = {"tokens": tokens, "windows": len(call["kwargs"]["cu_seqlens"]) - 1}
    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "tower": lambda: model(pixels, grid_thw=grid).pooler_output,
        "attention": lambda: model.blocks[0].attn(*call["args"], **call["kwargs"]),
    }
    for name, forward in forwards.items():
        seconds, apart = in_turn(model, forward, rounds)
        found[name] = {"seconds": seconds, "apart": apart}
    return found


def in_turn(model: Any, forward: Callable[[], torch.Tensor], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each forward, the two ways in turn after one of each, and the largest difference of their outputs."""
    seconds: dict[str, list[float]] = {"one by one": [], "batched": []}
    outputs: dict[str, torch.Tensor] = {}
    for turn in range(rounds + 1):
        for way, found in seconds.items():
            with turbovlm.batch_windows(model) if way == "batched" else nullcontext():
                start = time.process_time()
                outputs[way] = forward()
                if turn > 0:
                    found.append(time.process_time() - start)
    own, batched = outputs.values()
    return seconds, float((own - batched).abs().max() / own.abs().max())


def report(results: dict[str, Any]) -> str:
    lines = ["# Windows in one call", "", described(results["machine"]), ""]
    whole = f"a tower of {BLOCKS} blocks of Qwen2.5-VL's width, {BLOCKS - 1} of them with windows; random weights"
    lines += [f"{results['dtype']}, {whole}. Medians of forwards in turn, ms of CPU time.", ""]
    lines += ["*Apart* is the largest difference of the outputs, relative to the largest number in them.", ""]
    columns = [
        "images",
        "tokens",
        "windows",
        "attention",
        "batched",
        "speed-up",
        "tower",
        "batched",
        "speed-up",
        "apart",
    ]
    lines.append(f"| {' | '.join(columns)} |")
    lines += ["|---|" + "--:|" * 9]
    for name, found in results["images"].items():
        cells = [name, str(found["tokens"]), str(found["windows"])]
        for part in ("attention", "tower"):
            own, batched = (statistics.median(seconds) for seconds in found[part]["seconds"].values())
            cells += [f"{own * 1e3:.1f}", f"{batched * 1e3:.1f}", f"**{own / batched:.2f}×**"]
        cells.append(f"{max(found[part]['apart'] for part in ('attention', 'tower')):.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
