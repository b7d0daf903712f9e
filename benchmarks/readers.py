"""Which of `transformers`' models that read images can have fewer visual tokens read, and what is said of the others.

    python benchmarks/readers.py       # writes benchmarks/results/readers.md

Classes are looked at, and no model is built: those that put features in place of placeholders, by their signatures, but
for classes around another that does it for them; those that an entry describes; and those that are refused by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import pkgutil
import platform
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch.nn as nn

from turbovlm.registry import families
from turbovlm.vlm.families.refused import REFUSED, fills_placeholders

RESULT = Path(__file__).parent / "results" / "readers.md"
NO_ENTRY = "no entry describes it yet"


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    rows = [(cls.__name__, *outcome_of(cls)) for cls in classes()]
    RESULT.write_text(report(rows))
    print(RESULT.read_text())


def classes() -> list[type[nn.Module]]:
    """Those that put features in place of placeholders, attend to them, or are refused by name, sorted."""
    import transformers

    known, found = described(), []
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.modeling_{package.name}"
        spec = importlib.util.find_spec(name)
        if spec is None or "image" not in Path(str(spec.origin)).read_text():
            continue
        own = [
            cls
            for cls in vars(importlib.import_module(name)).values()
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == name
        ]
        decided = [cls for cls in own if path_of(cls) in known or path_of(cls) in REFUSED]
        open_to = [cls for cls in own if cls not in decided and fills_placeholders(cls)]
        inner = [cls for cls in open_to if not hasattr(cls, "generate")]
        found += decided or inner or open_to
    return sorted(found, key=lambda cls: cls.__name__.lower())


def described() -> dict[str, object]:
    """The family of each class that has one, by its path."""
    return {path: family for family in families("vlm") for path in family.classes}


def path_of(cls: type) -> str:
    """The dotted path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def outcome_of(cls: type[nn.Module]) -> tuple[str, str]:
    """The family's name, and what `visual_keep` does."""
    path, known = path_of(cls), described()
    if path in REFUSED:
        return "", f"refused: {REFUSED[path]}"
    if path not in known:
        return "", f"refused: {NO_ENTRY}"
    family = known[path]
    if family.cross_attention:  # type: ignore[attr-defined]
        return family.family, "fewer tokens, read across"  # type: ignore[attr-defined]
    runs = "fewer tokens" if family.guide is not None else "fewer tokens, chosen without attention"  # type: ignore[attr-defined]
    return family.family, runs  # type: ignore[attr-defined]


def report(rows: list[tuple[str, str, str]]) -> str:
    """The counts, and every class with its outcome, as Markdown."""
    without = sum(outcome.endswith("without attention") for *_, outcome in rows)
    runs = sum(not outcome.startswith("refused") for *_, outcome in rows)
    open_to = sum(outcome.endswith(NO_ENTRY) for *_, outcome in rows)
    lines = [
        "# Models that read images, and visual_keep",
        "",
        f"`python benchmarks/readers.py`, {date.today()}, Python {platform.python_version()}, transformers "
        f"{version('transformers')}. Of {len(rows)} classes {runs} have fewer visual tokens read, {without} of them "
        f"chosen without attention; {len(rows) - runs - open_to} are refused by name, {open_to} for want of an entry.",
        "",
        "| class | family | visual_keep |",
        "|---|---|---|",
    ]
    return "\n".join(lines + [f"| {name} | {family} | {outcome} |" for name, family, outcome in rows]) + "\n"


if __name__ == "__main__":
    main()
