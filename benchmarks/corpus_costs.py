"""What an image of a corpus costs a CPU: decoding, preprocessing, collecting, writing; an engine's driver.

    python benchmarks/corpus_costs.py               # writes benchmarks/results/corpus_costs.json
    python benchmarks/corpus_costs.py --engine      # where Ray is installed: what its driver takes for a batch

Images are JPEGs of 640×480 to 2000×1500 pixels: photographs of scikit-image and scikit-learn, enlarged, with noise as a
sensor's, of quality 75 to 95. Pillow decodes them, whole and at a fraction of their sides (`draft`), and the CLIP
processor of transformers makes pixels of them. One thread; seconds are process CPU time, of a part's writing (Parquet,
temporary name, fsync, rename) wall time, since a disk is waited for.
`corpus_scale.py` simulates with these.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import RESULTS, load, machine, save
from PIL import Image

FILE = RESULTS / "corpus_costs.json"
SIDES, QUALITIES, NOISE = (640, 2000), (75, 95), (2.0, 6.0)
WIDTH, BATCH = 768, 64
PARTS = (1_000, 10_000)
WRITERS = {"rows": False, "matrix": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="measure Ray's driver, and nothing else")
    parser.add_argument("--images", type=int, default=300, help="drawn and decoded (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=384, help="of the encoder's image (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FILE, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.engine:
        found = {"engine": engine_driver(args.rounds)}
    else:
        found = {
            "machine": machine(),
            "images": images(args.images, args.pixels),
            "collect": collect(args.rounds),
            "write": {
                name: {str(size): write_part(size, plain, args.rounds, args.out.parent) for size in PARTS}
                for name, plain in WRITERS.items()
            },
        }
    save(args.out, load(args.out) | found)


def jpeg(photographs: list[Image.Image], chance: random.Random) -> bytes:
    """One file: its longer side log-uniform in `SIDES`, 4:3 or 3:4."""
    longer = round(SIDES[0] * (SIDES[1] / SIDES[0]) ** chance.random())
    size = (longer, longer * 3 // 4) if chance.random() < 0.75 else (longer * 3 // 4, longer)
    enlarged = np.asarray(chance.choice(photographs).resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    noise = np.random.default_rng(chance.getrandbits(32)).standard_normal(enlarged.shape, dtype=np.float32)
    pixels = (enlarged + chance.uniform(*NOISE) * noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=chance.randint(*QUALITIES))
    return file.getvalue()


def images(number: int, pixels: int) -> dict[str, Any]:
    """Of every image: its file's bytes, its pixels, and seconds of decoding and preprocessing, whole and by `draft`."""
    from transformers import CLIPImageProcessor

    from turbovlm_lab.demo.photos import load_photos

    photographs, chance = [photo.image for photo in load_photos()], random.Random(0)
    processor = CLIPImageProcessor(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}, do_convert_rgb=False
    )
    found: dict[str, list[float]] = {name: [] for name in ("bytes", "pixels", "decode", "prepare", "draft", "smaller")}
    for file in [jpeg(photographs, chance) for _ in range(number)]:
        whole, seconds = timed(lambda file=file: Image.open(io.BytesIO(file)).convert("RGB"))
        less, draft = timed(lambda file=file: drafted(file, pixels))
        prepared, prepare = timed(lambda image=whole: processor(image, return_tensors="pt")["pixel_values"])
        _, smaller = timed(lambda image=less: processor(image, return_tensors="pt")["pixel_values"])
        assert prepared.shape == (1, 3, pixels, pixels) and min(less.size) >= pixels
        row = (len(file), whole.width * whole.height, seconds, prepare, draft, smaller)
        for name, value in zip(found, row):
            found[name].append(value)
    return {"processor": type(processor).__name__, "side": pixels, "each": found}


def drafted(file: bytes, pixels: int) -> Image.Image:
    """Decoded at the smallest of 1/1, 1/2, 1/4, 1/8 of the sides whose shorter one has at least so many pixels."""
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", (pixels, pixels))
    return image.convert("RGB")


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def collect(rounds: int) -> list[float]:
    """Seconds in which a batch's embeddings, an array an image, are read from bytes and put where its shard's are."""
    sent = pickle.dumps(list(np.ones((BATCH, WIDTH), dtype=np.float32)), protocol=5)
    seconds = []
    for _ in range(rounds):
        shard: dict[int, Any] = {}
        start = time.process_time()
        for index in range(1_000):
            shard[index] = pickle.loads(sent)
        seconds.append((time.process_time() - start) / 1_000)
    return seconds


def write_part(size: int, plain: bool, rounds: int, folder: Path) -> list[float]:
    """Seconds in which a shard's part is made of its images' embeddings and written, whole or not at all.

    Args:
        size: images.
        plain: from one matrix, without dictionary and compression, instead of row by row and as pyarrow does it.
        rounds: parts.
        folder: on whose disk.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    matrix = np.random.default_rng(0).standard_normal((size, WIDTH), dtype=np.float32)
    rows, names = list(matrix), [f"shard-000000/{index:08d}.jpg" for index in range(size)]
    seconds = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for index in range(rounds + 1):
            start = time.perf_counter()
            if plain:
                column = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(rows)), WIDTH)
            else:
                column = pa.array(rows, pa.list_(pa.float32()))
            draft = Path(scratch, "part.unfinished")
            pq.write_table(
                pa.table({"name": names, "embedding": column}),
                draft,
                use_dictionary=not plain,
                compression="none" if plain else "snappy",
            )
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.replace(Path(scratch, f"{index}.parquet"))
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def engine_driver(rounds: int, batches: int = 40, shards: tuple[int, int] = (4, 20)) -> dict[str, Any]:
    """CPU seconds of Ray Data's driver for each block that read tasks yield, an actor embeds and the driver collects.

    Pixels are few, so that nothing but the driver's own work is seen; every batch is a block of its own, as 64 images
    of 384×384 pixels in float32 are. The slope between few and many shards: what a run costs once is left out.
    """
    import ray

    pixels = np.zeros((BATCH, 3, 32, 32), dtype=np.uint8)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.target_max_block_size = False, pixels.nbytes

    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for _ in range(batches):
            yield {"pixels": pixels, "shard": np.full(BATCH, row["id"][0])}

    class Embed:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"embedding": np.zeros((len(batch["shard"]), WIDTH), dtype=np.float32), "shard": batch["shard"]}

    def run(number: int) -> float:
        data = ray.data.range(number, override_num_blocks=number).map_batches(read, batch_size=1, num_cpus=1)
        data = data.map_batches(Embed, batch_size=None, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5)
        start = time.process_time()
        blocks = [len(batch["embedding"]) for batch in data.iter_batches(batch_size=None, batch_format="numpy")]
        assert blocks == [BATCH] * (number * batches), f"{number * batches} batches in {len(blocks)} blocks"
        return time.process_time() - start

    few, many = shards
    run(few)
    seconds = [(run(many) - run(few)) / ((many - few) * batches) for _ in range(rounds)]
    ray.shutdown()
    return {
        "ray": ray.__version__,
        "machine": machine(),
        "blocks": [each * batches for each in shards],
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
