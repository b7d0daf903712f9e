"""Pipelines and denoisers of `diffusers` by name, with their weights or with random ones."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn

from turbovlm.errors import TurboError
from turbovlm.loading.spec import ModelSpec, library_errors, load_added, without_remarks

UNNEEDED = ("safety_checker", "image_encoder")
"""Components without which a pipeline makes the same images, but for those that a safety checker turns black."""


def load_pipeline(spec: ModelSpec, *, pretrained: bool, without: Sequence[str] = UNNEEDED) -> Any:
    """Load a pipeline, or a denoiser alone (an `nn.Module`, in eval mode), with random weights unless `pretrained`.

    Args:
        spec: `diffusers:` and a hub id or a folder, of a pipeline (model_index.json) or of a denoiser (config.json);
            or a pipeline that another package brings.
        pretrained: load the weights, from the cache, the folder or the hub.
        without: components of a pipeline to leave out.

    Raises:
        TurboError: `diffusers` is not installed, does not know the model, or has no weights for it.
    """
    added = spec.added
    if added is not None:
        return load_added(spec, added, pretrained)
    quiet = contextlib.nullcontext() if pretrained else without_remarks()
    with library_errors(spec), quiet:
        made = _pretrained(spec, without) if pretrained else _random(spec, without)
        return made.eval().to(spec.device) if isinstance(made, nn.Module) else made.to(spec.device)


def load_pipeline_outline(spec: ModelSpec) -> Any | None:
    """Build a pipeline, or a denoiser alone, on the meta device, where its weights take no memory.

    Returns:
        The pipeline or the denoiser; None where it can only be had with its weights.

    Raises:
        TurboError: see `load_pipeline`.
    """
    return None if spec.added is not None else load_pipeline(dataclasses.replace(spec, device="meta"), pretrained=False)


def _index(where: str) -> dict[str, Any] | None:
    """Read model_index.json; None where there is a config.json in its place."""
    from diffusers import DiffusionPipeline

    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(where)
    except OSError as error:
        try:
            _config(where)
        except OSError:
            reason = textwrap.shorten(str(error), 120, placeholder=" …")
            raise TurboError(
                f"{where}: neither a pipeline's model_index.json nor a denoiser's config.json can be read: {reason}"
            ) from error
        return None
    return index


def _config(where: str) -> dict[str, Any]:
    from diffusers import AutoModel

    config: dict[str, Any] = AutoModel.load_config(where)
    return config


def _pretrained(spec: ModelSpec, without: Sequence[str]) -> Any:
    from diffusers import DiffusionPipeline

    index = _index(spec.name)
    if index is None:
        kind = _class_named("diffusers", _config(spec.name)["_class_name"])
        return kind.from_pretrained(spec.name, torch_dtype=spec.dtype)
    left_out = {name: None for name in without if name in index}
    return DiffusionPipeline.from_pretrained(spec.name, torch_dtype=spec.dtype, **left_out)


def _random(spec: ModelSpec, without: Sequence[str]) -> Any:
    torch.manual_seed(0)
    index = _index(spec.name)
    if index is None:
        config = _config(spec.name)
        with _building(spec):
            return _class_named("diffusers", config["_class_name"]).from_config(config)
    pipeline = _class_named("diffusers", index["_class_name"])
    accepted = inspect.signature(pipeline.__init__).parameters
    arguments = {name: value for name, value in index.items() if name in accepted and not name.startswith("_")}
    components = {name: value for name, value in arguments.items() if isinstance(value, list | tuple)}
    absent = {name: None for name, value in components.items() if name in without or value[0] is None}
    kinds = {name: _class_named(*value) for name, value in components.items() if name not in absent}
    made = {name: _component(spec, name, kind) for name, kind in kinds.items()}
    return pipeline(**{**arguments, **absent, **made})


def _component(spec: ModelSpec, name: str, kind: Any) -> Any:
    """Build a model from its config alone; load a tokenizer, a scheduler and so on as it is."""
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(spec.name, subfolder=name)
    if hasattr(kind, "config_class"):  # of transformers
        config = kind.config_class.from_pretrained(spec.name, subfolder=name)
        with _building(spec):
            return kind(config).eval()
    config = kind.load_config(spec.name, subfolder=name)
    with _building(spec):
        return kind.from_config(config).eval()


def _class_named(library: str, name: str) -> Any:
    if library not in ("diffusers", "transformers"):
        raise TurboError(f"{library}.{name}: only classes of diffusers and transformers are built with random weights")
    found = getattr(importlib.import_module(library), name, None)
    if not isinstance(found, type):
        raise TurboError(f"{library} has no class {name!r}")
    return found


@contextlib.contextmanager
def _building(spec: ModelSpec) -> Iterator[None]:
    """Make every parameter on the device and in the dtype at once, without a copy in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(spec.dtype)
    try:
        with torch.device(spec.device):
            yield
    finally:
        torch.set_default_dtype(before)
