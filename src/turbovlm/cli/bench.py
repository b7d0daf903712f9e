"""`turbovlm bench`: its options, what they mean together, and what becomes of what was measured."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from turbovlm.cli.help import Help
from turbovlm.cli.measuring import QUANTIZATIONS, check_plot, versions_used, written
from turbovlm.cli.output import add_json_option, check_json, console, print_table, write_json
from turbovlm.errors import ConfigError

if TYPE_CHECKING:
    from turbovlm.profile import Comparison

_EPILOG = """\
examples:
  turbovlm bench timm:vit_base_patch16_384 --r 35            one setting, fp32, batch 8, random weights
  turbovlm bench timm:vit_base_patch16_384 --r 8 16 35 --dtype bfloat16 --plot bench.png
  turbovlm bench torchvision:vit_b_16 --flops 0.6 --compile  against the compiled model
  turbovlm bench timm:vit_base_patch16_224 --r 13 --quantize int8 nf4    on top of weights in 8 and in 4 bits
  turbovlm bench zoo:saliency --pretrained --batch 1 --r 8   the real ViT-S/14 at 518 pixels
  turbovlm bench timm:vit_large_patch16_384 --r 16 --device cuda --dtype bfloat16 --batch 64

examples of image generation:
  turbovlm bench zoo:emoji --pretrained --keep 0.9 0.7 0.5   a small trained pipeline: speed, and how images change
  turbovlm bench diffusers:stable-diffusion-v1-5/stable-diffusion-v1-5 --keep 0.5 0.7 --image-size 512 768x512
  turbovlm bench diffusers:./my-pipeline --pretrained --keep 0.5 --steps 20 --batch 4 --plot drift.png
  turbovlm bench diffusers:./my-pipeline --pretrained --keep 0.7 --components attention --refresh 5
  turbovlm bench diffusers:./my-pipeline --keep 0.5,0.75 0.7 --settings calibrated.json
  turbovlm bench zoo:drawings --pretrained --keep 0.75 0:0.5,0.5:1 0:1,0.5:0.5    another share in later steps
  turbovlm bench diffusers:./my-pipeline/unet --keep 0.5     one forward of the denoiser alone
  turbovlm bench diffusers:./wan/transformer --image-size 832x480 --frames 33

The model itself and each setting run in turn, A B … B A, in one process, after warm-up: process CPU time on the CPU,
CUDA events on a GPU. The weights do not change the time, so random ones will do.

Encoders: efficiency is the speed-up over the ratio of multiply-accumulates, 1 where all that arithmetic allows is
gained.

