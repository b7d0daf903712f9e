"""peft's adapters, before turbovlm and after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from matrix_cases import Case
from matrix_checks.check import check, close, differ, loss_of
from matrix_checks.hooks import blocks_of, watched


def lora_targets(case: Case, model: nn.Module) -> list[str]:
    """The linear layers of blocks that the forward calls; where attention packs them, the attention module."""
    with watched(blocks_of(model)) as called, torch.no_grad():
        case.run(model, case.inputs())
    found: list[str] = []
    for path in (next(iter(called)), list(called)[-2]):
        block = blocks_of(model)[path]
        packed = [name for name, module in block.named_modules() if isinstance(module, nn.MultiheadAttention)]
        found += [f"{path}.{name}" for name in packed]
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(tuple(packed) or ("\0",)):
                found.append(f"{path}.{name}")
    return found


def with_lora(case: Case, model: nn.Module, targets: list[str]) -> Any:
    """Adapters that matter, of the same weights each time."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted


def merged(case: Case) -> Any:
    """The model with the adapters' effect in its own weights."""
    model = case.make()
    return with_lora(case, model, lora_targets(case, model)).merge_and_unload().eval()


def trained_adapters(case: Case, adapted: Any) -> set[str]:
    loss_of(case.run(adapted, case.inputs())).backward()
    return {n for n, p in adapted.named_parameters() if "lora_" in n and p.grad is not None and p.grad.any()}


def check_lora(case: Case, adapted: Any) -> None:
    """Of an adapted and accelerated model: output, gradients, and the output once the adapters are merged."""
    inputs, whole, without = case.inputs(), merged(case), case.make()
    with case.apply(whole), case.apply(without), torch.no_grad():
        wanted = case.run(whole, inputs)
        differ(wanted, case.run(without, inputs), by=0.01)
    found = case.run(adapted, inputs)
    close(found.detach(), wanted)
    whole = case.make()
    whole = with_lora(case, whole, lora_targets(case, whole))
    trained = [trained_adapters(case, each) for each in (adapted, whole)]
    assert trained[0] == trained[1], f"no gradient: {', '.join(trained[1] - trained[0])}"
    unloaded = adapted.merge_and_unload().eval()
    with torch.no_grad():
        close(case.run(unloaded, inputs), wanted)


@check("LoRA (peft), then apply; merged and unloaded after it")
def lora_before(case: Case) -> None:
    model = case.make()
    adapted = with_lora(case, model, lora_targets(case, model))
    case.apply(adapted)
    check_lora(case, adapted)


@check("apply, then LoRA (peft); merged and unloaded after it")
def lora_after(case: Case) -> None:
    model = case.make()
    targets = lora_targets(case, model)
    case.apply(model)
    check_lora(case, with_lora(case, model, targets))
