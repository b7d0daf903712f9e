"""Threads, and what PyTorch makes of a model: traces, exports, compiled graphs, transforms."""

from __future__ import annotations

import io
import threading
from typing import Any

import torch
import torch.nn as nn

from matrix_cases import Case
from matrix_checks.check import ATOL, Flat, check, close, loss_of
from matrix_checks.hooks import blocks_of, first_of


@check("two threads")
def threads(case: Case) -> None:
    model = case.make()
    wrong: list[Any] = []
    with case.apply(model):
        with torch.no_grad():
            pairs = [(case.inputs(seed), case.run(model, case.inputs(seed))) for seed in (0, 1)]

        def run(inputs: Any, wanted: torch.Tensor) -> None:
            with torch.no_grad():
                for _ in range(4):
                    try:
                        close(case.run(model, inputs), wanted)
                    except BaseException as error:
                        wrong.append(error)
                        raise

        workers = [threading.Thread(target=run, args=pair) for pair in pairs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong, wrong[0]


@check("`torch.jit.trace`")
@torch.no_grad()
def jit_trace(case: Case) -> None:
    model = case.make()
    flat = Flat(case, model)
    with case.apply(model):
        traced = torch.jit.trace(flat, flat.tensors(), check_trace=False)
        for seed in (1, 0):
            close(traced(*flat.tensors(seed)), flat(*flat.tensors(seed)))


ONE_EACH = ("vit", "timm_eva02", "torchvision", "open_clip", "bert", "llava", "sd15", "flux")
"""Families that stand for their libraries where a cell takes seconds."""


@check("`torch.onnx.export(dynamo=False)`, in onnxruntime", only=ONE_EACH)
@torch.no_grad()
def onnx(case: Case) -> None:
    import onnxruntime

    model = case.make()
    flat = Flat(case, model)
    with case.apply(model):
        file = io.BytesIO()
        names = [f"in{i}" for i in range(len(flat.places))]
        torch.onnx.export(flat, flat.tensors(), file, dynamo=False, opset_version=18, input_names=names)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        taken = {each.name for each in session.get_inputs()}
        other = flat.tensors(1)
        given = {name: tensor.numpy() for name, tensor in zip(names, other) if name in taken}
        close(torch.from_numpy(session.run(None, given)[0]), flat(*other))


@check("`torch.export`", only=ONE_EACH)
@torch.no_grad()
def export(case: Case) -> None:
    model = case.make()
    flat = Flat(case, model)
    with case.apply(model):
        exported = torch.export.export(flat, flat.tensors()).module()
        close(exported(*flat.tensors(1)), flat(*flat.tensors(1)))


@check("`torch.compile`, in one graph", only=ONE_EACH)
@torch.no_grad()
def compile_(case: Case) -> None:
    model = case.make()
    flat = Flat(case, model)
    with case.apply(model):
        wanted = [flat(*flat.tensors(seed)) for seed in (0, 1)]
        torch._dynamo.reset()
        compiled = torch.compile(flat, fullgraph=True, dynamic=False, backend="aot_eager")
        for seed, each in enumerate(wanted):
            close(compiled(*flat.tensors(seed)), each)
    torch._dynamo.reset()


@check("`torch.func`: `vmap` over images, per-sample gradients")
def per_sample(case: Case) -> None:
    model = case.make()
    flat = Flat(case, model)
    tensors = flat.tensors()
    along = tuple(0 if tensor.ndim and tensor.shape[0] == 2 else None for tensor in tensors)
    trained = ((n, p) for n, p in flat.named_parameters() if p.requires_grad)
    name, weights = next((n, p) for n, p in trained if n.endswith("weight") and p.ndim == 2)

    def one(value: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        single = [part if axis is None else part[None] for part, axis in zip(parts, along)]
        return torch.func.functional_call(flat, {name: value}, tuple(single))

    def loss(value: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        return loss_of(one(value, *parts))

    with case.apply(model):
        with torch.no_grad():
            close(torch.func.vmap(one, in_dims=(None, *along))(weights, *tensors).flatten(0, 1), flat(*tensors))
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *along))(weights.detach(), *tensors)
        for i in range(2):
            parts = [part if axis is None else part[i] for part, axis in zip(tensors, along)]
            (wanted,) = torch.autograd.grad(loss(weights, *parts), weights)
            close(found[i], wanted, 5 * ATOL)  # through systems of equations, in float32


@check("`create_feature_extractor` (`torch.fx`)", lambda case: case.group in ("timm", "torchvision"))
@torch.no_grad()
def feature_extractor(case: Case) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, (inputs, *_) = case.make(), Flat(case, nn.Identity()).tensors()
    nodes = list(blocks_of(model))[1:3]
    seen: dict[str, torch.Tensor] = {}
    with case.apply(model):
        for node in nodes:
            block = model.get_submodule(node)
            block.register_forward_hook(lambda module, args, out, node=node: seen.update({node: first_of(out)}))
        model(inputs)
        wanted = dict(seen)
        found = create_feature_extractor(model, nodes)(inputs)
    for node in nodes:
        close(found[node], wanted[node])
