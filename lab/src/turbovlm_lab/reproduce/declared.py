"""What each table and figure compares: settings with the amounts that are printed, and those for built-in models.

A built-in model is smaller than the paper's, so it is not given the printed r but the share of the vision encoder's
multiply-accumulates that r leaves in the printed model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from turbovlm.config import PAPER_ALPHA_SCALE, Config, DenoiseConfig, TurboConfig
from turbovlm.ops import LayeredDegree
from turbovlm_lab.costs.paper import encoder_macs
from turbovlm_lab.evaluate.settings import MATCHED, METHODS, SMALLER
from turbovlm_lab.reproduce.published import Printed, printed_in

PAPER = METHODS["paper"]
CONTROLS = ("turbovlm", "random", "uniform")
"""Of each comparison, at the paper's first amount, and a smaller image beside."""
_EVA = {"patch_size": 14, "depth": 39, "width": 1408, "mlp_width": 6144, "head_dim": 88}
_BASE = {"patch_size": 16, "depth": 12, "width": 768, "mlp_width": 3072, "head_dim": 64}
_LARGE = {"patch_size": 16, "depth": 24, "width": 1024, "mlp_width": 4096, "head_dim": 64}
_HUGE = {"patch_size": 14, "depth": 32, "width": 1280, "mlp_width": 5120, "head_dim": 80}
_SMALL = {"patch_size": 16, "depth": 12, "width": 384, "mlp_width": 1536, "head_dim": 64}
SHAPES: dict[tuple[int, str], dict[str, int]] = {
    (1, "BLIP-B"): {**_BASE, "image_size": 384},
    (2, "BLIP-B"): {**_BASE, "image_size": 480},
    (3, "BLIP-B"): {**_BASE, "image_size": 384},
    (3, "BLIP2"): {**_EVA, "image_size": 364},
    (4, "MiniGPT-v2"): {**_EVA, "image_size": 448},
    (5, "BLIP-B"): {**_BASE, "image_size": 384},
    (5, "BLIP2"): {**_EVA, "image_size": 364},
    (7, "AugReg ViT-S/16"): {**_SMALL, "image_size": 224},
    (7, "AugReg ViT-B/16"): {**_BASE, "image_size": 224},
    (7, "AugReg ViT-L/16"): {**_LARGE, "image_size": 224},
    (7, "SWAG ViT-B/16"): {**_BASE, "image_size": 384},
    (7, "SWAG ViT-L/16"): {**_LARGE, "image_size": 512},
    (7, "SWAG ViT-H/14"): {**_HUGE, "image_size": 518},
    (8, "BLIP-B"): {**_BASE, "image_size": 384},
    (10, "BLIP-B"): {**_BASE, "image_size": 384},
}
"""The vision encoders of the paper's tables."""
PLUGINS: dict[str, dict[str, Any]] = {
    "redundancy": METHODS["ToMe"],
    "tome": METHODS["ToMe"],
    "semantics": METHODS["semantics"],
    "turbo": PAPER,
    "none (A1)": METHODS["random"],
    "redundancy (A2)": METHODS["ToMe"],
    "semantics (A3)": METHODS["semantics"],
    "weighted difference (A4)": PAPER,
    "coupled division (A5)": {**PAPER, "degree": "coupled_division"},
}
"""What the printed names merge by; the others are pruned or quantised models."""
PRUNED = "UPop"
"""Printed rows of a model whose weights were pruned, and retrained: another checkpoint."""
QUANTIZED = {"GPTQ": "nf4"}
"""How a printed name's weights are quantised here: to 4 bits as well, without the data that GPTQ needs."""
PRINTED_PATCHES, BUILTIN_PATCHES = 576, 256
SWEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
ALPHAS = (0.0, 2.0, 6.0, 20.0, 60.0, 180.0, 600.0)
DEFAULT_SHARE = 0.6


