"""One denoising step of Stable Diffusion's UNets, merged and not, beside tomesd (pip install --no-deps tomesd).

    python benchmarks/diffusion.py                      # writes benchmarks/results/diffusion.{json,md}
    python benchmarks/diffusion.py --device cuda --dtype bf16 --models sd15 sdxl --batch 8 --out diffusion_gpu
    python benchmarks/diffusion.py --device cuda --dtype bf16 --batch 8 --out diffusion_gpu_compiled --compile
    python benchmarks/diffusion.py --sizes 512          # that size anew; the file keeps the others
    python benchmarks/diffusion.py --small --out tried  # the same path on a tiny UNet, to see that it runs

Full size, random weights: speed does not depend on the weights. turbovlm merges in stacks, its default, and by parts;
tomesd by its defaults in self-attention of the largest resolution, and in all three components of the two largest.
Each `keep` is compared by itself, interleaved with the UNet, so that a machine whose speed drifts over minutes hits all
versions alike; the speed-ups are medians of ratios of process CPU time, or of CUDA events.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from cases import DTYPES, RESULTS, compare_shown, described, load, machine, save

from turbovlm import DenoiseConfig

SIZES = {512: 2, 1024: 1}
"""Pixels a side, and images in a batch unless told otherwise."""
KEEPS = (0.9, 0.8, 0.7, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(UNETS), default=("sd15",))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", choices=tuple(SIZES), default=tuple(SIZES), metavar="PIXELS")
    parser.add_argument("--batch", type=int, metavar="N", help="images in a batch (default: 2 of 512, 1 of 1024)")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS, metavar="SHARE")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: PyTorch's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--compile", action="store_true", help="every version, the UNet itself too; without tomesd")
    parser.add_argument("--small", action="store_true", help="a tiny UNet of 64 pixels")
    parser.add_argument("--out", default="diffusion", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    if importlib.util.find_spec("tomesd") is None:
        parser.error("tomesd is compared with: pip install --no-deps tomesd")
    if args.threads:
        torch.set_num_threads(args.threads)
    packages = {name: importlib.metadata.version(name) for name in ("diffusers", "tomesd")}
    results: dict[str, Any] = {"runs": {}} | load(RESULTS / f"{args.out}.json")
    results |= {"machine": {**machine(), **packages}, "dtype": args.dtype, "compiled": args.compile}
    if args.device.startswith("cuda"):
        results["machine"]["cpu"] = f"{torch.cuda.get_device_name(args.device)}; {results['machine']['cpu']}"
    for model in args.models:
        torch.manual_seed(0)
        with torch.device(args.device):
            denoiser = UNETS[model](args.small).eval().to(DTYPES[args.dtype])
        for size in args.sizes:
            batch = args.batch or SIZES[size]
            name = f"{model}, {size}×{size}, batch {batch}"
            inputs = _inputs(denoiser, batch, 16 if args.small else size // 8)
            found: list[dict[str, Any]] = []
            for keep in args.keeps:
                versions, label = versions_of(keep, args.compile), f"{name}, keep={keep:g}"
                comparison = compare_shown(
                    denoiser, inputs, versions, label, args.rounds, compile=args.compile, warmup=1
                )
                found.append(comparison.to_dict())
                results["runs"][name] = found[0] | {"runs": [run for each in found for run in each["runs"]]}
                save(RESULTS / f"{args.out}.json", results)
    (RESULTS / f"{args.out}.md").write_text(report(results))
    print(report(results))


def versions_of(keep: float, compiled: bool) -> dict[str, Any]:
    compared: dict[str, Any] = {
        f"turbovlm, keep={keep:g}": DenoiseConfig(keep),
        f"turbovlm, parts, keep={keep:g}": DenoiseConfig(keep, scope="part"),
    }
    if not compiled:
        compared[f"tomesd, keep={keep:g}"] = tomesd(keep, 1, everywhere=False)
        compared[f"tomesd, all parts, two resolutions, keep={keep:g}"] = tomesd(keep, 2, everywhere=True)
    return compared


def sd15(small: bool) -> Any:
    """Stable Diffusion 1.5's."""
    from diffusers import UNet2DConditionModel

    size = {"block_out_channels": (32, 32, 32, 32), "attention_head_dim": 4} if small else {}
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **size)


def sdxl(small: bool) -> Any:
    """SDXL's, whose largest resolution has no attention."""
    from diffusers import UNet2DConditionModel

    size: dict[str, Any] = {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20)}
    if small:
        size = {"block_out_channels": (32, 32, 32), "attention_head_dim": 4}
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1 if small else (1, 2, 10),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
        **size,
    )


UNETS = {"sd15": sd15, "sdxl": sdxl}


def _inputs(denoiser: Any, batch: int, side: int) -> list[Any]:
    """By position, as tomesd wants the latent."""
    generator, like = torch.Generator().manual_seed(0), next(denoiser.parameters())

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    text = noise(batch, 77, denoiser.config.cross_attention_dim)
    inputs = [noise(batch, 4, side, side), torch.tensor(500, device=like.device), text]
    if denoiser.config.addition_embed_type == "text_time":
        inputs += [None] * 4 + [{"text_embeds": noise(batch, 1280), "time_ids": noise(batch, 6)}]
    return inputs


def tomesd(keep: float, downsampling: int, everywhere: bool) -> Callable[[Any], None]:
    """Prepares a UNet with tomesd, deterministic, in resolutions down to that one, in self-attention or all parts."""
    import tomesd as package

    def prepare(model: Any) -> None:
        where = {"max_downsample": downsampling, "merge_crossattn": everywhere, "merge_mlp": everywhere}
        package.apply_patch(model, ratio=1 - keep, use_rand=False, **where)

    return prepare


def report(results: dict[str, Any]) -> str:
    lines = ["# A denoising step of Stable Diffusion's UNets", "", described(results["machine"]), ""]
    how = "compiled" if results["compiled"] else "eager"
    lines += [f"{results['dtype']}, {how}, random weights. Medians, and quartiles of the speed-up.", ""]
    for name, compared in results["runs"].items():
        lines += [f"## {name}", "", "| | GMACs | MACs ratio | s | speed-up | peak MB |", "|---|--:|--:|--:|--:|--:|"]
        for run in compared["runs"]:
            seconds = sorted(run["wall_seconds"])[len(run["wall_seconds"]) // 2]
            low, high = run["speedup_quartiles"]
            lines.append(
                f"| {run['name']} | {run['macs'] / 1e9:.0f} | {run['macs_ratio']:.2f}× | {seconds:.3f} "
                f"| **{run['speedup']:.2f}×** ({low:.2f} to {high:.2f}) | {run['peak_bytes'] / 1e6:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
