"""What a model's name says, the models that other packages bring, and the failures of libraries in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from turbovlm.errors import TurboError

ENTRY_POINTS = "turbovlm.models"
"""Group of entry points by which other packages bring models: each is named as a prefix, `PREFIX:NAME`, and names a
module with `MODELS`, a mapping from NAME to `AddedModel`."""
LAB_PREFIX = "zoo"
"""Prefix of the models that the package turbovlm-lab brings."""
OURS = ("turbovlm", "turbovlm_lab")
"""Packages whose errors are mistakes, not a library's answer to a model or an image."""
EXTRAS = ("diffusers", "open_clip", "timm", "torchvision", "transformers")
"""Libraries that an extra of turbovlm installs."""


@dataclass(frozen=True)
class AddedModel:
    """A pretrained model that another package brings.

    Attributes:
        load: gives it with its weights, in eval mode: an encoder, or a pipeline that makes images.
        prepare: RGB images to the encoder's input, a tensor; None for a pipeline.
        prompts: texts that a pipeline was trained on; it is measured with them unless others are given.
        any_size: whether the encoder takes images of any size, set as `config.image_size`.
    """

    load: Callable[[], Any]
    prepare: Callable[[Sequence[Any]], torch.Tensor] | None = None
    prompts: tuple[str, ...] = ()
    any_size: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, and how it runs.

    Attributes:
        text: `LIBRARY:NAME`, such as `timm:vit_base_patch16_224`; without a library, a hub id or a folder of
            transformers.
        device: where it runs; `"meta"` for questions that shapes alone answer.
        dtype: of its weights and of what it computes.
    """

    text: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def library(self) -> str:
        """Name of the library, or the prefix of another package."""
        return self.text.partition(":")[0] if ":" in self.text else "transformers"

    @property
    def name(self) -> str:
        """Name without the library; a folder's `~` is spelled out."""
        name = self.text.partition(":")[2] if ":" in self.text else self.text
        return os.path.expanduser(name)  # which leaves a user's name that it does not know

    @property
    def added(self) -> AddedModel | None:
        """The model that another package brings under this name; None where the prefix is that of a library.

        Raises:
            TurboError: the package has no such model, or is not installed.
        """
        for point in entry_points(group=ENTRY_POINTS):
            if point.name == self.library:
                models: dict[str, AddedModel] = point.load().MODELS
                if self.name not in models:
                    known = ", ".join(f"{self.library}:{name}" for name in sorted(models))
                    raise TurboError(f"{self.text}: there is no such model; there are {known}")
                return models[self.name]
        if self.library == LAB_PREFIX:
            raise TurboError(f"{self.text} is a model of the package turbovlm-lab: pip install turbovlm-lab")
        return None

    @property
    def makes_images(self) -> bool:
        """Whether it is a pipeline or a denoiser, not an encoder.

        Raises:
            TurboError: as `added`.
        """
        added = self.added
        return self.library == "diffusers" if added is None else added.prepare is None


def load_added(spec: ModelSpec, added: AddedModel, pretrained: bool) -> Any:
    """Load a model of another package onto its device.

    Raises:
        TurboError: not `pretrained`: these models have no config without weights.
    """
    if not pretrained:
        raise TurboError(f"{spec.text} is a pretrained model: give --pretrained")
    return added.load().to(spec.device, spec.dtype)


@contextlib.contextmanager
def library_errors(spec: ModelSpec) -> Iterator[None]:
    """Turn whatever a library raises for a name, a size or a file into a `TurboError` of one line.

    Raises:
        TurboError: that; also where the library is not installed, or the folder is not there.
    """
    if importlib.util.find_spec(spec.library) is None:
        package = f"'turbovlm[{spec.library}]'" if spec.library in EXTRAS else spec.library
        raise TurboError(f"{spec.text} needs {spec.library}: pip install {package}")
    if not spec.name:
        raise TurboError(f"{spec.text!r}: names no model")
    if spec.name.startswith((".", "/")) and not Path(spec.name).exists():
        raise TurboError(f"{spec.text}: there is no such folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that we use for the sake of older releases
            yield
    except TurboError:
        raise
    except Exception as error:  # every library and file format has its own kinds
        raise TurboError(f"{spec.text}: {spec.library} could not load it: {reason(error)}{_hint(spec)}") from error


@contextlib.contextmanager
def running(name: str, what: str = "run") -> Iterator[None]:
    """Turn what a library raises as its own model runs, unmerged, into a `TurboError` of one line.

    An error that turbovlm itself raises, by mistake, stays what it is, and so does one of too little memory.

    Args:
        name: of the model, as the user gave it.
        what: cannot be done with it.

    Raises:
        TurboError: that, with the kind of the error and its text.
    """
    try:
        yield
    except (TurboError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not of_library(error) or "DefaultCPUAllocator" in str(error):
            raise
        raise TurboError(f"{name}: the model itself, unmerged, does not {what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """An error's kind and text, in one line of no more than about 200 characters."""
    text = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def of_library(error: Exception) -> bool:
    """Whether the code that raised it is none of turbovlm's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] not in OURS


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Silence what libraries log of random weights, and of downloads whose failure ends in an error.

    Only for random weights: what a library says of weights that it does not find must be read.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _hint(spec: ModelSpec) -> str:
    """The other spellings of a name, where it may be of another library."""
    if ":" in spec.text or Path(spec.name).exists():
        return ""
    return f"; there is no folder {spec.text} either, and models of other libraries are timm:NAME, torchvision:NAME, …"
