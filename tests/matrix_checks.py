"""What people do with a model, each as a check that an accelerated one does it right: `check(case)` returns or raises.

Each compares with a value that was had another way: the accelerated model by itself, a loop by hand, a model whose
weights were changed instead.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import turbovlm
from matrix_cases import Case

ATOL = 1e-4


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        applies: of which families it can be asked at all.
        only: families that it is run for, where a cell takes seconds; they stand for the others.
    """

    name: str
    run: Callable[[Case], None]
    applies: Callable[[Case], bool]
    only: tuple[str, ...]


CHECKS: dict[str, Check] = {}
Run = Callable[[Case], None]


def check(
    name: str, applies: Callable[[Case], bool] = lambda case: True, only: tuple[str, ...] = ()
) -> Callable[[Run], Run]:
    """Enter a function in the table under a name."""

    def enter(run: Run) -> Run:
        CHECKS[name] = Check(name, run, applies, only)
        return run

    return enter


def in_transformers(case: Case) -> bool:
    return case.library == "transformers"


def has_head(case: Case) -> bool:
    return case.head is not None


def close(found: torch.Tensor, wanted: torch.Tensor, atol: float = ATOL) -> None:
    scale = max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * scale)


def differ(found: torch.Tensor, other: torch.Tensor, by: float = 1e-4) -> None:
    assert found.shape != other.shape or (found - other).abs().max() > by, "no effect"


class Flat(nn.Module):
    """A model as a function of its input tensors, by position."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.model, self.case = model, case
        leaves, self.spec = tree_flatten(case.inputs())
        self.others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        leaves, _ = tree_flatten(self.case.inputs(seed))
        return tuple(leaves[i] for i in self.places)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        leaves = list(self.others)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        return self.case.run(self.model, tree_unflatten(leaves, self.spec))


# ------------------------------------------------------------------------------------------------ what is hooked


def attention_of(block: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child
        for name, child in block.named_children()
        if "Attention" in type(child).__name__ and any(True for _ in child.parameters())
    }


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks by path: members of a list that have an attention of their own."""
    return {
        f"{path}.{name}" if path else name: block
        for path, holder in model.named_modules()
        if isinstance(holder, nn.ModuleList | nn.Sequential)
        for name, block in holder.named_children()
        if attention_of(block)
    }


