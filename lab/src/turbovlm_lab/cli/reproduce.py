"""`turbovlm reproduce`: the paper's tables and figures, ours beside the printed numbers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.cli.help import Help
from turbovlm.cli.output import add_json_option
from turbovlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from turbovlm_lab.reproduce.sources import Sources

IMAGES, QUICK = 200, 4

_EPILOG = """\
examples:
  turbovlm reproduce all --builtin                 everything, with small models that come with turbovlm: hours
  turbovlm reproduce all --builtin --quick         the same on 4 images per task: that all of it runs, in minutes
  turbovlm reproduce table3 figure4 --builtin --images 100
  turbovlm reproduce --list                        all there is, and its keys
  turbovlm reproduce --template sources.json       a file that names your checkpoints and data, to be filled in
  turbovlm reproduce table2 table5 --sources sources.json --device cuda --dtype bfloat16 --batch 64
  turbovlm reproduce all --sources sources.json --check      do all files fit, do all images decode?

With your own checkpoints every setting has the printed r. Built-in models are smaller: they are given the share of the
encoder's multiply-accumulates that r leaves in the paper's. Predictions are kept in --out; a run that was stopped goes
on where it was. The report is report.md in that folder, plots beside it as PNG and SVG, numbers in results.json.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "reproduce",
        help="the paper's tables and figures, beside the printed numbers",
        description="Run the Turbo paper's tables and figures, with your models and data or built-in ones.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help="all, tasks, tables, figures, table5, figure4, a key …")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop there")
    parser.add_argument("--template", metavar="FILE", help="write a file of sources to begin with, and stop there")
    given = parser.add_argument_group("models and data")
    one = given.add_mutually_exclusive_group()
    one.add_argument("--builtin", action="store_true", help="small models and drawn data that come with turbovlm")
    one.add_argument("--sources", metavar="FILE", help="JSON: model, data, images … of each task or comparison")
    given.add_argument(
        "--images", "--pictures", type=int, metavar="N", help=f"of each built-in task (default {IMAGES})"
    )
    given.add_argument("--quick", action="store_true", help=f"{QUICK} images: shows that it runs, and no more")
    given.add_argument("--check", action="store_true", help="open every image, list what is wrong, and stop there")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--out", default="turbovlm-reproduce", metavar="FOLDER", help="(default turbovlm-reproduce)")
    how.add_argument("--batch", type=int, default=16, metavar="N", help="samples in a forward (default 16)")
    how.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default 0)")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    how.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps … (default: cuda where there is one)")
    add_json_option(how)
    parser.set_defaults(run=run, kept=kept)


def kept(args: argparse.Namespace) -> str | None:
    """What an interrupted run leaves behind, in words; None if nothing."""
    if not any(Path(args.out).glob("predictions/*/*.jsonl")):
        return None
    return f"predictions so far are kept in {args.out}, and the same command goes on from there"


def run(args: argparse.Namespace) -> int:
    """List, write a template, check, or run and report."""
    from turbovlm.cli.measuring import check_file, check_folder, check_numbers, check_workers
    from turbovlm.cli.output import check_json, console, write_json
    from turbovlm_lab.reproduce.sources import write_template
    from turbovlm_lab.reproduce.studies import chosen

    check_json(args)
    if args.list:
        return _list(args)
    if args.template:
        check_file("--template", args.template)
        write_template(Path(args.template))
        console().print(f"{args.template}: fill in your models and data, and give it as --sources", soft_wrap=True)
        if args.json:
            write_json(args.json, {"template": args.template})
        return 0
    check_numbers(args, "batch", "images")
    check_folder("--out", args.out)
    check_workers(args.workers)
    if not args.what:
        raise ConfigError("name what to reproduce: all, table5, figure4 …; --list says what there is")
    studies = chosen(args.what)
    sources = _sources(args)
    with_source = [study for study in studies if sources.named(study) is not None]
    left_out = [study.key for study in studies if sources.named(study) is None]
    given = "--builtin" if args.builtin else args.sources
    if not with_source:
        remedy = "; pruned models come by --sources, with an entry of their own" if args.builtin else ""
        raise ConfigError(f"{given}: has no entry for any of {' '.join(args.what)}{remedy}")
    if left_out:
        print(f"{given} has nothing for: {', '.join(left_out)}", file=sys.stderr)
    _check(sources, with_source)
    if not args.check:
        return _run(args, with_source, sources)
    if args.json:
        write_json(args.json, {"checked": [study.key for study in with_source], "left_out": left_out})
    return 0


