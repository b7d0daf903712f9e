"""`apply` finds what can be made faster, checks it and installs it; a `Handle` reports, restores and removes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from turbovlm.config import Config, DenoiseConfig, ReadConfig, TurboConfig
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError
from turbovlm.patching import Feature, Patch, install, keeps_tokens, patches_on, remove
from turbovlm.registry import class_paths, families, family_of
from turbovlm.workflows import configs_from

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature
    from turbovlm.encoder.schedule import Schedule
    from turbovlm.encoder.state import BlockTrace
    from turbovlm.vlm.selection import Selection

DENOISERS = ("unet", "transformer", "transformer_2")
"""Attributes where a pipeline keeps its denoisers: Wan 2.2 has one for much noise and one for little."""

UNKNOWN_DENOISER = "diffusers.models.modeling_utils.ModelMixin"
"""Base of every model of `diffusers`."""


def apply(model: Any, *configs: Any, **settings: Any) -> Handle:
    """Merge tokens in `model`, in place: in its encoders, in what its language model reads, or in its denoiser.

    No parameter, buffer, class or hook is changed: some modules get a `forward` of their own.

    Args:
        model: a `transformers`, `timm`, `torchvision` or `open_clip` model, or any module that contains one; or a
            `diffusers` pipeline, UNet or transformer.
        configs: the settings, one config of each workflow at most: `TurboConfig` for encoders, `ReadConfig` for what a
            language model reads, `DenoiseConfig` for denoisers, or what `turbovlm.calibrate` returned.
        settings: or the fields of these classes by name, as in `apply(model, r=16)`; each goes to the classes in use
            that have it.

    Returns:
        A handle that reports (`print(handle)`), traces, restores and removes; also a context manager.

    Raises:
        ConfigError: wrong settings, or settings of another workflow than the model's.
        UnsupportedModelError: nothing in the model can be accelerated.
        TurboError: the model is accelerated already.
    """
    module = _module_of(model)
    for patch in (patch for patch in patches_on(module) if not keeps_tokens(patch.feature)):
        raise TurboError(
            f"{_name_of(module, patch.module)} is accelerated already ({patch.feature.config.amount}): "
            "call handle.remove(), or turbovlm.get_handle(model).remove(), first"
        )
    denoises = any(family_of("denoiser", part) is not None for part in module.modules())
    if not denoises and UNKNOWN_DENOISER in class_paths(module):
        known = ", ".join(family.family for family in families("denoiser"))
        raise UnsupportedModelError(
            f"{type(module).__name__} is a model of diffusers without a block that turbovlm knows; image generation is "
            f"accelerated in {known}"
        )
    features = _find(module, model, configs_from(configs, settings, denoises, type(module).__name__))
    patches = [patch for feature in features for patch in feature.patches(module)]
    install([*_across(module, features), *patches, *_checks(module, features)])
    return Handle(module, features)


def _find(module: nn.Module, owner: Any, configs: tuple[Config, ...]) -> list[Feature]:
    """The features that the settings ask for, checked; each is imported when it is asked for."""
    features: list[Feature] = []
    for config in configs:
        if isinstance(config, TurboConfig):
            from turbovlm.encoder.feature import find_encoders

            features += find_encoders(module, config)
        elif isinstance(config, ReadConfig):
            from turbovlm.vlm.install import find_readings

            encoders: list[Any] = features  # those of the workflows before
            features += find_readings(module, config, encoders)
        elif isinstance(config, DenoiseConfig):
            from turbovlm.diffusion.find import find_denoiser

            features.append(find_denoiser(module, config, owner))
    return features


def _across(module: nn.Module, features: list[Feature]) -> list[Patch]:
    """What has cross-attention to merged tokens count them by size, whichever features merge them."""
    if all(getattr(feature, "cross_attention", None) is None for feature in features):
        return []
    from turbovlm.encoder.cross_attention import cross_patches

    return cross_patches(module, features)


def _checks(module: nn.Module, features: list[Feature]) -> list[Patch]:
    """What sees, at every call, that a language model reads an encoder where it has all positions."""
    encoders = [feature for feature in features if isinstance(feature.config, TurboConfig)]
    if not encoders:
        return []
    from turbovlm.vlm.layers import layer_checks

    return layer_checks(module, encoders)


def get_handle(model: Any) -> Handle:
    """The handle of an accelerated model, such as a copy or one that was unpickled.

    Raises:
        TurboError: the model is not accelerated.
    """
    module = _module_of(model)
    features = list(dict.fromkeys(patch.feature for patch in patches_on(module)))
    if not features:
        raise TurboError(f"this {type(module).__name__} is not accelerated")
    return Handle(module, features)


class Handle:
    """What `apply` did to one model, and the way back. It does not keep the model alive."""

    def __init__(self, model: nn.Module, features: list[Feature]) -> None:
        models = dict(model.items()) if isinstance(model, Denoisers) else {"": model}
        self._models = {name: weakref.ref(each) for name, each in models.items()}
        self.features = tuple(features)

    @property
    def _model(self) -> nn.Module | None:
        """The model, or both denoisers of a pipeline; None where it is gone."""
        return _together({name: model for name, found in self._models.items() if (model := found()) is not None})

    @property
    def configs(self) -> tuple[Any, ...]:
        """The settings in force, one config of each workflow."""
        asked = [feature for feature in self.features if not getattr(feature, "implied", False)]
        return tuple(dict.fromkeys(feature.config for feature in asked))

    @property
    def config(self) -> Any:
        """The settings in force, where they are of one workflow.

        Raises:
            ConfigError: they are of several: see `configs`.
        """
        if len(self.configs) > 1:
            raise ConfigError(f"config: there are several ({', '.join(c.amount for c in self.configs)}); see configs")
        return self.configs[0]

    @property
    def active(self) -> bool:
        """Whether the model is still accelerated by this handle."""
        model = self._model
        return model is not None and any(patch.feature in self.features for patch in patches_on(model))

    @property
    def schedules(self) -> list[Schedule]:
        """One schedule per accelerated encoder, for its native number of tokens."""
        return [encoder.schedule() for encoder in self._encoders]

    def schedule(self, tokens: int) -> Schedule:
        """The first encoder's schedule for inputs of `tokens` tokens, prefix and suffix included.

        Raises:
            ConfigError: `tokens` is no integer above the number of tokens that never merge.
            StateError: no encoder is accelerated.
        """
        encoder = self._encoder_of(None, first=True)
        protected = encoder.shape.protected
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens <= protected:
            raise ConfigError(f"tokens={tokens!r}: must be an integer > {protected}, the number of prefix tokens")
        return encoder.schedule(tokens)

    @property
    def trace(self) -> list[BlockTrace]:
        """Per block of the last forward: what was merged where, and R, A and E.

        Raises:
            StateError: the config has no `trace=True`, or no forward has ended yet.
        """
        encoders = self._encoders
        if not any(encoder.config.trace for encoder in encoders):
            raise StateError("nothing is traced: apply with trace=True")
        if all(encoder.last is None for encoder in encoders):
            raise StateError("nothing is traced yet: run the model first")
        return [trace for encoder in encoders if encoder.last is not None for trace in encoder.last.traces]

    @property
    def visual(self) -> tuple[Selection, ...]:
        """What became of each image's visual tokens in the last prompt, in the order of the prompts.

        Raises:
            StateError: the config has no `visual_keep` or `pixel_tolerance`, or no prompt with an image has been read
                yet.
        """
        return self._selections("visual_keep", "no visual tokens are chosen", "no visual tokens have been chosen yet")

    @property
    def cross(self) -> tuple[Selection, ...]:
        """Which image tokens were left from one stage of cross-attention layers to the next, in the last forward.

        Raises:
            StateError: the config has no `cross_keep`, or no image has been read yet.
        """
        return self._selections("cross_keep", "cross-attention reads all tokens", "no image has been read yet")

    def restore(self, tokens: Tensor, *, block: int | None = None, tower: str | None = None) -> Tensor:
        """Give every position of an encoder's input the value of the token it became part of.

        For heads that need the full grid: segmentation, saliency, detection, and probes of an earlier block.
        Differentiable.

        Args:
            tokens: `[batch, M, ...]`, one entry per token that a block handed on, prefix included. The very output of
                a block knows its forward; anything else is taken as of the last forward of this thread, or, where this
                thread had none, of the last one in any.
            block: how many blocks had run by then: k for `hidden_states[k]`; if None, `M` tells.
            tower: path of the encoder, where several are accelerated.

        Returns:
            `[batch, N0, ...]`, in the order of the encoder's input; the tokens themselves where they are restored
            already.

        Raises:
            StateError: no forward has ended yet, or the tokens are not those of the last one.
            ConfigError: an unknown tower or block.
        """
        return self._encoder_of(tower).restored(tokens, block)

    def remove(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        model = self._model
        if model is not None:
            remove(patch for patch in patches_on(model) if patch.feature in self.features)
        for feature in self.features:
            feature.removed = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        settings = "; ".join(f"{config.amount}, {config.summary}" for config in self.configs)
        lines = [f"Turbo({settings}{state})", *(line for each in self.features for line in each.describe())]
        model = self._model
        weights = None if model is None else next((p for p in model.parameters() if p.is_floating_point()), None)
        merges = not all(map(keeps_tokens, self.features))
        if merges and self.active and weights is not None and not weights.is_meta:  # whose values are yet to come
            from turbovlm.ops.dispatch import path_told

            where = f"{weights.device}, {str(weights.dtype).removeprefix('torch.')}"
            lines.append(f"  merges run on {where}, in eager mode: {path_told(weights.device, weights.dtype)}")
        return "\n".join(lines)

    @property
    def _encoders(self) -> list[EncoderFeature]:
        encoders: list[Any] = [feature for feature in self.features if isinstance(feature.config, TurboConfig)]
        return encoders

    def _encoder_of(self, tower: str | None, first: bool = False) -> EncoderFeature:
        encoders = {encoder.tower: encoder for encoder in self._encoders}
        if not encoders:
            raise StateError("no encoder is accelerated: apply with r, keep or flops")
        if tower is None and (first or len(encoders) == 1):
            return next(iter(encoders.values()))
        if not isinstance(tower, str) or tower not in encoders:
            raise ConfigError(f"tower={tower!r}: must be one of {', '.join(map(repr, encoders))}")
        return encoders[tower]

    def _selections(self, setting: str, without: str, before: str) -> tuple[Selection, ...]:
        feature = next((feature for feature in self.features if getattr(feature, "setting", None) == setting), None)
        if feature is None:
            raise StateError(f"{without}: apply with {setting}")
        if feature.last is None:
            raise StateError(f"{before}: run the model first")
        selections: tuple[Selection, ...] = feature.last
        return selections


def _module_of(model: Any) -> nn.Module:
    """The model itself, or a pipeline's denoiser, or both."""
    if isinstance(model, nn.Module):
        return model
    found = _together(denoisers_of(model))
    if found is None:
        raise UnsupportedModelError(_no_module(model))
    return found


