"""The first hour of a newcomer, timed: a fresh clone, the demo, an own image, an own model, its settings, and back.

    python benchmarks/newcomer.py    # about ten minutes; writes benchmarks/results/newcomer.{json,md}

Each step is a command as README and the docs give it, run in a clone of the last commit in a temporary folder. The own
model is a ViT-S/16 of `transformers` with random weights, saved as a user has it; the own images are photographs that
scikit-image ships, and forty crops of them. Needs git, make and Python; packages come from pip's index or its cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import RESULTS, described, machine, save
from rich.console import Console

ROOT = Path(__file__).parents[1]
STDERR = Console(stderr=True)

PREPARE = """
import torch
from PIL import Image
from pathlib import Path
from skimage import data
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

torch.manual_seed(0)
size = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
ViTForImageClassification(ViTConfig(**size, num_labels=10)).save_pretrained("mine")
ViTImageProcessor().save_pretrained("mine")
for folder in ("own", "photos"):
    Path(folder).mkdir()
photos = {name: Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")}
for name, photo in photos.items():
    photo.save(f"own/{name}.jpg")
    for place in range(10):
        side = min(photo.size) // 2
        left, top = (place * 37) % (photo.width - side), (place * 53) % (photo.height - side)
        photo.crop((left, top, left + side, top + side)).save(f"photos/{name}-{place}.jpg")
"""

OWN_CODE = """
import torch
import turbovlm
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

model = ViTForImageClassification.from_pretrained("mine").eval()
images = ViTImageProcessor.from_pretrained("mine")(Image.open("own/chelsea.jpg"), return_tensors="pt")
with torch.inference_mode():
    before = model(**images).logits
    handle = turbovlm.apply(model, turbovlm.TurboConfig.load("turbo.json"))
    merged = model(**images).logits
    print(handle)
    handle.remove()
    after = model(**images).logits
assert not torch.equal(before, merged), "nothing was merged"
assert torch.equal(before, after), "the model is not what it was"
print("removed: bit for bit what it was")
"""


def steps() -> list[tuple[str, str]]:
    """What a newcomer does, and the command."""
    turbovlm = ".venv/bin/turbovlm"
    return [
        ("clone", f"git clone --quiet file://{ROOT} turbovlm"),
        ("set up everything", "make setup"),
        ("the demo", "make demo"),
        ("own images", f'{turbovlm} demo --images own --labels "cat, coffee, rocket, astronaut" --out own.html'),
        ("own model: what it would save", f"{turbovlm} inspect mine --r 8"),
        ("own model: what it saves here", f"{turbovlm} bench mine --r 8 --batch 8"),
        ("settings found on own images", f"{turbovlm} calibrate mine photos --flops 0.6"),
        ("applied, run and removed in Python", ".venv/bin/python -W ignore own.py"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the clone there (default: it is removed)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        done = [run(folder, what, command) for what, command in steps()]
        if args.keep is not None:
            shutil.copytree(folder / "turbovlm", args.keep, symlinks=True)
    finally:
        shutil.rmtree(folder)
    results = {"machine": machine(), "load_before": os.getloadavg()[0], "steps": done}
    save(RESULTS / "newcomer.json", results)
    (RESULTS / "newcomer.md").write_text(report(results))
    print(report(results))


def run(folder: Path, what: str, command: str) -> dict[str, Any]:
    """One step, in the clone where there is one."""
    clone = folder / "turbovlm"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHON": sys.executable, "COLUMNS": "80"}
    if what == "set up everything":
        (clone / "own.py").write_text(OWN_CODE)
    if what == "own images":
        subprocess.run([".venv/bin/python", "-W", "ignore", "-c", PREPARE], cwd=clone, env=environment, check=True)
    STDERR.print(f"{what}: {command}", highlight=False, markup=False)
    begun = time.perf_counter()
    where = clone if clone.is_dir() else folder
    ended = subprocess.run(command, shell=True, cwd=where, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if ended.returncode:
        raise SystemExit(f"{command}: ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}")
    return {
        "what": what,
        "command": command.replace(str(ROOT), "…"),
        "seconds": seconds,
        "said": ended.stdout.replace(sys.executable, "python3"),
    }


def report(results: dict[str, Any]) -> str:
    lines = [
        "# The first hour of a newcomer",
        "",
        "From nothing to an own model that is faster, measured, and back as it was; each command as it stands.",
        "",
        described(results["machine"]),
        "",
        "| step | command | seconds |",
        "|---|---|--:|",
    ]
    lines += [f"| {step['what']} | `{step['command']}` | {step['seconds']:.0f} |" for step in results["steps"]]
    whole = sum(step["seconds"] for step in results["steps"])
    lines += [f"| **in all** | | **{whole:.0f}** |", ""]
    said = {step["what"]: step["said"].strip() for step in results["steps"]}
    for what in list(said)[4:]:
        lines += [f"## {what[0].upper()}{what[1:]}", "", "```text", *said[what].splitlines(), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
