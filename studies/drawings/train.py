"""Train the small text-to-image model that is like FLUX, on small images first.

    python studies/emoji/prepare.py                                 # fetches the drawings
    python studies/drawings/train.py --size 16 --minutes 20         # goes on from the last checkpoint, or else weights
    python studies/drawings/train.py --size 32 --minutes 40
    python studies/drawings/train.py --size 64 --minutes 60 --fade
    python studies/drawings/train.py --size 64 --minutes 0          # only writes the weights of the last checkpoint

Flow matching: the velocity from image to noise, at times spread as the scheduler's, 10 % of the prompts empty, fp32,
Muon for the matrices of the blocks and AdamW for the rest, an average of the weights over about 200 steps. A checkpoint
every five minutes, a sheet of samples every ten, both under studies/drawings/data; the averaged weights go to the
package as fp16.

A smaller image shows the same scene in fewer tokens. They stand at the positions of what they show, so that larger
images bring finer positions and no new ones, and what was learnt of where things are stays true.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from turbovlm_lab.zoo.drawings import PATCH, SHIFT, SIDE, WEIGHTS, drawings_pipeline, drawings_transformer

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from prepare import DATA
from scenes import Emoji, load_emoji, scenes
from training import blend, tiled

FOLDER = Path(__file__).parent / "data"
CHECKPOINT = FOLDER / "checkpoint.pt"
BATCHES = {16: 32, 32: 16, 64: 8}
RATE, WARMUP, AVERAGE = 2e-3, 200, 0.995
SHEET = ("red apple", "dog face", "tulip", "octopus", "hamburger", "penguin", "watermelon", "butterfly")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=BATCHES, default=SIDE, help="of the images, in pixels (default 64)")
    parser.add_argument("--minutes", type=float, default=60, help="how long, this time (default 60)")
    parser.add_argument("--fade", action="store_true", help="let the learning rate go to 0 in this time")
    parser.add_argument("--rate", type=float, default=RATE, help=f"the learning rate (default {RATE:g})")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="where the weights go")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    emoji = load_emoji(DATA)
    state, step = restored(args.weights)
    model, average, optimizers = state["model"], state["average"], [state["muon"], state["adamw"]]
    words, means = embedded([*emoji.prompts, ""])
    losses: list[float] = []
    begin = saved_at = shown_at = time.monotonic()
    with tqdm(initial=step, unit=" steps", mininterval=10) as bar:
        while (share := (time.monotonic() - begin) / (60 * args.minutes or 1)) < bool(args.minutes):
            rate = args.rate * min(1, (step + 1) / WARMUP) * (1 - share if args.fade else 1)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
            losses.append(train_step(model, optimizers, emoji, words, means, args.size, step))
            step += 1
            blend(average, model, min(AVERAGE, (1 + step) / (10 + step)))
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}")
            if time.monotonic() > saved_at + 300:
                save(state, step, args.size, losses, args.weights)
                saved_at = time.monotonic()
            if time.monotonic() > shown_at + 600:
                sheet(average, args.size)
                shown_at = time.monotonic()
    save(state, step, args.size, losses, args.weights)
    sheet(average, args.size)


def restored(weights: Path) -> tuple[dict[str, Any], int]:
    """Model, average and optimizers, as the checkpoint has them, or the weights, or new; and the steps so far."""
    torch.manual_seed(0)
    model, average = fresh(drawings_transformer()).train(), drawings_transformer().eval().requires_grad_(False)
    inner = [part for name, part in model.named_parameters() if part.ndim == 2 and "blocks." in name]
    outer = [part for name, part in model.named_parameters() if part.ndim != 2 or "blocks." not in name]
    state: dict[str, Any] = {
        "model": model,
        "average": average,
        "muon": torch.optim.Muon(inner, lr=RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(outer, lr=RATE, weight_decay=0.01, betas=(0.9, 0.99)),
    }
    step = 0
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        step = saved["step"]
    else:
        if weights.exists():
            model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        average.load_state_dict(model.state_dict())
    return state, step


@torch.no_grad()
def fresh(model: Any) -> nn.Module:
    """Let every block begin as the identity and the model as nought, and words count as much as pixels."""
    doubles, singles = model.transformer_blocks, model.single_transformer_blocks
    modulations = [norm for block in doubles for norm in (block.norm1, block.norm1_context)]
    modulations += [block.norm for block in singles]
    for linear in (*(norm.linear for norm in modulations), model.norm_out.linear, model.proj_out):
        linear.weight.zero_()
        linear.bias.zero_()
    for linear in (model.context_embedder, model.time_text_embed.text_embedder.linear_1):
        linear.weight *= 3  # MiniLM's words have a standard deviation of about a third
    return model


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    emoji: Emoji,
    words: Tensor,
    means: Tensor,
    size: int,
    step: int,
) -> float:
    """One step on images of `size` pixels; the loss. The last of the words and means are those of the empty prompt."""
    generator, batch = torch.Generator().manual_seed(step), BATCHES[size]
    index = torch.randint(len(emoji.prompts), (batch,), generator=generator)
    tokens = packed(F.avg_pool2d(scenes(emoji, index, generator), SIDE // size))
    noise = torch.randn(tokens.shape, generator=generator)
    times = noise_levels(batch, size, generator)
    prompt = torch.where(torch.rand(batch, generator=generator) < 0.1, len(emoji.prompts), index)
    share = times.view(-1, 1, 1)
    guess = model(
        hidden_states=(1 - share) * tokens + share * noise,
        encoder_hidden_states=words[prompt].float(),
        pooled_projections=means[prompt].float(),
        timestep=times,
        img_ids=positions(size),
        txt_ids=torch.zeros(words.shape[1], 3),
    ).sample
    loss = (guess - (noise - tokens)).square().mean()
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())


def noise_levels(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Shares of noise, `[batch]`, spread over the batch: uniform, and shifted as the scheduler's for that size."""
    spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return shift_of(size) * spread / (1 + (shift_of(size) - 1) * spread)


