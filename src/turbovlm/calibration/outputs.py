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

    Dual encoders and their image towers by the embedding of an image; a model with logits by them; what feeds a
    language model or a text decoder by the tokens of its vision encoder; encoders by CLS and by the patches' tokens,
    half each.

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
    """Logits, an image's embedding, or what a model has pooled; else CLS and registers, and patches."""
    for read in (getattr(out, "logits", None), getattr(out, "image_embeds", None)):
        if isinstance(read, Tensor) and read.ndim == 2:
            return read
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
        ConfigError: neither a tensor, nor a mapping or a list of them, of different lengths, or not of numbers.
    """
    listed = isinstance(inputs, list | tuple)
    tensors = list(inputs) if listed else list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not tensors or not all(isinstance(each, Tensor) and each.ndim > 0 for each in tensors):
        kinds = ", ".join(sorted({type(each).__name__ for each in tensors})) or "nothing"
        raise ConfigError(
            "images: must be what the model takes, a tensor [images, …], a mapping of them by name, or for several "
            f"sizes a list of tensors [3, height, width], got {kinds}"
        )
    if not all(each.isfinite().all() for each in tensors if each.is_floating_point()):
        raise ConfigError("images: some values are NaN or infinite")
    if listed:
        wrong = next((each for each in tensors if each.ndim != 3), None)
        if wrong is not None:
            raise ConfigError(f"images: of a list each must be a tensor [3, height, width], got {tuple(wrong.shape)}")
        return len(tensors)
    counts = {len(each) for each in tensors}
    if len(counts) > 1:
        raise ConfigError(f"images: the tensors are of different lengths: {sorted(counts)}")
    return counts.pop()


def check_different(inputs: Any, fewest: int) -> None:
    """Refuse images of which a drift would say nothing about others.

    Args:
        inputs: as `count_images` takes them.
        fewest: how many must differ.

    Raises:
        ConfigError: too many are the same, or each is of one colour.
    """
    images = [_single(inputs, index) for index in range(count_images(inputs))]
    pixels = [largest for image in images if (largest := max(image, key=torch.numel)).ndim > 1]
    if pixels and all(bool((each.flatten(1).amin(1) == each.flatten(1).amax(1)).all()) for each in pixels):
        raise ConfigError(f"images: each of the {len(images)} is of one colour; give photographs of what it will see")
    different = len({tuple(map(_fingerprint, image)) for image in images})
    if different < fewest:
        raise ConfigError(
            f"images: only {different} of the {len(images)} differ, at least {fewest} must: the others say nothing new"
        )


def _single(inputs: Any, index: int) -> list[Tensor]:
    """The tensors of one image."""
    return [each[index] for each in inputs.values()] if isinstance(inputs, Mapping) else [inputs[index]]


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for equal tensors, and for no others but by a chance of no account."""
    values = tensor.detach().cpu().flatten().double()  # a device may have no float64
    weights = torch.rand(len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (*tensor.shape, (values * weights).sum().item())


def sizes_of(inputs: Any) -> dict[tuple[int, ...], list[int]]:
    """The images of each size, by their places, the size of most of them first."""
    if not isinstance(inputs, list | tuple):
        return {(): list(range(count_images(inputs)))}
    places: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(inputs):
        places.setdefault(tuple(image.shape), []).append(index)
    return dict(sorted(places.items(), key=lambda item: -len(item[1])))


def select_images(inputs: Any, indices: Sequence[int]) -> Any:
    """The images of those indices, as the model takes them; those of a list must be of one size."""
    if isinstance(inputs, list | tuple):
        return torch.stack([inputs[index] for index in indices])
    places = torch.as_tensor(list(indices))
    if isinstance(inputs, Mapping):
        return {name: each[places.to(each.device)] for name, each in inputs.items()}
    return inputs[places.to(inputs.device)]
