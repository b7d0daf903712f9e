"""The outputs of an encoder by which drift is measured: pooled features, logits, or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.towers import find_towers
from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.registry import family_of

Measure = Callable[[nn.Module, Any], Any]
"""`(model, inputs) -> features`: a tensor `[batch, width]` or `[batch, tokens, width]`, or several."""


def default_measure(model: nn.Module) -> Measure:
    """The measure of a model's family.

    Dual encoders by the pooled features of an image; a model with logits by them; what feeds a language model or a
    text decoder by the tokens of its vision encoder; encoders by CLS and by the patches' tokens, half each.

    Raises:
        UnsupportedModelError: several vision encoders, of which it is not known what is read.
    """
    if any(family_of("vlm", part) is not None for part in model.modules()):
        towers = find_towers(model)
        if len(towers) > 1:
            names = ", ".join(tower.name for tower in towers)
            raise UnsupportedModelError(f"{type(model).__name__} has several vision encoders ({names}): give `measure`")
        name, prefix = towers[0].name, towers[0].prefix
        return lambda whole, inputs: _tokens(_call(whole.get_submodule(name), inputs), prefix)
    if hasattr(model, "get_image_features"):
        return lambda whole, inputs: _pooled(_call(whole.get_image_features, inputs))
    if hasattr(model, "encode_image"):
        return lambda whole, inputs: _call(whole.encode_image, inputs)
    prefix = find_towers(model)[0].prefix
    return lambda whole, inputs: _tokens(_call(whole, inputs), prefix)


def _call(function: Any, inputs: Any) -> Any:
    """Call it with keyword arguments, or with the one tensor there is."""
    return function(**inputs) if isinstance(inputs, Mapping) else function(inputs)


def measured_parts(measure: Measure, model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a measure gives of a batch, each `[batch, tokens, width]`.

    Raises:
        ConfigError: it gives something else.
    """
    found = measure(model, inputs)
    parts = [found] if isinstance(found, Tensor) else found
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(part, Tensor) for part in parts):
        raise ConfigError(f"measure: must give a tensor or several, got {type(found).__name__}")
    for part in parts:
        if part.ndim not in (2, 3):
            raise ConfigError(
                f"measure: gave a tensor of shape {tuple(part.shape)}; must be [batch, width] or [batch, tokens, width]"
            )
    return [(part[:, None] if part.ndim == 2 else part).float() for part in parts]


def _tokens(out: Any, prefix: int) -> Any:
    """Logits, or what a model has pooled; else CLS and registers, and patches."""
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    tokens = out if isinstance(out, Tensor) else getattr(out, "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.ndim not in (2, 3):
        raise ConfigError(f"measure: it is not known what of a {type(out).__name__} counts; give a function")
    if tokens.ndim == 2 or prefix == 0:
        return tokens
    return tokens[:, :prefix], tokens[:, prefix:]


def _pooled(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found


def count_images(inputs: Any) -> int:
    """The number of images.

    Raises:
        ConfigError: neither a tensor nor a mapping of them, or of different lengths.
    """
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not tensors or not all(isinstance(each, Tensor) and each.ndim > 0 for each in tensors):
        kinds = ", ".join(sorted({type(each).__name__ for each in tensors})) or "nothing"
        raise ConfigError(
            f"images: must be what the model takes, a tensor [images, …] or a mapping of them by name, got {kinds}"
        )
    counts = {len(each) for each in tensors}
    if len(counts) > 1:
        raise ConfigError(f"images: the tensors are of different lengths: {sorted(counts)}")
    if not all(each.isfinite().all() for each in tensors if each.is_floating_point()):
        raise ConfigError("images: some values are NaN or infinite")
    return counts.pop()


def select_images(inputs: Any, indices: Sequence[int]) -> Any:
    """The images of those indices, as the model takes them."""
    places = torch.as_tensor(list(indices))
    if isinstance(inputs, Mapping):
        return {name: each[places.to(each.device)] for name, each in inputs.items()}
    return inputs[places.to(inputs.device)]
