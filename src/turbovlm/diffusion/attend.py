"""Attention of merged tokens: in proportion to their sizes, each at the position of the token that it went into.

`diffusers` attends in processors, objects that an attention module calls with itself. For those that are known, a
function here attends with the module's own projections and norms, through `turbovlm.ops.attention`. All others are
called as ever, and take the sizes as a bias in their `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.ops.attention import size_bias
from turbovlm.ops.merging import Merge
from turbovlm.patching import Patch

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of every token's angles, `[batch, tokens, head_dim]` each."""
Function = Callable[[Any, ModuleType, Tensor, Tensor | None, Tensor | None, Rotary | None], Any]
"""`(attention, path, x, text, bias, rotary)`: what a processor does, with a bias `[batch, 1, 1, keys]` on its keys."""

TAKEN = {"encoder_hidden_states", "attention_mask", "image_rotary_emb"}
"""Arguments that the functions here know of; calls with others go to the processor itself."""

BIASED_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_math", "flex", "xformers")
"""Attention backends of `diffusers` that add their mask to the scores."""


@dataclass(frozen=True)
class Attending:
    """How an attention module attends in proportion to sizes.

    Args:
        function: does what the known processors do.
        processors: dotted paths of their classes; subclasses do not count.
        mask_axes: axes of the bias, `[batch, …, keys]`, that all other processors take as `attention_mask`.
    """

    function: Function
    processors: tuple[str, ...]
    mask_axes: int