@dataclass(frozen=True)
class Line:
    """One row of a comparison.

    Attributes:
        name: of the setting; `SMALLER` is a smaller image that costs about what the first merged line does, `MATCHED`
            the default at exactly the smaller image's cost.
        config: how a user's model merges; None for the model itself.
        builtin: the same for a built-in model.
        printed: the paper's row beside which it stands.
        curve, x: in a figure, the curve it is on, and where.
        runs: whether there is anything to run; among a whole model's rows, a pruned one's are only printed.
        quantize: how the model's weights are quantised before tokens are merged.
    """

    name: str
    config: Config | None = None
    builtin: Config | None = None
    printed: Printed | None = None
    curve: str = ""
    x: float = 0.0
    runs: bool = True
    quantize: str | None = None


@dataclass(frozen=True)
class Declared:
    """One comparison.

    Attributes:
        key: `"table5/BLIP-B/COCO"`: what sources and commands name.
        title: for the report.
        task: of `turbovlm evaluate`.
        lines: the model itself first.
        axis: of a figure: what `x` is.
        strength: of text-to-image that begins with images.
        pruned: whether the model is another checkpoint than its task's, so that only an entry of its own names it.
    """

    key: str
    title: str
    task: str
    lines: tuple[Line, ...]
    axis: str = ""
    strength: float | None = None
    pruned: bool = False

    @property
    def name(self) -> str:
        """`"table5"`: its table or figure; `"tasks"`."""
        return self.key.partition("/")[0]


TASKS = {
    1: "nlvr2",
    2: "vqa",
    3: "captioning",
    4: "vqa",
    5: "retrieval",
    6: "text-to-image",
    7: "classification",
    8: "captioning",
    10: "captioning",
}
TITLES = {
    1: "natural language for visual reasoning",
    2: "visual question answering",
    3: "captioning",
    4: "visual question answering by a chat model",
    5: "retrieval",
    6: "text-to-image",
    7: "classification",
    8: "what ranks tokens",
    9: "ways to fuse redundancy and semantics",
    10: "threshold on the number of tokens",
    11: "largest saving within a drop of 5 %",
    12: "a quarter of the tokens left",
}
STRENGTH = 0.6
"""Of Table 6's image-to-image half; the paper does not print it."""
FIGURES = {
    3: "redundancy and concentration of attention, by block",
    4: "score against cost",
    5: "the weight α",
    6: "which patches become one token",
}
UNDERSTANDING = ("saliency", "classification", "retrieval", "captioning", "vqa", "nlvr2")
WEIGHTS = ("int8-dynamic", "nf4")
"""How weights are quantised below the default, in the comparisons of tasks."""
SWEPT_TASKS = ("captioning", "retrieval")
"""Of Figures 4 and 5."""
SEARCHED = ("nlvr2", "vqa", "captioning", "retrieval")
"""Tasks of Table 11."""


def encoder_share(table: int, model: str, r: int) -> float:
    """Of the printed vision encoder's multiply-accumulates that r leaves, to two digits."""
    shape = SHAPES[table, model]
    return round(encoder_macs(**shape, r=r) / encoder_macs(**shape), 2)


def comparisons() -> tuple[Declared, ...]:
    """All that is a comparison of settings: tasks at one cost, Tables 1 to 10 and 12, Figures 4 and 5."""
    found: list[Declared] = []
    for table in (1, 2, 3, 4, 5, 6, 7, 8):
        rows = printed_in(table)
        for model, dataset, begun in dict.fromkeys((row.model, row.dataset, _is_begun(row)) for row in rows):
            some = [row for row in rows if (row.model, row.dataset, _is_begun(row)) == (model, dataset, begun)]
            parts = (f"table{table}", model, dataset, *(("image-to-image",) if begun else ()))
            key = "/".join(part.replace(" ", "-").replace("/", "-") for part in parts)
            title = f"Table {table}: {'image-to-image' if begun else TITLES[table]}, {model} on {dataset}"
            lines = _generating(some) if table == 6 else _merging(table, model, some)
            found.append(Declared(key, title, TASKS[table], lines, strength=STRENGTH if begun else None))
            if any(row.plugin == PRUNED for row in some):
                title = f"Table {table}: {TITLES[table]}, {model} pruned by {PRUNED} on {dataset}"
                found.append(Declared(f"{key}/{PRUNED}", title, TASKS[table], _pruned(some), pruned=True))
    found += [_fusions(), _thresholds(), *_quarters()]
    found += [_sweep(task) for task in SWEPT_TASKS] + [_alphas(task) for task in SWEPT_TASKS]
    return (*(_task(task) for task in UNDERSTANDING), *found)


