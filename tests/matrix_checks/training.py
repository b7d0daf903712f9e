"""Gradients, and what trains models: loops, Trainer, checkpointing, several processes and devices, accelerate."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from matrix_cases import Case
from matrix_checks.check import Flat, check, close, differ, gradients, has_head, loss_of, quiet


def same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert wanted and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(found[name], gradient)


def doubled(tree: Any) -> Any:
    def each(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(each, tree)


@check("a training loop of one's own")
def training_loop(case: Case) -> None:
    """A step along the gradient changes the loss by what the gradient says."""
    model, inputs = case.make().double(), doubled(case.inputs())
    with case.apply(model):
        gradient = gradients(model, lambda: case.run(model, inputs))
        slope = float(torch.stack([each.square().sum() for each in gradient.values()]).sum().sqrt())
        weights = {name: p for name, p in model.named_parameters() if name in gradient}

        @torch.no_grad()
        def after(step: float) -> float:
            for name, p in weights.items():
                p.add_(gradient[name], alpha=step / slope)
            return loss_of(case.run(model, inputs)).item()

        measured = []
        for size in (1e-2, 1e-3, 1e-4, 1e-5):  # the longest merge other tokens, the shortest drown in float32
            above, below = after(size), after(-2 * size)
            measured.append((above - below) / (2 * size))
            after(size)
        assert any(abs(each - slope) <= 1e-3 * slope for each in measured), (measured, slope)


@check("`transformers.Trainer`: evaluate and a training step", has_head)
def trainer(case: Case) -> None:
    """Its loss is that of a loop by hand, and its step leaves the weights that a step by hand does."""
    from transformers import Trainer, TrainingArguments

    assert case.head is not None
    model = case.head()
    twin = copy.deepcopy(model)
    batches = [{**case.inputs(seed), **case.labels} for seed in (0, 1)]
    rate = 0.05
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 1, "learning_rate": rate, "optim": "sgd", "lr_scheduler_type": "constant"}
        settings |= {"label_names": list(case.labels) or ["pixel_values"]}  # else no loss is read
        settings |= {"max_grad_norm": 0.0, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
        arguments = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=1, per_device_eval_batch_size=1, **settings
        )
        with quiet(), case.apply(model), case.apply(twin):
            by_hand = Trainer(
                model, arguments, train_dataset=batches[:1], eval_dataset=batches, data_collator=lambda items: items[0]
            )
            with torch.no_grad():
                losses = [float(twin(**batch).loss) for batch in batches]
            found = by_hand.evaluate()["eval_loss"]
            assert abs(found - sum(losses) / 2) < 1e-5
            twin.train()
            twin(**batches[0]).loss.backward()
            with torch.no_grad():
                for parameter in twin.parameters():
                    if parameter.grad is not None:
                        parameter -= rate * parameter.grad
            before = [parameter.clone() for parameter in model.parameters()]
            by_hand.train()
    for parameter, wanted in zip(model.parameters(), twin.parameters()):
        close(parameter.data, wanted.data, atol=1e-5)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


def _checkpointing(model: Any) -> list[Callable[[], Any]]:
    """The ways to turn gradient checkpointing on that the model has."""
    if hasattr(model, "gradient_checkpointing_enable"):

        def enable(reentrant: bool) -> Callable[[], None]:
            settings = {"use_reentrant": reentrant}
            return lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

        return [enable(True), enable(False)]
    if hasattr(model, "enable_gradient_checkpointing"):
        return [model.enable_gradient_checkpointing]
    return [lambda: model.set_grad_checkpointing(True)]


@check("gradient checkpointing", lambda case: case.group != "torchvision")
def gradient_checkpointing(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return case.run(model, inputs)

    with case.apply(model):
        wanted = gradients(model, run)
        for enable in _checkpointing(model):
            enable()
            inputs = tree_map(_with_gradient, case.inputs())
            same_gradients(gradients(model, run), wanted)


def _with_gradient(value: Any) -> Any:
    """Reentrant checkpointing needs an input with a gradient."""
    needs = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.clone().requires_grad_() if needs else value


@check("DistributedDataParallel (gloo, one process)")
def data_distributed(case: Case) -> None:
    import torch.distributed as dist

    model, inputs = case.make(), Flat(case, nn.Identity()).tensors()
    flat = Flat(case, model)
    with case.apply(model):
        wanted = gradients(model, lambda: flat(*inputs))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(flat, find_unused_parameters=True)
            for _ in range(2):
                found = gradients(model, lambda: wrapped(*inputs))
        finally:
            dist.destroy_process_group()
        same_gradients({n: g for n, g in found.items() if n in wanted}, wanted)


@check("`nn.DataParallel`'s replicas")
@torch.no_grad()
def data_parallel(case: Case) -> None:
    """A replica runs on its own weights: here, others than the original's."""
    replicate = sys.modules["torch.nn.parallel.replicate"]
    model, other, inputs = case.make(), case.make(), case.inputs()
    for parameter in other.parameters():
        parameter.mul_(0.9)

    def copied(tensors: Any, devices: Any, detach: bool = False) -> Any:
        return [[t * 0.9 if isinstance(t, nn.Parameter) else t.clone() for t in tensors] for _ in devices]

    with case.apply(model), case.apply(other):
        wanted = case.run(other, inputs)
        differ(wanted, case.run(model, inputs))
        own = replicate._broadcast_coalesced_reshape, replicate._get_device_index
        replicate._broadcast_coalesced_reshape, replicate._get_device_index = copied, lambda device, *_: device
        try:
            replicas = replicate.replicate(model, [0, 1])
        finally:
            replicate._broadcast_coalesced_reshape, replicate._get_device_index = own
        for replica in replicas:
            close(case.run(replica, inputs), wanted)


@check("accelerate: `prepare`, `unwrap_model`")
def accelerated(case: Case) -> None:
    """The unwrapped model runs merged while turbovlm is applied, and as it was after `remove()`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    inputs = case.inputs()
    with torch.no_grad():
        plain = case.run(case.make(), inputs)
        twin = case.make()
        with case.apply(twin):
            wanted = case.run(twin, inputs)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        for remove_first in (False, True):
            model = case.make()
            handle = case.apply(model)
            accelerator = Accelerator(mixed_precision="bf16", cpu=True)
            prepared = accelerator.prepare(model)
            accelerator.backward(loss_of(case.run(prepared, inputs)))
            if remove_first:
                handle.remove()
            unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            with torch.no_grad():
                close(case.run(unwrapped, inputs), plain if remove_first else wanted)
            handle.remove()
            with torch.no_grad():
                close(case.run(unwrapped, inputs), plain)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
