"""Train the small text-to-image model on emoji.

    python studies/emoji/train.py --minutes 180    # goes on from the last checkpoint, or else from the weights
    python studies/emoji/train.py --minutes 0      # only writes the weights of the last checkpoint

v-prediction on a cosine schedule, less weight where there is little noise, 10 % of the prompts empty, bf16 autocast, an
average of the weights over about 1,000 steps. A checkpoint every five minutes, a sheet of samples every fifteen, both
under studies/emoji/data; the averaged weights go to the package as fp16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from prepare import DATA
from safetensors.torch import load_file, save_file
from scenes import load_emoji, scenes
from torch import Tensor, nn
from tqdm import tqdm
from training import blend, tiled

from turbovlm_lab.zoo.emoji import WEIGHTS, WORDS, emoji_pipeline, emoji_unet

CHECKPOINT = DATA.with_name("checkpoint.pt")
BATCH = 16
RATE, WARMUP, FADE = 4e-4, 500, 2_500
SHEET = ("red apple", "dog face", "tulip", "octopus", "hamburger", "penguin", "watermelon", "butterfly")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=180, help="how long, this time (default 180)")
    parser.add_argument("--fade", action="store_true", help=f"let the learning rate go to 0 in the next {FADE} steps")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="where the weights go")
    args = parser.parse_args()
    emoji = load_emoji(DATA)
    torch.manual_seed(0)
    unet, average = emoji_unet().train(), emoji_unet().eval().requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.99))
    state = {"unet": unet, "average": average, "optimizer": optimizer}
    step, fade_from = 0, None
    if args.weights.exists():
        for model in (unet, average):
            model.load_state_dict({name: value.float() for name, value in load_file(args.weights).items()})
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        step, fade_from = saved["step"], saved["fade_from"]
    if args.fade and fade_from is None:
        fade_from = step
    texts, nothing = embedded(emoji.prompts), embedded([""])
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod  # ᾱ: the share of the image left
    end = time.monotonic() + 60 * args.minutes
    saved_at = shown_at = time.monotonic()
    losses: list[float] = []
    with tqdm(initial=step, unit=" steps") as bar:
        while time.monotonic() < end and (fade_from is None or step < fade_from + FADE):
            faded = 1.0 if fade_from is None else 1 - (step - fade_from) / FADE
            optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * faded
            generator = torch.Generator().manual_seed(step)
            index = torch.randint(len(texts), (BATCH,), generator=generator)
            losses.append(train_step(unet, optimizer, scenes(emoji, index, generator), texts, nothing, index, alphas))
            step += 1
            blend(average, unet, min(0.999, (1 + step) / (10 + step)))
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}")
            if time.monotonic() > saved_at + 300:
                save(state, step, fade_from, losses, args.weights)
                saved_at = time.monotonic()
            if time.monotonic() > shown_at + 900:
                sheet(average, DATA.with_name("sheet.png"))
                shown_at = time.monotonic()
    save(state, step, fade_from, losses, args.weights)
    sheet(average, DATA.with_name("sheet.png"))


def train_step(
    unet: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    texts: Tensor,
    nothing: Tensor,
    index: Tensor,
    alphas: Tensor,
) -> float:
    """One step on `images`, `[batch, 3, 64, 64]`; the loss."""
    generator = torch.Generator().manual_seed(int(index[0]) + 7919 * int(index[1]))
    latent = F.pixel_unshuffle(images, 2)
    noise = torch.randn(latent.shape, generator=generator)
    times = torch.randint(1000, (len(index),), generator=generator)
    silent = torch.rand(len(index), generator=generator) < 0.1
    text = torch.where(silent.view(-1, 1, 1), nothing, texts[index]).float()
    a = alphas[times].view(-1, 1, 1, 1)
    noisy, velocity = a.sqrt() * latent + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latent
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guess = unet(noisy, times, text).sample
    ratio = (a / (1 - a)).flatten()
    loss = ((guess.float() - velocity).square().mean(dim=(1, 2, 3)) * (ratio + 1).clamp(max=5) / (ratio + 1)).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def embedded(prompts: list[str]) -> Tensor:
    """What the pipeline's text encoder makes of them: `[prompts, 16, 384]`, fp16."""
    pipe = emoji_pipeline(emoji_unet())
    out = []
    for start in range(0, len(prompts), 256):
        ids = pipe.tokenizer(
            prompts[start : start + 256],
            padding="max_length",
            max_length=WORDS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        out.append(pipe.text_encoder(ids)[0].half())
    return torch.cat(out)


def save(state: dict, step: int, fade_from: int | None, losses: list[float], weights: Path) -> None:
    """The checkpoint, the weights as fp16, and the loss of every hundred steps."""
    content = {name: part.state_dict() for name, part in state.items()}
    torch.save({**content, "step": step, "fade_from": fade_from}, CHECKPOINT.with_suffix(".new"))
    CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in state["average"].state_dict().items()}, weights)
    with DATA.with_name("loss.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "loss": sum(losses[-200:]) / max(len(losses[-200:]), 1)}) + "\n")


def sheet(unet: nn.Module, file: Path) -> None:
    """Sixteen samples, on white and on photographs."""
    pipe = emoji_pipeline(unet)
    pipe.set_progress_bar_config(disable=True)
    rows = ("noto, on white", "twemoji, on a photo")
    prompts = [f"{name}, {row}" for row in rows for name in SHEET]
    made = pipe(prompts, num_inference_steps=12, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images
    tiled(made).save(file)


if __name__ == "__main__":
    main()
