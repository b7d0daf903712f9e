"""Serving by vLLM with fewer visual tokens: requests a second, time to the first token, blocks of the cache.

    python benchmarks/serving.py              # writes benchmarks/results/serving.{json,md}
    python benchmarks/serving.py --quick --out FOLDER  # a tiny model, one round, two engines: whether it runs

LLaVA-1.5's shape in two sizes, random weights from seed 0, by vLLM's build for CPUs: `make test-engines` sets up an
environment with it. Three engines stand side by side, as vLLM is and with two of `visual_keep`, each in processes of
its own, and are loaded one after the other: in a round each serves the same requests, in an order that turns from round
to round, and ratios are those of a round. Clients send the next request when the one before is answered. Every image
is another, unless it says that it repeats, and comes as pixels: nothing is decoded or sent over a network.

An engine's scheduler waits for its worker, which runs the model, in a loop that takes a core: two are needed. Processor
time is that of the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from cases import RESULTS, machine, save
from serving_report import DISTINCT, NONE, REPEATED, report

KEEPS = (1.0, 0.5, 0.25)
"""1 is vLLM without settings."""
BEFORE, BEHIND = 8, 32
"""Words of a prompt in front of its image and behind it."""
WORDS = 32000
MARKS = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
CHOSEN_BY = ("coverage", "redundancy")
"""The default, and one in rounds, which takes less time."""
BLOCK = 32
"""Tokens of a block of the cache."""
SETTLED = 1.1
"""Seconds after which a worker that has nothing to do no longer waits in a loop."""


@dataclass(frozen=True)
class Size:
    """Widths of a tower and of a language model, and the side of an image and of its patches, in pixels."""

    tower: dict[str, int]
    text: dict[str, int]
    pixels: int = 336
    patch: int = 14

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.pixels // self.patch) ** 2


SIZES = {
    "small": Size(
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6},
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    ),
    "middle": Size(
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
    ),
}
TINY = Size(
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    pixels=112,
)


@dataclass(frozen=True)
class Load:
    """So many clients that send so many requests in all, each for `new` tokens about `images`."""

    clients: int
    requests: int
    new: int
    images: str = DISTINCT


LOADS = [Load(clients, requests, new) for new in (8, 64) for clients, requests in ((1, 3), (4, 8), (16, 16))]
LOADS += [Load(4, 8, 8, REPEATED), Load(4, 8, 8, NONE)]
QUICK = [Load(2, 4, 4), Load(2, 4, 4, REPEATED), Load(2, 4, 4, NONE)]
WARM = (Load(1, 1, 4, REPEATED), Load(2, 2, 4))


@dataclass(frozen=True)
class Served:
    """What an engine did with a load.

    Attributes:
        seconds: from the first request to the last answer.
        first, whole: seconds to the first token and to the last of each request.
        prompt, cached: tokens of all prompts, and how many of them were in the cache.
        blocks: of the cache that were in use at most.
        worker, front: seconds of processor time of the process that runs the model, and of the one that has the images
            processed and tokens collected.
    """

    seconds: float
    first: list[float]
    whole: list[float]
    prompt: int
    cached: int
    blocks: int
    worker: float
    front: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of each engine (default: %(default)s)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    }
    torch.set_num_threads(args.threads)
    sizes, loads, keeps, rounds = SIZES, LOADS, KEEPS, args.rounds
    if args.quick:
        sizes, loads, keeps, rounds = {"tiny": TINY}, QUICK, KEEPS[:2], 1
    results: dict[str, Any] = {"machine": machine() | {"vllm": vllm_version()}, "dtype": "bf16", "seed": 0}
    results |= {"block": BLOCK, "sizes": {}}
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            results["sizes"][name] = {**asdict(size), **make(size, Path(folder), keeps)}
            asyncio.run(keep_rounds(measure(size, folder, keeps, loads, rounds), name, results, args.out))
    print(report(results))


async def keep_rounds(rounds: AsyncIterator[dict[str, Any]], name: str, results: dict[str, Any], out: Path) -> None:
    """Write what there is after each round."""
    async for found in rounds:
        results["sizes"][name] |= found
        save(out / "serving.json", results)
        (out / "serving.md").write_text(report(results))
        print(f"{name}: round {found['rounds']}", flush=True)


def vllm_version() -> str:
    """Its distribution for CPUs has another name."""
    names = metadata.packages_distributions()["vllm"]
    return f"{names[0]} {metadata.version(names[0])}"


def make(size: Size, folder: Path, keeps: Sequence[float]) -> dict[str, Any]:
    """Save a model of that size and its processor; its parameters, and multiply-accumulates by part and keep."""
    from safetensors.torch import load_file, save_file
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    import turbovlm
    from turbovlm.profile.macs import macs

    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=size.pixels, patch_size=size.patch, **size.tower)
    text = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=2, **size.text
    )
    image = MARKS.index("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image))
    model = model.to(torch.bfloat16).eval()
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": size.pixels}, crop_size={"height": size.pixels, "width": size.pixels}
        ),
        tokenizer(),
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # the names of published checkpoints, which vLLM reads
    file = folder / "model.safetensors"
    weights = load_file(file)
    inside = re.compile(r"vision_tower\.(?!vision_model)")
    save_file({inside.sub("vision_tower.vision_model.", name): weight for name, weight in weights.items()}, file)

    ids = torch.full((1, BEFORE + size.tokens + BEHIND), image)
    ids[:, :BEFORE] = ids[:, BEFORE + size.tokens :] = len(MARKS)
    pixels = torch.zeros(1, 3, size.pixels, size.pixels, dtype=torch.bfloat16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "logits_to_keep": 1}
    counts = {"tower": macs(model.model.vision_tower, pixels)}
    for keep in keeps:
        if keep == 1:
            counts[f"{keep:g}"] = macs(model, **inputs)
        else:
            with turbovlm.apply(model, visual_keep=keep):
                counts[f"{keep:g}"] = macs(model, **inputs)
    parts = {"tower": model.model.vision_tower, "text": model.model.language_model}
    parameters = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    return {"parameters": parameters, "macs": counts, "choosing": choosing(size, keeps)}


def choosing(size: Size, keeps: Sequence[float]) -> dict[str, dict[str, float]]:
    """Seconds of processor time that an image's tokens are chosen in, by selection and keep, medians of 9."""
    from turbovlm import ReadConfig
    from turbovlm.vlm.select import kept_count, select

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, size.tokens, size.text["hidden_size"], generator=generator).to(torch.bfloat16)
    semantic = torch.rand(1, size.tokens, generator=generator)
    found: dict[str, dict[str, float]] = {}
    for keep, chosen_by in itertools.product(keeps, CHOSEN_BY):
        if keep == 1:
            continue
        config, seconds = ReadConfig(keep, visual_select=chosen_by), []
        for _ in range(9):
            start = time.process_time()
            select(features, semantic, kept_count(keep, size.tokens), config)
            seconds.append(time.process_time() - start)
        found.setdefault(chosen_by, {})[f"{keep:g}"] = round(statistics.median(seconds), 5)
    return found


