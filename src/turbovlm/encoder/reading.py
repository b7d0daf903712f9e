"""What reads the tokens of an encoder: which blocks' outputs it takes, and whether it needs every position back.

A tower's own methods (`Layout.entries`) are patched. They know what the call asks for: the hidden states of all blocks,
the grids of some. The blocks asked for hand out one token per position, restored, and the next block goes on with the
merged ones, which travel with them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.cross_attention import hand_on
from turbovlm.encoder.entrance import standing_patches
from turbovlm.encoder.layout import Around, Layout, fetch
from turbovlm.encoder.state import ASKED
from turbovlm.errors import StateError
from turbovlm.patching import Patch, patches_of

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature
    from turbovlm.encoder.state import State

PASS_ON = ("torch", "peft", "accelerate", "deepspeed", "lightning", "pytorch_lightning", "fairscale")
"""Packages whose modules wrap a model and pass on what it gives."""

KNOWN_OWNERS = (
    *("transformers.models.vision_encoder_decoder", "transformers.models.vision_text_dual_encoder"),
    *("transformers.models.timm_wrapper", "transformers.models.timm_backbone", "open_clip", "turbovlm_lab"),
)
"""Packages that own encoders of other packages, and read CLS, or cross-attend to all tokens, or read by the tower's own
methods."""


@dataclass
class Asked:
    """What one call of a tower asks of its blocks.

    Attributes:
        feature: of the tower.
        blocks: indices of those that hand out every position.
        maps: whether attention maps are asked for, in the call or the config.
        standing: for each patch of a packed sequence the one that stands for it, `[patches]`; None where all stay.
        left: what the last block has come to, once it has run, where it is handed on merged to cross-attention.
    """

    feature: EncoderFeature
    blocks: frozenset[int]
    maps: bool = False
    standing: Tensor | None = None
    left: State | None = None


_CALL = threading.local()  # of the call under way in this thread: `asked`


def asked_of(feature: EncoderFeature, hidden: Tensor | None = None) -> Asked | None:
    """What the call under way asks of this feature's blocks; None outside of the tower's own methods.

    Args:
        hidden: the first block's input, which may have it from `keep_asked`.
    """
    asked: Asked | None = getattr(_CALL, "asked", None)
    if asked is None and hidden is not None:
        asked = getattr(hidden, ASKED, None)
    return asked if asked is not None and asked.feature is feature else None


def keep_asked(feature: EncoderFeature, hidden: Tensor) -> None:
    """Have the first block's input know which patches are left out, as it runs again for checkpointed gradients."""
    asked = asked_of(feature)
    if asked is not None and asked.standing is not None:
        setattr(hidden, ASKED, asked)


@contextlib.contextmanager
def asking(asked: Asked) -> Iterator[None]:
    outer: Asked | None = getattr(_CALL, "asked", None)
    _CALL.asked = asked
    try:
        yield
    finally:
        _CALL.asked = outer