class Denoisers(nn.ModuleDict):
    """The denoisers of one pipeline, which merge by the same settings."""


def _together(models: Mapping[str, nn.Module]) -> nn.Module | None:
    """One model, or several denoisers as one; None of none."""
    return Denoisers(models) if len(models) > 1 else next(iter(models.values()), None)


def _no_module(model: Any) -> str:
    """What stands in for a model that is none, and what to give instead."""
    from turbovlm.encoder.refusals import CLOSED

    if isinstance(model, str | PathLike):
        return f"{str(model)!r} is a name, no model: load it first, as by transformers.AutoModel.from_pretrained"
    if isinstance(model, type):
        return f"{model.__name__} is a class, no model: apply to an instance of it"
    if isinstance(model, list | tuple | dict):
        return (
            f"{type(model).__name__} is no torch.nn.Module: apply to each of the {len(model)} things in it that is one"
        )
    for path in class_paths(model):
        if path in CLOSED:
            return f"{type(model).__name__}: {CLOSED[path]}: apply to the model before it is traced"
    parts = getattr(model, "__dict__", {}).items()
    inside = [f"{name} ({type(part).__name__})" for name, part in parts if isinstance(part, nn.Module)]
    if inside:
        found = f"it has {', '.join(inside)}, and neither of {', '.join(DENOISERS)}: apply to the model inside it"
        return f"{type(model).__name__} is no torch.nn.Module: {found}"
    return f"{type(model).__name__} is no torch.nn.Module, and holds none: apply to a PyTorch model"


def denoiser_of(pipe: Any) -> nn.Module | None:
    """A pipeline's denoiser, the first where it has two, or None where it has none."""
    return next(iter(denoisers_of(pipe).values()), None)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """All denoisers of a pipeline, by the names of its attributes."""
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _name_of(model: nn.Module, sought: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is sought) or type(model).__name__
