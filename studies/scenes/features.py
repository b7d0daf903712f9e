"""What frozen eyes make of scenes, once and for all epochs of training: tokens of 40,000 scenes, in fp16.

    python studies/scenes/features.py                            # the ViT-S/14: 8 GB; goes on where it stopped
    python studies/scenes/features.py --eyes clip --pairs 6000   # CLIP ViT-B/16, fewer scenes: 4 GB

Writes studies/scenes/data/{train,validation}.npy, for CLIP clip_{train,validation}.npy.

Scenes come in pairs. They show nine vendors' drawings on photographs of mate-backgrounds; what one of `PARTIAL` does
not draw, a full set lends. Those to validate on are other scenes of the same. Twemoji and the photographs of
scikit-image and scikit-learn are left for evaluation.
"""

from __future__ import annotations

import argparse
import io
import random
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from prepare import DATA, PARTIAL, VENDORS
from tqdm import tqdm

from turbovlm_lab.zoo.reader import EYES
from turbovlm_lab.zoo.scenes import Scene, draw_scene, make_pair
from turbovlm_lab.zoo.sprites import SCENE_NAMES, load_sprites

PAIRS = {"train": 20_000, "validation": 100}
SEEDS = {"train": 0, "validation": 1_000_000}
NAMES = tuple(SCENE_NAMES)
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS["train"], metavar="N", help="to train on (default 20000)")
    parser.add_argument("--eyes", choices=EYES, default="vit", help="(default vit)")
    args = parser.parse_args()
    vendors, photos = load_drawings()
    for part, count in {"validation": PAIRS["validation"], "train": args.pairs}.items():
        extract(part, count, args.eyes, vendors, photos)


def file_of(part: str, eyes: str) -> Path:
    """Where the tokens of a part lie."""
    return DATA / f"{'' if eyes == 'vit' else f'{eyes}_'}{part}.npy"


def load_drawings() -> tuple[list[dict[str, Image.Image]], list[Image.Image]]:
    """The drawings to train on, a dictionary per vendor, and the photographs. Full sets lend what partial ones lack."""
    full = [named(vendor) for vendor in VENDORS if vendor != "twemoji"]
    vendors = full + [{**lender, **named(vendor)} for lender, vendor in zip(full, PARTIAL)]
    with zipfile.ZipFile(DATA / "photos.zip") as archive:
        photos = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in archive.namelist()]
    return vendors, photos


def named(vendor: str) -> dict[str, Image.Image]:
    return {s.name: s.image for s in load_sprites(DATA / f"{vendor}.zip") if s.name}


def pair_of(part: str, number: int) -> tuple[Scene, Scene]:
    """The scenes of a pair: what its tokens show."""
    return make_pair(random.Random(SEEDS[part] + number), NAMES)


@torch.inference_mode()
def extract(
    part: str,
    pairs: int,
    eyes: str,
    vendors: list[dict[str, Image.Image]],
    photos: list[Image.Image],
) -> None:
    """Writes `[scenes, tokens, width]`, and how many are done beside it."""
    file, seen = file_of(part, eyes), EYES[eyes]
    progress = file.with_suffix(".done")
    encoder = seen.load().to(torch.bfloat16)
    shape = (2 * pairs, 1 + (224 // seen.patch) ** 2, seen.width)
    done = int(progress.read_text()) if progress.exists() else 0
    if file.exists():
        stored = np.lib.format.open_memmap(file, mode="r+")
        if stored.shape != shape:
            raise SystemExit(f"{file} holds {stored.shape[0]} scenes, not {shape[0]}: remove it and {progress}")
    else:
        stored = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    with tqdm(total=shape[0], initial=done, desc=part, unit=" scenes") as bar:
        while done < shape[0]:
            numbers = range(done, min(done + BATCH, shape[0]))
            scenes = [pair_of(part, number // 2)[number % 2] for number in numbers]
            drawn = [draw_scene(scene, vendors[scene.seed % len(vendors)], photos) for scene in scenes]
            tokens = encoder(pixel_values=seen.preprocess(drawn).to(encoder.dtype)).last_hidden_state
            stored[numbers.start : numbers.stop] = tokens.float().numpy()
            done = numbers.stop
            if done % (BATCH * 25) == 0 or done == shape[0]:
                stored.flush()
                progress.write_text(str(done))
            bar.update(len(numbers))


if __name__ == "__main__":
    main()
