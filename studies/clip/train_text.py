"""Trains the map from MiniLM's sentences to CLIP's space, and says what it is worth on names that it has not seen.

    python studies/clip/train_text.py --names FOLDER          # writes benchmarks/results/clip_text.{json,md}, minutes;
                                                              # ways that are in the JSON are not measured again
    python studies/clip/train_text.py --names FOLDER --ship   # also writes the weights that ship, trained on all names

FOLDER has embeddings of names by CLIP ViT-B/16's text tower, see `turbovlm_lab.zoo.clip_names`; embeddings.py makes
those of images. CLIP's texts lie in another cone than its images. So the mean is taken off both, of images that of
their part, and what is learnt is the direction from there: for a name that of its embedding, for a caption that of its
image: by ridge regression, or from there by contrasting names and captions among themselves, as CLIP learnt.

Judged by cross-validation: of each tenth of the names, neither the embedding is seen nor any caption with the name in
it; images of it are named by the map of the other tenths, among all names. The map that ships is also asked what it
was never told: photographs of animals and things by words for them; and maps are asked for captions held back.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from cases import RESULTS, described, load, machine, save

from turbovlm_lab.evaluate import statistics
from turbovlm_lab.zoo.clip_names import ClipNames, read_names
from turbovlm_lab.zoo.clip_text import TEMPLATE, WEIGHTS
from turbovlm_lab.zoo.minilm import load_minilm

DATA = Path(__file__).parent / "data"
PARTS = ("noto", "fluent-3d", "openmoji", "icons", "clipart", "stamps", "stamps-on-photos")
"""Of embeddings.py, to learn from; of those that it has made."""
FOLDS, CAPTION_FOLDS, THINGS = 10, 5, 80
"""Parts of names and captions that are held back in turn; COCO-Stuff's first names, of things that one can count."""
BATCH, EPOCHS, RATE, DECAY, TEMPERATURE = 128, 10, 3e-4, 0.1, 0.07
RIDGE, CAPTION_WEIGHT = 0.3, 0.1
"""Of the regression: its penalty, and what a caption counts beside a name."""


@dataclass(frozen=True)
class Lessons:
    """Texts and where they point.

    Attributes:
        sentences: MiniLM's, in several ways to say each, `[texts, ways, 384]`.
        directions: of length 1, `[texts, 512]`.
        groups: the same number for those that are right for one another, `[texts]`.
        words: all that is said, as `spaced` has it.
    """

    sentences: Tensor
    directions: Tensor
    groups: Tensor
    words: list[str]

    def rows(self, kept: Sequence[int]) -> Lessons:
        at = torch.tensor(kept, dtype=torch.long)
        return Lessons(self.sentences[at], self.directions[at], self.groups[at], [self.words[row] for row in kept])


@dataclass(frozen=True)
class Way:
    """What a map learns from, and whether it is the regression alone."""

    names: bool = True
    captions: bool = True
    contrast: bool = True
    hidden: int = 0


WAYS = {
    "names, regression": Way(captions=False, contrast=False),
    "captions, regression": Way(names=False, contrast=False),
    "both, regression": Way(contrast=False),
    "both, contrast": Way(),
    "both, contrast, 256 hidden": Way(hidden=256),
}
SHIPS = "both, regression"


