"""Train the small text-to-video model that is like Wan: on small images, then small videos, then whole ones.

    python studies/emoji/prepare.py                                     # fetches the drawings
    python studies/moving/train.py --size 16 --frames 1 --minutes 12    # goes on from the last checkpoint, or weights
    python studies/moving/train.py --size 16 --minutes 25
    python studies/moving/train.py --size 32 --minutes 40 --fade
    python studies/moving/train.py --size 32 --minutes 0                # only writes the last checkpoint's weights

Flow matching as in studies/drawings: the velocity from video to noise, at times spread as the scheduler's, 10 % of the
prompts empty, fp32, Muon for the matrices of the blocks and AdamW for the rest, an average of the weights over about
200 steps. The model's blocks are compiled. A checkpoint every five minutes, a sheet of samples every fifteen, both
under studies/moving/data; the averaged weights go to the package as fp16.

A smaller video shows the same in fewer tokens. They stand at the positions of what they show, so that larger videos
bring finer positions and no new ones. An image is a video's first frame.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from turbovlm_lab.zoo.emoji import WORDS
from turbovlm_lab.zoo.moving import (
    FRAMES,
    SHIFT,
    SIDE,
    WEIGHTS,
    moving_pipeline,
    moving_prompts,
    moving_transformer,
)
from turbovlm_lab.zoo.pixels import FramePairs

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from prepare import DATA
from scenes import Emoji, load_emoji
from training import RATE, noise_levels, restored, saved, tiled, train
from videos import videos

FOLDER = Path(__file__).parent / "data"
PIXELS = 64
"""A side of what the scenes are made of."""
TOKENS = 4096
"""Of a batch, about; small images make a smaller one."""
SHEET = ("red apple, on white, moving left", "penguin, on a photo, moving right", "frog, on white, moving up")


class Places(nn.Module):
    """Wan's rotary positions where a token stands for more pixels than 2×2: in the middle of what it shows.

    Args:
        rope: Wan's own.
        step: how many of its tokens one stands for, along a side.
    """

    def __init__(self, rope: Any, step: int) -> None:
        super().__init__()
        self.dims, self.patch, self.step = (rope.t_dim, rope.h_dim, rope.w_dim), rope.patch_size, step

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        counts = [length // patch for length, patch in zip(hidden.shape[2:], self.patch)]
        along = [torch.arange(count, dtype=torch.float64) for count in counts]
        along[1:] = [place * self.step + (self.step - 1) / 2 for place in along[1:]]
        tables = [
            get_1d_rotary_pos_embed(dim, place, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
            for dim, place in zip(self.dims, along)
        ]
        return tuple(laid([table[part] for table in tables], counts) for part in range(2))  # type: ignore[return-value]


def laid(tables: list[Tensor], counts: list[int]) -> Tensor:
    """Tables of time, rows and columns as one of all tokens, `[1, tokens, 1, head width]`."""
    shapes = [[-1, 1, 1], [1, -1, 1], [1, 1, -1]]
    spread = [table.view(*shape, table.shape[1]).expand(*counts, -1) for table, shape in zip(tables, shapes)]
    return torch.cat(spread, dim=-1).flatten(0, 2)[None, :, None].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=int, choices=(16, 32), default=SIDE, help="of the videos, in pixels (default 32)"
    )
    parser.add_argument("--frames", type=int, choices=(1, FRAMES), default=FRAMES, help="1 for images (default 15)")
    parser.add_argument("--minutes", type=float, default=60, help="how long, this time (default 60)")
    parser.add_argument("--fade", action="store_true", help="let the learning rate go to 0 in this time")
    parser.add_argument("--rate", type=float, default=RATE, help=f"the learning rate (default {RATE:g})")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="where the weights go")
    args = parser.parse_args()
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    training = restored(fresh(moving_transformer()), moving_transformer(), FOLDER / "checkpoint.pt", args.weights)
    for model in (training.model, training.average):
        model.rope = Places(model.rope, SIDE // args.size)
    training.model.compile_repeated_blocks(dynamic=False)
    emoji, words = load_emoji(DATA), embedded([*moving_prompts(), ""])
    save = functools.partial(saved, training, FOLDER, args.weights)
    train(
        training,
        lambda step: loss_of(training.model, videos_of(emoji, args.size, args.frames, step), words, step),
        lambda loss: save({"size": args.size, "frames": args.frames, "loss": loss}),
        lambda: sheet(training.average, args.size, args.frames),
        args.minutes,
        args.rate,
        args.fade,
    )


@torch.no_grad()
def fresh(model: Any) -> nn.Module:
    """Let every block begin as the identity and the model as nought, and words count as much as pixels."""
    for block in model.blocks:
        for linear in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            linear.weight.zero_()
            linear.bias.zero_()
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, 2::3] = 0.5  # gates
    model.scale_shift_table.zero_()
    for linear in (model.condition_embedder.time_proj, model.proj_out):
        linear.weight.zero_()
        linear.bias.zero_()
    model.condition_embedder.text_embedder.linear_1.weight *= 3  # MiniLM's words have a standard deviation of a third
    return model


def videos_of(emoji: Emoji, size: int, frames: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of latents, `[batch, 6, frames, size, size]`, and which prompts they show."""
    generator = torch.Generator().manual_seed(step)
    batch = min(TOKENS // ((frames + 1) // 2 * (size // 2) ** 2), 32)
    index = torch.randint(len(moving_prompts()), (batch,), generator=generator)
    made = videos(emoji, index, generator, frames)
    return FramePairs().encode(F.avg_pool3d(made, (1, PIXELS // size, PIXELS // size))).latents, index


def loss_of(model: nn.Module, made: tuple[Tensor, Tensor], words: Tensor, step: int) -> Tensor:
    """Of flow matching. The last of the words are those of the empty prompt."""
    latents, index = made
    generator, batch = torch.Generator().manual_seed(step + 1_000_000), len(index)
    noise = torch.randn(latents.shape, generator=generator)
    times = noise_levels(batch, shift_of(latents.shape[-1], latents.shape[2]), generator)
    prompt = torch.where(torch.rand(batch, generator=generator) < 0.1, len(words) - 1, index)
    share = times.view(-1, 1, 1, 1, 1)
    guess = model((1 - share) * latents + share * noise, 1000 * times, words[prompt]).sample
    return (guess - (noise - latents)).square().mean()


def shift_of(size: int, frames: int) -> float:
    """In proportion to the side, and the root of the frames: as much noise hides as much of what is shown."""
    return SHIFT * size / SIDE * (frames / ((FRAMES + 1) // 2)) ** 0.5


@torch.no_grad()
def embedded(prompts: list[str]) -> Tensor:
    """What the pipeline's text encoder makes of them: `[prompts, 16, 384]`."""
    words: Tensor = moving_pipeline()._get_t5_prompt_embeds(prompts, max_sequence_length=WORDS)
    return words


@torch.no_grad()
def sheet(model: Any, size: int, frames: int) -> None:
    """Three videos, every second frame of each in a row; or eight images of each prompt."""
    pipe = moving_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_shift(shift_of(size, (frames + 1) // 2))
    made = pipe(
        list(SHEET),
        height=size,
        width=size,
        num_frames=frames,
        num_videos_per_prompt=8 if frames == 1 else 1,
        generator=torch.Generator().manual_seed(0),
        output_type="pil",
    ).frames
    tiled([frame for video in made for frame in video[::2]]).save(FOLDER / f"sheet_{size}_{frames}.png")


if __name__ == "__main__":
    main()