def _is_begun(row: Printed) -> bool:
    return row.task == "image2image"


def _task(task: str) -> Declared:
    """Not of the paper: the default, the paper's setting and all controls, of one cost."""
    lines = [Line(name, _at(how, flops=DEFAULT_SHARE), _at(how, flops=DEFAULT_SHARE)) for name, how in METHODS.items()]
    ours = lines[0]
    for kind in WEIGHTS:
        lines += [Line(kind, quantize=kind), dataclasses.replace(ours, name=f"{kind}, {ours.name}", quantize=kind)]
    title = f"{task.capitalize()} at {DEFAULT_SHARE:.0%} of the encoder's multiply-accumulates"
    return Declared(f"tasks/{task}", title, task, (Line("unmerged"), *lines, Line(SMALLER), Line(MATCHED)))


def _pruned(rows: Sequence[Printed]) -> tuple[Line, ...]:
    """Tokens merged in a model that UPop pruned; where the paper prints no r, that of the whole model's main row."""
    own = next(row for row in rows if row.plugin == PRUNED)
    both = next((row for row in rows if row.plugin == f"turbo+{PRUNED}"), None)
    main = both if both is not None and both.r is not None else next(row for row in rows if row.plugin == "turbo")
    assert main.r is not None
    lines = [Line(f"turbo, r={main.amount}", _at(PAPER, r=main.r), printed=both)]
    lines += [Line(f"{name}, r={main.amount}", _at(METHODS[name], r=main.r)) for name in CONTROLS]
    return (Line("unmerged", printed=own), *lines, Line(SMALLER))


def _merging(table: int, model: str, rows: Sequence[Printed]) -> tuple[Line, ...]:
    own = next((row for row in rows if row.plugin == "none"), None)
    lines = [Line("unmerged", printed=own)]
    for row in rows:
        if row is own:
            continue
        merging, _, compressed = row.plugin.rpartition("+")
        kind = QUANTIZED.get(compressed)
        name = row.plugin if kind is None else f"{row.plugin} (here {kind})"
        name += f", r={row.amount}" if row.amount else ""
        method = PLUGINS.get(row.plugin if kind is None else merging)
        if method is not None and row.r is not None:
            share = encoder_share(table, model, row.r)
            lines.append(Line(name, _at(method, r=row.r), _at(method, flops=share), row, quantize=kind))
        else:
            lines.append(Line(name, printed=row, runs=kind is not None, quantize=kind))
    main = next(row for row in rows if row.plugin in ("turbo", "weighted difference (A4)"))
    assert main.r is not None
    share = encoder_share(table, model, main.r)
    lines += [
        Line(f"{name}, r={main.amount}", _at(METHODS[name], r=main.r), _at(METHODS[name], flops=share))
        for name in CONTROLS
        if not (name == "random" and table == 8)
    ]
    return (*lines, Line(SMALLER))


def _generating(rows: Sequence[Printed]) -> tuple[Line, ...]:
    """Shares of tokens merged, of a pipeline."""
    lines = [Line("unmerged", printed=rows[0])]
    for row in rows[1:]:
        keep = round(1 - float(row.amount.rstrip("%")) / 100, 3)
        degree = {"degree": "redundancy"} if row.plugin == "redundancy" else {}
        config = DenoiseConfig(keep, **degree)  # type: ignore[arg-type]
        lines.append(Line(f"{row.plugin}, {row.amount}", config, config, row))
    half = DenoiseConfig(0.5)
    return (*lines, Line("turbo, 50%", half, half))


