"""What may be set for the vLLM plug-in, and what is refused before an engine starts. Imports nothing of vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from turbovlm.checks import brief
from turbovlm.config import ReadConfig
from turbovlm.engines.vllm.families import FAMILIES, ServedFamily, served
from turbovlm.errors import ConfigError, UnsupportedModelError

KEY = "turbovlm"
"""In vLLM's `additional_config`, and the attribute of the model's config that takes settings to each process."""
RELEASES = ("0.31", "0.32")
"""Of vLLM, that the plug-in is tested with."""
SETTINGS = ("visual_keep", "visual_select", "degree", "alpha", "reduce", "min_visual_tokens", "seed")
"""Fields of `ReadConfig` that can be served."""
NOT_SERVED = {
    "cross_keep": "the models of the plug-in have no cross-attention to images",
    "question": "what is kept of an image would depend on the question, and prefix caching takes it for the same",
    "change": "videos are not shortened by the plug-in",
    "pixel_tolerance": "how many tokens are left would depend on the image's pixels, and vLLM goes by its size",
    "visual_tolerance": "how many tokens are left would depend on the image's content, and vLLM asks before it encodes",
    "guidance": "A is the row of CLS where the tower has it, and of the mean query elsewhere",
    "proportional": "no tokens are merged inside the tower by the plug-in",
}
"""Why the others cannot."""
ROPES = ("default", "linear", "llama3")
"""Types of rotary positions that do not depend on how far positions may go."""


def release_supported(release: str) -> bool:
    """Whether a release of vLLM, as `vllm.__version__` says it, is one of `RELEASES`."""
    return ".".join(release.split(".")[:2]) in RELEASES


def reading_from(settings: Any, release: str) -> ReadConfig:
    """The settings that were given to vLLM under `"turbovlm"`.

    Args:
        settings: what was given, a mapping.
        release: of vLLM.

    Raises:
        ConfigError: the release is not known, or a setting is unknown, not for serving, or wrong.
    """
    if not release_supported(release):
        raise ConfigError(
            f"vLLM {release}: turbovlm's plug-in is tested with {', '.join(RELEASES)} alone; install one of them, or "
            f"leave {KEY!r} out of --additional-config"
        )
    if not isinstance(settings, Mapping):
        raise ConfigError(f'{KEY}={brief(settings)}: must be settings by name, such as {{"visual_keep": 0.5}}')
    for name, value in settings.items():
        if name in NOT_SERVED:
            raise ConfigError(f"{name}={brief(value)}: cannot be served: {NOT_SERVED[name]}")
        if name not in SETTINGS:
            raise ConfigError(f"{name}={brief(value)}: no such setting; there are {', '.join(SETTINGS)}")
        if callable(value):
            raise ConfigError(f"{name}={brief(value)}: a function cannot be sent to vLLM's processes; give a name")
    if settings.get("visual_keep") is None:
        raise ConfigError(f"{KEY}={brief(dict(settings))}: give visual_keep, how many of an image's tokens are read")
    return ReadConfig(**settings)


def family_served(architecture: str, config: Any, reading: ReadConfig) -> ServedFamily:
    """The family of a model that is to be served with those settings.

    Args:
        architecture: as vLLM names it.
        config: the model's.

    Raises:
        UnsupportedModelError: the plug-in does not know it, or not with its tower or its rotary positions.
    """
    family = served(architecture)
    known = ", ".join(each.architecture for each in FAMILIES)
    if family is None:
        raise UnsupportedModelError(
            f"{architecture}: {reading.amount} is served of {known}; start it without {KEY!r} in --additional-config"
        )
    vision = config.vision_config.model_type
    if family.vision and vision not in family.vision:
        raise UnsupportedModelError(
            f"{architecture} with a tower of type {vision}: served with {', '.join(family.vision)} alone"
        )
    if not family.packed:
        rope = rope_type(config.get_text_config())
        if rope not in ROPES:
            raise UnsupportedModelError(
                f"rope_type={rope!r}: tokens keep the positions of the full prompt, which go beyond vLLM's table of "
                f"them; it can be made longer for {', '.join(ROPES)}"
            )
    return family


def rope_type(text: Any) -> str:
    """The type of a language model's rotary positions, by its config."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def put_settings(config: Any, reading: ReadConfig, columns: int) -> None:
    """Have a model's config take the settings to every process; `columns` is how long a full prompt may be."""
    given = {field.name: getattr(reading, field.name) for field in dataclasses.fields(ReadConfig)}
    setattr(config, KEY, {"reading": given, "columns": columns})


def settings_of(config: Any) -> tuple[ReadConfig, int] | None:
    """What `put_settings` put on a model's config; None where it did not."""
    found = getattr(config, KEY, None)
    return None if found is None else (ReadConfig(**found["reading"]), int(found["columns"]))
