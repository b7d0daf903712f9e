"""What may be set for the vLLM plug-in, and what is refused before an engine starts. Imports nothing of vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbovlm.checks import brief
from turbovlm.config import AMOUNTS, ReadConfig, TurboConfig
from turbovlm.encoder.schedule import check_depth
from turbovlm.engines.vllm.families import FAMILIES, ServedFamily, served
from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.workflows import configs_from

KEY = "turbovlm"
"""In vLLM's `additional_config`, and the attribute of the model's config that takes settings to each process."""
RELEASES = ("0.31", "0.32")
"""Of vLLM, that the plug-in is tested with."""
SETTINGS = (
    *("visual_keep", "visual_select", "degree", "alpha", "reduce", "min_visual_tokens", "seed"),
    *(*AMOUNTS, "blocks", "min_tokens", "similarity", "partition", "order", "proportional", "restore"),
)
"""Fields of `ReadConfig`, and of `TurboConfig`, that can be served."""
NOT_SERVED = {
    "cross_keep": "the models of the plug-in have no cross-attention to images",
    "question": "what is kept of an image would depend on the question, and prefix caching takes it for the same",
    "change": "videos are not shortened by the plug-in",
    "pixel_tolerance": "how many tokens are left would depend on the image's pixels, and vLLM goes by its size",
    "visual_tolerance": "how many tokens are left would depend on the image's content, and vLLM asks before it encodes",
    "guidance": "A is the row of CLS where the tower has it, and of the mean query elsewhere",
    "thresholds": "what is merged of an image would depend on those that are encoded with it",
    "grid": "images of these towers are square",
    "dense": "every position gets its token back, as projectors read all of them",
    "trace": "a server has nobody to read it",
}
"""Why the others cannot."""
ROPES = ("default", "linear", "llama3")
"""Types of rotary positions that do not depend on how far positions may go."""


@dataclass(frozen=True)
class Serving:
    """What is served with; one of the two at least.

    Attributes:
        encoder: how tokens merge inside the tower; None where none do.
        reading: which tokens the language model reads; None where it reads all.
    """

    encoder: TurboConfig | None
    reading: ReadConfig | None

    @property
    def amount(self) -> str:
        """What was asked for, as it was written: `"r=8, visual_keep=0.5"`."""
        return ", ".join(config.amount for config in (self.encoder, self.reading) if config is not None)

    @property
    def summary(self) -> str:
        """The settings that say which tokens."""
        merged = [] if self.encoder is None else [f"inside the tower {self.encoder.summary}"]
        read = [] if self.reading is None else [f"of each image {self.reading.summary}"]
        return "; ".join([*merged, *read])


def release_supported(release: str) -> bool:
    """Whether a release of vLLM, as `vllm.__version__` says it, is one of `RELEASES`."""
    return ".".join(release.split(".")[:2]) in RELEASES


def serving_from(settings: Any, release: str) -> Serving:
    """The settings that were given to vLLM under `"turbovlm"`.

    Args:
        settings: what was given, a mapping; each setting goes to the config that has it, as in `turbovlm.apply`.
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
    if all(settings.get(name) is None for name in ("visual_keep", *AMOUNTS)):
        raise ConfigError(
            f"{KEY}={brief(dict(settings))}: give visual_keep, how many of an image's tokens are read, or "
            f"{', '.join(AMOUNTS)}: how many merge inside the tower"
        )
    configs = configs_from((), settings, denoises=False, model="model")
    encoder = next((config for config in configs if isinstance(config, TurboConfig)), None)
    reading = next((config for config in configs if isinstance(config, ReadConfig)), None)
    if encoder is None and reading is not None and not reading.proportional:
        raise ConfigError(f"proportional=False: it would have no effect: no tokens merge without {', '.join(AMOUNTS)}")
    if encoder is not None and encoder.partition == "cells":
        raise ConfigError("partition='cells': no projector of these towers joins squares of patches; use 'all'")
    return Serving(encoder, reading)


def family_served(architecture: str, config: Any, serving: Serving) -> ServedFamily:
    """The family of a model that is to be served with those settings.

    Args:
        architecture: as vLLM names it.
        config: the model's.

    Raises:
        ConfigError: settings that its tower cannot have.
        UnsupportedModelError: the plug-in does not know it, or not with its tower or its rotary positions.
    """
    family = served(architecture)
    if family is None:
        known = ", ".join(each.architecture for each in FAMILIES)
        raise UnsupportedModelError(
            f"{architecture}: {serving.amount} is served of {known}; start it without {KEY!r} in --additional-config"
        )
    vision = config.vision_config.model_type
    if family.vision and vision not in family.vision:
        raise UnsupportedModelError(
            f"{architecture} with a tower of type {vision}: served with {', '.join(family.vision)} alone"
        )
    if serving.encoder is not None:
        _check_tower(family, config, serving.encoder)
    if serving.reading is not None and not family.packed:
        rope = rope_type(config.get_text_config())
        if rope not in ROPES:
            raise UnsupportedModelError(
                f"rope_type={rope!r}: tokens keep the positions of the full prompt, which go beyond vLLM's table of "
                f"them; it can be made longer for {', '.join(ROPES)}"
            )
    return family


def _check_tower(family: ServedFamily, config: Any, encoder: TurboConfig) -> None:
    """See that tokens can merge inside a model's tower, which vLLM builds up to the block that is read."""
    if family.merges is None:
        known = ", ".join(each.architecture for each in FAMILIES if each.merges is not None)
        raise UnsupportedModelError(
            f"{family.architecture}: {encoder.amount} merges inside the towers of {known}: give visual_keep alone"
        )
    layer, depth = config.vision_feature_layer, int(config.vision_config.num_hidden_layers)
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer={brief(layer)}: {encoder.amount} merges inside a tower of which one block is read"
        )
    check_depth(encoder, layer if layer >= 0 else depth + 1 + layer, family.merges)


def rope_type(text: Any) -> str:
    """The type of a language model's rotary positions, by its config."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def put_settings(config: Any, serving: Serving, columns: int) -> None:
    """Have a model's config take the settings to every process; `columns` is how long a full prompt may be."""
    given = {name: _plain(getattr(serving, name)) for name in ("encoder", "reading")}
    setattr(config, KEY, {**given, "columns": columns})


def _plain(config: TurboConfig | ReadConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def settings_of(config: Any) -> tuple[Serving, int] | None:
    """What `put_settings` put on a model's config; None where it did not."""
    found = getattr(config, KEY, None)
    if found is None:
        return None
    encoder, reading = found["encoder"], found["reading"]
    serving = Serving(
        None if encoder is None else TurboConfig(**encoder), None if reading is None else ReadConfig(**reading)
    )
    return serving, int(found["columns"])