def _fusions() -> Declared:
    r, share = 30, encoder_share(8, "BLIP-B", 30)
    made: dict[str, dict[str, Any]] = {
        "S1, E = R − αA, α=6": PAPER,
        "S2, E = R/A": {**PAPER, "degree": "coupled_division"},
        **{
            f"S3, E = R(1 − αA), α={a}": {**PAPER, "degree": "damped", "alpha": a * PAPER_ALPHA_SCALE}
            for a in (1, 2, 3, 4)
        },
        **{
            f"S4, E = R − β^|γ−l| αA, α=6, β={b}, γ={g}": {
                **PAPER,
                "degree": LayeredDegree(6 * PAPER_ALPHA_SCALE, b, g),
                "alpha": None,
            }
            for b in (0.9, 1.1)
            for g in (1, 5, 10)
        },
        "turbovlm": METHODS["turbovlm"],
    }
    lines = [Line(name, _at(how, r=r), _at(how, flops=share)) for name, how in made.items()]
    return Declared("table9", f"Table 9: {TITLES[9]}", "captioning", (Line("unmerged"), *lines))


def _thresholds() -> Declared:
    lines = [Line("unmerged")]
    for row in printed_in(10):
        least, r = int(row.plugin.partition("=")[2]), row.r
        assert r is not None
        few = {"r": _scaled(r), "min_tokens": _scaled(least)}
        lines.append(Line(f"{row.plugin}, r={r}", _at(PAPER, r=r, min_tokens=least), _at(PAPER, **few), row))
    return Declared("table10/BLIP-B/COCO", f"Table 10: {TITLES[10]}, BLIP-B on COCO", "captioning", tuple(lines))


def _quarters() -> Iterable[Declared]:
    for task in SEARCHED:
        lines = [Line(f"{name}, keep=0.25", _at(how, keep=0.25), _at(how, keep=0.25)) for name, how in METHODS.items()]
        yield Declared(f"table12/{task}", f"Table 12: {TITLES[12]}, {task}", task, (Line("unmerged"), *lines))


def _sweep(task: str) -> Declared:
    curves = {name: METHODS[name] for name in ("turbovlm", "paper", "ToMe", "semantics", "random")}
    lines = [
        Line(f"{name}, flops={share:g}", _at(how, flops=share), _at(how, flops=share), curve=name, x=share)
        for name, how in curves.items()
        for share in SWEPT
    ]
    title = f"Figure 4: {FIGURES[4]}, {task}"
    axis = "share of the encoder's multiply-accumulates"
    return Declared(f"figure4/{task}", title, task, (Line("unmerged"), *lines), axis)


def _alphas(task: str) -> Declared:
    ours = {key: value for key, value in METHODS["turbovlm"].items() if key != "alpha"}
    curves = {"as published": PAPER, "turbovlm's partition and order": ours}
    lines = []
    for name, how in curves.items():
        for a in ALPHAS:
            config = _at({**how, "alpha": a}, flops=DEFAULT_SHARE)
            lines.append(Line(f"{name}, alpha={a:g}", config, config, curve=name, x=a))
    title = f"Figure 5: {FIGURES[5]}, {task}, at {DEFAULT_SHARE:.0%} of the encoder's multiply-accumulates"
    axis = "multiplier of A (the paper's α times 30)"
    return Declared(f"figure5/{task}", title, task, (Line("unmerged"), *lines), axis)


def _scaled(count: int) -> int:
    """Of the printed model's patches, to as large a part of a built-in one's."""
    return round(count * BUILTIN_PATCHES / PRINTED_PATCHES)


def _at(method: dict[str, Any], **amount: Any) -> TurboConfig:
    config: TurboConfig = TurboConfig(**amount).changed(**method)
    return config
