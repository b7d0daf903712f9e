"""Models by name: on the meta device for questions that shapes alone answer, or with weights, to be run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from turbovlm.config import TurboConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm.loading import added_models

MODEL_HELP = (
    "a transformers hub id, a folder with a config.json, or timm:NAME, torchvision:NAME, open_clip:NAME; "
    "weights are neither needed nor fetched"
)


def load_model(
    spec: str, image_size: int | None = None, *, device: str | torch.device = "meta", pretrained: bool = False
) -> nn.Module:
    """Build a model from its config, in eval mode, with random weights unless `pretrained`.

    Args:
        spec: see `MODEL_HELP`.
        image_size: pixels per side, instead of the model's own.
        device: where to build it.
        pretrained: load the weights as the library does: from its cache, the folder, or the hub.

    Raises:
        TurboError: the library is not installed, or does not know the model, or has no weights for it.
    """
    library, separator, name = spec.partition(":")
    if not separator:
        library, name = "transformers", spec
    added = added_models(library)
    if added is not None:
        model: nn.Module = added.load_encoder(name, image_size, pretrained)
        return model.eval().to(device)
    if library not in _LOADERS:
        raise TurboError(f"{spec!r}: {library!r} is none of {', '.join(_LOADERS)}")
    if library == "transformers" and name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise TurboError(f"{spec!r}: there is no such folder")
    with loading(spec, library), contextlib.nullcontext() if pretrained else torch.device(device):
        return _LOADERS[library](name, image_size, pretrained).eval().to(device)


@contextlib.contextmanager
def loading(spec: str, library: str) -> Iterator[None]:
    """Whatever a library raises for a name, a size or a file that it does not like becomes a `TurboError`.

    Raises:
        TurboError: also where the library is not installed.
    """
    if importlib.util.find_spec(library) is None:
        raise TurboError(f"{spec!r} needs {library}: pip install 'turbovlm[{library}]'")
    try:
        with _without_warnings():
            yield
    except TurboError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(".") or type(error).__name__
        raise TurboError(f"{spec!r}: {library} could not build it: {reason}{_hint(spec)}") from error


def add_amount_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """`--r`, `--keep`, `--flops`, `--min-tokens`, and `--image-size`."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--r", type=int, metavar="N", help="tokens merged in every block")
    group.add_argument("--keep", type=float, metavar="SHARE", help="share of the tokens left after the last block")
    group.add_argument("--flops", type=float, metavar="SHARE", help="share of the encoder's multiply-accumulates left")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="blocks with fewer tokens do not merge")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels per side, instead of the model's own")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def config_from(args: argparse.Namespace, default_r: int | None) -> TurboConfig:
    """The settings that the options say; `r=default_r` where no amount was given."""
    if args.image_size is not None and args.image_size < 1:
        raise ConfigError(f"--image-size {args.image_size}: must be an integer ≥ 1")
    given = {name: getattr(args, name) for name in ("r", "keep", "flops") if getattr(args, name) is not None}
    return TurboConfig(**(given or {"r": default_r}), min_tokens=args.min_tokens)


def write_json(path: str, content: Any) -> None:
    """Write `content` to a file.

    Raises:
        TurboError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise TurboError(f"--json {path}: {error.strerror}") from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without the libraries' remarks on random weights, deprecations, and failed downloads, which end in an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


def _hint(spec: str) -> str:
    if ":" in spec or Path(spec).expanduser().exists():
        return ""
    return f"; there is no folder {spec} either, and models of other libraries are timm:NAME, torchvision:NAME, …"


def _transformers(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    import transformers

    where = str(Path(name).expanduser()) if name.startswith("~") else name
    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    if image_size is not None:
        vision = getattr(config, "vision_config", config)
        if not hasattr(vision, "image_size"):
            raise TurboError(f"--image-size {image_size}: a {type(vision).__name__} has no image size")
        vision.image_size = image_size
    architecture = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    if pretrained:
        model: nn.Module = architecture.from_pretrained(where, config=config)
    elif architecture is transformers.AutoModel:
        model = architecture.from_config(config)
    else:
        model = architecture(config)
    return model


def _timm(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    import timm

    size = {} if image_size is None else {"img_size": image_size}
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **size)
    return model


def _torchvision(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    from torchvision import models

    settings: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        settings["weights_backbone"] = None
    model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **settings)
    return model


def _open_clip(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    import open_clip

    if pretrained != name.startswith(("hf-hub:", "local-dir:")):
        form = "hf-hub:ID or local-dir:FOLDER, which have weights" if pretrained else "the architecture's name"
        raise TurboError(f"'open_clip:{name}': for {'pretrained' if pretrained else 'random'} weights give {form}")
    model: nn.Module = open_clip.create_model(
        name,
        load_weights=pretrained,
        pretrained_text=False,
        force_image_size=image_size,
        device=str(torch.get_default_device()),
    )
    return model


_LOADERS: dict[str, Callable[[str, int | None, bool], nn.Module]] = {
    "transformers": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
