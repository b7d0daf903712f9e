"""Self-attention of merged tokens: in proportion to their sizes, each at the position of the token that it went into.

The library's own processors attend, whichever they are. The sizes are added where they end, in
`scaled_dot_product_attention`; to those that end elsewhere they are given as a mask. Positions that a block is given,
such as rotary angles, are gathered for the tokens that are left, `turbovlm.diffusion.positions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from turbovlm.errors import StateError

MASKED = "AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor", "IPAdapterXFormersAttnProcessor"
"""Processors of `diffusers` that do not attend by `scaled_dot_product_attention`, and add their mask to the scores."""

BIASED_BACKENDS = ("_native_cudnn", "_native_efficient", "_native_math", "flex", "xformers")
"""Attention backends of `diffusers` that are not PyTorch's own choice and add their mask to the scores."""


@dataclass(frozen=True)
class Attending:
    """How an attention module attends in proportion to sizes.

    Args:
        text: where the text's keys stand: `"front"` or `"behind"` those of the image; None where there are none.
        mask_axes: axes of the bias, `[batch, …, keys]`, that processors take as `attention_mask`; 0 where none does.
        keys_apart: whether keys and values are made of `encoder_hidden_states`, where it is given.
        each: whether every image attends by itself, to those words that are no padding.
        asked: whether other tokens ask, as a sound's do; the image's give keys and values only.
        any_words: whether all other keys are the words', however many there are: those of a text that are kept from
            step to step, or a text in an argument that is not called `encoder_hidden_states`.
        added: name of the argument whose value the module itself adds to the scores, `[batch, 1, 1, keys]`; empty where
            a processor attends.
    """

    text: str | None = None
    mask_axes: int = 0
    keys_apart: bool = False
    each: bool = False
    asked: bool = False
    any_words: bool = False
    added: str = ""


def attend_merged(
    attending: Attending,
    attention: Any,
    original: Any,
    path: ModuleType,
    biases: Biases,
    x: Tensor,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run an attention on merged tokens, in proportion to their sizes.

    Args:
        attention: the module; `original`: what ran before.
        path: from `path_for`.
        biases: of the sizes.
        x: what it reads, `[batch, tokens, width]`.
        rest, kwargs: its other arguments.

    Raises:
        StateError: its attention backend takes no bias, or its processor attends by something else.
    """
    text = kwargs.get("encoder_hidden_states", rest[0] if rest else None)
    # some are given what they read as both
    words = x.shape[1] - biases.bias.shape[-1] if text is None or text is x else text.shape[1]
    bias = biases.beside(attending.text, 0 if attending.asked else words)
    if attending.added:
        return original(x, *rest, **{**kwargs, attending.added: bias})
    processor = getattr(attention, "processor", None)
    if ends_in_sdpa(processor):
        counting = CountSizes(path, attending, biases.bias, bias)
        with counting:
            out = original(x, *rest, **kwargs)
        if not counting.counted:
            raise StateError(
                f"{type(processor).__name__} does not attend by scaled_dot_product_attention, in which the sizes of "
                "merged tokens would count: give proportional=False, or another processor"
            )
        return out
    backend = _backend_of(processor)
    if not attending.mask_axes or not (backend is None or backend in BIASED_BACKENDS):
        raise StateError(
            f"the attention backend {backend!r} takes no mask that is added to the scores, in which the sizes of "
            "merged tokens would be: give proportional=False, or use another backend"
        )
    kwargs["attention_mask"] = bias if attending.mask_axes == bias.ndim else bias.squeeze(1)
    return original(x, *rest, **kwargs)


def ends_in_sdpa(processor: Any) -> bool:
    """Whether what a processor does ends in `scaled_dot_product_attention`, as far as its kind and backend tell."""
    return _backend_of(processor) in (None, "native") and type(processor).__name__ not in MASKED


def beside_words(bias: Tensor, text: str | None, words: int) -> Tensor:
    """A bias on the image's keys with that of the words, 0, on their side, `[batch, 1, 1, keys]`."""
    return F.pad(bias, (words, 0) if text == "front" else (0, words))


class Biases:
    """The bias that lets sizes count, with as many words beside the image's keys as there are.

    Args:
        bias: `size_bias` of the image's tokens, `[batch, 1, 1, tokens]`.
    """

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias
        self._beside: dict[tuple[str | None, int], Tensor] = {}

    def beside(self, text: str | None, words: int) -> Tensor:
        """With that of the words, 0, on their side, `[batch, 1, 1, keys]`; made once."""
        if not words:
            return self.bias
        found = self._beside.get((text, words))
        if found is None:
            found = beside_words(self.bias, text, words)
            self._beside[text, words] = found
        return found


class CountSizes(TorchFunctionMode):
    """Adds a bias to the scores of self-attentions, while it lasts.

    Args:
        path: from `path_for`; it attends.
        attending: how the module attends.
        alone: bias of the image's keys, `[batch, 1, 1, tokens]`.
        beside: the same beside the words', in attention that has them, `[batch, 1, 1, keys]`.
        most: self-attentions that there are at most; they come before attention of any other kind. None for any number.
        traced: whether it acts only while PyTorch compiles what runs, and not once more when that runs.
    """

    def __init__(
        self,
        path: ModuleType,
        attending: Attending,
        alone: Tensor,
        beside: Tensor,
        most: int | None = None,
        traced: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.attending, self.alone, self.beside = path, attending, alone, beside
        self.most, self.traced, self.counted = most, traced, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        idle = self.counted == self.most or (self.traced and not torch.compiler.is_compiling())
        if function is not F.scaled_dot_product_attention or idle:
            # Dynamo cannot look into the method
            return (torch.unflatten if function is Tensor.unflatten else function)(*args, **kwargs)
        named: dict[str, Any] = dict(zip(ARGUMENTS, args)) | kwargs
        q, k, v, mask = named["query"], named["key"], named["value"], named.get("attn_mask")
        keys, alone, beside = k.shape[-2], self.alone.shape[-1], self.beside.shape[-1]
        if self.attending.each:  # how many words are no padding is not known while PyTorch compiles
            bias = beside_words(self.alone[self.counted % len(self.alone)][None], self.attending.text, keys - alone)
        # the image asks: in a sequence with its words, to all of that (words that ask by themselves have fewer keys);
        # alone, to as many keys of words as there are
        elif self.attending.any_words and q.shape[-2] in (alone, keys) and (keys == beside or alone == beside <= keys):
            bias = beside_words(self.alone, self.attending.text, keys - alone)
        # keys of other tokens, such as an image prompt's, are as many as they are; of words there may be keys only
        elif keys in (alone, beside) and (self.attending.asked or q.shape[-2] in (keys, alone)):
            bias = self.beside if keys == beside else self.alone
        else:
            return function(*args, **kwargs)
        self.counted, scale = self.counted + 1, kwargs.get("scale")
        if mask is None:
            return self.path.attend(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return function(q, k, v, attn_mask=mask + bias, scale=scale)


ARGUMENTS = "query", "key", "value", "attn_mask"


def _backend_of(processor: Any) -> str | None:
    """Name of the backend that a processor leaves its attention to; None where it calls PyTorch's by itself."""
    if not hasattr(processor, "_attention_backend"):
        return None
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend: Any = processor._attention_backend
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(backend, "value", backend))
