"""Trains what reads the tokens of features.py: captions, questions and statements about scenes.

    python studies/scenes/train.py               # about an hour on one core; goes on where it stopped
    python studies/scenes/train.py --eyes clip   # what reads CLIP's tokens
    python studies/scenes/train.py --steps 0     # only writes the weights of the last checkpoint

First the connector and the words are brought together: at the middle of each cell, where a thing is if the cell has
one, the token is to be nearest to the words for its name, its colour, its row and its column. This takes two minutes,
and stays part of the loss. Queries and keys of the attention to the image begin alike, so that a word begins by
looking at what it names.

Tokens are disturbed by noise, so that the reader depends less on how the vendors of the training draw.

Then every image of a batch is read once, with its caption and about nine questions in one row that attend to
themselves alone; every pair once, with eight statements. Questions, captions' forms and statements are drawn anew in
each epoch. AdamW, the rate a half cosine after a warm-up over the steps given; bf16 autocast. Weights and log go beside
the features; the weights also to --weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from features import NAMES, file_of, pair_of
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from turbovlm_lab.zoo.grammar import captions, plural, questions, statement
from turbovlm_lab.zoo.reader import (
    ANSWER,
    CAPTION,
    END,
    EYES,
    PAD,
    QUESTION,
    STATEMENT,
    TIED,
    VOCABULARY,
    SceneReader,
    encode,
    scene_decoder,
)
from turbovlm_lab.zoo.scenes import COLOURS, PLACES, Scene

PAIRS = 4
"""In a batch: 8 images."""
DRAWS, STATEMENTS = 2, 8
"""How often each sort of question is asked of an image, and how many statements are made about a pair."""
RATE, WARMUP, DECAY = 7e-4, 500, 0.05
FIRST_STEPS, FIRST_BATCH, FIRST_RATE = 1_500, 2_048, 2e-3
MIDDLES = {
    "vit": [1 + 16 * y + x for y in (2, 8, 13) for x in (2, 8, 13)],
    "clip": [1 + 14 * y + x for y in (2, 7, 11) for x in (2, 7, 11)],
}
"""Of the cells: the tokens of patches that a thing in the cell always covers."""
NOTHING = "no"
"""The word that the middle of an empty cell is to be nearest to."""
NOISE = 0.4
"""Deviation of the noise on tokens, as a share of each feature's own."""
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
_PAD = VOCABULARY.index(PAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9_500, metavar="N", help="in all (default 9500)")
    parser.add_argument("--eyes", choices=EYES, default="vit", help="whose tokens to read (default vit)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="(default: where those that ship are)")
    args = parser.parse_args()
    torch.manual_seed(0)
    reader = SceneReader(nn.Identity(), scene_decoder(), args.eyes)
    stored = np.load(file_of("train", args.eyes), mmap_mode="r")
    checkpoint = file_of("checkpoint", args.eyes).with_suffix(".pt")
    log = file_of("train", args.eyes).with_suffix(".jsonl")
    batches = len(stored) // 2 // PAIRS
    optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=DECAY)
    step, last = 0, args.steps
    if not checkpoint.exists():
        bring_together(reader, stored, MIDDLES[args.eyes])
    else:
        saved = torch.load(checkpoint, weights_only=True)
        reader.load_state_dict(saved["reader"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    losses: list[float] = []
    saved_at = time.monotonic()
    with tqdm(total=last, initial=step, unit=" steps") as bar:
        while step < last:
            optimizer.param_groups[0]["lr"] = rate(step, last)
            epoch, batch = divmod(step, batches)
            order = np.random.default_rng(epoch).permutation(batches * PAIRS)
            numbers = order[batch * PAIRS : (batch + 1) * PAIRS].tolist()
            loss = loss_of(reader, stored, numbers, MIDDLES[args.eyes], random.Random(f"{epoch} {batch}"))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
            if time.monotonic() - saved_at > 300 or step == last:
                save(checkpoint, reader, optimizer, step)
                found = right_words(reader, np.load(file_of("validation", args.eyes), mmap_mode="r"))
                line = json.dumps({"step": step, "loss": float(np.mean(losses[-500:])), **found})
                tqdm.write(line)
                with log.open("a") as file:
                    file.write(line + "\n")
                saved_at = time.monotonic()
    save_file(
        {name: value.half().contiguous() for name, value in reader.state_dict().items() if name not in TIED},
        args.weights or EYES[args.eyes].weights,
        {"steps": str(step)},
    )


def rate(step: int, last: int) -> float:
    return RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * min(1, step / last))))


def loss_of(
    reader: SceneReader, stored: np.ndarray, numbers: list[int], middles: list[int], chance: random.Random
) -> Tensor:
    """Cross-entropy of captions and answers: of the images and of the pairs, weighed alike."""
    pairs = [pair_of("train", number) for number in numbers]
    alone = [about(scene, chance) for pair in pairs for scene in pair]
    both = [[said(first, second, chance) for _ in range(STATEMENTS)] for first, second in pairs]
    rows = np.stack([stored[2 * number : 2 * number + 2] for number in numbers])
    with torch.autocast("cpu", torch.bfloat16):
        tokens = reader.connector(disturbed(torch.from_numpy(rows).float()))
        cells = names_loss(reader, tokens[:, :, middles].flatten(0, 2), shown(pairs))
        return cells + words_loss(reader, tokens.flatten(0, 1), alone) + words_loss(reader, reader.join(tokens), both)


