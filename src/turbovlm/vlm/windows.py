"""Windows of a vision tower attended to together: what packed towers do one by one, in one call for each length.

Towers that run several images as one sequence, as Qwen's, attend segment by segment: windows, frames or images. Without
a kernel for such sequences, `transformers` calls attention once for each. Here segments of one length are a batch. No
token is merged, and the numbers are the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.layout import library_version
from turbovlm.errors import UnsupportedModelError
from turbovlm.ops.segments import Segments, attend_within, segments_from, segments_of
from turbovlm.patching import Patch, check_forwards
from turbovlm.registry import class_paths

MODELS = "transformers.models"
ATTENTIONS = tuple(
    f"{MODELS}.{name}"
    for name in (
        "qwen2_vl.modeling_qwen2_vl.VisionAttention",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention",
        "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionAttention",
        "qwen3_5.modeling_qwen3_5.Qwen3_5VisionAttention",
        "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionAttention",
        "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionAttention",
        "glm4v.modeling_glm4v.Glm4vVisionAttention",
        "glm4v_moe.modeling_glm4v_moe.Glm4vMoeVisionAttention",
        "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention",
    )
)
"""Classes whose forward projects by `qkv`, rotates, attends segment by segment, and projects by `proj`."""
CALLED = (
    *("is_flash_attention_requested", "apply_rotary_pos_emb_vision", "ALL_ATTENTION_FUNCTIONS"),
    "eager_attention_forward",
)
"""What their modules have for it."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
"""How far from an attention's own forward ours may be on random tokens, relatively; 5e-2 in other types."""


@dataclass(frozen=True)
class Windows:
    """The settings of `batch_windows`, of which there are none."""

    amount: ClassVar[str] = "batch_windows"
    summary: ClassVar[str] = "segments of one length in one call"


@dataclass(eq=False)
class WindowsFeature:
    """How a packed tower attends to windows of one length together.

    Attributes:
        names: paths of the attention modules.
        config, removed, last: as in `turbovlm.patching.Feature`; nothing is kept of a forward.
    """

    keeps_tokens: ClassVar[bool] = True

    names: tuple[str, ...]
    config: Windows = Windows()
    removed: bool = False
    last: None = None

    def patches(self, model: nn.Module) -> list[Patch]:
        """The forward of every attention module."""
        return [Patch(model.get_submodule(name), "forward", windows_forward, self) for name in self.names]

    def describe(self) -> list[str]:
        """Which attentions run so."""
        first, last = self.names[0], self.names[-1]
        return [f"  {first} … {last}: {len(self.names)} attentions, one call for all windows or images of one length"]


def find_windows(model: nn.Module) -> WindowsFeature:
    """How the packed towers in `model` will attend.

    Raises:
        UnsupportedModelError: there is none, or one that the installed release computes otherwise.
        TurboError: another library has replaced an attention's forward.
    """
    found = [(name, module) for name, module in model.named_modules() if _known_path(module) is not None]
    if not found:
        families = ", ".join(dict.fromkeys(path.split(".")[2] for path in ATTENTIONS))
        raise UnsupportedModelError(
            f"batch_windows: {type(model).__name__} has no vision tower that attends segment by segment, as far as "
            f"turbovlm knows; those of {families} do"
        )
    check_forwards(found, one_device=False)
    for name, module in found:
        _verify(name, module)
    return WindowsFeature(tuple(name for name, _ in found))


def windows_forward(
    patch: Patch, attention: Any, original: Any, /, hidden: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run an attention on a packed sequence, `[tokens, width]`: segments of one length in one call."""
    library = _library(attention)
    segments = None if library.is_flash_attention_requested(attention.config) else segments_of(cu_seqlens)
    if segments is None or len(segments.lengths) == len(segments.groups):
        return original(hidden, cu_seqlens, *args, **kwargs)  # type: ignore[no-any-return]
    arguments = {**dict(zip(("position_embeddings", "max_seqlen"), args)), **kwargs}
    return _attend(attention, library, hidden, segments, arguments)


def _attend(attention: Any, library: Any, hidden: Tensor, segments: Segments, arguments: dict[str, Any]) -> Tensor:
    rest = {k: v for k, v in arguments.items() if k not in ("position_embeddings", "max_seqlen")}
    q, k, v = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
    q, k = library.apply_rotary_pos_emb_vision(q, k, *arguments["position_embeddings"])
    interface = library.ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, library.eager_attention_forward
    )

    def attend(*heads: Tensor) -> Tensor:
        mixed: Tensor = interface(
            attention,
            *heads,
            attention_mask=None,
            scaling=attention.scaling,
            dropout=attention.attention_dropout if attention.training else 0.0,
            is_causal=False,
            **rest,
        )[0]
        return mixed

    mixed = attend_within(attend, segments, *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)))
    projected: Tensor = attention.proj(mixed.flatten(2).squeeze(0))
    return projected


def _known_path(module: nn.Module) -> str | None:
    return next((path for path in class_paths(module) if path in ATTENTIONS), None)


def _library(attention: nn.Module) -> Any:
    """The module of `transformers` with the functions that an attention's own forward calls."""
    path = _known_path(attention)
    assert path is not None
    return sys.modules[path.rpartition(".")[0]]


@torch.no_grad()
def _verify(name: str, attention: Any) -> None:
    """See that an attention's own forward, on random tokens of three segments, is what `windows_forward` makes of it.

    Raises:
        UnsupportedModelError: it is something else in the installed release.
    """
    weight, library = attention.qkv.weight, _library(attention)
    missing = [function for function in CALLED if not hasattr(library, function)]
    if missing:
        raise UnsupportedModelError(
            f"batch_windows: {library.__name__} of {library_version(type(attention))} has no {missing[0]}; that of "
            "transformers ≥ 5.18 does"
        )
    if weight.is_meta or not weight.is_floating_point() or hasattr(weight, "full_tensor"):
        return
    lengths = [4, 3, 4]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(lengths), weight.shape[1], generator=generator).to(weight)
    width = weight.shape[0] // 3 // attention.num_heads
    angles = torch.rand(sum(lengths), width // 2, generator=generator).repeat(1, 2).to(weight.device)
    rotary = (angles.cos(), angles.sin())
    bounds = torch.tensor([0, *lengths], device=weight.device).cumsum(0, dtype=torch.int32)
    own = type(attention).forward(attention, hidden, cu_seqlens=bounds, position_embeddings=rotary)
    segments = segments_from(lengths, weight.device)
    ours = _attend(attention, library, hidden, segments, {"position_embeddings": rotary})
    gap = (ours - own).abs().max() / own.abs().max()
    if not gap <= TOLERANCE.get(hidden.dtype, 5e-2):
        raise UnsupportedModelError(
            f"batch_windows: {name} ({type(attention).__name__}) computes something else in "
            f"{library_version(type(attention))} than turbovlm knows: {gap:.1%} apart on random tokens"
        )