def tokenizer() -> Any:
    """Words by their number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*MARKS, *(f"w{i}" for i in range(WORDS - len(MARKS)))]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, additional_special_tokens=["<image>"], **special)


class Engine:
    """vLLM in processes of its own, with one `visual_keep`."""

    def __init__(self, folder: str, keep: float, size: Size) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = {} if keep == 1 else {"additional_config": {"turbovlm": {"visual_keep": keep}}}
        args = AsyncEngineArgs(
            model=folder,
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            block_size=BLOCK,
            enforce_eager=True,
            limit_mm_per_prompt={"image": 1},
            enable_prefix_caching=True,
            distributed_executor_backend="uni",
            disable_log_stats=True,
            **settings,
        )
        self.size = size
        self.peak = 0.0
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        self.llm = AsyncLLM.from_engine_args(args, stat_loggers=[self._watch])
        self.processes = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        (self.worker,) = (process for process in self.processes if "Worker" in process.name())
        self.names = itertools.count()

    def _watch(self, config: Any, index: int) -> Any:
        """A logger of vLLM's that keeps the share of the cache that was in use at most."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class Peak(StatLoggerBase):  # type: ignore[misc]
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    engine.peak = max(engine.peak, scheduler_stats.kv_cache_usage)

            def log_engine_initialized(self) -> None:
                pass

        return Peak()

    async def serve(self, requests: Sequence[dict[str, Any]], load: Load) -> Served:
        """Have clients send requests until none is left."""
        left = iter(requests)
        self.peak = 0.0
        start, worker, front = time.perf_counter(), busy([self.worker]), time.process_time()
        clients = [self._client(left, load.new) for _ in range(load.clients)]
        answers = [answer for found in await asyncio.gather(*clients) for answer in found]
        seconds, worker, front = time.perf_counter() - start, busy([self.worker]) - worker, time.process_time() - front
        await asyncio.sleep(SETTLED)
        first, whole, prompt, cached = zip(*answers)
        times = ([round(value, 4) for value in values] for values in (first, whole))
        blocks = round(self.peak * (self.llm.vllm_config.cache_config.num_gpu_blocks - 1))
        return Served(round(seconds, 4), *times, sum(prompt), sum(cached), blocks, round(worker, 2), round(front, 3))

    async def _client(self, left: Iterator[dict[str, Any]], new: int) -> list[tuple[float, float, int, int]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, output_kind=RequestOutputKind.DELTA, detokenize=False
        )
        found = []
        for request in left:
            start = time.perf_counter()
            first, count = 0.0, 0
            async for output in self.llm.generate(request, sampling, str(next(self.names))):
                first = first or time.perf_counter() - start
                count += len(output.outputs[0].token_ids)
            assert count == new
            prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
            found.append((first, time.perf_counter() - start, prompt, cached))
        return found


