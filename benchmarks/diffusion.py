"""One denoising step of Stable Diffusion 1.5's UNet, merged and not, beside tomesd (pip install tomesd).

    python benchmarks/diffusion.py                      # writes benchmarks/results/diffusion.{json,md}

Full size, random weights, fp32 on a CPU: speed does not depend on the weights. Every version merges in all three
components; tomesd by its default in the largest resolution alone, and in the two largest. Interleaved; the speed-ups
are medians of ratios of process CPU time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from cases import RESULTS, compare_shown, described, machine, save

from turbovlm import TurboConfig

SIZES = {512: 2, 1024: 1}
"""Pixels a side, and pictures in a batch."""
KEEPS = (0.9, 0.7, 0.5, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", choices=tuple(SIZES), default=tuple(SIZES), metavar="PIXELS")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS, metavar="SHARE")
    args = parser.parse_args()
    if importlib.util.find_spec("tomesd") is None:
        parser.error("tomesd is compared with: pip install --no-deps tomesd")
    model = unet()
    versions = {name: importlib.metadata.version(name) for name in ("diffusers", "tomesd")}
    results: dict[str, Any] = {"machine": {**machine(), **versions}}
    for size in args.sizes:
        batch, side = SIZES[size], size // 8
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(batch, 4, side, side, generator=generator)
        text = torch.randn(batch, 77, 768, generator=generator)
        inputs = (latent, torch.tensor(500), text)
        compared: dict[str, Any] = {}
        for keep in args.keeps:
            compared[f"turbovlm, keep={keep:g}"] = TurboConfig(keep=keep)
            compared[f"tomesd, keep={keep:g}"] = tomesd(keep, 1)
            compared[f"tomesd, two resolutions, keep={keep:g}"] = tomesd(keep, 2)
        name = f"{size}×{size}, batch {batch}"
        results[name] = compare_shown(model, inputs, compared, name, args.rounds).to_dict()
        save(RESULTS / "diffusion.json", results)
    (RESULTS / "diffusion.md").write_text(report(results))
    print(report(results))


def unet() -> Any:
    """Stable Diffusion 1.5's, with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()


def tomesd(keep: float, downsampling: int) -> Callable[[Any], None]:
    """Prepares a UNet with tomesd, deterministic, in resolutions down to that one."""
    import tomesd as package

    def prepare(model: Any) -> None:
        where = {"max_downsample": downsampling, "merge_attn": True, "merge_crossattn": True, "merge_mlp": True}
        package.apply_patch(model, ratio=1 - keep, use_rand=False, **where)

    return prepare


def report(results: dict[str, Any]) -> str:
    lines = ["# A denoising step of Stable Diffusion 1.5's UNet", "", described(results["machine"]), ""]
    lines += ["fp32, random weights, attention, cross-attention and FFN. Medians.", ""]
    for name in (name for name in results if name != "machine"):
        lines += [f"## {name}", "", "| | GMACs | MACs ratio | s | speed-up | peak MB |", "|---|--:|--:|--:|--:|--:|"]
        for run in results[name]["runs"]:
            seconds = sorted(run["wall_seconds"])[len(run["wall_seconds"]) // 2]
            lines.append(
                f"| {run['name']} | {run['macs'] / 1e9:.0f} | {run['macs_ratio']:.2f}× | {seconds:.2f} "
                f"| **{run['speedup']:.2f}×** | {run['peak_bytes'] / 1e6:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
