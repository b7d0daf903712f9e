"""A tower of Qwen2.5-VL's width that merges: time and multiply-accumulates, random weights, half of its depth.

    python benchmarks/tower.py                          # writes benchmarks/results/tower.{json,md}
    python benchmarks/tower.py --patches 16 --rounds 1  # as committed

Sixteen blocks of Qwen2.5-VL-7B's tower and its merger; every fourth block attends to whole images, the others within
windows of 112 pixels. One image; the tokens are restored for the merger. Versions take turns, a forward each.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from cases import RESULTS, compare_shown, described, machine, save

from turbovlm import TurboConfig

BLOCKS, WHOLE = 16, (3, 7, 11, 15)
VERSIONS = {f"keep={keep:g}": TurboConfig(keep=keep) for keep in (0.75, 0.5, 0.25)}
VERSIONS["keep=0.5, cells"] = TurboConfig(keep=0.5, partition="cells")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patches", type=int, default=32, help="of 14 pixels, along a side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    side = args.patches
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    inputs = {"hidden_states": pixels, "grid_thw": torch.tensor([[1, side, side]])}
    with torch.inference_mode():
        found = compare_shown(tower(), inputs, VERSIONS, "tower", args.rounds, warmup=1)
    results: dict[str, Any] = {"machine": machine(), "patches": side, "tower": found.to_dict()}
    save(RESULTS / "tower.json", results)
    (RESULTS / "tower.md").write_text(report(results))
    print(report(results))


def tower() -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    size = {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584}
    config = Qwen2_5_VLVisionConfig(depth=BLOCKS, fullatt_block_indexes=list(WHOLE), **size)
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval()


def report(results: dict[str, Any]) -> str:
    side = results["patches"]
    lines = ["# A tower of Qwen2.5-VL's width that merges", "", described(results["machine"]), ""]
    lines += [f"fp32, {BLOCKS} blocks, an image of {14 * side}×{14 * side} pixels: {side * side} patches. Medians.", ""]
    lines += ["| | s | speed-up | MACs | peak MB |", "|---|--:|--:|--:|--:|"]
    for run in results["tower"]["runs"]:
        seconds = statistics.median(run["seconds"])
        lines.append(
            f"| {run['name']} | {seconds:.2f} | **{run['speedup']:.2f}×** | {run['macs_ratio']:.2f}× fewer "
            f"| {run['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
