"""Weights in fewer bits, by torchao and bitsandbytes: what merging is measured beside, and on top of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch.nn as nn

from turbovlm.errors import ConfigError, TurboError

NF4_BLOCK = 64
"""Weights that share a scale; bitsandbytes' kernel for CPUs takes as many outputs at a time."""


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Quantise every `nn.Linear` of the model, in place; its subclasses stay as they are.

    Args:
        model: any module, on the device that it runs on.
        kind: `"int8"`: weights in 8 bits, products as before; `"int8-dynamic"`: activations too, rounded as they come,
            and products of integers; both by torchao. `"nf4"`: weights in 4 bits, QLoRA's NormalFloat in blocks of 64,
            by bitsandbytes; it needs no data, where GPTQ does. Layers with a side that is no multiple of 64, such as
            classifiers of 1,000 classes, stay as they are.

    Returns:
        The model.

    Raises:
        ConfigError: an unknown kind.
        TurboError: the library is not installed, or there is no `nn.Linear`.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(f"quantize={kind!r}: must be one of {', '.join(QUANTIZATIONS)}")
    if not any(_is_linear(module) for module in model.modules() if module is not model):
        raise TurboError(f"quantize={kind!r}: there is no nn.Linear in this {type(model).__name__}")
    try:
        QUANTIZATIONS[kind](model)
    except ImportError as error:
        library = "bitsandbytes" if kind == "nf4" else "torchao"
        raise TurboError(f"quantize={kind!r} needs {library}: pip install {library} ({error})") from error
    return model


@contextlib.contextmanager
def quantized(model: nn.Module, kind: str) -> Iterator[None]:
    """The model quantised in between, and with its own weights again after; see `quantize` for `kind` and errors."""
    own = [(m, dict(m.__dict__), dict(m._parameters), dict(m._modules)) for m in model.modules()]
    try:
        quantize(model, kind)
        yield
    finally:
        for module, attributes, parameters, modules in own:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(modules)


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers as they lie in memory, the scales of quantised ones included."""
    return sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's: several tensors that look like one
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)  # bitsandbytes'
    scales = state.as_dict(packed=True).values() if state is not None else ()
    return int(tensor.numel() * tensor.element_size()) + sum(map(_bytes, scales))


def _is_linear(module: nn.Module, name: str = "") -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear


def _int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=_is_linear)


def _int8_dynamic(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_linear)


def _nf4(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if _is_linear(linear) and not (linear.in_features % NF4_BLOCK or linear.out_features % NF4_BLOCK):
                weight, bias = linear.weight, linear.bias is not None
                kind = {"compute_dtype": weight.dtype, "quant_type": "nf4"}
                layer = Linear4bit(linear.in_features, linear.out_features, bias, **kind).to(weight.dtype)
                layer.load_state_dict(linear.state_dict())
                setattr(module, name, layer.to(weight.device).train(linear.training).requires_grad_(False))


QUANTIZATIONS: Mapping[str, Callable[[nn.Module], None]] = {
    "int8": _int8,
    "int8-dynamic": _int8_dynamic,
    "nf4": _nf4,
}
"""In place."""
