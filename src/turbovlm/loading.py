"""A model by its id or folder, with its weights and its processor, and how and where it runs.

Other packages add models named `PREFIX:NAME` by the entry point group `turbovlm.models`: the entry point's name is the
prefix, its module has `load_encoder(name, image_size, pretrained)`, `load_encoder_for_pictures(name)` and
`load_pipeline(name, pretrained)`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from turbovlm.errors import ConfigError, TurboError

LAB_PREFIX = "zoo"
"""Prefix of the models that the package turbovlm-lab brings."""


def added_models(prefix: str) -> Any:
    """The module that loads models of this prefix, or None where the prefix is that of a library.

    Raises:
        TurboError: the package that has it is not installed.
    """
    for point in entry_points(group="turbovlm.models"):
        if point.name == prefix:
            return point.load()
    if prefix == LAB_PREFIX:
        raise TurboError(f"{prefix}:… are models of the package turbovlm-lab: pip install turbovlm-lab")
    return None


@dataclass(frozen=True)
class Where:
    """How a model is asked.

    Attributes:
        spec: a hub id or a local folder; `timm:NAME`, `open_clip:NAME`, `zoo:NAME`.
        device: where it runs.
        dtype: of its weights and what it computes.
        prompt: what it is asked, `{}` standing for question, statement or class; the model family's own if None.
    """

    spec: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    prompt: str | None = None

    @property
    def library(self) -> str:
        """Which the spec says."""
        return self.spec.partition(":")[0] if ":" in self.spec else "transformers"

    @property
    def name(self) -> str:
        """Without the library; a folder's `~` is spelled out."""
        name = self.spec.partition(":")[2] if ":" in self.spec else self.spec
        return str(Path(name).expanduser()) if name.startswith("~") else name


@contextlib.contextmanager
def loading(where: Where) -> Iterator[None]:
    """What a library raises for an id, a folder or a file that it does not like becomes a `TurboError`.

    Raises:
        TurboError: also where the library is not installed, or the folder not there.
    """
    if importlib.util.find_spec(where.library) is None:
        raise TurboError(f"{where.spec}: needs {where.library}: pip install 'turbovlm[{where.library}]'")
    if where.name.startswith((".", "/")) and not Path(where.name).exists():
        raise TurboError(f"{where.spec}: there is no such folder")
    try:
        yield
    except TurboError:
        raise
    except Exception as error:  # every library and file format has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TurboError(f"{where.spec}: {where.library} could not load it: {reason}") from error


def architecture(where: Where, allowed: Sequence[str]) -> Any:
    """The class of `transformers` that a model's config names.

    Args:
        where: the model.
        allowed: endings of class names that the task can use.

    Raises:
        TurboError: there is no such model, or it is for something else; the message says what would do.
    """
    with loading(where):
        import transformers

        config = transformers.AutoConfig.from_pretrained(where.name)
    names = config.architectures or []
    for name in names:
        if hasattr(transformers, name) and name.endswith(tuple(allowed)):
            return getattr(transformers, name)
    raise TurboError(
        f"{where.spec}: is a {', '.join(names) or config.model_type}; this task takes …{', …'.join(allowed)}"
    )


def with_processor(where: Where, kind: Any) -> tuple[Any, Any]:
    """A model of `transformers` in eval mode and its processor.

    Raises:
        TurboError: the weights or the processor's files are not there.
    """
    import transformers

    with loading(where):
        model = kind.from_pretrained(where.name, dtype=where.dtype).eval().to(where.device)
        processor = transformers.AutoProcessor.from_pretrained(where.name)
    return model, processor


def resized(processor: Any, image_size: int | None, spec: str) -> dict[str, Any]:
    """What an image processor is given for pictures of so many pixels a side instead of its own.

    Raises:
        ConfigError: it does not make pictures of one size.
    """
    if image_size is None:
        return {}
    own = dict(getattr(processor, "image_processor", processor).size or {})
    if set(own) <= {"height", "width"}:
        size: dict[str, Any] = {"size": {"height": image_size, "width": image_size}}
    elif set(own) == {"shortest_edge"}:
        size = {"size": {"shortest_edge": image_size}}
        if getattr(getattr(processor, "image_processor", processor), "do_center_crop", False):
            size["crop_size"] = {"height": image_size, "width": image_size}
    else:
        raise ConfigError(
            f"{spec}: makes pictures of many sizes ({own}), so image_size={image_size} cannot be asked of it"
        )
    return size


def sizes_of(model: Any, processor: Any) -> Sequence[int]:
    """Pixels a side that a model can be given, whole patches, its own last; none if it takes its own alone."""
    config = getattr(model.config, "vision_config", model.config)
    patch, own = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    size = dict(getattr(getattr(processor, "image_processor", processor), "size", None) or {})
    if (
        not isinstance(patch, int)
        or not isinstance(own, int)
        or not size.keys() <= {"height", "width", "shortest_edge"}
    ):
        return ()
    return range(patch, own + 1, patch)
