"""Models by name, with random weights on the meta device: for questions that shapes alone answer."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.adapters import Tower
from turbovlm.config import TurboConfig
from turbovlm.errors import ConfigError, TurboError

MODEL_HELP = (
    "a transformers hub id, a folder with a config.json, or timm:NAME, torchvision:NAME, open_clip:NAME; "
    "weights are neither needed nor fetched"
)


def load_model(spec: str, image_size: int | None = None) -> nn.Module:
    """Build a model from its config, in eval mode, on the meta device.

    Args:
        spec: see `MODEL_HELP`.
        image_size: pixels per side, instead of the model's own.

    Raises:
        TurboError: the library is not installed, or does not know the model.
    """
    library, separator, name = spec.partition(":")
    if not separator:
        library, name = "transformers", spec
    if library not in _LOADERS:
        raise TurboError(f"{spec!r}: {library!r} is none of {', '.join(_LOADERS)}")
    if library == "transformers" and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise TurboError(f"{spec!r}: there is no such folder")
    if importlib.util.find_spec(library) is None:
        raise TurboError(f"{spec!r} needs {library}: pip install 'turbovlm[{library}]'")
    try:
        with torch.device("meta"):
            return _LOADERS[library](name, image_size).eval()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TurboError(f"{spec!r}: {library} could not build it: {reason}") from error


def example_inputs(tower: Tower) -> dict[str, Tensor | None]:
    """One input of native size for a tower's forward, on the meta device, by argument name."""
    module: Any = tower.module
    patches = tower.tokens - tower.prefix
    family = tower.layout.family
    if family == "transformers SigLIP 2":
        config = module.config
        return {
            "pixel_values": torch.empty(1, patches, config.num_channels * config.patch_size**2, device="meta"),
            "pixel_attention_mask": None,
            "spatial_shapes": torch.full((1, 2), int(patches**0.5)),
        }
    if family.startswith("transformers"):
        size = module.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        frames = (module.config.num_frames,) if family == "transformers VideoMAE" else ()
        return {"pixel_values": torch.empty(1, *frames, module.config.num_channels, height, width, device="meta")}
    size = module.patch_embed.img_size if hasattr(module, "patch_embed") else module.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"x": torch.empty(1, 3, height, width, device="meta")}


def add_amount_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """`--r`, `--keep`, `--flops`, `--min-tokens`, and `--image-size`."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--r", type=int, metavar="N", help="tokens merged in every block")
    group.add_argument("--keep", type=float, metavar="SHARE", help="share of the tokens left after the last block")
    group.add_argument("--flops", type=float, metavar="SHARE", help="share of the encoder's multiply-accumulates left")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="blocks with fewer tokens do not merge")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels per side, instead of the model's own")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def config_from(args: argparse.Namespace, default_r: int) -> TurboConfig:
    """The settings that `add_amount_options` read; `r=default_r` where no amount was given."""
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


def _transformers(name: str, image_size: int | None) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(Path(name).expanduser()) if name.startswith("~") else name)
    if image_size is not None:
        getattr(config, "vision_config", config).image_size = image_size
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    model: nn.Module = architecture(config) if architecture else transformers.AutoModel.from_config(config)
    return model


def _timm(name: str, image_size: int | None) -> nn.Module:
    import timm

    size = {} if image_size is None else {"img_size": image_size}
    model: nn.Module = timm.create_model(name, pretrained=False, **size)
    return model


def _torchvision(name: str, image_size: int | None) -> nn.Module:
    from torchvision import models

    size = {} if image_size is None else {"image_size": image_size}
    model: nn.Module = models.get_model(name, weights=None, **size)
    return model


def _open_clip(name: str, image_size: int | None) -> nn.Module:
    import open_clip

    model: nn.Module = open_clip.create_model(name, pretrained=None, force_image_size=image_size, device="meta")
    return model


_LOADERS: dict[str, Callable[[str, int | None], nn.Module]] = {
    "transformers": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
