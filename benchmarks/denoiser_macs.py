"""What arithmetic allows: multiply-accumulates of one forward of full-size denoisers, by keep and scope.

    python benchmarks/denoiser_macs.py     # writes benchmarks/results/denoiser_macs.{json,md}; some minutes
    python benchmarks/denoiser_macs.py --models "Wan 2.2 14B"     # counts it anew, beside what the files have

The models are built from their published configs, on the meta device, so without weights; shapes alone run through the
library's own forwards, merged and not. Nothing is timed:
milliseconds are the counts over two rates, which follow from two measured forwards (`MEASURED`).
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from cases import RESULTS, described, load, machine, save
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import turbovlm
from turbovlm import DenoiseConfig
from turbovlm.diffusion.grids import OfPositions
from turbovlm.diffusion.inputs import Request, denoiser_request, inputs_asked
from turbovlm.profile import macs

KEEPS = (0.75, 0.5, 0.3)
SCOPES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "parts": ({"scope": "part"}, KEEPS),
    "stacks": ({}, KEEPS),
    "stacks, none whole": ({"whole_first": 0}, (0.5,)),
}
"""Settings by name, and the shares that are kept."""


@dataclass(frozen=True)
class Model:
    """A denoiser by its published config.

    Attributes:
        kind: its class in `diffusers`.
        config: what its `__init__` takes.
        size: height and width in pixels.
        frames: of a video.
        parts: whether its parts can merge by themselves.
        blocks: whether it is made of transformer blocks alone, for whose arithmetic there are rates.
    """

    kind: str
    config: dict[str, Any]
    size: tuple[int, int] = (1024, 1024)
    frames: int | None = None
    parts: bool = False
    blocks: bool = True


FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}

MODELS = {
    "SDXL": Model(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        parts=True,
        blocks=False,
    ),
    "AnimateDiff": Model(
        "UNetMotionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "num_attention_heads": 8},
        size=(512, 512),
        frames=16,
        parts=True,
        blocks=False,
    ),
    "Stable Video Diffusion": Model(
        "UNetSpatioTemporalConditionModel", {}, size=(576, 1024), frames=25, parts=True, blocks=False
    ),
    "Stable Diffusion 3.5 large": Model(
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        parts=True,
    ),
    "FLUX.1-dev": Model("FluxTransformer2DModel", FLUX, parts=True),
    "FLUX.1-dev, 2048 pixels": Model("FluxTransformer2DModel", FLUX, size=(2048, 2048), parts=True),
    "FLUX.2-dev": Model(
        "Flux2Transformer2DModel",
        {
            "in_channels": 128,
            "num_layers": 8,
            "num_single_layers": 48,
            "attention_head_dim": 128,
            "num_attention_heads": 48,
            "joint_attention_dim": 15360,
            "mlp_ratio": 3.0,
            "axes_dims_rope": (32, 32, 32, 32),
        },
    ),
    "Qwen-Image": Model(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        size=(1328, 1328),
    ),
    "LTX-Video": Model(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 128,
            "num_layers": 28,
            "attention_head_dim": 64,
            "num_attention_heads": 32,
            "cross_attention_dim": 2048,
            "caption_channels": 4096,
        },
        size=(512, 704),
        frames=161,
    ),
    "CogVideoX-5B": Model(
        "CogVideoXTransformer3DModel",
        {
            "in_channels": 16,
            "num_layers": 42,
            "attention_head_dim": 64,
            "num_attention_heads": 48,
            "text_embed_dim": 4096,
            "time_embed_dim": 512,
            "use_rotary_positional_embeddings": True,
        },
        size=(480, 720),
        frames=49,
    ),
    "Wan 2.2 5B": Model(
        "WanTransformer3DModel",
        {**WAN, "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        size=(704, 1280),
        frames=121,
    ),
    "Wan 2.2 14B": Model(
        "WanTransformer3DModel",
        {**WAN, "num_attention_heads": 40, "in_channels": 16, "out_channels": 16, "ffn_dim": 13824, "num_layers": 40},
        size=(720, 1280),
        frames=81,
    ),
    "HunyuanVideo": Model(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 16,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_refiner_layers": 2,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "mlp_ratio": 4.0,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
            "rope_axes_dim": (16, 56, 56),
            "guidance_embeds": True,
        },
        size=(720, 1280),
        frames=129,
    ),
}

SHALLOW = Model("FluxTransformer2DModel", {**FLUX, "num_layers": 4, "num_single_layers": 8})
MEASURED = {1024: 0.0344, 2048: 0.173}
"""Seconds of a forward of `SHALLOW` by pixels a side, unmerged: one H200, bf16, batch 1, torch 2.11, random weights,
medians of CUDA events; the smaller captured in a CUDA graph, the larger in eager mode, whose launches it hides."""


class Attention(TorchDispatchMode):
    """Counts the multiply-accumulates of attention: on the meta device it is products of as many matrices as heads.

    Those of choosing and restoring are of one matrix for each image, and here is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.bmm.default and len(args[0]) > 1:
            self.macs += args[0].numel() * int(args[1].shape[2])
        return operator(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--out", default="denoiser_macs", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    file, per_second = RESULTS / f"{args.out}.json", rates()
    results: dict[str, Any] = {}
    for name in tqdm(args.models):
        found = counted(MODELS[name], per_second)
        models = {**load(file).get("models", {}), name: found}
        ordered = {each: models[each] for each in MODELS if each in models}
        results = {"machine": machine(), "rates": per_second, "models": ordered}
        save(file, results)
        file.with_suffix(".md").write_text(report(results))
    print(report(results))


def rates() -> dict[str, float]:
    """Multiply-accumulates a second, of attention and of all else: those with which both measured forwards agree."""
    model, found = built(SHALLOW), []
    for side in MEASURED:
        total, attention = count(model, inputs_asked(denoiser_request(model, (side, side), 1)))
        found.append((attention, total - attention))
    system = torch.tensor(found, dtype=torch.float64)
    per_second = 1 / torch.linalg.solve(system, torch.tensor(list(MEASURED.values()), dtype=torch.float64))
    return {"attention": float(per_second[0]), "rest": float(per_second[1])}


def built(model: Model) -> Any:
    """On the meta device, in bfloat16."""
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return getattr(diffusers, model.kind)(**model.config).eval().to("meta")  # some make tensors elsewhere
    finally:
        torch.set_default_dtype(before)


def count(model: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """Multiply-accumulates of a forward, and those of attention in it."""
    with Attention() as attention:
        total = macs(model, **inputs)
    return total, attention.macs


def counted(what: Model, per_second: dict[str, float]) -> dict[str, Any]:
    """One forward of one image or video, unmerged and merged."""
    model = built(what)
    request = denoiser_request(model, what.size, 1, what.frames)
    inputs = inputs_asked(request)
    total, attention = count(model, inputs)
    frames, rows, columns = request.grid
    found: dict[str, Any] = {
        "size": what.size,
        "frames": what.frames,
        "grid": request.grid,
        "tokens": frames * rows * columns,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": total,
        "attention": attention,
        "seconds": seconds(total, attention, per_second) if what.blocks else None,
        "versions": {},
    }
    for scope, (given, keeps) in SCOPES.items():
        if (scope == "parts" and not what.parts) or (given.get("whole_first") == 0 and not what.blocks):
            continue
        for keep in keeps:
            with turbovlm.apply(model, configured(model, DenoiseConfig(keep, **given), request)) as handle:
                merged, left = count(model, inputs)
                merges = merges_of(handle.features[0])
            found["versions"][f"{scope}, keep={keep:g}"] = {
                "macs": merged,
                "attention": left,
                "merges": merges,
                "seconds": seconds(merged, left, per_second) if what.blocks else None,
            }
    return found


def configured(model: Any, config: DenoiseConfig, request: Request) -> DenoiseConfig:
    """With rows and columns, where positions say them: on the meta device they have no values."""
    with turbovlm.apply(model, config) as handle:
        holders: Any = handle.features[0]
        by_places = any(isinstance(holder.grid, OfPositions) for _, holder in holders.holders)
    return config.changed(grid=request.grid[1:]) if by_places else config


def merges_of(feature: Any) -> int:
    """How often tokens were merged in the last forward."""
    merged = {key for key, choice in feature.last.items() if choice.merge is not None}
    units = [unit for unit in feature.units if unit.key in merged]
    return len({unit.group for unit in units}) if feature.places else len(units)


def seconds(total: int, attention: int, per_second: dict[str, float]) -> float:
    """What these take at the measured rates."""
    return attention / per_second["attention"] + (total - attention) / per_second["rest"]


def report(results: dict[str, Any]) -> str:
    per_second, ms = results["rates"], {side: 1000 * time for side, time in MEASURED.items()}
    lines = ["# What arithmetic allows", "", described(results["machine"]), ""]
    text = (
        "Multiply-accumulates of one forward of one image or video, from published configs, on the meta device. *Left* "
        "and *at best* are of these; *merges* are those of one forward. *ms* are not measured: they are what attention "
        f"takes at {per_second['attention'] / 1e12:.0f}·10¹² a second and all else at "
        f"{per_second['rest'] / 1e12:.0f}·10¹², the rates that follow from forwards of FLUX with 4 double and 8 single "
        f"blocks at full width in {ms[1024]:.1f} ms at 1024² and {ms[2048]:.0f} ms at 2048² (one H200, bf16, batch 1, "
        "torch 2.11; the smaller in a CUDA graph). What choosing, merging and restoring take beside their products is "
        "left out of them, and so is a slower kernel of attention with sizes."
    )
    lines += [*textwrap.wrap(text, 118), ""]
    for name, found in results["models"].items():
        height, width = found["size"]
        frames = "" if found["frames"] is None else f", {found['frames']} frames"
        share = found["attention"] / found["macs"]
        lines += [
            f"## {name}, {width}×{height}{frames}",
            "",
            f"{found['tokens']:,} {'positions of the latent' if found['seconds'] is None else 'tokens'}, "
            f"{found['parameters'] / 1e9:.1f}·10⁹ parameters; attention is {share:.0%} of the multiply-accumulates.",
            "",
            "| | 10¹² MACs | left | at best | attention's share | merges | ms |",
            "|---|--:|--:|--:|--:|--:|--:|",
            _row("model", found, found, 0),
            *(_row(version, found, each, each["merges"]) for version, each in found["versions"].items()),
            "",
        ]
    return "\n".join(lines)


def _row(name: str, own: dict[str, Any], found: dict[str, Any], merges: int) -> str:
    time = "" if found["seconds"] is None else f"{1000 * found['seconds']:,.0f}"
    return (
        f"| {name} | {found['macs'] / 1e12:,.2f} | {found['macs'] / own['macs']:.0%} | "
        f"{own['macs'] / found['macs']:.2f}× | {found['attention'] / found['macs']:.0%} | {merges} | {time} |"
    )


if __name__ == "__main__":
    main()
