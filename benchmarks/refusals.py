"""Which models are accelerated, and what is said of the others: every class that can be built without weights.

    python benchmarks/refusals.py               # all of them; writes benchmarks/results/refusals.md
    python benchmarks/refusals.py Swin Llava    # those whose names contain one of the words; prints them

Models are built on the meta device from their own configs, cut to four layers where the config says how many it has:
the classes of `transformers`' Auto mappings (but for heads on text models, whose blocks are the base model's), one
model of each architecture module of `timm` and `torchvision`, and some of `open_clip`'s configs. `apply` is asked with
`r=4`, and with `visual_keep=0.5` where a refusal recommends it. Exit code 1 where a refusal has several lines,
names a setting that is refused as well, or where text is merged beside images.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import turbovlm
from turbovlm.encoder.towers import find_towers

RESULT = Path(__file__).parent / "results" / "refusals.md"
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
"""Fields of configs that say how many layers there are."""
TEXT_HEADS = (
    *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "MASKED_LM"),
    *("CAUSAL_LM", "NEXT_SENTENCE_PREDICTION", "TEXT_ENCODING", "PRETRAINING", "SEQ_TO_SEQ_CAUSAL_LM"),
    "TABLE_QUESTION_ANSWERING",
)
OPEN_CLIP = ("ViT-B-32", "RN50", "convnext_base", "coca_ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP-S1")
REASONS = {
    "a layout could describe it": ("look like a",),
    "only what was found": ("none that a layout", "turbovlm can tell", "blocks of other kinds", "no repeated blocks"),
    "causal attention": ("causal attention",),
    "a hierarchy of stages": ("hierarchy",),
    "windowed attention": ("within windows", "windowed"),
    "positions in a table or of pairs": ("in a table", "relative positions", "relative position bias"),
    "squares of patches joined": ("squares of",),
    "one placeholder per visual token": ("one placeholder",),
    "cross-attention": ("cross-attention",),
    "a convolution or pooling among blocks": ("convolution over", "pool neighbours", "stand between"),
    "no attention": ("no attention",),
    "grouped queries": ("grouped queries",),
    "other": ("",),
}
"""What a refusal is counted as, by what it says; the first that fits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only classes whose names contain one of these")
    words = parser.parse_args().words
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    start, rows, unbuilt, wrong = time.time(), list[tuple[str, str, str, str]](), Counter[str](), list[str]()
    for library, name, build in candidates():
        if words and not any(word in name for word in words):
            continue
        try:
            with torch.device("meta"):
                model = build()
        except (Exception, SystemExit):  # whatever keeps a library from building a class by its defaults
            unbuilt[library] += 1
            continue
        outcome, text = asked(model, r=4)
        wrong += [f"{name}: {fault}" for fault in faults(model, outcome, text)]
        rows.append((library, name, outcome, text))
    if words:
        print("\n".join(f"{name} | {outcome} | {text}" for _, name, outcome, text in rows))
    else:
        RESULT.write_text(report(rows, unbuilt, wrong, time.time() - start))
        print(RESULT.read_text().partition("## Every")[0])
    sys.exit("\n".join(wrong) or None)


