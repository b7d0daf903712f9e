"""Everything that must be measured on a GPU, in one command.

    python benchmarks/gpu.py                            # about fifteen minutes; writes benchmarks/results/gpu.{json,md}
    python benchmarks/gpu.py --parts routes --dtypes bf16 fp16
    python benchmarks/gpu.py --parts models --encoders vit-l-384 --modes compiled --routes chosen     # the rest is kept
    python benchmarks/gpu.py --device cpu --small       # the same path on a tiny model, to see that it runs

Parts: `checks`: the kernels against the plain path, every attention route against float64, and a whole encoder in a
CUDA graph against itself outside of one. `routes`: which exact way of attending is fastest, per shape and dtype; what
wins here belongs in `turbovlm.ops.fused.attend`. `kernels`: similarity and merge, Triton against the plain path.
`models`: ViT-L/16-384 and EVA-g/14-448, batch 64, eager and compiled, by the route that the library chooses
and by others, and beside ToMe. `graphs`: the same encoders captured in CUDA graphs, where launches cost nothing, at
batch 1, 8 and 64.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from cases import CASES, DTYPES, RESULTS, Case, build, described, images, load, machine, save
from rich.progress import track
from rivals import published, with_sdpa
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

import turbovlm
from turbovlm import TurboConfig
from turbovlm.ops import (
    Partition,
    Ranking,
    fused,
    host,
    kernels,
    merge_ranked,
    mutual_redundancy,
    partition_tokens,
    plain,
    rank_candidates,
    size_bias,
)
from turbovlm.ops.dispatch import path_for
from turbovlm.profile import compare
from turbovlm.profile.timing import interleaved

CHOSEN = "chosen"
"""What `attend` does, on the path of the device."""
BACKENDS = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
SHAPES = {"ViT-L/16-384": (64, 16, 577, 64), "EVA-g/14-448": (64, 16, 1025, 88), "DINOv2-S/14-518": (64, 6, 1370, 64)}
"""Batch, heads, tokens and head_dim."""
SMALL_SHAPES = {"small": (2, 3, 65, 64)}


def _tiny() -> torch.nn.Module:
    import timm

    model: torch.nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    return model


SMALL = Case("ViT-Ti/16-224", 224, 197, 8, _tiny)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16"), default=("bf16",))
    parser.add_argument("--encoders", nargs="+", choices=tuple(CASES), default=("vit-l-384", "eva-g-448"))
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=("eager", "compiled"))
    parser.add_argument("--routes", nargs="+", choices=(CHOSEN, *ROUTES), default=(CHOSEN, "masked"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and tiny shapes; nothing is written")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device here: run this on a machine with one, or see --device cpu --small\n")
    file = RESULTS / "gpu.json"
    results = {} if args.small else load(file)
    results["machine"] = {"gpu": _name(args.device), **machine()}
    for part in args.parts:
        results[part] = results.get(part, {}) | PARTS[part](args)
        if not args.small:
            save(file, results)
    if not args.small:
        (RESULTS / "gpu.md").write_text(report(results))
    print(report(results))


@contextmanager
def attending_by(name: str) -> Iterator[None]:
    """Let every accelerated block attend by the route of that name."""
    before = {way: way.attend for way in (fused, host, plain)}

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float = 0.0) -> Tensor:
        return ROUTES[name](q, k, v, None if bias is None else bias.to(q.dtype), scale)

    try:
        for way in before if name != CHOSEN else ():
            way.attend = attend
        yield
    finally:
        for way, own in before.items():
            way.attend = own


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention with the bias as its mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Our kernel; PyTorch's where there is no bias."""
    if bias is None:
        return masked_attention(q, k, v, None, scale)
    attended: Tensor = kernels.biased_attention(q, k, v, bias, scale)
    return attended