def busy(processes: Sequence[psutil.Process]) -> float:
    """Seconds of processor time that they have taken."""
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


def others(own: Sequence[psutil.Process]) -> float:
    """Seconds of processor time that the machine has spent on all but these processes."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq) - busy(own)


def requests_of(load: Load, size: Size, seed: int) -> list[dict[str, Any]]:
    """The requests of a load; others for another seed, but for an image that repeats."""
    from PIL import Image

    random = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for _ in range(load.requests):
        words = [f"w{i}" for i in random.integers(0, WORDS - len(MARKS), BEHIND + size.tokens // 4)]
        before = [f"w{i}" for i in range(BEFORE)]
        if load.images == NONE:
            found.append({"prompt": " ".join([*before, *words])})
            continue
        of_image = random if load.images == DISTINCT else np.random.default_rng(0)
        pixels = of_image.integers(0, 255, (size.pixels, size.pixels, 3), dtype=np.uint8)
        prompt = " ".join([*before, "<image>", *words[:BEHIND]])
        found.append({"prompt": prompt, "multi_modal_data": {"image": Image.fromarray(pixels)}})
    return found


async def measure(
    size: Size, folder: str, keeps: Sequence[float], loads: Sequence[Load], rounds: int
) -> AsyncIterator[dict[str, Any]]:
    """After each round, what each engine did with each load so far, and how busy the machine was with other things."""
    engines = {f"{keep:g}": Engine(folder, keep, size) for keep in keeps}
    seeds = itertools.count(1)
    served: list[dict[str, list[Any]]] = [{keep: [] for keep in engines} for _ in loads]
    try:
        for load in WARM:
            for engine in engines.values():
                await engine.serve(requests_of(load, size, next(seeds)), load)
        own = [psutil.Process(), *(process for engine in engines.values() for process in engine.processes)]
        start, elsewhere = time.perf_counter(), others(own)
        for round_ in range(rounds):
            for load, found in zip(loads, served):
                requests = requests_of(load, size, next(seeds))
                turned = [*engines][round_ % len(engines) :] + [*engines][: round_ % len(engines)]
                for keep in turned:
                    found[keep].append(asdict(await engines[keep].serve(requests, load)))
            busy_cores = (others(own) - elsewhere) / (time.perf_counter() - start)
            done = [{"load": asdict(load), "served": found} for load, found in zip(loads, served)]
            yield {"rounds": round_ + 1, "others_cores": round(busy_cores, 3), "loads": done}
    finally:
        for engine in engines.values():
            engine.llm.shutdown()


if __name__ == "__main__":
    main()