def bring_together(reader: SceneReader, stored: np.ndarray, middles: list[int]) -> None:
    """Trains connector and words on the cells alone; then lets queries and keys be alike."""
    words = reader.decoder.get_input_embeddings().weight
    tokens = torch.from_numpy(np.stack([each[middles] for each in tqdm(stored, "middles")])).flatten(0, 1)
    known = shown([pair_of("train", number) for number in range(len(stored) // 2)])
    optimizer = torch.optim.AdamW([*reader.connector.parameters(), words], lr=FIRST_RATE, weight_decay=DECAY)
    for step in (bar := tqdm(range(FIRST_STEPS), "connector")):
        optimizer.param_groups[0]["lr"] = FIRST_RATE * min((step + 1) / 100, 1 - step / FIRST_STEPS)
        some = torch.randint(len(tokens), (FIRST_BATCH,))
        loss = names_loss(reader, reader.connector(disturbed(tokens[some].float())), known[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    for layer in reader.decoder.bert.encoder.layer:
        attention = layer.crossattention.self
        nn.init.normal_(attention.query.weight, std=0.06)
        attention.key.weight.data.copy_(attention.query.weight)


def disturbed(tokens: Tensor) -> Tensor:
    return tokens + NOISE * tokens.flatten(0, -2).std(dim=0) * torch.randn_like(tokens)


def shown(pairs: list[tuple[Scene, Scene]]) -> Tensor:
    """What the cells show, `[cells, 4]`: name, colour (-100 where it has none to be told), row and column."""
    found = []
    for scene in (scene for pair in pairs for scene in pair):
        for cell in range(len(PLACES)):
            kind = scene.at(cell)
            name = len(NAMES) if kind is None else NAMES.index(kind.name)
            colour = -100 if kind is None or kind.colour is None else list(COLOURS).index(kind.colour)
            found.append((name, colour, *divmod(cell, 3)))
    return torch.tensor(found)


def names_loss(reader: SceneReader, tokens: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of the words for what the tokens, `[cells, width]`, show; names in singular or plural."""
    words = reader.decoder.get_input_embeddings().weight
    names = [*(map(plural, NAMES) if torch.rand(()) < 0.5 else NAMES), NOTHING]
    loss = torch.zeros(())
    for column, texts in enumerate((names, list(COLOURS), ROWS, COLUMNS)):
        vectors = torch.stack([words[encode(text)].mean(0) for text in texts])
        loss = loss + F.cross_entropy((tokens @ vectors.T).float(), known[:, column])
    return loss


def about(scene: Scene, chance: random.Random) -> list[str]:
    asked = [question for _ in range(DRAWS) for question in questions(scene, chance, NAMES)]
    return [f"{CAPTION} {chance.choice(captions(scene))}", *(f"{QUESTION} {q.text} {ANSWER} {q.answer}" for q in asked)]


def said(first: Scene, second: Scene, chance: random.Random) -> str:
    made = statement(first, second, chance)
    return f"{STATEMENT} {made.text} {ANSWER} {str(made.true).lower()}"


def words_loss(reader: SceneReader, tokens: Tensor, rows: list[list[str]]) -> Tensor:
    """Mean over the words that are to be said."""
    ids, wanted, positions, mask = packed(rows)
    logits = reader(ids, tokens, positions, mask)
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=_PAD)


def packed(rows: list[list[str]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Several texts in a row: words, the words to be said next, positions, and what of the row each word sees."""
    coded = [[encode(f"{text} {END}") for text in texts] for texts in rows]
    length = max(sum(len(text) - 1 for text in texts) for texts in coded)
    ids, wanted = (torch.full((len(rows), length), _PAD) for _ in range(2))
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    text_of = torch.full((len(rows), length), -1)
    for row, texts in enumerate(coded):
        start = 0
        for number, text in enumerate(texts):
            here = slice(start, start + len(text) - 1)
            asked = text.index(encode(ANSWER)[0]) if encode(ANSWER)[0] in text else 0
            ids[row, here] = torch.tensor(text[:-1])
            wanted[row, here] = torch.tensor([_PAD] * asked + text[asked + 1 :])
            positions[row, here] = torch.arange(len(text) - 1)
            text_of[row, here] = number
            start = here.stop
    seen = (text_of[:, :, None] == text_of[:, None, :]).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return ids, wanted, positions, mask[:, None]


@torch.no_grad()
def right_words(reader: SceneReader, stored: np.ndarray) -> dict[str, float]:
    """How often the likeliest first word of an answer is right, per sort of question, of all pairs' tokens."""
    reader.eval()
    chance = random.Random(0)
    right: dict[str, list[bool]] = {}
    for number in range(len(stored) // 2):
        pair = pair_of("validation", number)
        tokens = reader.connector(torch.from_numpy(stored[2 * number : 2 * number + 2].astype(np.float32)))
        for scene, seen in zip(pair, tokens):
            for q in questions(scene, chance, NAMES):
                answer = first_word(reader, seen[None], f"{QUESTION} {q.text} {ANSWER}")
                right.setdefault(q.asks, []).append(answer == q.answer.split()[0])
        made = statement(*pair, chance)
        answer = first_word(reader, reader.join(tokens[None]), f"{STATEMENT} {made.text} {ANSWER}")
        right.setdefault("statement", []).append(answer == str(made.true).lower())
    reader.train()
    return {asks: float(np.mean(values)) for asks, values in right.items()}


def first_word(reader: SceneReader, tokens: Tensor, text: str) -> str:
    return VOCABULARY[int(reader(torch.tensor([encode(text)]), tokens)[0, -1].argmax())]


def save(checkpoint: Path, reader: SceneReader, optimizer: torch.optim.Optimizer, step: int) -> None:
    content = {"reader": reader.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(content, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)


if __name__ == "__main__":
    main()