def channel_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The bias as channels of the keys against ones in the queries, so that no mask is needed and FlashAttention runs.

    Two channels, the second for what the first loses by rounding; then zeros up to a multiple of 8.
    """
    if bias is None:
        return masked_attention(q, k, v, None, scale)
    head_dim = q.shape[-1]
    precise = torch.promote_types(q.dtype, torch.float32)
    wanted = (bias.to(precise) / scale).clamp_min(torch.finfo(q.dtype).min / 2).transpose(-1, -2)
    high = wanted.to(q.dtype)
    pair = torch.cat([high, (wanted - high).to(q.dtype)], dim=-1).expand(*k.shape[:3], 2)
    padding = -(head_dim + 2) % 8
    q = torch.cat([q, q.new_ones(()).expand(*q.shape[:3], 2), q.new_zeros(()).expand(*q.shape[:3], padding)], dim=-1)
    k = torch.cat([k, pair, k.new_zeros(()).expand(*k.shape[:3], padding)], dim=-1)
    v = F.pad(v, (0, 2 + padding))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :head_dim]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """FlexAttention, with the bias added by its score modifier."""

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[batch, 0, 0, key]

    attention: Any = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex.flex_attention
    attended: Tensor = attention(q, k, v, score_mod=None if bias is None else modified, scale=scale)
    return attended


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex.flex_attention, dynamic=True)


ROUTES = {
    "masked": masked_attention,
    "fused": kernel_attention,
    "channel": channel_attention,
    "flex": flex_attention,
}


def heads(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as one projection gives them, and sizes of 1 to 8."""
    batch, count, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(batch, tokens, 3, count, head_dim, generator=generator).to(device, dtype)
    q, k, v = flat.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, torch.randint(1, 9, (batch, tokens), generator=generator).to(device, torch.float32)


def check(args: argparse.Namespace) -> dict[str, float]:
    """Largest differences; each should be rounding."""
    found = {}
    for dtype in args.dtypes:
        q, k, v, sizes = heads((2, 4, 145, 64), DTYPES[dtype], args.device)
        bias, scale = size_bias(sizes, q.dtype), q.shape[-1] ** -0.5
        exact = masked_attention(q.double(), k.double(), v.double(), bias.double(), scale)
        for name, route in ROUTES.items():
            if route is kernel_attention and args.device == "cpu":
                continue
            found[f"route {name}, {dtype}"] = float((route(q, k, v, bias, scale) - exact).abs().max())
        x = k.transpose(1, 2).flatten(2)
        split = partition_tokens(145, 1, "random", device=x.device)
        ranking = rank_candidates(x, split, None, degree="redundancy")
        plain_redundancy, _ = plain.most_similar(x, split)
        found[f"similarity, {dtype}"] = float((ranking.redundancy - plain_redundancy).abs().max())
        merging = functools.partial(merge_ranked, ranking, 40, x, sizes=sizes, order="partition", reduce="keep_norm")
        (merge, y), (plain_merge, plain_y) = merging(), merging(path=plain)
        found[f"merge, {dtype}"] = float((y - plain_y).abs().max())
        assert torch.equal(merge.rows, plain_merge.rows), "the kernel and the plain path place tokens differently"
        if args.device == "cuda":
            found[f"CUDA graph, {dtype}"] = _graph_difference(DTYPES[dtype])
    return found


def _graph_difference(dtype: torch.dtype) -> float:
    """A forward captured in a CUDA graph and replayed on another image, against the same forward in eager."""
    model = build(CASES["vit-b-384"], dtype, "cuda")
    first, second = images(CASES["vit-b-384"], 4, dtype, "cuda").chunk(2)
    with turbovlm.apply(model, TurboConfig(35, blocks="every")), torch.inference_mode():
        model(second.clone())
        static = first.clone()
        replay, out = _captured(model, static)
        static.copy_(second)
        replay()
        return float((out - model(second)).abs().max())


