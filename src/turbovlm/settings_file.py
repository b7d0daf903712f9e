"""Settings as JSON files, and those of earlier formats."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from turbovlm.checks import brief
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import LayeredDegree

FORMAT = 4
"""Number of the format that is written. In 1 and 2, an integer `r` was the number of every block that merges, not the
mean over all blocks; 1 had the fields of all workflows in one class. Up to 3 denoisers merged in parts of blocks."""

KINDS = ("TurboConfig", "ReadConfig", "DenoiseConfig")
PARTS = {"kind", "settings", "promise"}
"""What a file holds beside the number of its format."""

OLD_DENOISING: dict[str, Any] = {
    "components": ["attention", "cross_attention", "ffn"],
    "refresh": 1,
    "share_guidance": True,
}
"""Fields of format 1 that only denoisers had, and their defaults."""
_READING = ("visual_keep", "cross_keep", "visual_select")
_MERGING = ("r", "flops", "thresholds", "similarity", "partition", "order", "dense", "trace")
OLD_LEFT_OUT = {
    "TurboConfig": (*OLD_DENOISING, *_READING),
    "ReadConfig": (*OLD_DENOISING, *_MERGING, "keep", "min_tokens", "grid", "restore"),
    "DenoiseConfig": (*_READING, *_MERGING, "guidance"),
}
"""Fields of format 1 that each class of now has not."""


def write_settings(path: str | Path, config: Any, **beside: Any) -> None:
    """Write a config, and what else the file is to hold, each under its name.

    Raises:
        ConfigError: the degree is a callable other than `LayeredDegree`, or `keep` or `visual_select` is one, which
            JSON has no word for.
    """
    settings = dataclasses.asdict(config)
    if isinstance(config.degree, LayeredDegree):
        settings["degree"] = {"layered": dataclasses.asdict(config.degree)}
    elif callable(config.degree):
        raise ConfigError(f"degree={config.degree!r}: a function cannot be saved, a name or a LayeredDegree can")
    if callable(settings.get("visual_select")):
        raise ConfigError(f"visual_select={config.visual_select!r}: a function cannot be saved, a name can")
    if callable(settings.get("keep")):
        raise ConfigError(f"{config.amount}: a function cannot be saved, a mapping of progress to shares can")
    content = {"turbovlm": FORMAT, "kind": type(config).__name__, "settings": settings, **beside}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_settings(path: str | Path, kind: type) -> Any:
    """The config of a class that a file holds.

    Raises:
        ConfigError: no such file, another format, a setting that is unknown or wrong, or settings of another class.
    """
    content = read_content(path, kind.__name__)
    if content["kind"] != kind.__name__:
        raise ConfigError(
            f"{path}: holds settings of {content['kind']}: read them with turbovlm.{content['kind']}.load"
        )
    return make_config(path, kind, content["settings"])


def read_content(path: str | Path, wanted: str | None = None) -> dict[str, Any]:
    """What a file holds, in the present format: `kind`, `settings`, and `promise` where it was calibrated.

    Args:
        wanted: the kind that is asked for, as files of format 1 may fit several.

    Raises:
        ConfigError: no such file, or it is of another format.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark in front
        content = json.loads(text, object_pairs_hook=_each_once)
        version = content.pop("turbovlm")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: holds no settings of turbovlm ({brief(error)})") from error
    if type(version) is not int or version not in range(1, FORMAT + 1):
        raise ConfigError(f"{path}: is of format {brief(version)}; this release reads 1 to {FORMAT}")
    if version == 1:
        content = _from_first_format(path, content, wanted)
    if content.get("kind") not in KINDS or not isinstance(content.get("settings"), dict):
        raise ConfigError(f"{path}: holds no settings of turbovlm (kind {brief(content.get('kind'))})")
    unknown = content.keys() - PARTS
    if unknown:
        raise ConfigError(f"{path}: holds what this release does not know: {brief(sorted(unknown))}")
    if version < 4 and content["kind"] == "DenoiseConfig":
        content["settings"] = {"scope": "part", "degree": "weighted_difference", **content["settings"]}
    if version < 3 and content["kind"] == "TurboConfig":
        content["settings"] = _from_second_format(content["settings"])
    return dict(content)


def make_config(path: str | Path, kind: type, settings: dict[str, Any]) -> Any:
    """A config of plain settings that were read from `path`; without those that have no effect beside the others.

    Earlier releases took and saved such settings.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    unknown = settings.keys() - kind.__dataclass_fields__.keys()  # type: ignore[attr-defined]
    if unknown:
        raise ConfigError(
            f"{path}: settings that this release does not know: {', '.join(map(brief, sorted(unknown)[:5]))}"
        )
    try:
        degree = settings.get("degree")
        if isinstance(degree, dict):
            if degree.keys() != {"layered"}:
                raise ConfigError(f"degree={brief(degree)}: must be a name, or the numbers of one that is layered")
            settings = {**settings, "degree": LayeredDegree(**degree["layered"])}
        unread: dict[str, str] = kind.unread(settings)  # type: ignore[attr-defined]
        return kind(**{name: value for name, value in settings.items() if name not in unread})
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ConfigError: a name stands in it twice.
    """
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"has {brief(twice)} twice in one object")
    return dict(pairs)


def _from_second_format(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an encoder in which an integer `r` is what every block that merges was asked for.

    Where there are no `blocks`, every block merged, one half into the other.
    """
    r, blocks = settings.get("r"), settings.get("blocks")
    if blocks is None:
        settings = {"partition": "random", **settings}
    if isinstance(blocks, list) and isinstance(r, int):
        return {**settings, "r": [r] * len(blocks)}
    every = isinstance(r, int) or (r is None and blocks is None)
    return {**settings, "blocks": "every"} if every else settings


def _from_first_format(path: str | Path, content: dict[str, Any], wanted: str | None) -> dict[str, Any]:
    """Format 1: one class for all workflows, `"auto"` for defaults, and S4's numbers as fields.

    Raises:
        ConfigError: the file has settings of several workflows, which are saved apart now.
    """
    settings = dict(content)
    promise = settings.pop("promise", None)
    beta, gamma = settings.pop("beta", 1.0), settings.pop("gamma", 0)
    if settings.get("degree") == "layered":
        alpha = settings.pop("alpha", None)
        settings["degree"] = {"layered": {"alpha": 2.0 if alpha is None else alpha, "beta": beta, "gamma": gamma}}
    for name in ("degree", "reduce", "partition"):
        if settings.get(name) == "auto":
            del settings[name]
    merges = any(settings.get(name) is not None for name in ("r", "keep", "flops"))
    reads = any(settings.get(name) is not None for name in ("visual_keep", "cross_keep"))
    if merges and reads:
        raise ConfigError(
            f"{path}: holds settings of an encoder and of what is read, which are saved apart now: save a TurboConfig "
            "and a ReadConfig, and give both to turbovlm.apply"
        )
    denoises = any(settings.get(name, default) != default for name, default in OLD_DENOISING.items())
    denoises |= isinstance(settings.get("keep"), list)
    kind = "ReadConfig" if reads else "DenoiseConfig" if denoises else "TurboConfig"
    if wanted == "DenoiseConfig" and settings.get("keep") is not None:
        kind = wanted
    if settings.get("share_guidance", True):
        settings.pop("share_guidance", None)  # always so now
    left_out = OLD_LEFT_OUT[kind]
    kept = {name: value for name, value in settings.items() if name not in left_out}
    return {"kind": kind, "settings": kept} | ({} if promise is None else {"promise": promise})
