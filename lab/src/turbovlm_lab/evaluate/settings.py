"""What a study compares: the model itself, the default, the paper's setting, and controls of the same cost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from turbovlm.config import Config
from turbovlm.encoder.towers import find_towers
from turbovlm.errors import ConfigError
from turbovlm.ops import LayeredDegree
from turbovlm.profile.macs import counting
from turbovlm.profile.quantize import weight_bytes
from turbovlm_lab.evaluate.data import Sample
from turbovlm_lab.evaluate.run import Predictor, Setting, arranged, module_of

OWN = "unmerged"
"""The model itself."""
SMALLER = "smaller image"
MATCHED = "turbovlm at that cost"
"""The default at what the smaller image costs, which cannot have just any cost."""
COUNTED = 64
"""Samples over which a cost that depends on the image is averaged."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of the golden section, without their whole part, lie evenly in [0, 1) however many are taken."""
_PAPER: dict[str, Any] = {
    "similarity": "keys",
    "partition": "alternate",
    "order": "partition",
    "reduce": "merge",
    "restore": "copy",
}


def evenly(redundancy: Tensor, semantic: Tensor, block: int) -> Tensor:
    """A degree by which the tokens merged are spread evenly over the candidates, whatever is in them."""
    places = torch.arange(redundancy.shape[-1], device=redundancy.device) * GOLDEN % 1
    return places.to(redundancy).expand_as(redundancy)


METHODS: dict[str, dict[str, Any]] = {
    "turbovlm": {},
    "paper": {**_PAPER, "degree": "weighted_difference", "alpha": 180.0},
    "ToMe": {**_PAPER, "degree": "redundancy"},
    "semantics": {**_PAPER, "degree": "semantics"},
    "random": {**_PAPER, "degree": "random"},
    "uniform": {**_PAPER, "degree": evenly},
}
"""Settings besides the amount, for the configs that have such a field; all but the first match keys between alternate
halves and restore by copies, as published. What a language model reads they choose in rounds."""


def methods(amounts: Sequence[Config], names: Sequence[str] = tuple(METHODS), seeds: int = 1) -> list[Setting]:
    """The ways of merging, at the same amounts.

    Args:
        amounts: configs of different workflows, which say how much; the rest of them is that of the first method.
        names: of `METHODS`.
        seeds: of what draws at random, each a setting of its own.

    Raises:
        ConfigError: a name that is none of them.
    """
    found = []
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"method={name!r}: must be one of {', '.join(METHODS)}")
        drawn = range(seeds) if name == "random" else range(1)
        for seed in drawn:
            label = name if len(drawn) == 1 else f"{name}, seed {seed}"
            configs = (by_method(amount, name) for amount in amounts)
            found.append(Setting(label, tuple(replace(config, seed=config.seed + seed) for config in configs)))
    return found


def by_method(amount: Config, name: str) -> Config:
    """The settings with those of a method that their class has, such as the degree."""
    method = {"visual_select": "information", **METHODS[name]} if METHODS[name] else {}
    changes = {field: value for field, value in method.items() if hasattr(amount, field)}
    config: Config = amount.changed(**changes)
    return config


def named(config: Config) -> str:
    """Every field that is not the default's, as text: one name for one config."""
    default = {each.name: each.default for each in fields(config)}
    changed = {name: value for name, value in vars(config).items() if value != default[name]}
    return ", ".join(f"{name}={_text(value)}" for name, value in changed.items())


def _text(value: Any) -> str:
    if value is evenly:
        return "evenly"
    if callable(value) and not isinstance(value, LayeredDegree):
        return getattr(value, "__name__", type(value).__name__)
    return str(value) if isinstance(value, str | LayeredDegree) else json.dumps(value)


def on_quantized(kinds: Sequence[str], settings: Sequence[Setting]) -> list[Setting]:
    """Each way to quantise the model, alone and below each setting that merges, under names that say both.

    Args:
        kinds: of `turbovlm.profile.QUANTIZATIONS`.
        settings: those that merge.
    """
    found = []
    for kind in kinds:
        found.append(Setting(kind, quantize=kind))
        found += [replace(each, name=f"{kind}, {each.name}", quantize=kind) for each in settings]
    return found


def smaller(predictor: Predictor, sample: Sample, macs: int, name: str = SMALLER) -> Setting:
    """Images with as few pixels as make the unmerged model cost what merging leaves.

    Args:
        predictor: the model.
        sample: an image to measure with.
        macs: the encoder's multiply-accumulates to come near, of one image.
        name: of the setting.

    Raises:
        ConfigError: the model takes images of one size only.
    """
    costs = size_costs(predictor, sample)
    if not costs:
        raise ConfigError(f"this model takes images of one size only: leave the control {name!r} out")
    return Setting(name, image_size=nearest_size(costs, macs))


def nearest_size(costs: Mapping[int, int], macs: int) -> int:
    """The pixels a side, of `size_costs`, that come nearest to so many multiply-accumulates."""
    return min(costs, key=lambda size: abs(costs[size] - macs))


def size_costs(predictor: Predictor, sample: Sample) -> dict[int, int]:
    """Multiply-accumulates of the unmerged model's encoder by pixels a side; empty where it takes its own alone."""
    return {size: encoder_macs(predictor, sample, Setting("", image_size=size)) for size in predictor.image_sizes}


def encoder_macs(predictor: Predictor, sample: Sample, setting: Setting, whole: bool = False) -> int:
    """Multiply-accumulates of the vision encoders, or of a pipeline's denoiser, for one sample.

    Args:
        whole: those of all that answers the sample instead, every step of a language model included.
    """
    counter = counting() if whole else _within(_modules(predictor.model))
    with arranged(predictor, setting), counter as total:
        predictor.predict([predictor.prepare(sample, setting.image_size)])
        return total()


def mean_macs(predictor: Predictor, samples: Sequence[Sample], setting: Setting, whole: bool = False) -> int:
    """`encoder_macs` of the first sample, or, where thresholds make it depend on the image, the mean of some."""
    count = min(len(samples), COUNTED) if setting.per_image else 1
    some = [samples[number * len(samples) // count] for number in range(count)]
    return round(sum(encoder_macs(predictor, sample, setting, whole) for sample in some) / count)


def weights_of(predictor: Predictor, quantize: str | None) -> int:
    """Bytes of the model's weights, or of a pipeline's denoiser's, quantised in this way."""
    with arranged(predictor, Setting("", quantize=quantize)):
        return weight_bytes(module_of(predictor.model))


def _modules(model: Any) -> list[nn.Module]:
    """The vision encoders, or a pipeline's denoiser."""
    if isinstance(model, nn.Module):
        return list({tower.name: tower.module for tower in find_towers(model)}.values())
    return [module_of(model)]


@contextlib.contextmanager
def _within(modules: Sequence[nn.Module]) -> Iterator[Callable[[], int]]:
    """Counts what runs inside these, as `counting` does."""
    counted, begun = [0], [0]
    with counting() as total, contextlib.ExitStack() as hooks:

        def begin(module: nn.Module, args: Any) -> None:
            begun[0] = total()

        def end(module: nn.Module, args: Any, out: Any) -> None:
            counted[0] += total() - begun[0]

        for module in modules:
            hooks.callback(module.register_forward_pre_hook(begin).remove)
            hooks.callback(module.register_forward_hook(end).remove)
        yield lambda: counted[0]