def shift_of(size: int) -> float:
    """In proportion to the side: as much noise hides as much of the scene."""
    return SHIFT * size / SIDE


def packed(images: Tensor) -> Tensor:
    """`[batch, 3, size, size]` to tokens of 2×2 pixels, in the order of `FluxPipeline`."""
    return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)


def positions(size: int) -> Tensor:
    """Where tokens of smaller images stand among those of an image of full size: in the middle of what they show."""
    side, step = size // PATCH, SIDE / size
    along = torch.arange(side) * step + (step - 1) / 2
    rows, columns = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)


@torch.no_grad()
def embedded(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What the pipeline's text encoder makes of them: `[prompts, 16, 384]` and `[prompts, 384]`, fp16."""
    pipe = drawings_pipeline()
    parts = [pipe.encode_prompt(prompts[start : start + 256]) for start in range(0, len(prompts), 256)]
    return torch.cat([part[0].half() for part in parts]), torch.cat([part[1].half() for part in parts])


def save(state: dict[str, Any], step: int, size: int, losses: list[float], weights: Path) -> None:
    """The checkpoint, the weights as fp16, and the mean loss of the last steps."""
    content = {name: part.state_dict() for name, part in state.items()}
    torch.save({**content, "step": step}, CHECKPOINT.with_suffix(".new"))
    CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in state["average"].state_dict().items()}, weights)
    with (FOLDER / "loss.jsonl").open("a") as log:
        mean = sum(losses[-200:]) / max(len(losses[-200:]), 1)
        log.write(json.dumps({"step": step, "size": size, "loss": mean}) + "\n")


@torch.no_grad()
def sheet(transformer: Any, size: int) -> None:
    """Eight samples, on white and on photographs in turn."""
    pipe = drawings_pipeline(transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_shift(shift_of(size))
    pipe._prepare_latent_image_ids = lambda *_: positions(size)
    prompts = [f"{name}, noto, on {'a photo' if i % 2 else 'white'}" for i, name in enumerate(SHEET)]
    made = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=3.0,
        num_inference_steps=12,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(0),
    ).images
    tiled(made).save(FOLDER / f"sheet_{size}.png")


if __name__ == "__main__":
    main()
