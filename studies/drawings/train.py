"""Train the small text-to-image model that is like FLUX, on small images first.

    python studies/emoji/prepare.py                                 # fetches the drawings
    python studies/drawings/train.py --size 16 --minutes 20         # goes on from the last checkpoint, or else weights
    python studies/drawings/train.py --size 32 --minutes 40
    python studies/drawings/train.py --size 64 --minutes 60 --fade
    python studies/drawings/train.py --size 64 --minutes 0          # only writes the weights of the last checkpoint

Flow matching: the velocity from image to noise, at times spread as the scheduler's, 10 % of the prompts empty, fp32,
Muon for the matrices of the blocks and AdamW for the rest, an average of the weights over about 200 steps. A checkpoint
every five minutes, a sheet of samples every fifteen, both under studies/drawings/data; the averaged weights go to the
package as fp16.

A smaller image shows the same scene in fewer tokens. They stand at the positions of what they show, so that larger
images bring finer positions and no new ones, and what was learnt of where things are stays true.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbovlm_lab.zoo.drawings import PATCH, SHIFT, SIDE, WEIGHTS, drawings_pipeline, drawings_transformer

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from prepare import DATA
from scenes import Emoji, load_emoji, scenes
from training import RATE, noise_levels, restored, saved, tiled, train

FOLDER = Path(__file__).parent / "data"
BATCHES = {16: 32, 32: 16, 64: 8}
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
    torch.manual_seed(0)
    training = restored(fresh(drawings_transformer()), drawings_transformer(), FOLDER / "checkpoint.pt", args.weights)
    emoji = load_emoji(DATA)
    words, means = embedded([*emoji.prompts, ""])
    save = functools.partial(saved, training, FOLDER, args.weights)
    train(
        training,
        lambda step: loss_of(training.model, emoji, words, means, args.size, step),
        lambda loss: save({"size": args.size, "loss": loss}),
        lambda: sheet(training.average, args.size),
        args.minutes,
        args.rate,
        args.fade,
    )


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


def loss_of(model: nn.Module, emoji: Emoji, words: Tensor, means: Tensor, size: int, step: int) -> Tensor:
    """Of flow matching, on images of `size` pixels. The last of the words and means are those of the empty prompt."""
    generator, batch = torch.Generator().manual_seed(step), BATCHES[size]
    index = torch.randint(len(emoji.prompts), (batch,), generator=generator)
    tokens = packed(F.avg_pool2d(scenes(emoji, index, generator), SIDE // size))
    noise = torch.randn(tokens.shape, generator=generator)
    times = noise_levels(batch, shift_of(size), generator)
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
    return (guess - (noise - tokens)).square().mean()


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