def _captured(model: torch.nn.Module, static: Tensor) -> tuple[Callable[[], object], Tensor]:
    """A replay of the model on what `static` holds, and where its result comes to lie."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(static)
    return graph.replay, getattr(out, "last_hidden_state", out)


def _seconds(functions: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each, in turn."""
    with torch.inference_mode():
        clock, _ = interleaved(list(functions.values()), torch.device(args.device), args.rounds, 3, lambda _: None)
    return {name: statistics.median(samples) for name, samples in zip(functions, clock)}


def route_candidates(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> dict[str, Callable[[], object]]:
    """Attention without a bias, and every way to attend with one that this device and release have."""
    bias, scale = size_bias(sizes, q.dtype), q.shape[-1] ** -0.5
    wanted: dict[str, Callable[[], object]] = {"no bias": lambda: masked_attention(q, k, v, None, scale)}
    for name, route in ROUTES.items():
        if route is kernel_attention and not q.is_cuda:
            continue
        wanted[name] = lambda route=route: route(q, k, v, bias, scale)

    def on(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    for name, backend in BACKENDS.items():
        wanted[f"masked, {name}"] = lambda backend=backend: on(backend)
    usable = {}
    for name, function in wanted.items():
        try:
            function()
            usable[name] = function
        except RuntimeError as error:
            print(f"{name}: not here: {str(error).splitlines()[0]}")
    return usable


def time_routes(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of attention, by shape and dtype, over the ways to do it."""
    found = {}
    for dtype, name, shape in track(_shapes(args), description="routes"):
        found[f"{name} {dtype}"] = _seconds(route_candidates(*heads(shape, DTYPES[dtype], args.device)), args)
    return found


def time_kernels(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of what a merge is made of, by Triton's kernels (where they run) and by plain operators."""
    found = {}
    for dtype, name, shape in track(_shapes(args), description="kernels"):
        q, k, _, sizes = heads(shape, DTYPES[dtype], args.device)
        features, x = k.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2).contiguous()
        split = partition_tokens(shape[2], 1, "random", device=x.device)
        ranking = rank_candidates(features, split, None, degree="redundancy")
        steps: dict[str, Callable[..., object]] = {
            "similarity": functools.partial(mutual_redundancy, features, split),
            "rank": functools.partial(_rank, ranking, sizes.softmax(dim=1), split),
            "attention row": functools.partial(_attention_rows, q, k, size_bias(sizes, k.dtype)),
            "merge": functools.partial(
                merge_ranked, ranking, 16, x, sizes=sizes, order="partition", reduce="keep_norm"
            ),
        }
        plainly = {f"{step}, plain": functools.partial(function, path=plain) for step, function in steps.items()}
        found[f"{name} {dtype}"] = _seconds({**steps, **plainly}, args)
    return found


def _rank(ranking: Ranking, semantic: Tensor, partition: Partition, path: ModuleType | None = None) -> Tensor:
    path = path or path_for(ranking.redundancy)
    how = {"degree": "weighted_distance", "alpha": None, "seed": 0, "padding": None, "r": 16}
    e: Tensor = path.rank(ranking.redundancy, ranking.nearest, semantic, partition, 0, **how)[1]
    return e


def _attention_rows(q: Tensor, keys: Tensor, bias: Tensor, path: ModuleType | None = None) -> Tensor:
    rows: Tensor = (path or path_for(keys)).attention_rows(q, keys, bias)[0]
    return rows


def time_models(args: argparse.Namespace) -> dict[str, Any]:
    """Whole encoders over every route, eager and compiled; eager beside token merging as others ship it."""
    found = {}
    cases = [SMALL] if args.small else [CASES[name] for name in args.encoders]
    todo = [(case, dtype, mode) for case in cases for dtype in args.dtypes for mode in args.modes]
    for case, dtype, mode in track(todo, description="models"):
        model = build(case, DTYPES[dtype], args.device)
        pixels = images(case, 2 if args.small else args.batch, DTYPES[dtype], args.device)
        for route in args.routes:
            versions: dict[str, Any] = {"turbo": TurboConfig(case.r, blocks="every")}
            if route == CHOSEN and mode == "eager":
                versions |= {"published": published(case.r), "SDPA": with_sdpa(case.r)}
            with attending_by(route):
                comparison = compare(model, pixels, versions, rounds=args.rounds, warmup=3, compile=mode == "compiled")
            key = f"{case.name} {dtype} {mode} {route}"
            found[key] = comparison.to_dict()
            print(f"{key}\n{comparison}")
            torch.compiler.reset()
    return found


def time_graphs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of whole encoders captured in CUDA graphs, as they are and merged, by batch."""
    if args.device == "cpu":
        print("graphs: CUDA's, so not on a CPU")
        return {}
    found = {}
    for name, dtype in track([(n, d) for n in args.encoders for d in args.dtypes], description="graphs"):
        case = CASES[name]
        model = build(case, DTYPES[dtype], args.device)
        for batch in sorted({1, 8, args.batch}):
            pixels = images(case, batch, DTYPES[dtype], args.device)
            replays = {"model": _captured(model, pixels)[0]}
            with turbovlm.apply(model, TurboConfig(case.r, blocks="every")):
                replays["turbo"] = _captured(model, pixels)[0]
            found[f"{case.name} {dtype} batch {batch}"] = _seconds(replays, args)
    return found


def report(results: dict[str, Any]) -> str:
    """Everything as tables in Markdown."""
    lines = ["# On a GPU", "", described(results["machine"]), ""]
    if "models" in results:
        lines += ["## Encoders", "", "Speed-ups are over the model on SDPA in the same mode, by CUDA events.", ""]
        lines += ["| model, dtype, mode, route | images/s | with turbo | MACs | speed-up | efficiency | ToMe |"]
        lines += ["|---|--:|--:|--:|--:|--:|---|"]
        for key, comparison in results["models"].items():
            model, turbo, *others = comparison["runs"]
            rivals = ", ".join(f"{run['name']} {run['speedup']:.2f}×" for run in others)
            lines.append(
                f"| {key} | {model['images_per_second']:.0f} | {turbo['images_per_second']:.0f} "
                f"| {turbo['macs_ratio']:.3f}× | **{turbo['speedup']:.3f}×** | {turbo['efficiency']:.3f} | {rivals} |"
            )
        lines.append("")
    if results.get("graphs"):
        lines += ["## In CUDA graphs", "", "| model, dtype, batch | ms | with turbo | speed-up |", "|---|--:|--:|--:|"]
        for key, seconds in results["graphs"].items():
            model, turbo = (1e3 * seconds[name] for name in ("model", "turbo"))
            lines.append(f"| {key} | {model:.2f} | {turbo:.2f} | **{model / turbo:.3f}×** |")
        lines.append("")
    for part, title in (("routes", "Attention, ms"), ("kernels", "Similarity and merge, ms")):
        if part in results:
            lines += [f"## {title}", ""]
            for key, seconds in results[part].items():
                lines += [f"- {key}: " + ", ".join(f"{name} {1e3 * s:.3f}" for name, s in seconds.items())]
            lines.append("")
    if "checks" in results:
        lines += ["## Largest differences to the plain path", ""]
        lines += [f"- {name}: {value:.2g}" for name, value in results["checks"].items()]
    return "\n".join(lines) + "\n"


def _shapes(args: argparse.Namespace) -> list[tuple[str, str, tuple[int, int, int, int]]]:
    shapes = SMALL_SHAPES if args.small else {name: (args.batch, *shape[1:]) for name, shape in SHAPES.items()}
    return [(dtype, name, shape) for dtype in args.dtypes for name, shape in shapes.items()]


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"none ({device})"


PARTS = {"checks": check, "routes": time_routes, "kernels": time_kernels, "models": time_models, "graphs": time_graphs}

if __name__ == "__main__":
    main()
