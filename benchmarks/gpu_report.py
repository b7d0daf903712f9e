"""The GPU benchmark's cells as tables in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cases import described
from gpu_attention import ROUTES
from gpu_encoders import ENCODERS, MODEL, MODES, SMALL, VERSIONS
from gpu_part import Cell

TITLES = {
    MODEL: "model itself",
    "default": "turbovlm, default",
    "paper": "turbovlm, the paper's",
    "redundancy": "turbovlm, redundancy",
    "published": "ToMe as published",
    "SDPA": "ToMe on SDPA",
}
HEAD = """
One row for each encoder, dtype, mode and batch; random weights, noise for images. *Eager*: as the library runs it.
*Graph*: the same, captured by hand in a CUDA graph. *Compiled*: `torch.compile(model)`. *Reduce-overhead*:
`torch.compile(model, mode="reduce-overhead")`.

The model itself runs on `scaled_dot_product_attention`. Speed-ups are over it in the same mode, dtype and batch; each
version is timed in turn with it, by CUDA events, and medians count. *The paper's* is `TurboConfig.paper(r)`,
*redundancy* is `TurboConfig.paper(r, degree="redundancy")`, and both ToMe merge the same r in every block. *Default* is
`TurboConfig(flops=…)` with the share of the encoder's multiply-accumulates that the paper's setting leaves, so that all
columns do the same arithmetic, within a percent.