def tower_forward(patch: Patch, tower: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a method of a tower that runs its blocks, which then know what is asked of them."""
    feature: EncoderFeature = patch.feature  # type: ignore[assignment]
    if asked_of(feature) is not None:  # a method that another one calls
        return original(*args, **kwargs)
    _check_unchanged(feature, tower)
    config = getattr(tower, "config", None)
    blocks = _blocks_asked(feature, tower, patch.name, args, kwargs) if feature.hands_out else frozenset()
    if feature.layout.reads is not None:
        blocks |= {*feature.layout.reads(tower)}
    maps = kwargs.get("output_attentions")
    maps = bool(getattr(config, "output_attentions", False) if maps is None else maps)
    standing = standing_patches(feature, tower, args, kwargs)
    asked, across = Asked(feature, blocks, maps, standing), feature.cross_attention
    with asking(asked):
        out = original(*args, **kwargs)
    return out if across is None or across.restored else hand_on(out, asked.left, feature.config.proportional)


def _blocks_asked(
    feature: EncoderFeature, tower: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> frozenset[int]:
    depth = len(feature.names)
    config = getattr(tower, "config", None)
    stages: list[int] = []
    if hasattr(tower, "stage_names") and hasattr(tower, "out_features"):  # a backbone: `stem`, `stage1`, ...
        stages = [list(tower.stage_names).index(name) - 1 for name in tower.out_features]
    asked: Iterable[int] = ()
    collected = kwargs.get("output_hidden_states")
    if collected is None:
        collected = getattr(config, "output_hidden_states", False)
    if method == "forward_intermediates":
        indices = kwargs.get("indices", args[1] if len(args) > 1 else None)
        take = getattr(sys.modules[type(tower).__module__], "feature_take_indices", None)
        asked = range(depth) if take is None else take(depth, indices)[0]
    elif collected is not None and not isinstance(collected, bool):  # indices among the states, the input's first
        states = [collected] if isinstance(collected, int) else collected
        asked = [(state if state >= 0 else depth + 1 + state) - 1 for state in states]
        asked = [index for index in asked if index != depth - 1]
    elif collected:  # the last is what the encoder hands on, which is not to change because somebody looks
        asked = range(depth - 1)
    elif method == "forward_features" and feature.unknown_owner is not None:
        asked = [depth - 1]
    return frozenset(index for index in (*stages, *asked) if 0 <= index < depth)


def _check_unchanged(feature: EncoderFeature, tower: nn.Module) -> None:
    """See that a tower still has the blocks, and the way of reading them, that it had when turbovlm was applied."""
    inside = len(feature.tower) + 1 if feature.tower else 0
    names = [feature.names[0][inside:], feature.names[-1][inside:]]
    for name in names:
        try:
            block = tower.get_submodule(name)
        except AttributeError:
            block = None
        if block is None or not any(patch.feature is feature for patch in patches_of(block)):
            raise StateError(f"{_title(feature)} no longer has the blocks that turbovlm was applied to{_AGAIN}")
    skips = feature.layout.skips
    if skips is not None and tower.training and (share := fetch(tower, skips)) > 0:
        raise StateError(
            f"{skips}={share}: in training {_title(feature)} skips blocks at random, and merged tokens with them: set "
            "it to 0, or train after handle.remove()"
        )
    container = tower.get_submodule(names[0].rpartition(".")[0])
    if len(list(container.children())) != feature.blocks_around:
        raise StateError(f"{_title(feature)} has another number of blocks than when turbovlm was applied{_AGAIN}")
    if reads_all(feature.layout, tower) != feature.reads_all:
        raise StateError(f"{_title(feature)} pools its tokens otherwise than when turbovlm was applied{_AGAIN}")


_AGAIN = ": call handle.remove() before such a change, and turbovlm.apply again after it"


def _title(feature: EncoderFeature) -> str:
    return feature.tower or "the model"


def reads_all(layout: Layout, tower: nn.Module, around: Around = ()) -> bool:
    """Whether what reads a tower's output needs every position, as its layout has it."""
    return bool(layout.restore(tower, around) if callable(layout.restore) else layout.restore)


def unknown_owner(tower: nn.Module, around: Around) -> str | None:
    """The class of the nearest module around a tower that reads it, where nothing is known of how; or None.

    Known are those of the tower's own package, of `transformers` those of the same model, and `KNOWN_OWNERS`.

    Args:
        tower: the encoder.
        around: the modules around it, outermost first, itself included.
    """
    own = _package(type(tower))
    for owner in reversed(around):
        if owner is tower or type(owner).__module__.partition(".")[0] in PASS_ON:
            continue
        path = type(owner).__module__
        known = any(path == package or path.startswith(f"{package}.") for package in (own, *KNOWN_OWNERS))
        return None if known else type(owner).__name__
    return None


def _package(cls: type) -> str:
    """What holds the classes that a layout's author has seen: a package, or one model of `transformers`."""
    parts = cls.__module__.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["transformers", "models"] else parts[0]
