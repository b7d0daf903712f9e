"""`turbovlm embed`: a corpus of images to embeddings, labels or captions."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.cli.help import Help
from turbovlm.cli.output import add_json_option
from turbovlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from turbovlm.corpus import Job
    from turbovlm.corpus.embed import Engine

OUTPUTS = ("projected", "pooled", "cls", "label", "caption")
"""Those of `turbovlm.corpus.job`, without importing it."""
RAY_ONLY = ("concurrency", "cpus_per_actor")

_EPILOG = """\
examples:
  turbovlm embed photos --model openai/clip-vit-base-patch16 --r 8 --out embeddings     a folder, and folders in it
  turbovlm embed "s3://bucket/laion/*.tar" --model google/siglip-base-patch16-224 --keep 0.5 --out embeddings
  turbovlm embed images.parquet --model timm:vit_base_patch16_224 --flops 0.6 --outputs cls pooled --out vectors
  turbovlm embed food101 --split validation --model openai/clip-vit-base-patch16 --r 8 --out food  a dataset's id
  turbovlm embed photos --model openai/clip-vit-base-patch16 --outputs label --labels labels.txt --out named
  turbovlm embed photos --model Salesforce/blip-image-captioning-base --outputs caption --r 16 --out captions
  turbovlm embed shards --model openai/clip-vit-base-patch16 --r 8 --out embeddings --engine ray --concurrency 4

Writes a row for each image: name, width, height, the outputs, and in the column error why it could not be read. A
Parquet file is there whole or not at all, so the same command goes on where a run was stopped.

  python: pandas.read_parquet("embeddings")
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "embed",
        help="embeddings, labels or captions of a folder, tar or Parquet files",
        description="Embed a corpus of images into Parquet files, in this process or on Ray.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, tar (WebDataset) or Parquet files, one such file, a pattern, a URL of them, or the "
        "id of a dataset",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="a hub id, a folder, timm:NAME, zoo:pairs, …")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new, or of an unfinished run, which goes on")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--r", type=int, metavar="N", help="tokens merged per block on average")
    amount.add_argument("--keep", type=float, metavar="SHARE", help="share of the tokens left after the last block")
    amount.add_argument("--flops", type=float, metavar="SHARE", help="share of the encoder's multiply-accumulates left")
    amount.add_argument("--settings", metavar="FILE", help="of turbovlm calibrate, such as turbo.json")
    parser.add_argument(
        "--visual-keep", type=float, metavar="SHARE", help="of an image's tokens that a captioner reads"
    )
    parser.add_argument(
        "--outputs",
        nargs="+",
        choices=OUTPUTS,
        default=(),
        metavar="OUTPUT",
        help="projected, pooled or cls embeddings, label or caption (default: the first embedding that the model has)",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="TEXT", help="that CLIP chooses from; or a .txt file with one in each line"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what a captioner is asked")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a caption (default 32)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images of a forward (default 32)")
    parser.add_argument("--shard-size", type=int, metavar="N", help="images of a part (default 1,000 to 10,000)")
    table = parser.add_argument_group("tables")
    table.add_argument("--image-column", metavar="NAME", help="the column of images (default: the only one)")
    table.add_argument("--name-column", metavar="NAME", help="a column to name images by (default: their path or row)")
    table.add_argument("--split", default="train", metavar="NAME", help="of a dataset (default train)")
    running = parser.add_argument_group("running")
    running.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    running.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps … (default: cuda where there is one)")
    running.add_argument("--workers", type=int, metavar="N", help="processes that read and decode, without Ray")
    running.add_argument("--engine", choices=("local", "ray"), default="local", help="(default local: this process)")
    running.add_argument("--concurrency", type=int, metavar="N", help="Ray: processes that hold the model (default 1)")
    running.add_argument("--cpus-per-actor", type=int, metavar="N", help="Ray: cores of each of them (default 1)")
    add_json_option(parser)
    parser.set_defaults(run=run, kept=lambda args: f"parts that are done are in {args.out}; the same command goes on")


def run(args: argparse.Namespace) -> int:
    """Check, embed, and say what was done."""
    from turbovlm.cli.measuring import check_folder, check_numbers, progress_bar
    from turbovlm.cli.output import check_json, console, write_json
    from turbovlm.corpus import embed
    from turbovlm.corpus.tables import Columns

    check_numbers(args, "batch", "shard_size", "max_new_tokens", *RAY_ONLY)
    check_folder("--out", args.out)
    check_json(args)
    engine, job = _engine(args), _job(args)
    columns = Columns(args.image_column, args.name_column, args.split)
    if not job.settings:
        print("the model as it is; --r, --keep or --flops make it faster", file=sys.stderr)
    with progress_bar(None, "images") as advance:
        summary = embed(
            args.source, args.out, job, shard_size=args.shard_size, columns=columns, engine=engine, progress=advance.to
        )
    console().print(str(summary))
    if args.json:
        write_json(args.json, {"model": args.model, "source": args.source, **summary.to_dict()})
    return 0


def _job(args: argparse.Namespace) -> Job:
    import torch

    from turbovlm.cli.measuring import device_named
    from turbovlm.corpus import Job
    from turbovlm.loading import ModelSpec

    settings = {name: getattr(args, name) for name in ("r", "keep", "flops") if getattr(args, name) is not None}
    if args.settings is not None:
        settings = _saved(args.settings)
    if args.visual_keep is not None:
        if "caption" not in args.outputs:
            raise ConfigError("--visual-keep: only a captioner reads an image's tokens; add --outputs caption")
        settings["visual_keep"] = args.visual_keep
    more = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    if more and "caption" not in args.outputs:
        raise ConfigError("--max-new-tokens: is of captions; add --outputs caption")
    return Job(
        ModelSpec(args.model, device_named(args.device), getattr(torch, args.dtype)),
        tuple(args.outputs),
        settings,
        args.batch,
        _labels(args.labels),
        args.prompt,
        **more,
    )


def _saved(name: str) -> dict[str, Any]:
    """The fields of an encoder's saved settings that are not their defaults."""
    from turbovlm import TurboConfig

    config = TurboConfig.load(name)
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }


def _labels(given: list[str] | None) -> tuple[str, ...]:
    """Texts, or the lines of a file.

    Raises:
        DataError: the file does not read.
    """
    if given is None:
        return ()
    if len(given) > 1 or not given[0].endswith(".txt"):
        return tuple(given)
    try:
        text = Path(given[0]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--labels {given[0]}: {error}") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _engine(args: argparse.Namespace) -> Engine:
    from turbovlm.cli.measuring import check_workers
    from turbovlm.corpus.embed import local

    if args.engine == "local":
        for name in RAY_ONLY:
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: is of --engine ray")
        if args.workers is not None:
            check_workers(args.workers)
        return local(args.workers)
    if args.workers is not None:
        raise ConfigError("--workers: Ray reads with the cores that its actors leave; give --concurrency")
    from turbovlm.engines.ray import on_ray

    return on_ray(args.concurrency or 1, args.cpus_per_actor or 1)