Pipelines: an image is a whole call (text, denoising, decoding), a step the denoiser's part of one denoising step.
With --pretrained, every version makes the images of the same prompts and seeds, and what merging changed is shown as
drift (root mean square error of the last latent over that of the latent itself) and PSNR of the decoded image.
Random weights say nothing about images, so there both are left out. One image is a small sample: --batch 8.
"""

_IMAGES_ONLY = ("steps", "refresh", "components", "prompt", "seed", "guidance_scale", "frames")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    from turbovlm.cli.bench_encoders import DEFAULT_R
    from turbovlm.cli.bench_images import DEFAULT_KEEP
    from turbovlm.cli.generation import SETTINGS_HELP, SHARES_HELP, shares
    from turbovlm.config import COMPONENTS
    from turbovlm.loading.models import MODEL_HELP

    parser = subparsers.add_parser(
        "bench",
        help="time an encoder or image generation with and without Turbo on this machine",
        description="Time a model's vision encoders, or image generation, with and without Turbo: speed, memory, "
        "and how far images change.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=MODEL_HELP + " unless --pretrained; or zoo:saliency. For image generation diffusers:ID or "
        "diffusers:FOLDER, of a pipeline or of a denoiser alone, whose configs are fetched; or zoo:drawings, "
        "zoo:emoji, zoo:moving",
    )
    group = parser.add_mutually_exclusive_group()
    default = " ".join(map(str, DEFAULT_R))
    group.add_argument(
        "--r",
        type=int,
        nargs="+",
        metavar="N",
        help=f"encoders: tokens merged per block on average (default {default})",
    )
    group.add_argument(
        "--keep",
        type=shares,
        nargs="+",
        metavar="SHARE",
        help="share of the tokens left: at the end of an encoder; in every block of a denoiser, ≥ 0.25 "
        f"(default there {' '.join(map(str, DEFAULT_KEEP))}); {SHARES_HELP}",
    )
    group.add_argument(
        "--flops", type=float, nargs="+", metavar="SHARE", help="encoders: share of the encoder's MACs left"
    )
    parser.add_argument("--settings", nargs="+", metavar="FILE", help=f"also or only these: {SETTINGS_HELP}")
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="images per forward of an encoder (default 8), or per call of a pipeline (default 1)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--image-size",
        nargs="+",
        metavar="SIZE",
        help="instead of the model's own: N pixels per side; for image generation also WIDTHxHEIGHT, as in 768x512, "
        "and several, a table each",
    )
    parser.add_argument(
        "--quantize",
        nargs="+",
        choices=QUANTIZATIONS,
        metavar="KIND",
        help=f"encoders: also with quantised weights, {', '.join(QUANTIZATIONS)}, each alone and with every setting",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile every version, the model itself too")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps … (default: cuda where there is one)")
    parser.add_argument("--pretrained", action="store_true", help="load the model's weights instead of random ones")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default 10; 3 of a pipeline)")
    parser.add_argument("--warmup", type=int, metavar="N", help="rounds before them (default 2; 1 of a pipeline)")
    add_json_option(parser)
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="also draw the speed-ups, or of a pretrained pipeline the drift against them: .png, .svg or .pdf",
    )
    images = parser.add_argument_group("image generation only")
    images.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps per image (default 20 with --pretrained, else 4)"
    )
    images.add_argument("--frames", type=int, metavar="N", help="of a video, instead of the model's own")
    images.add_argument(
        "--refresh", type=int, metavar="N", help="steps that share one decision of what is merged (default 1)"
    )
    images.add_argument(
        "--components", nargs="+", choices=COMPONENTS, metavar="PART", help=f"some of {', '.join(COMPONENTS)}"
    )
    images.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="taken in turn by the images of a batch; class numbers for DiT"
    )
    images.add_argument("--seed", type=int, metavar="N", help="of the first image; the next has the next (default 0)")
    images.add_argument(
        "--guidance-scale", type=float, metavar="X", help="instead of the pipeline's own; 0 for distilled models"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    from turbovlm.cli import bench_encoders, bench_images
    from turbovlm.loading import ModelSpec

    check_json(args)
    check_plot(args.plot)
    if ModelSpec(args.model).makes_images:
        for name in ("r", "flops"):
            if getattr(args, name) is not None:
                raise ConfigError(
                    f"--{name}: image generation takes --keep, the share of the tokens that each block reads, because "
                    "a block restores what it merges"
                )
        if args.quantize:
            raise ConfigError("--quantize: only encoders are quantised here; quantise the pipeline's parts yourself")
        return bench_images.run(args)
    for name in _IMAGES_ONLY:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} has no place with an encoder: only image generation has it")
    return bench_encoders.run(args)


@dataclass
class Results:
    """Comparisons as they are made: each is printed at once, and all are written at the end.

    Attributes:
        args: of the command.
        kind: `"encoders"`, `"images"` or `"denoiser"`, the key under which JSON has them.
        about: what else JSON says of the run.
        libraries: whose versions it names, beside PyTorch's.
        settings: what holds for all of them, for titles; empty, or begins with a comma.
    """

    args: argparse.Namespace
    kind: str
    about: dict[str, Any]
    libraries: tuple[str, ...] = ()
    settings: str = ""
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    def add(self, name: str, comparison: Comparison, title: str, *, drift: bool = True) -> None:
        """Print a comparison and keep it.

        Args:
            name: of the encoder, or of the size.
            comparison: what was measured.
            title: what was measured, for people.
            drift: whether to show how images changed.
        """
        self.comparisons[name] = comparison
        out = console()
        header, rows = comparison.columns(drift=drift)
        print_table(out, f"{self.args.model}, {title}{self.settings}", header, rows, names=header.count(""))
        out.print(comparison.conditions, end="\n\n")

    def write(self) -> None:
        """Write the plot and the JSON that were asked for.

        Raises:
            TurboError: a file cannot be written.
        """
        if self.args.plot:
            from turbovlm.profile.plot import save_drifts, save_speedups

            save = save_drifts if self.kind == "images" else save_speedups
            save(self.comparisons, self.args.plot, title=f"{self.args.model}{self.settings}")
            written.append(self.args.plot)
        if self.args.json:
            about = {"model": self.args.model, "pretrained": self.args.pretrained, **self.about}
            versions = versions_used(*self.libraries)
            found = {name: comparison.to_dict() for name, comparison in self.comparisons.items()}
            write_json(self.args.json, {**about, "versions": versions, self.kind: found})