def attend_merged(
    patch: Patch,
    attention: Any,
    original: Any,
    path: ModuleType,
    merge: Merge,
    x: Tensor,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run an attention on merged tokens.

    Args:
        patch: of the attention module, `attention`, with its `Site`; `original`: what ran before.
        path: from `path_for`.
        merge: what was done to the image's tokens.
        x: what it reads, `[batch, tokens, width]`, the image's tokens merged and last.
        rest, kwargs: its other arguments.

    Raises:
        StateError: the sizes have to count, and the attention backend in use takes no bias.
    """
    attending: Attending = patch.detail.part.attending
    rotary = kwargs.get("image_rotary_emb")
    text = kwargs.get("encoder_hidden_states", rest[0] if rest else None)
    processor = getattr(attention, "processor", None)
    biased = patch.feature.config.proportional and not getattr(attention, "is_cross_attention", False)
    if not biased and rotary is None:
        return original(x, *rest, **kwargs)
    words = x.shape[1] - merge.sizes.shape[1] if text is None else text.shape[1]
    bias = F.pad(size_bias(merge.sizes, x.dtype), (words, 0)) if biased else None
    backend = _backend_of(processor)
    if backend in (None, "native") and _is_known(patch, attention, attending, rest, kwargs):
        turned = None if rotary is None else _rotary_of(merge, rotary)
        return attending.function(attention, path, x, text, bias, turned)
    if bias is not None:
        if backend is not None and backend not in BIASED_BACKENDS:
            raise StateError(
                f"the attention backend {backend!r} takes no mask that is added to the scores, in which the sizes of "
                "merged tokens would be: give proportional=False, or use another backend"
            )
        kwargs["attention_mask"] = bias if attending.mask_axes == bias.ndim else bias.squeeze(1)
    if rotary is None:
        return original(x, *rest, **kwargs)
    return _one_image_at_a_time(original, x, rest, kwargs, _rotary_of(merge, rotary))


def plain_attention(
    attention: Any, path: ModuleType, x: Tensor, text: Tensor | None, bias: Tensor | None, rotary: Rotary | None
) -> Tensor:
    """Self-attention of `Attention` modules: `[batch, tokens, width]`."""
    # By the processor: a module whose projections were fused and parted again keeps the fused one.
    if type(attention.processor).__name__.startswith("Fused"):
        projected = attention.to_qkv(x).chunk(3, dim=-1)
    else:
        projected = attention.to_q(x), attention.to_k(x), attention.to_v(x)
    q, k, v = (each.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for each in projected)
    if attention.norm_q is not None:
        q = attention.norm_q(q)
    if attention.norm_k is not None:
        k = attention.norm_k(k)
    attended = path.attend(q, k, v, bias, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
    return attention.to_out[1](attention.to_out[0](attended))  # type: ignore[no-any-return]


def rotary_attention(
    attention: Any, path: ModuleType, x: Tensor, text: Tensor | None, bias: Tensor | None, rotary: Rotary | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention of FLUX's modules: `[batch, tokens, width]`, and the same of the text where it is given apart."""
    q, k, v = _projected(attention, x, "to_qkv", ("to_q", "to_k", "to_v"))
    q, k = attention.norm_q(q), attention.norm_k(k)
    if text is not None:
        words = _projected(attention, text, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
        normed = attention.norm_added_q(words[0]), attention.norm_added_k(words[1]), words[2]
        q, k, v = (torch.cat(both, dim=1) for both in zip(normed, (q, k, v)))
    if rotary is not None:
        q, k = _rotate(q, rotary), _rotate(k, rotary)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    attended: Tensor = path.attend(q, k, v, bias, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
    if text is None:
        return attended  # the block projects it
    of_text, of_image = torch.split(attended, [text.shape[1], x.shape[1]], dim=1)
    return attention.to_out[1](attention.to_out[0](of_image)), attention.to_add_out(of_text)


def _projected(attention: Any, x: Tensor, fused: str, apart: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Queries, keys and values, `[batch, tokens, heads, head_dim]` each."""
    projected: list[Any]
    if attention.fused_projections:
        projected = list(getattr(attention, fused)(x).chunk(3, dim=-1))
    else:
        projected = [getattr(attention, name)(x) for name in apart]
    return tuple(each.unflatten(-1, (-1, attention.head_dim)) for each in projected)


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of neighbouring channels of `x`, `[batch, tokens, heads, head_dim]`, by its angle."""
    cos, sin = (each.unsqueeze(2) for each in rotary)
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x.float() * cos + across.float() * sin).to(x.dtype)


def _rotary_of(merge: Merge, rotary: tuple[Tensor, Tensor]) -> Rotary:
    """Every image's own angles: the text's, then those of the tokens that its merged ones went into.

    Args:
        rotary: of all tokens of the sequence, `[words + N, head_dim]` each.
    """
    words = len(rotary[0]) - merge.weights.shape[1]
    text = torch.arange(words, device=merge.sizes.device).expand(len(merge.sizes), -1)
    index = torch.cat([text, merge.kept + words], dim=1)
    return rotary[0][index], rotary[1][index]


def _is_known(
    patch: Patch, attention: Any, attending: Attending, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether `attending.function` does all that a call of the module would: no other class, forward or argument."""
    processor = getattr(attention, "processor", None)
    kind = type(processor)
    if f"{kind.__module__}.{kind.__qualname__}" not in attending.processors or rest:
        return False
    if patch.before is not None and getattr(patch.before, "__func__", None) is not patch.method:
        return False
    if getattr(processor, "_parallel_config", None) is not None:
        return False
    if any(value is not None and name not in TAKEN for name, value in kwargs.items()):
        return False
    norms = getattr(attention, "group_norm", None), getattr(attention, "spatial_norm", None)
    adds = getattr(attention, "residual_connection", False), getattr(attention, "rescale_output_factor", 1) != 1
    return norms == (None, None) and not any(adds)


def _backend_of(processor: Any) -> str | None:
    """Name of the backend that a processor leaves its attention to; None where it calls PyTorch's by itself."""
    if not hasattr(processor, "_attention_backend"):
        return None
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend: Any = processor._attention_backend
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(backend, "value", backend))


def _one_image_at_a_time(
    original: Any, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any], rotary: Rotary
) -> Any:
    """Run a processor that takes one set of angles for a whole batch on each image, with its own."""
    outs = []
    for i, tokens in enumerate(torch.split(x, 1)):
        own = {name: _of_image(value, i, len(x)) for name, value in kwargs.items()}
        own["image_rotary_emb"] = rotary[0][i], rotary[1][i]
        outs.append(original(tokens, *rest, **own))
    if isinstance(outs[0], Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(each) for each in zip(*outs))


def _of_image(value: Any, index: int, batch: int) -> Any:
    """What belongs to one image of an argument: a row of tensors that have one for each, also in lists."""
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.ndim > 1 and len(value) == batch else value
    return [_of_image(each, index, batch) for each in value] if isinstance(value, list | tuple) else value
