"""What the trainings of generative models share: averaged weights, flow matching, checkpoints, sheets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

GAP = 2
COLUMNS = 8
RATE, WARMUP, AVERAGE = 2e-3, 200, 0.995


@dataclass
class Training:
    """A transformer in training: Muon for the matrices of its blocks, AdamW for the rest, an average of its weights.

    Attributes:
        model: what learns.
        average: the same model, its weights the average over about 200 steps.
        optimizers: Muon and AdamW.
        step: steps so far.
    """

    model: nn.Module
    average: nn.Module
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    step: int = 0

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        muon, adamw = self.optimizers
        return {"model": self.model, "average": self.average, "muon": muon, "adamw": adamw}


def restored(model: nn.Module, average: nn.Module, checkpoint: Path, weights: Path) -> Training:
    """Both as the checkpoint has them, or else the weights, or else as `model` is."""
    average.eval().requires_grad_(False)
    inner = [part for name, part in model.named_parameters() if part.ndim == 2 and "blocks." in name]
    outer = [part for name, part in model.named_parameters() if part.ndim != 2 or "blocks." not in name]
    muon = torch.optim.Muon(inner, lr=RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    training = Training(model.train(), average, (muon, torch.optim.AdamW(outer, lr=RATE, betas=(0.9, 0.99))))
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in training.parts.items():
            part.load_state_dict(saved[name])
        training.step = saved["step"]
        return training
    if weights.exists():
        model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    average.load_state_dict(model.state_dict())
    return training


def saved(training: Training, folder: Path, weights: Path, about: dict[str, Any]) -> None:
    """The checkpoint, the average as fp16, and a line of the log."""
    content = {name: part.state_dict() for name, part in training.parts.items()}
    new = folder / "checkpoint.new"
    torch.save({**content, "step": training.step}, new)
    new.replace(folder / "checkpoint.pt")
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in training.average.state_dict().items()}, weights)
    with (folder / "loss.jsonl").open("a") as log:
        log.write(json.dumps({"step": training.step, **about}) + "\n")


def train(
    training: Training,
    loss_of: Callable[[int], Tensor],
    save: Callable[[float], None],
    sheet: Callable[[], None],
    minutes: float,
    rate: float,
    fade: bool,
) -> None:
    """Steps for so many minutes; a checkpoint every five, a sheet every fifteen, and both at the end.

    Args:
        training: what goes on.
        loss_of: the loss of a step by its number, to go backwards from.
        save: writes a checkpoint; it is given the mean loss of the last 200 steps.
        sheet: writes a sheet of samples.
        minutes: 0 for no step.
        rate: the learning rate behind the warm-up.
        fade: whether it goes to 0 in this time.
    """
    losses: list[float] = []
    begin = saved_at = shown_at = time.monotonic()
    with tqdm(initial=training.step, unit=" steps", mininterval=10) as bar:
        while (share := (time.monotonic() - begin) / (60 * minutes or 1)) < bool(minutes):
            now = rate * min(1, (training.step + 1) / WARMUP) * (1 - share if fade else 1)
            losses = [*losses[-199:], descend(training, loss_of(training.step), now)]
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}")
            if time.monotonic() > saved_at + 300:
                save(sum(losses) / len(losses))
                saved_at = time.monotonic()
            if time.monotonic() > shown_at + 900:
                sheet()
                shown_at = time.monotonic()
    save(sum(losses) / max(len(losses), 1))
    sheet()


def descend(training: Training, loss: Tensor, rate: float) -> float:
    """One step down, and the average after it; the loss."""
    training.model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    for optimizer in training.optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    training.step += 1
    blend(training.average, training.model, min(AVERAGE, (1 + training.step) / (10 + training.step)))
    return float(loss.detach())


def noise_levels(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Shares of noise, `[batch]`, spread over the batch: uniform, and shifted as a scheduler shifts them."""
    spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return shift * spread / (1 + (shift - 1) * spread)


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's, by 1 − `decay` of the way."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in rows of eight, enlarged to 128 pixels."""
    cell = images[0].width + GAP
    rows = -(-len(images) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * cell, rows * cell), "white")
    for i, image in enumerate(images):
        whole.paste(image, (i % COLUMNS * cell, i // COLUMNS * cell))
    scale = 128 // images[0].width
    return whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST)