def _list(args: argparse.Namespace) -> int:
    from turbovlm.cli.output import console, write_json
    from turbovlm_lab.reproduce.studies import every_study

    every = every_study()
    header, rows = ("key", "task", "title"), [(study.key, study.task, study.title) for study in every]
    out = console()
    for key, task, title in rows:
        out.print(f"{key:45} {task}")
        out.print(f"    {title}")
    if args.json:
        write_json(args.json, {"studies": [dict(zip(header, row)) for row in rows]})
    return 0


def _sources(args: argparse.Namespace) -> Sources:
    import torch

    from turbovlm.cli.measuring import device_named
    from turbovlm_lab.reproduce.sources import Sources, read_sources
    from turbovlm_lab.reproduce.studies import every_study

    if not args.builtin and args.sources is None:
        raise ConfigError("give --builtin or --sources FILE; --template FILE writes such a file to begin with")
    if args.sources and (args.quick or args.images):
        raise ConfigError("--quick and --images are of built-in data; give a limit in the file of sources")
    if args.quick and args.images:
        raise ConfigError("give --quick or --images, one of the two")
    if args.builtin and (args.dtype != "float32" or args.device):
        raise ConfigError("--dtype and --device: built-in models run in float32 on the CPU")
    every = every_study()
    known = {name for study in every for name in (study.key, study.name, study.task)}
    entries = read_sources(Path(args.sources), sorted(known)) if args.sources else None
    images = QUICK if args.quick else args.images or IMAGES
    device = "cpu" if args.builtin else device_named(args.device)
    given = {"device": device, "dtype": getattr(torch, args.dtype), "batch": args.batch, "workers": args.workers}
    return Sources(Path(args.out), entries, images, **given)


def _check(sources: Sources, studies: Sequence[Any]) -> None:
    from turbovlm.cli.measuring import progress_bar
    from turbovlm_lab.evaluate.check import check

    if sources.entries is None:
        return
    bad = []
    for name, task in dict.fromkeys((sources.named(study), study.task) for study in studies):
        assert name is not None
        data = sources.data(name, task)
        with progress_bar(len(data.samples) + len(data.real), f"checking {name}") as advance:
            bad += [f"{name}: {line}" for line in check(data, advance)[1]]
    for line in bad:
        print(line, file=sys.stderr)
    if bad:
        raise DataError(f"{len(bad)} things are wrong, which are listed above; nothing was run")
    print("all data can be read", file=sys.stderr)


def _run(args: argparse.Namespace, studies: Sequence[Any], sources: Sources) -> int:
    from datetime import datetime, timezone

    from turbovlm.cli.measuring import versions_used
    from turbovlm.cli.output import console, print_table, write_json
    from turbovlm_lab.reproduce.overview import overview
    from turbovlm_lab.reproduce.report import read_entries, write_report
    from turbovlm_lab.reproduce.studies import every_study, run_studies

    folder, out, done = Path(args.out), console(), []
    kept = read_entries(folder)
    source = f"--sources {args.sources}" if args.sources else "--builtin"
    amount = " --quick" if args.quick else f" --images {args.images}" if args.images else ""
    about = {
        "command": f"turbovlm reproduce {' '.join(args.what)} {source}{amount}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions_used(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    summary = overview(kept, folder)
    begun = since = time.monotonic()
    for found in run_studies(studies, sources, folder):
        before, now = kept.get(found.key, {}).get("seconds", 0), time.monotonic()
        kept[found.key] = {**about, "seconds": round(before + now - since, 1), **found.plain()}
        since = now
        if found.key.startswith("tasks/"):
            summary = overview(kept, folder)
        write_report(folder, kept, [study.key for study in every_study()], summary)
        print_table(out, found.sheet.title, found.sheet.header, found.sheet.rows)
        done.append(found.key)
    out.print(f"report: {folder / 'report.md'} ({(time.monotonic() - begun) / 60:.1f} minutes)", soft_wrap=True)
    if args.json:
        write_json(args.json, {"report": str(folder / "report.md"), "studies": {key: kept[key] for key in done}})
    return 0