class Map(nn.Module):
    """From sentences, `[..., 384]`, to directions of length 1, `[..., 512]`."""

    def __init__(self, hidden: int, regression: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        weight, bias = regression
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.load_state_dict({"weight": weight, "bias": bias})
        self.more = None
        if hidden:
            last = nn.Linear(hidden, weight.shape[0], bias=False)
            nn.init.zeros_(last.weight)
            self.more = nn.Sequential(
                nn.LayerNorm(weight.shape[1]), nn.Linear(weight.shape[1], hidden), nn.GELU(), last
            )

    def forward(self, sentences: Tensor) -> Tensor:
        out = self.linear(sentences)
        return F.normalize(out if self.more is None else out + self.more(sentences), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", required=True, metavar="PATH", help="embeddings of names: a folder or a .npy")
    parser.add_argument("--ship", action="store_true", help="also write the weights that ship")
    args = parser.parse_args()
    given = read_names(args.names)
    given = ClipNames(tuple(in_english(name) for name in given.names), given.vectors)
    made = [part for part in PARTS if files_of(part)]
    names, captions = of_names(given), of_captions([read_part(part) for part in made])
    tests = {"stamps": things_of("named-stamps", given), "photographs": things_of("photos", given)}
    parts = {part: len(read_part(part)[0]) for part in made}
    found = load(RESULTS / "clip_text.json")
    if found.get("parts") != parts:
        found = {"names": len(names.words), "captions": len(captions.words), "parts": parts, "ways": {}}
    found["machine"] = machine()
    found["own"] = {test: top(asked.vectors @ given.vectors[:THINGS].T, asked.own) for test, asked in tests.items()}
    for name, way in WAYS.items():
        if name not in found["ways"]:
            found["ways"][name] = held_back(way, names, captions, given, tests)
            found["ways"][name]["new words"] = new_words(trained(way, names, captions), given)
            save(RESULTS / "clip_text.json", found)
    found["captions held back"] = new_captions(WAYS[SHIPS], names, captions)
    save(RESULTS / "clip_text.json", found)
    (RESULTS / "clip_text.md").write_text(report(found))
    print(report(found))
    if args.ship:
        mean, spread = cone(given.vectors)
        model = trained(WAYS[SHIPS], names, captions)
        stored = {**model.linear.state_dict(), "mean": mean, "spread": spread}
        save_file({name: value.half().contiguous() for name, value in stored.items()}, WEIGHTS)


def in_english(name: str) -> str:
    """A name of COCO-Stuff's: "brick wall" for "wall-brick", "building" for "building-other"."""
    return " ".join(reversed(re.sub(r"-(other|stuff)$", "", name).split("-")))


def files_of(part: str) -> list[Path]:
    return sorted((DATA / "embeddings").glob(f"{part}-[0-9][0-9][0-9].safetensors"))


def read_part(part: str) -> tuple[list[dict[str, Any]], Tensor]:
    """What is told of images, and their embeddings, `[images, 512]`."""
    files = files_of(part)
    about = [entry for file in files for entry in json.loads(file.with_suffix(".json").read_text())]
    return about, torch.cat([load_file(file)["vectors"].float() for file in files])


def cone(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Where CLIP's texts lie: their mean, and how far from it they are."""
    mean = vectors.mean(dim=0)
    return mean, (vectors - mean).norm(dim=1).mean()


def directions(vectors: Tensor) -> Tensor:
    return F.normalize(vectors - vectors.mean(dim=0), dim=1)


def of_names(given: ClipNames) -> Lessons:
    said = [[TEMPLATE.format(name)] for name in given.names]
    words = [spaced(name) for name in given.names]
    return Lessons(embedded(said), directions(given.vectors), torch.arange(len(words)), words)


def of_captions(parts: list[tuple[list[dict[str, Any]], Tensor]]) -> Lessons:
    """Those of one title are right for one another's images."""
    about = [entry for told, _ in parts for entry in told]
    chance, titles = random.Random(0), dict[str, int]()
    groups = torch.tensor([titles.setdefault(entry["title"].lower(), len(titles)) for entry in about])
    words = [spaced(", ".join([entry["title"], *entry["tags"]])) for entry in about]
    said = embedded([ways_to_say(entry, chance) for entry in about])
    return Lessons(said, torch.cat([directions(vectors) for _, vectors in parts]), groups, words)


def ways_to_say(entry: Mapping[str, Any], chance: random.Random) -> list[str]:
    """The title without its article, and the same with up to three of an emoji's tags."""
    title = re.sub("^(an?|the|some) ", "", entry["title"].lower())
    tags = entry["tags"] if entry["source"] == "emoji" else []
    more = ", ".join([title, *chance.sample(tags, min(len(tags), chance.randint(1, 3)))])
    return [TEMPLATE.format(title), TEMPLATE.format(more)]


def spaced(text: str) -> str:
    """Its words in lower case, a space before and behind each."""
    return f" {' '.join(re.findall('[a-z]+', text.lower()))} "


def embedded(said: list[list[str]]) -> Tensor:
    """MiniLM's vectors, `[texts, ways, 384]`; a file keeps those of all texts that were ever asked for."""
    file = DATA / "sentences.pt"
    known: dict[str, Tensor] = torch.load(file, weights_only=True) if file.exists() else {}
    new = sorted({text for texts in said for text in texts} - known.keys(), key=lambda text: (len(text), text))
    if new:
        minilm = load_minilm()
        with torch.no_grad():
            for some in tqdm([new[i : i + 256] for i in range(0, len(new), 256)], desc="sentences"):
                known |= zip(some, minilm(**minilm.tokens(some)).unbind())
        torch.save({text: vector.clone() for text, vector in known.items()}, file)
    return torch.stack([torch.stack([known[text] for text in texts]) for texts in said])


def regression(way: Way, names: Lessons, captions: Lessons) -> tuple[Tensor, Tensor]:
    """Weight `[512, 384]` and bias `[512]` of the ridge regression from sentences to directions."""
    used = [(names, 1.0)] * way.names + [(captions, CAPTION_WEIGHT)] * way.captions
    x = torch.cat([lessons.sentences.mean(dim=1) for lessons, _ in used])
    y = torch.cat([lessons.directions for lessons, _ in used])
    counts = torch.cat([torch.full((len(lessons.words), 1), weight) for lessons, weight in used])
    centre = (counts * x).sum(dim=0) / counts.sum()
    x = x - centre
    weight = torch.linalg.solve(x.T @ (counts * x) + RIDGE * torch.eye(x.shape[1]), x.T @ (counts * y)).T
    return weight, -weight @ centre


def trained(way: Way, names: Lessons, captions: Lessons) -> Map:
    torch.manual_seed(0)
    model = Map(way.hidden, regression(way, names, captions))
    if not way.contrast:
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * (len(captions.words) // BATCH))
    for _ in range(EPOCHS):
        order = torch.randperm(len(captions.words))
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = contrast(model, captions, batch) + contrast(model, names, torch.arange(len(names.words)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def contrast(model: Map, lessons: Lessons, rows: Tensor) -> Tensor:
    """Every text against all directions of the rows, both ways, each said in one of its ways."""
    ways = torch.randint(lessons.sentences.shape[1], (len(rows),))
    logits = model(lessons.sentences[rows, ways]) @ lessons.directions[rows].T / TEMPERATURE
    right = (lessons.groups[rows, None] == lessons.groups[rows]).float()
    wanted = right / right.sum(dim=1, keepdim=True)
    return -sum((F.log_softmax(each, dim=1) * wanted).sum(dim=1).mean() for each in (logits, logits.T)) / 2


def held_back(
    way: Way, names: Lessons, captions: Lessons, given: ClipNames, tests: Mapping[str, Asked]
) -> dict[str, Any]:
    """What maps are worth on names that they have not seen: those of each part by the map of the others.

    The real vectors are looked for with those of the part, images of the part among all things, by the part's map.
    """
    order = torch.randperm(len(names.words), generator=torch.Generator().manual_seed(0)).tolist()
    found = torch.zeros_like(given.vectors)
    scores = {test: torch.zeros(len(asked.own), THINGS) for test, asked in tests.items()}
    for part in tqdm([order[first::FOLDS] for first in range(FOLDS)], desc="held back"):
        unsaid = [form for row in part for form in forms(given.names[row])]
        kept = [row for row, words in enumerate(captions.words) if not any(form in words for form in unsaid)]
        others = [row for row in order if row not in part]
        model = trained(way, names.rows(others), captions.rows(kept))
        mapped = mapped_names(model, given.names, given.vectors[others])
        found[part] = mapped[part]
        for test, asked in tests.items():
            rows = torch.isin(asked.own, torch.tensor(part))
            scores[test][rows] = asked.vectors[rows] @ mapped[:THINGS].T
    alike = directions(found) @ directions(given.vectors).T
    nearest = {f"R@{k}": interval((ranks(alike) < k).tolist()) for k in (1, 5)}
    about = {"cosine": interval(alike.diagonal().tolist()), **nearest}
    return {"names": about, **{test: top(scores[test], asked.own) for test, asked in tests.items()}}


def forms(name: str) -> set[str]:
    """A name and its plurals, as `spaced` has them."""
    plurals = {name, f"{name}s", f"{name}es", re.sub("y$", "ies", name), re.sub("fe?$", "ves", name)}
    return {f" {form} " for form in plurals}


@torch.no_grad()
def pointed(model: Map, texts: Sequence[str]) -> Tensor:
    """Where texts point, `[texts, 512]`."""
    return model(embedded([[text] for text in texts])[:, 0])


def mapped_names(model: Map, names: Sequence[str], real: Tensor) -> Tensor:
    """The vectors of names, `[names, 512]`, in the cone of real ones."""
    mean, spread = cone(real)
    return F.normalize(mean + spread * pointed(model, [TEMPLATE.format(name) for name in names]), dim=1)


class Asked(NamedTuple):
    """Images of things, `[images, 512]`, and the places of their names, `[images]`."""

    vectors: Tensor
    own: Tensor


def things_of(part: str, given: ClipNames) -> Asked:
    about, vectors = read_part(part)
    shown = [label_of(entry["title"], given.names[:THINGS]) for entry in about]
    rows = [row for row, name in enumerate(shown) if name is not None]
    return Asked(vectors[rows], torch.tensor([given.names.index(shown[row]) for row in rows]))


def label_of(title: str, names: Sequence[str]) -> str | None:
    """The name that a caption ends in, the longest of several: "A black cat" is a cat."""
    words = spaced(re.sub(r"\(.*?\)", "", title))
    return max((name for name in names if any(map(words.endswith, forms(name)))), key=len, default=None)


def top(scores: Tensor, own: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 of scores, `[images, names]`; images of one name are drawn together."""
    found = (scores > scores.gather(1, own[:, None])).sum(dim=1)
    tops = {f"top-{k}": interval((found < k).tolist(), own.tolist()) for k in (1, 5)}
    return {"images": len(own), **tops}


def ranks(alike: Tensor) -> Tensor:
    """Of how many columns each row is nearer to than to its own, on the diagonal."""
    return (alike > alike.diagonal()[:, None]).sum(dim=1)


def interval(values: Sequence[float], groups: Sequence[str] | None = None) -> dict[str, float]:
    return asdict(statistics.mean(values, groups))


def new_words(model: Map, given: ClipNames) -> dict[str, Any]:
    """Photographs by all the words for them, few of which are among the names."""
    about, vectors = read_part("photos")
    words = sorted({entry["title"] for entry in about})
    scores = vectors @ mapped_names(model, words, given.vectors).T
    return {"words": len(words), **top(scores, torch.tensor([words.index(entry["title"]) for entry in about]))}


def new_captions(way: Way, names: Lessons, captions: Lessons) -> dict[str, Any]:
    """Recall at 1 of captions and of images, one of each title, among a fifth of them that the map has not seen."""
    order = torch.randperm(int(captions.groups.max()) + 1, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[bool]] = {"captions": [], "images": []}
    for first in range(CAPTION_FOLDS):
        hidden = torch.isin(captions.groups, order[first::CAPTION_FOLDS])
        model = trained(way, names, captions.rows((~hidden).nonzero()[:, 0].tolist()))
        rows = list({int(captions.groups[row]): row for row in hidden.nonzero()[:, 0].tolist()}.values())
        asked = captions.rows(rows)
        with torch.no_grad():
            alike = model(asked.sentences[:, 0]) @ asked.directions.T
        found["captions"] += (ranks(alike.T) == 0).tolist()
        found["images"] += (ranks(alike) == 0).tolist()
    return {"titles": len(order), **{what: interval(values) for what, values in found.items()}}


def report(found: dict[str, Any]) -> str:
    def cell(value: dict[str, float]) -> str:
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    tests, tops = ("stamps", "photographs"), ("top-1", "top-5")
    columns = [f"{test}, {k}" for test in (*tests, "new words") for k in tops]
    parts = ", ".join(f"{part} {count}" for part, count in found["parts"].items())
    new, captions = found["ways"][SHIPS]["new words"], found["captions held back"]
    lines = [
        "# Texts for CLIP, by a map from MiniLM",
        "",
        f"{described(found['machine'])}; seed 0",
        "",
        f"Learnt from {found['names']} names embedded by CLIP's text tower and {found['captions']} captioned images",
        f"({parts}). Each tenth of the names was held back, with all captions that have one of them in them.",
        "Cosine: of the mapped vector and the real one, both from their mean. R@1, R@5: how often the real one is the",
        f"nearest to it of all {found['names']}, or among five. Images of names held back: how often their name is the",
        f"nearest of {THINGS}, or among five. New words: {new['images']} photographs by {new['words']} words, most of",
        "them none of the names, by the map of all names. Brackets hold 95 % of the bootstrap's draws, images of one",
        "name drawn together.",
        "",
        f"| learnt from | cosine | R@1 | R@5 | {' | '.join(columns)} |",
        "|---|" + "--:|" * (3 + len(columns)),
    ]
    for way, each in found["ways"].items():
        values = [each["names"][key] for key in ("cosine", "R@1", "R@5")]
        values += [each[test][k] for test in (*tests, "new words") for k in tops]
        lines.append(f"| {way} | {' | '.join(map(cell, values))} |")
    own = [cell(found["own"][test][k]) for test in tests for k in tops]
    lines += [
        f"| CLIP's own text tower | 1 | 1 | 1 | {' | '.join(own)} | | |",
        "",
        f"These are {found['own']['stamps']['images']} stamps and {found['own']['photographs']['images']} photographs.",
        f"What ships: {SHIPS}. Of {captions['titles']} captions, each among a fifth of them by maps that have not seen",
        f"any: R@1 of captions for images {cell(captions['captions'])}, of images {cell(captions['images'])}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
