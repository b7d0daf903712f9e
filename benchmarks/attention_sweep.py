"""The fastest tile of the kernel that attends with sizes, by head width; beside PyTorch's own attention.

    python benchmarks/attention_sweep.py                    # writes benchmarks/results/attention_sweep.{json,md}
    python benchmarks/attention_sweep.py --widths 72 88     # the other widths are kept
    TRITON_INTERPRET=1 python benchmarks/attention_sweep.py --device cpu --small    # tiny shapes, to see that it runs

Planned for three minutes on an H200; not run on a GPU yet. Every tile is first compared with float64. Times are medians
of CUDA graphs that hold enough launches for `PRODUCTS` multiply-accumulates, so that host time does not count. The tile
that is fastest for a width belongs in `turbovlm.ops.kernels.attention.tile_of`; batch 1 tells what belongs in `BUSY`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, RESULTS, described, load, machine, save
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from turbovlm.ops import plain, size_bias
from turbovlm.ops.kernels.attention import Tile, launch, tile_of
from turbovlm.profile.timing import interleaved

Shape = tuple[int, int, int, int]
"""Batch, heads, tokens and head_dim."""

HEADS = 16
WIDTHS = (40, 64, 72, 80, 88, 96, 128)
TILES = tuple(
    Tile(*sizes)
    for sizes in (
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3)),
        *((128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2)),
    )
)
PRODUCTS = 1 << 38
"""Multiply-accumulates of one timed replay: about a millisecond of a large GPU."""

NO_BIAS, BIAS = "no bias", "bias as a mask"
BACKENDS = {
    f"{NO_BIAS}, flash": SDPBackend.FLASH_ATTENTION,
    f"{NO_BIAS}, cuDNN": SDPBackend.CUDNN_ATTENTION,
    f"{BIAS}, efficient": SDPBackend.EFFICIENT_ATTENTION,
    f"{BIAS}, cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--tokens", nargs="+", type=int, default=(577, 1025, 4096))
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8, 64))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and two tiles; nothing is written")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device here: run this on a machine with one, or see --device cpu --small\n")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.exit(2, "on a CPU the kernel runs in Triton's interpreter alone: set TRITON_INTERPRET=1\n")
    file = RESULTS / "attention_sweep.json"
    results = {} if args.small else load(file)
    results["machine"] = {"gpu": torch.cuda.get_device_name() if args.device == "cuda" else "none", **machine()}
    if args.small:
        shapes, tiles = [(1, 2, 65, width) for width in (64, 72)], TILES[::4]
    else:
        shapes = [(b, HEADS, n, width) for width in args.widths for n in args.tokens for b in args.batches]
        tiles = TILES
    attention = results.setdefault("attention", {})
    for shape in track(shapes, description="attention"):
        attention[f"{' '.join(map(str, shape))} {args.dtype}"] = {
            "chosen": named(tile_of(*shape)),
            "seconds": timed(shape, tiles, args),
        }
        if not args.small:
            save(file, results)
    if not args.small:
        file.with_suffix(".md").write_text(report(results))
    print(report(results))


def named(tile: Tile) -> str:
    """A tile in words."""
    return f"{tile.queries} × {tile.keys}, {tile.warps} warps, {tile.stages} stages"


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Queries, keys and values as one projection gives them, the bias of sizes from 1 to 8, and the scale."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, device=device, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    sizes = torch.randint(1, 9, (batch, tokens), generator=generator, device=device).float()
    return q, k, v, size_bias(sizes, torch.float32), head_dim**-0.5


def tiled(tile: Tile, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention by the kernel, in these tiles."""
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    launch(out, q, k, v, bias, scale, tile)
    return out


def timed(shape: Shape, tiles: tuple[Tile, ...], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of attention of this shape, by the way to do it, of all ways that this device has."""
    dtype = DTYPES[args.dtype]
    q, k, v, bias, scale = inputs(shape, dtype, args.device)
    low = bias.to(dtype)

    def sdpa(mask: Tensor | None, backend: SDPBackend | None = None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    ways: dict[str, Callable[[], Tensor]] = {NO_BIAS: lambda: sdpa(None), BIAS: lambda: sdpa(low)}
    for name, backend in BACKENDS.items() if q.is_cuda else ():
        ways[name] = functools.partial(sdpa, None if name.startswith(NO_BIAS) else low, backend)
    for tile in tiles:
        ways[named(tile)] = functools.partial(tiled, tile, q, k, v, bias, scale)
    small = inputs((1, shape[1], 65, shape[3]), dtype, args.device)  # of the variant that is timed
    exact = plain.attend(*(x.double() for x in small[:4]), small[4])
    usable: dict[str, Callable[[], object]] = {}
    times = max(1, PRODUCTS // (2 * math.prod(shape) * shape[2])) if q.is_cuda else 1
    with torch.inference_mode():
        for tile in tiles:
            check(tile, small, exact)
        for name, way in ways.items():
            try:
                usable[name] = captured(way, times) if q.is_cuda else way
            except (RuntimeError, OutOfResources) as error:
                print(f"{name}, {shape}: not here: {str(error).splitlines()[0]}")
        clock, _ = interleaved(list(usable.values()), torch.device(args.device), args.rounds, 2, lambda _: None)
    return {name: statistics.median(seconds) / times for name, seconds in zip(usable, clock)}


def check(tile: Tile, small: tuple[Tensor, Tensor, Tensor, Tensor, float], exact: Tensor) -> None:
    """Raise AssertionError if attention in these tiles is not exact to rounding; pass where they do not fit."""
    try:
        found = tiled(tile, *small)
    except OutOfResources:
        return
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=8 * torch.finfo(found.dtype).eps)


def captured(function: Callable[[], object], times: int) -> Callable[[], object]:
    """A replay of as many calls of `function`, in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            function()
    return graph.replay


def report(results: dict[str, Any]) -> str:
    """Times as tables in Markdown: one of shapes, and for each width and batch the tiles in order."""
    lines = ["# Tiles for attention with sizes", "", described(results["machine"]), "", "Milliseconds.", ""]
    lines += [f"| batch, heads, tokens, head_dim | {NO_BIAS} | {BIAS} | chosen | fastest | fastest tile |"]
    lines += ["|---|--:|--:|--:|--:|---|"]
    slower: dict[str, dict[str, list[float]]] = {}
    for key, found in results["attention"].items():
        seconds = found["seconds"]
        without, masked = (min(s for name, s in seconds.items() if name.startswith(kind)) for kind in (NO_BIAS, BIAS))
        tiles = {name: s for name, s in seconds.items() if not name.startswith((NO_BIAS, BIAS))}
        best = min(tiles, key=tiles.__getitem__)
        chosen = f"{1e3 * tiles[found['chosen']]:.3f}" if found["chosen"] in tiles else "–"
        times = f"{1e3 * without:.3f} | {1e3 * masked:.3f} | {chosen} | {1e3 * tiles[best]:.3f}"
        lines.append(f"| {key} | {times} | {best} |")
        batch, _, _, *width = key.split()
        for name, s in tiles.items():
            slower.setdefault(f"{' '.join(width)}, {batch}", {}).setdefault(name, []).append(s / tiles[best])
    lines += ["", "Mean time over that of the fastest tile of each shape.", "", "| width, batch | tiles |", "|---|---|"]
    for case, ratios in slower.items():
        means = sorted((statistics.geometric_mean(values), name) for name, values in ratios.items())
        lines.append(f"| {case} | " + "; ".join(f"{name}: {mean:.2f}" for mean, name in means) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