In a cell: the speed-up; *MACs*, how many times fewer multiply-accumulates; *eff.*, efficiency, the speed-up over that;
the memory that a forward takes at most, weights and images not counted (of a graph, while it is captured;
reduce-overhead has a pool of its own, which is not counted); seconds of compilation with empty caches, and how many
times the model's; and in eager mode at batch 1, for each merging block, what the version adds to the model:
milliseconds of CPU time on the host, which does not wait for the GPU, and kernels. For the model itself these are of
one of its blocks.
"""


def report(results: dict[str, Any]) -> str:
    """Everything that was measured so far."""
    cells: dict[str, Cell] = results["cells"]
    lines = ["# On a GPU", "", described(results["machine"]), "", *_codes(cells)]
    for section in (_encoders, _attention, _steps, _checks, _failures):
        lines += section(cells)
    return "\n".join(lines).rstrip() + "\n"


def is_failed(cell: Cell) -> bool:
    return "failed" in cell


def _codes(cells: dict[str, Cell]) -> list[str]:
    codes = Counter(cell["code"] for cell in cells.values() if "code" in cell)
    if len(codes) < 2:
        return []
    told = ", ".join(f"{code} ({count} cells)" for code, count in codes.items())
    return [f"Not all of one code; sources by their hash: {told}.", ""]


def _encoders(cells: dict[str, Cell]) -> list[str]:
    cases = ENCODERS | SMALL
    rows = _grouped(cells, [*cases])
    if not rows:
        return []
    order = {level: index for index, level in enumerate((*cases, "bf16", "fp16", *MODES))}
    ordered = sorted(rows, key=lambda row: (order[row[0]], order[row[1]], order[row[2]], int(row[3])))
    head = ["encoder", "dtype", "mode", "batch", *(TITLES[version] for version in VERSIONS)]
    lines = ["## Encoders", HEAD, *_header(head, 3)]
    for name, dtype, mode, batch in ordered:
        found = rows[name, dtype, mode, batch]
        shown = [_version(version, found.get(version)) for version in VERSIONS]
        lines.append(_row([f"{cases[name].name}, r={cases[name].r}", dtype, mode, batch, *shown]))
    return [*lines, ""]


def _version(version: str, cell: Cell | None) -> str:
    if cell is None or "ms" not in cell:
        return _state(cell)
    if version == MODEL:
        lines = [f"**{cell['ms']:.2f} ms**", f"{1e3 * cell['images'] / cell['ms']:.0f} images/s"]
    else:
        speedup = cell["base_ms"] / cell["ms"]
        lines = [f"**{speedup:.3f}×**", f"MACs {cell['macs_ratio']:.3f}×, eff. {speedup / cell['macs_ratio']:.2f}"]
    if "peak_bytes" in cell:
        lines.append(f"{cell['peak_bytes'] / 2**20:.0f} MiB")
    if "compile_s" in cell:
        beside = "" if version == MODEL else f", {cell['compile_s'] / cell['base_compile_s']:.1f}×"
        lines.append(f"compiled in {cell['compile_s']:.0f} s{beside}")
    if "host" in cell:
        lines.append(_host(version, cell))
    return "<br>".join(lines)


def _host(version: str, cell: Cell) -> str:
    host = cell["host"]
    what, over = ("block", cell["blocks"]) if version == MODEL else ("merge", cell["merges"])

    def each(name: str) -> float:
        return float(host[name] - (0 if version == MODEL else host[f"base_{name}"])) / float(over)

    counted = "kernels" if "kernels" in host else "operators"
    return f"a {what}: {each('ms'):.3f} ms of host, {each(counted):.1f} {counted}"


def _attention(cells: dict[str, Cell]) -> list[str]:
    rows = _grouped(cells, ["routes"])
    if not rows:
        return []
    lines = ["## Attention with a bias, ms", ""]
    lines += ["Beside attention without one, in turn with it; 16 heads, batches of about 32,768 tokens. *SDPA* has the"]
    lines += ["bias as its mask, by the backend that PyTorch chooses; *kernel* is ours.", ""]
    lines += _header(["dtype", "head width", "tokens", "no bias", *ROUTES], 3)
    for (_, dtype, width, length), found in sorted(rows.items(), key=lambda row: (row[0][1], *map(int, row[0][2:]))):
        shown = [_beside(found.get(name), name != "no bias") for name in ("no bias", *ROUTES)]
        lines.append(_row([dtype, width, length, *shown]))
    return [*lines, ""]


def _beside(cell: Cell | None, is_compared: bool = True) -> str:
    """Milliseconds, and how many times those of what it is compared with."""
    if cell is None or "ms" not in cell:
        return _state(cell)
    return f"{cell['ms']:.3f}" + (f" ({cell['ms'] / cell['base_ms']:.2f}×)" if is_compared else "")


def _steps(cells: dict[str, Cell]) -> list[str]:
    rows = _grouped(cells, ["kernels"])
    if not rows:
        return []
    lines = ["## Steps of a merge, ms", ""]
    lines += ["On the path that the library takes on this device, and how many times the time of plain operators.", ""]
    names = list(dict.fromkeys(step for found in rows.values() for step in found))
    lines += _header(["dtype", "tokens of", "who merges", *names], 3)
    for (_, dtype, shape, kind), found in rows.items():
        lines.append(_row([dtype, shape, kind, *(_beside(found.get(name)) for name in names)]))
    return [*lines, ""]


def _checks(cells: dict[str, Cell]) -> list[str]:
    found = {key: cell for key, cell in cells.items() if key.startswith("checks/")}
    if not found:
        return []
    lines = ["## Largest differences", "", "From exact attention, or from the plain path.", ""]
    lines += _header(["dtype", "what", "difference", "rounding"], 2)
    for key, cell in found.items():
        shown = [f"{cell[name]:.2g}" for name in ("difference", "limit")] if "limit" in cell else [_state(cell), ""]
        lines.append(_row([*key.split("/")[1:], *shown]))
    return [*lines, ""]


def _failures(cells: dict[str, Cell]) -> list[str]:
    failed = [f"- {key}: {cell['failed']}" for key, cell in cells.items() if is_failed(cell)]
    return ["## Failures", "", *failed] if failed else []


def _state(cell: Cell | None) -> str:
    """Why there is no number."""
    if cell is None:
        return "–"
    return f"failed: {cell['failed'].partition(':')[0]}" if is_failed(cell) else str(cell["not_here"])


def _grouped(cells: dict[str, Cell], first: Sequence[str]) -> dict[tuple[str, ...], dict[str, Cell]]:
    """The cells whose keys begin with one of these levels, by the levels in front of the last, then by the last."""
    rows: dict[tuple[str, ...], dict[str, Cell]] = {}
    for key, cell in cells.items():
        *levels, name = key.split("/")
        if levels[0] in first:
            rows.setdefault(tuple(levels), {})[name] = cell
    return rows


def _header(columns: Iterable[str], words: int) -> list[str]:
    """A table's first two lines; the first `words` columns are words, the others numbers."""
    names = list(columns)
    return [_row(names), "|" + "---|" * words + "--:|" * (len(names) - words)]


def _row(shown: Iterable[str]) -> str:
    return f"| {' | '.join(shown)} |"
