"""Trains the projections of the dual encoder, and a classifier of emoji's groups, on the features of pictures.py.

    python studies/pairs/train.py               # minutes on two cores; writes the weights that ship

Contrastive: every image of a batch against all texts of the batch, both ways; images of one emoji count as right
for each other's texts. A text is the title, or the title and some tags or all, or tags alone, drawn anew in every step.
Features are learnt with noise. AdamW, bf16, one cycle of the rate. With --hold a quarter of the emoji and all of one
vendor's are held back, to say how well that vendor's images of that quarter are found: how to train was chosen by it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scenes"))

from turbovlm_lab.zoo.dual_encoder import CLASSIFIER, WEIGHTS, Projection
from turbovlm_lab.zoo.minilm import load_minilm
from turbovlm_lab.zoo.sprites import load_sprites

DATA = Path(__file__).parent / "data"
BATCH, RATE, DECAY, TEMPERATURE = 1024, 1e-3, 0.1, 0.05
NOISE = 0.1
"""On features, as a share of how much each varies."""
TEXTS = 6
"""Ways to say what a drawing shows, beside its title, and its title with all tags."""
HELD = "openmoji"
"""The vendor that --hold holds back."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="(default 30)")
    parser.add_argument("--hold", action="store_true", help="hold emoji back and say how they are found")
    parser.add_argument("--without", nargs="*", default=[], metavar="SOURCE", help="such as clipart")
    args = parser.parse_args()
    about = json.loads((DATA / "features.json").read_text())
    features = torch.load(DATA / "features.pt", weights_only=True).float()
    texts, text_of = sentences(about)
    concept = concepts(about)
    kept = torch.tensor([entry["source"] not in args.without for entry in about])
    emoji = sorted({entry["concept"] for entry in about if entry["concept"]})
    held = set(random.Random(0).sample(emoji, len(emoji) // 4)) if args.hold else set()
    is_held = torch.tensor([entry["concept"] in held or (args.hold and entry["maker"] == HELD) for entry in about])
    rows = (kept & ~is_held).nonzero()[:, 0]
    torch.manual_seed(0)
    image, text = Projection(features.shape[1]), Projection(texts.shape[1])
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters()], lr=RATE, weight_decay=DECAY)
    steps = args.epochs * (len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    noise = NOISE * features.std(dim=0)
    with tqdm(total=steps, unit=" steps") as bar:
        for epoch in range(args.epochs):
            order = rows[torch.randperm(len(rows))]
            for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
                seen = features[batch] + noise * torch.randn(len(batch), features.shape[1])
                said = texts[text_of[batch, torch.randint(text_of.shape[1], (len(batch),))]]
                with torch.autocast("cpu", torch.bfloat16):
                    pair = image(seen), text(said)
                loss = contrast(*(vectors.float() for vectors in pair), concept[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            if args.hold and (epoch + 1) % 10 == 0:
                found = recall(image, text, features, texts, text_of, about, held)
                tqdm.write(f"epoch {epoch + 1}: loss {loss.item():.3f}, held back R@1 {found}")
    if not args.hold:
        save_file(classifier(features, about), CLASSIFIER)
        parts = {"image": image, "text": text}
        stored = {f"{part}.{n}": v.half().contiguous() for part, m in parts.items() for n, v in m.state_dict().items()}
        save_file(stored, WEIGHTS)


def classifier(features: Tensor, about: list[dict]) -> dict[str, Tensor]:
    """A linear probe of Unicode's groups, on the five vendors' images of emoji, with noise as they vary."""
    of_code = {sprite.code: sprite.group for sprite in load_sprites()}
    names = sorted(set(of_code.values()))
    rows = torch.tensor([i for i, entry in enumerate(about) if entry["source"] == "emoji"])
    wanted = torch.tensor([names.index(of_code[about[i]["concept"]]) for i in rows])
    seen = features[rows]
    mean, deviation = seen.mean(dim=0), seen.std(dim=0)
    torch.manual_seed(0)
    probe = nn.Linear(seen.shape[1], len(names))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=1.0)
    for _ in tqdm(range(30), desc="classifier", unit=" epochs"):
        for batch in torch.randperm(len(rows)).split(BATCH):
            noisy = (seen[batch] - mean) / deviation + torch.randn(len(batch), seen.shape[1])
            loss = F.cross_entropy(probe(noisy), wanted[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weight = probe.weight.detach() / deviation
    return {"weight": weight.half(), "bias": (probe.bias.detach() - weight @ mean).half()}


def contrast(image: Tensor, text: Tensor, concept: Tensor) -> Tensor:
    logits = image @ text.T / TEMPERATURE
    right = (concept[:, None] == concept[None, :]).float()
    wanted = right / right.sum(dim=1, keepdim=True)
    both = (F.log_softmax(logits, dim=1) * wanted).sum(dim=1) + (F.log_softmax(logits.T, dim=1) * wanted).sum(dim=1)
    return -both.mean() / 2


def sentences(about: list[dict]) -> tuple[Tensor, Tensor]:
    """MiniLM's vectors of all texts, and which `2 + TEXTS` of them go with each image."""
    cached = DATA / "texts.pt"
    chance = random.Random(0)
    said: dict[tuple, list[str]] = {}
    for entry in about:
        key = (entry["title"], *entry["tags"])
        if key not in said:
            said[key] = [entry["title"], ", ".join(key), *(one_text(entry, chance) for _ in range(TEXTS))]
    unique = sorted({text for texts in said.values() for text in texts})
    number = {text: i for i, text in enumerate(unique)}
    text_of = torch.tensor([[number[t] for t in said[(entry["title"], *entry["tags"])]] for entry in about])
    if cached.exists() and (saved := torch.load(cached, weights_only=True))["texts"] == unique:
        return saved["vectors"], text_of
    minilm = load_minilm()
    with torch.inference_mode():
        parts = [minilm(**minilm.tokens(unique[i : i + 256])) for i in tqdm(range(0, len(unique), 256), desc="texts")]
    vectors = torch.cat(parts).clone()
    torch.save({"texts": unique, "vectors": vectors}, cached)
    return vectors, text_of


def one_text(entry: dict, chance: random.Random) -> str:
    tags = chance.sample(entry["tags"], min(len(entry["tags"]), chance.randint(1, 4)))
    if not tags or chance.random() < 0.2:
        return chance.choice(("a drawing of {}", "{} on a photo", "a picture of {}")).format(entry["title"])
    return f"{entry['title']}, {', '.join(tags)}" if chance.random() < 0.6 else ", ".join(tags)


def concepts(about: list[dict]) -> Tensor:
    """The same number for what shows the same: one emoji, or drawings of one title."""
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(entry["concept"] or entry["title"], len(number)) for entry in about])


@torch.no_grad()
def recall(image: nn.Module, text: nn.Module, features: Tensor, texts: Tensor, text_of: Tensor, about: list[dict],
           held: set[str]) -> str:  # fmt: skip
    """Of the last image of each emoji held back, by the vendor held back, and its title with and without all tags.

    R@1 from images to texts and from texts to images.
    """
    image.eval(), text.eval()
    last = {entry["concept"]: i for i, entry in enumerate(about) if entry["concept"] in held and entry["maker"] == HELD}
    rows = torch.tensor(sorted(last.values()))
    scores = image(features[rows]) @ text(texts[text_of[rows, :2].flatten()]).T
    right = torch.arange(len(rows)).repeat_interleave(2)
    image.train(), text.train()
    found = right[scores.argmax(dim=1)] == right[::2], scores.argmax(dim=0) == right
    return " ".join(f"{float(f.float().mean()):.3f}" for f in found)


if __name__ == "__main__":
    main()