def attentions_of(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules of blocks, and what has weights, or drops some, inside them."""
    found: dict[str, nn.Module] = {}
    for path, block in blocks_of(model).items():
        for name, attention in attention_of(block).items():
            found[f"{path}.{name}"] = attention
            for inner, module in attention.named_modules():
                if not list(module.children()) and (list(module.parameters()) or isinstance(module, nn.Dropout)):
                    found[f"{path}.{name}.{inner}"] = module
    return found


def others_of(model: nn.Module) -> dict[str, nn.Module]:
    """Norms and the MLP's layers of blocks."""
    attentions = tuple(attentions_of(model))
    return {
        f"{path}.{name}": module
        for path, block in blocks_of(model).items()
        for name, module in block.named_modules()
        if not list(module.children()) and list(module.parameters()) and not f"{path}.{name}".startswith(attentions)
    }


@contextlib.contextmanager
def watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """How many tokens each module's output had, per call."""
    calls: dict[str, list[int]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            out = first_of(output)
            calls.setdefault(name, []).append(out.shape[-2] if out.ndim > 1 else 0)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def tokens_of(handle: Any, plain: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    """Tokens in each block of an encoder that merges, before the merge and behind it, by path.

    `plain`: what came out of each block when nothing merged.
    """
    if not any(hasattr(feature, "schedule") for feature in getattr(handle, "features", ())):
        return {}
    first = handle.schedules[0].blocks[0]
    schedule = handle.schedule(plain[first][0])
    return dict(zip(schedule.blocks, zip(schedule.tokens, schedule.tokens[1:])))


def first_of(out: Any) -> torch.Tensor:
    """The first tensor of what a module returns."""
    return next(each for each in out if each is not None) if isinstance(out, tuple) else out


def instead_of(out: Any, tensor: torch.Tensor) -> Any:
    """What a module returns, with another first tensor."""
    return tuple(tensor if each is first_of(out) else each for each in out) if isinstance(out, tuple) else tensor


@check("forward hooks on blocks that read")
@torch.no_grad()
def hooks_on_blocks(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    with watched(blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model) as handle:
        wanted = case.run(model, inputs)
        with watched(blocks_of(model)) as calls:
            assert torch.equal(case.run(model, inputs), wanted)
        assert {name: len(seen) for name, seen in calls.items()} == {name: len(seen) for name, seen in plain.items()}
        towers = tokens_of(handle, plain)
        for name, (_, behind) in towers.items():
            restored = name == list(towers)[-1] and handle.features[0].restore
            assert calls[name] == (plain[name] if restored else [behind]), name


@check("forward hooks on blocks that change the output")
@torch.no_grad()
def hooks_that_change_blocks(case: Case) -> None:
    """Another tensor given back counts like the same change made in place."""
    model, inputs = case.make(), case.inputs()
    with watched(blocks_of(model)) as plain:
        case.run(model, inputs)
    block = blocks_of(model)[next(iter(plain))]

    def in_place(module: nn.Module, args: Any, out: Any) -> None:
        first_of(out).mul_(1.5)

    def another(module: nn.Module, args: Any, out: Any) -> Any:
        return instead_of(out, first_of(out) * 1.5)

    with case.apply(model):
        unchanged = case.run(model, inputs)
        found = []
        for hook in (in_place, another):
            handle = block.register_forward_hook(hook)
            try:
                found.append(case.run(model, inputs))
            finally:
                handle.remove()
    differ(found[0], unchanged)
    close(found[1], found[0])


@check("forward hooks on attention modules that read")
@torch.no_grad()
def hooks_on_attention(case: Case) -> None:
    """Whatever the model calls in its attention is called, with the tokens that are there."""
    model, inputs = case.make(), case.inputs()
    with watched(attentions_of(model) | blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model) as handle:
        wanted = case.run(model, inputs)
        with watched(attentions_of(model)) as calls:
            found = case.run(model, inputs)
        if "left whole" not in str(handle):  # parts of a denoiser that hooks look into, which it says
            close(found, wanted)
        missing = [name for name in plain if name not in calls and name not in blocks_of(model)]
        assert not missing, f"never called: {', '.join(missing)}"
        for path, (before, _) in tokens_of(handle, plain).items():
            for name in attention_of(model.get_submodule(path)):
                assert set(calls[f"{path}.{name}"]) == {before}, name


@check("forward hooks on attention modules that change the output")
@torch.no_grad()
def hooks_that_change_attention(case: Case) -> None:
    """With nothing merged the hooked model itself, and merged it counts as well."""
    model, inputs = case.make(), case.inputs()
    with watched(blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model):
        unchanged = case.run(model, inputs)

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return instead_of(out, first_of(out) * 3)

    for path in plain:
        for attention in attention_of(blocks_of(model)[path]).values():
            attention.register_forward_hook(hook)
    wanted = case.run(model, inputs)
    with case.apply(model):
        differ(case.run(model, inputs), unchanged, by=0.01)
    if "r" in (case.settings or {}):
        with turbovlm.apply(model, r=0, trace=True):
            close(case.run(model, inputs), wanted)


@check("forward hooks on norms and the MLP's layers")
@torch.no_grad()
def hooks_on_the_rest(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    with watched(others_of(model) | blocks_of(model)) as plain:
        case.run(model, inputs)
    with case.apply(model) as handle:
        with watched(others_of(model)) as calls:
            case.run(model, inputs)
        missing = [name for name in plain if name not in calls and name not in blocks_of(model)]
        assert not missing, f"never called: {', '.join(missing)}"
        for path, (before, behind) in tokens_of(handle, plain).items():
            for name in (name for name in calls if name.startswith(f"{path}.")):
                linear = isinstance(model.get_submodule(name), nn.Linear)
                assert set(calls[name]) <= ({behind} if linear else {before, behind}), (name, calls[name])
        if case.group == "diffusers":
            assert "left whole" in str(handle)
        elif "visual_keep" in (case.settings or {}):
            assert any(sum(seen) < sum(plain[name]) for name, seen in calls.items()), "nothing got fewer tokens"


# ----------------------------------------------------------------------------------------------------- adapters


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


# ----------------------------------------------------------------------------------------------------- training


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A weighted mean: outputs of length 1 have one too that is not constant."""
    weights = torch.arange(out.numel(), dtype=out.dtype).cos().view(out.shape)
    return (out * weights).sum() / out.numel() ** 0.5


def gradients(model: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(run()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


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


# ----------------------------------------------------------------------------------------- programs of PyTorch


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
    name, weights = next((n, p) for n, p in flat.named_parameters() if n.endswith("weight") and p.ndim == 2)

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


# ------------------------------------------------------------------------------------- files, numbers, outputs


@check("`state_dict`, `save_pretrained`, `deepcopy`, `pickle`")
@torch.no_grad()
def persistence(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    weights, plain = {name: value.clone() for name, value in model.state_dict().items()}, case.run(model, inputs)

    def has_weights(state: dict[str, torch.Tensor]) -> None:
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[name], value) for name, value in weights.items())

    model = case.make()  # libraries put hooks that do not pickle on a model that has run
    with case.apply(model):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        wanted = case.run(model, inputs)
        has_weights(model.state_dict())
        for twin in (*twins, copy.deepcopy(model)):
            assert torch.equal(case.run(twin, inputs), wanted)
            if case.settings is not None:
                turbovlm.get_handle(twin).remove()
            assert torch.equal(case.run(twin, inputs), plain)
        fresh = case.make()
        fresh.load_state_dict(model.state_dict())
        close(case.run(fresh, inputs), plain)
        model.load_state_dict({name: value * 0 for name, value in weights.items()})
        model.load_state_dict(weights)
        assert torch.equal(case.run(model, inputs), wanted)
        if hasattr(model, "save_pretrained"):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                loaded = type(model).from_pretrained(folder).eval()
            has_weights(loaded.state_dict())
            close(case.run(loaded, inputs), plain)


@check("autocast to bfloat16")
@torch.no_grad()
def autocast(case: Case) -> None:
    """The model's own dtype; with nothing merged its own numbers; merged nearer to float32 than to the full model."""
    model, inputs = case.make(), case.inputs()
    plain = case.run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = case.run(model, inputs)
    with case.apply(model):
        wanted = case.run(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = case.run(model, inputs)
    assert found.dtype == rounded.dtype and found.isfinite().all() and found.shape == wanted.shape
    scale = float(plain.abs().max())
    assert (found.float() - wanted).abs().mean() < 0.3 * scale
    if "r" in (case.settings or {}):
        with turbovlm.apply(model, r=0, trace=True), torch.autocast("cpu", torch.bfloat16):
            close(case.run(model, inputs).float(), rounded.float(), atol=0.06)


@check("`output_hidden_states=True`", in_transformers)
@torch.no_grad()
def hidden_states(case: Case) -> None:
    """As many as the model's own, each with all positions; those of what was one token behind a block are alike.

    Words that read fewer image tokens are fewer in each alike.
    """
    model, inputs = case.make(), case.inputs()
    inside = {"restore": "copy", "trace": True} if "r" in (case.settings or {}) else {}
    with turbovlm.apply(model, **case.settings, **inside) if case.settings else case.apply(model):
        bare = case.run(model, inputs)
    plain = hidden_of(model(**inputs, output_hidden_states=True))
    with turbovlm.apply(model, **case.settings, **inside) if case.settings else case.apply(model) as handle:
        out = model(**inputs, output_hidden_states=True)
        found, given = hidden_of(out), case.output(out)
        if case.group == "language" or not inside:
            assert len(found) == len(plain) and len({each.shape[1] for each in found[:-1]}) == 1
            close(given, bare)
            return
        assert [each.shape for each in found[:-1]] == [each.shape for each in plain[:-1]]
        close(found[0], plain[0])
        for trace, each in zip(handle.trace, found[1:-1]):
            tokens = each.new_zeros(each.shape[0], trace.sizes.shape[1], each.shape[2])
            source = trace.source[..., None].expand(-1, -1, each.shape[2])
            close(tokens.scatter(1, source, each).gather(1, source), each)
            differ(each, each.roll(1, dims=1))
        close(given, bare)


def hidden_of(out: Any) -> tuple[torch.Tensor, ...]:
    names = ("hidden_states", "decoder_hidden_states", "language_model_outputs")
    found = next(value for name in names if (value := getattr(out, name, None)) is not None)
    return found.hidden_states if hasattr(found, "hidden_states") else found


def maps_of(model: Any, inputs: Any, in_config: bool) -> tuple[torch.Tensor, ...]:
    model.set_attn_implementation("eager")
    if not in_config:
        return attentions_in(model(**inputs, output_attentions=True))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.output_attentions = True
    return attentions_in(model(**inputs))


def attentions_in(out: Any) -> tuple[torch.Tensor, ...]:
    names = ("attentions", "decoder_attentions", "language_model_outputs")
    found = next((value for name in names if (value := getattr(out, name, None)) is not None), ())
    return found.attentions if hasattr(found, "attentions") else found


@torch.no_grad()
def attention_maps(case: Case, in_config: bool) -> None:
    """As many maps as the model has, whose rows sum to 1."""
    inputs = case.inputs()
    plain = maps_of(case.make(), inputs, in_config)
    assert plain and all(each is not None for each in plain)
    model = case.make()
    with case.apply(model):
        found = maps_of(model, inputs, in_config)
    assert len(found) == len(plain) and all(each is not None for each in found)
    for each in found:
        rows = each.sum(-1)
        close(rows[rows > 0.5], torch.ones_like(rows[rows > 0.5]))


@check("`output_attentions=True` in the call", in_transformers)
def attentions_in_the_call(case: Case) -> None:
    attention_maps(case, in_config=False)


@check("`output_attentions=True` in the config", in_transformers)
def attentions_in_the_config(case: Case) -> None:
    attention_maps(case, in_config=True)


# ----------------------------------------------------------------------------------------------------- pipelines


def has_pipeline(case: Case) -> bool:
    plain = case.first().keys() in ({"pixel_values"}, {"input_ids", "attention_mask"})
    return bool(case.pipes) or case.name == "llava" or (in_transformers(case) and plain and case.name != "video_mae")


@check("`transformers.pipeline`, pipelines of `diffusers`", has_pipeline)
@torch.no_grad()
def pipelines(case: Case) -> None:
    if case.pipes:
        for name in case.pipes:
            pipeline_of_images(case, name)
    elif case.group == "text":
        pipeline_of_text(case)
    elif case.group == "language":
        pipeline_of_a_prompt(case)
    else:
        pipeline_of_an_encoder(case)


def pipeline_of_images(case: Case, name: str) -> None:
    """As with the denoiser accelerated by itself, and not as without."""
    from pipelines import PIPES

    made = PIPES[name]

    def images(pipe: Any) -> torch.Tensor:
        size = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(pipe(**made.inputs(64, 64), **size).images)

    pipe, twin = made(), made()
    plain = images(pipe)
    denoiser = next(part for part in ("unet", "transformer") if getattr(twin, part, None) is not None)
    with case.apply(pipe), case.apply(getattr(twin, denoiser)):
        found = images(pipe)
        close(found, images(twin))
        if case.settings is not None:
            differ(found, plain)
    assert torch.equal(images(pipe), plain)


def pictures() -> list[Any]:
    from PIL import Image

    pixels = [torch.rand(6, 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return [Image.fromarray((p * 255).byte().numpy()).resize((48, 48)) for p in pixels]


def pipeline_of_an_encoder(case: Case) -> None:
    from transformers import ViTImageProcessor, pipeline

    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    inputs = processor(pictures(), return_tensors="pt")
    model = case.make()
    with case.apply(model):
        found = pipeline("image-feature-extraction", model=model, image_processor=processor)(pictures())
        for each, wanted in zip(found, case.run(model, inputs)):
            close(torch.tensor(each)[0], wanted)
    if case.head is None:
        return
    model = case.head()
    with case.apply(model):
        found = pipeline("image-classification", model=model, image_processor=processor)(pictures(), top_k=5)
        for each, wanted in zip(found, model(**inputs).logits.softmax(-1)):
            scores = {row["label"]: row["score"] for row in each}
            close(torch.tensor([scores[f"LABEL_{i}"] for i in range(5)]), wanted)


def pipeline_of_text(case: Case) -> None:
    from transformers import pipeline

    words = tokenizer()
    text = " ".join(f"w{i}" for i in range(20, 40))
    model = case.make()
    with case.apply(model):
        (found,) = pipeline("feature-extraction", model=model, tokenizer=words)(text)
        close(torch.tensor(found), case.run(model, words(text, return_tensors="pt"))[0])


def pipeline_of_a_prompt(case: Case) -> None:
    """The words that `generate` gives by itself."""
    import transformers

    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**size),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    model, (picture, _), text = case.make(), pictures(), "<image> w20 w21"
    asked = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [90, 91], "eos_token_id": None}
    with quiet(), case.apply(model):
        generator = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        (answer,) = generator(images=picture, text=text, return_full_text=False, generate_kwargs=asked)
        inputs = processor(images=picture, text=text, return_tensors="pt")
        new = model.generate(**inputs, **asked)[:, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"].split() == processor.decode(new[0]).split()
    assert len(answer["generated_text"].split()) == 5


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    names = ["<pad>", "</s>", "<s>", "<unk>", *(f"w{i}" for i in range(4, 90)), "<image>"]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, model_max_length=64)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.model_input_names = ["input_ids", "attention_mask"]
    return fast