def candidates() -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Library, name and builder of every model that is tried."""
    for name, model_type in sorted(_transformers_classes().items()):
        yield "transformers", name, lambda name=name, model_type=model_type: _transformers_model(name, model_type)
    import timm
    from timm.models import _registry

    for module, names in sorted(_registry._module_to_models.items()):
        name = min(names)
        yield "timm", f"{module}: {name}", lambda name=name: timm.create_model(name)
    import torchvision

    seen = set()
    for name in torchvision.models.list_models():
        build = torchvision.models.get_model_builder(name)
        if build.__module__ not in seen:
            seen.add(build.__module__)
            none = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(build).parameters}
            yield "torchvision", name, lambda build=build, none=none: build(**none)
    import open_clip

    for name in OPEN_CLIP:
        yield "open_clip", name, lambda name=name: open_clip.create_model(name, device="meta")


def _transformers_classes() -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for mapping in dir(modeling_auto):
        head = mapping.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES")
        if mapping.endswith("MAPPING_NAMES") and mapping.startswith("MODEL") and head not in TEXT_HEADS:
            for model_type, names in getattr(modeling_auto, mapping).items():
                found |= dict.fromkeys(names if isinstance(names, tuple | list) else (names,), model_type)
    return found


def _transformers_model(name: str, model_type: str) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    config = cls.config_class or transformers.CONFIG_MAPPING[model_type]
    with suppress(Exception):  # some configs do not go with fewer layers
        return cls(_cut(config()))
    return cls(config())


def _cut(config: Any) -> Any:
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _cut(value)
        elif name in DEPTHS and isinstance(value, int) and value > 4:
            setattr(config, name, 4)
    if isinstance(types := vars(config).get("layer_types"), list):
        config.layer_types = types[: getattr(config, "num_hidden_layers", None)]
    return config


def asked(model: nn.Module, **settings: Any) -> tuple[str, str]:
    """`"accelerated"` and the towers, or `"refused"` and why."""
    try:
        with turbovlm.apply(model, **settings) as handle:
            return "accelerated", ", ".join(s.tower or "the model" for s in handle.schedules)
    except turbovlm.TurboError as error:
        return "refused", str(error)


def faults(model: nn.Module, outcome: str, text: str) -> list[str]:
    """What is wrong with an outcome: whatever must not be, of what the module's docstring names."""
    found = []
    if outcome == "accelerated":
        modalities = getattr(model, "input_modalities", ())
        if "image" in modalities and all(tower.layout.text for tower in find_towers(model)):
            found.append(f"text is merged beside images: {text}")
    elif "\n" in text:
        found.append("several lines")
    elif "visual_keep shortens" in text and asked(model, visual_keep=0.5)[0] == "refused":
        found.append("visual_keep is recommended and refused")
    return found


def reason_of(text: str) -> str:
    """What a refusal is counted as."""
    return next(reason for reason, marks in REASONS.items() if any(mark in text for mark in marks))


def report(rows: list[tuple[str, str, str, str]], unbuilt: Counter[str], wrong: list[str], seconds: float) -> str:
    """The counts, and every model with its outcome, as Markdown."""
    libraries = list(dict.fromkeys(library for library, *_ in rows))
    packages = {"open_clip": "open_clip_torch"}
    versions = ", ".join(f"{each} {version(packages.get(each, each))}" for each in ("torch", *libraries))
    refused = Counter(reason_of(text) for *_, outcome, text in rows if outcome == "refused")
    lines = [
        "# What is accelerated, and what is said of the rest",
        "",
        f"`python benchmarks/refusals.py`, {date.today()}, {platform.machine()}, Python {platform.python_version()}, "
        f"{versions}; {seconds:.0f} s. Models on the meta device, from their configs' defaults; `apply(model, r=4)`.",
        "",
        "| library | built | accelerated | refused, with a reason | a layout could describe it | only what was found | "
        "not built |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in libraries:
        own = [(outcome, reason_of(text)) for each, _, outcome, text in rows if each == library]
        done, could, found = (
            sum(outcome == "accelerated" for outcome, _ in own),
            *(sum(each == ("refused", reason) for each in own) for reason in list(REASONS)[:2]),
        )
        counts = (len(own), done, len(own) - done - could - found, could, found, unbuilt[library])
        lines.append(f"| {library} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", f"Refusals that break a rule (see the script): {len(wrong)}.", ""]
    lines += ["| what a refusal says | models |", "|---|---|"]
    lines += [f"| {reason} | {count} |" for reason, count in refused.most_common()]
    for title, wanted in (("accelerated", "accelerated"), ("refused", "refused")):
        lines += ["", f"## Every model that is {title}", "", "| library | model | |", "|---|---|---|"]
        lines += [
            f"| {library} | {name} | {text.replace('|', '/')} |"
            for library, name, outcome, text in rows
            if outcome == wanted
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
