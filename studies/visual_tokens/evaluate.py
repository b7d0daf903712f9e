"""Asks the small VLM about crowds it has never seen, reading all of an image's tokens or fewer, by every selection.

    python studies/visual_tokens/evaluate.py                  # writes selections.{json,md,png} in results/
    python studies/visual_tokens/evaluate.py --keeps 0.25     # what the file has is not asked again
    python studies/visual_tokens/evaluate.py --selections random attention --seeds 5
    python studies/visual_tokens/evaluate.py --images 150 --without-lists    # the committed are of these
    python studies/visual_tokens/evaluate.py --selections coverage --alphas 0 0.5 2    # other weights of attention
    python studies/visual_tokens/evaluate.py --report         # only the table and the plot anew
    python studies/visual_tokens/evaluate.py --quick --out /tmp   # few images, to see that it runs

Selections are those that turbovlm has, merging the rest into what stays or dropping it; those that can go by the
question also do. Where halves or tokens are drawn, a seed is one draw of many. The controls are random tokens, and an
image that is smaller to begin with: 160, 112 and 80 pixels a side make 100, 49 and 25 tokens. A question counts where
every token of its answer is the likeliest, the end included, so that greedy decoding writes just that; a list of all
there is, by the F1 of its items, for which it is written out.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from crowds import Crowd, asked, crowd, draw, style_of
from model import assembled
from packing import UNASKED, hidden_behind, pack, right_texts
from report import ALONE, write_report
from torch import Tensor
from tqdm import tqdm

import turbovlm
from turbovlm import ReadConfig
from turbovlm.errors import ConfigError
from turbovlm.read_config import SALIENCY
from turbovlm.vlm.marks import ATTENTION
from turbovlm_lab.zoo.clip import PATCH_SIZE, preprocess
from turbovlm_lab.zoo.grammar import Question
from turbovlm_lab.zoo.small_vlm import BOS, IMAGE_TOKEN, SIDE, TOKENS, WEIGHTS, SmallVlm

RESULTS = Path(__file__).parent / "results"
SELECTIONS: tuple[str, ...] = vars(sys.modules[ReadConfig.__module__])["VISUAL_SELECTIONS"]
DRAWN = ("information", "redundancy", "attention", "random")
"""Those that a seed decides something of."""
SMALLER = {0.5: 160, 0.25: 112, 0.1: 80}
"""Pixels a side of the image that has about as many tokens."""
KEEPS, SEEDS, IMAGES, BATCH = tuple(SMALLER), 3, 200, 50
QUESTION = 1.0
"""How much the question counts where it does."""
WHOLE, CONTROL = "all tokens", "smaller image"


@dataclass(frozen=True)
class Setting:
    """What is read of an image: everything, a share of its tokens, or a smaller image."""

    select: str
    keep: float = 1.0
    reduce: str = ""
    question: float = 0.0
    seed: int = 0
    alpha: float | None = None

    @property
    def key(self) -> str:
        parts = [self.select, f"{self.keep:g}", self.reduce, f"question {self.question:g}" if self.question else ""]
        parts += [] if self.alpha is None else [f"alpha {self.alpha:g}"]
        return ", ".join([*filter(None, parts), f"seed {self.seed}"])

    def config(self) -> ReadConfig | None:
        """None where turbovlm has no part in it.

        Raises:
            ConfigError: turbovlm has no such setting.
        """
        if self.select in (WHOLE, CONTROL):
            return None
        given = {"question": self.question} if self.question else {}
        given |= {} if self.alpha is None else {"alpha": self.alpha}
        return ReadConfig(self.keep, visual_select=self.select, reduce=self.reduce, seed=self.seed, **given)


@dataclass(frozen=True, eq=False)
class Shown:
    """An image and what is asked about it."""

    crowd: Crowd
    image: Any
    questions: list[Question]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selections", nargs="+", choices=(*SELECTIONS, WHOLE, CONTROL), metavar="NAME", help="(all)")
    parser.add_argument("--keeps", nargs="+", type=float, choices=KEEPS, default=KEEPS, help="shares of the tokens")
    parser.add_argument("--reduce", nargs="+", choices=("merge", "prune"), default=("merge", "prune"), help="(both)")
    parser.add_argument("--alphas", nargs="+", type=float, metavar="A", help="of these only, not of the default's")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"of what is drawn (default {SEEDS})")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"(default {IMAGES})")
    parser.add_argument("--without-lists", action="store_true", help="ask for none: they take most of a CPU's time")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="(default: those that ship)")
    parser.add_argument("--device", default="cpu", help="(default cpu)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="ask nothing")
    parser.add_argument("--quick", action="store_true", help="8 images, one seed, a quarter of the tokens")
    args = parser.parse_args()
    if args.quick:
        args.images, args.seeds, args.keeps = 8, 1, (0.25,)
    file = args.out / ("selections_quick.json" if args.quick else "selections.json")
    args.out.mkdir(exist_ok=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if args.report and not found:
        parser.error(f"--report: there is no {file}")
    if not args.report:
        about = {"images": args.images, "weights": hashlib.sha256(args.weights.read_bytes()).hexdigest()}
        about["lists"] = not args.without_lists
        if any(found.get(name, value) != value for name, value in about.items()):
            parser.error(f"{file} is of other weights, images or questions: remove it, or give --out")
        wanted = list(settings(args.selections, args.keeps, args.reduce, args.seeds, args.alphas))
        found = {**about, "asked": [], "scores": {}} | found
        fill(found, wanted, assembled(args.weights, args.device), file)
    write_report(found, file)


def settings(
    selections: Sequence[str] | None,
    keeps: Sequence[float],
    reductions: Sequence[str],
    seeds: int,
    alphas: Sequence[float] | None = None,
) -> Iterator[Setting]:
    """Those that turbovlm has, and the controls; with `alphas`, selections over all pairs with these alone."""
    if alphas is not None:
        over_pairs = [select for select in selections or SALIENCY if SALIENCY.get(select)]
        for keep, select, reduce, alpha in product(keeps, over_pairs, reductions, alphas):
            yield Setting(select, keep, reduce, alpha=alpha)
        return
    if selections is None or WHOLE in selections:
        yield Setting(WHOLE)
    questions = (0.0, QUESTION) if "question" in {field.name for field in fields(ReadConfig)} else (0.0,)
    for keep in keeps:
        if selections is None or CONTROL in selections:
            yield Setting(CONTROL, keep)
        for select in SELECTIONS if selections is None else [name for name in selections if name in SELECTIONS]:
            if select == "pooling" and round(keep * TOKENS) != (SIDE // 2) ** 2:
                continue
            for reduce in ("prune",) if select in ALONE else reductions:
                for question in questions:
                    for seed in range(seeds if select in DRAWN else 1):
                        setting = Setting(select, keep, reduce, question, seed)
                        if _exists(setting):
                            yield setting


def _exists(setting: Setting) -> bool:
    try:
        setting.config()
    except ConfigError:
        return False
    return True


def fill(found: dict[str, Any], wanted: list[Setting], vlm: SmallVlm, file: Path) -> None:
    """Ask what is not known yet; each setting's scores are written when it has been asked."""
    style, shown = style_of("test"), []
    for number in range(found["images"]):
        seen, chance = crowd("test", number)
        questions = [q for q in asked(seen, chance) if found["lists"] or q.asks != "list"]
        shown.append(Shown(seen, draw(seen, style)[0], questions))
    found["asked"] = [[number, q.asks] for number, each in enumerate(shown) for q in each.questions]
    seen = [look(vlm, shown[start : start + BATCH]) for start in tqdm(range(0, len(shown), BATCH), "looking")]
    for setting in tqdm([each for each in wanted if each.key not in found["scores"]], unit=" settings"):
        found["scores"][setting.key] = vars(setting) | {"right": ask(vlm, setting, shown, seen)}
        file.write_text(json.dumps(found) + "\n")


@torch.no_grad()
def look(vlm: SmallVlm, shown: Sequence[Shown]) -> Any:
    """What the tower and the projector make of images, with A of every token: no selection changes it."""
    with turbovlm.apply(vlm.model, ReadConfig(1.0, visual_select="attention")):
        return vlm.model.get_image_features(pixels_of(vlm, Setting(WHOLE), shown)[0])


@torch.no_grad()
def ask(vlm: SmallVlm, setting: Setting, shown: Sequence[Shown], seen: Sequence[Any]) -> list[float]:
    """The score of every question about every image, in their order; `seen` is what `look` made of each batch."""
    config, scores = setting.config(), []
    handle = None if config is None else turbovlm.apply(vlm.model, config)
    try:
        for start, images in zip(range(0, len(shown), BATCH), seen):
            some = shown[start : start + BATCH]
            answers = guided(vlm, some, images) if setting.question else read(vlm, setting, some, images)
            scores += [score for image in answers for score in image]
    finally:
        if handle is not None:
            handle.remove()
    return scores


def read(vlm: SmallVlm, setting: Setting, shown: Sequence[Shown], images: Any) -> list[list[float]]:
    """Images are read once, and all questions about each behind them; only lists are written out."""
    side = SIDE * PATCH_SIZE
    if setting.select == CONTROL:
        pixels, side = pixels_of(vlm, setting, shown)
        images = vlm.model.get_image_features(pixels, interpolate_pos_encoding=True)
    front = [BOS, *[IMAGE_TOKEN] * (side // PATCH_SIZE) ** 2]
    ids = torch.tensor([front] * len(shown), device=vlm.model.device)
    cache = vlm.model.model(input_ids=ids, mm_encoder_outputs={"image": images}, use_cache=True).past_key_values
    texts = [[(vlm.encode(q.text), vlm.encode_answer(q.answer)) for q in each.questions] for each in shown]
    packed = pack(texts, len(front)).to(vlm.model.device)
    hidden = hidden_behind(vlm.model.model.language_model, cache, packed)
    right = [[float(each) for each in row] for row in right_texts(hidden, packed, vlm.model.lm_head.weight)]
    lists = [(row, i) for row, each in enumerate(shown) for i, q in enumerate(each.questions) if q.asks == "list"]
    if lists:
        said = generate(vlm, [[*front, *texts[row][i][0]] for row, i in lists], images)
        for (row, i), text in zip(lists, said):
            right[row][i] = f1(text, shown[row].questions[i].answer)
    return right


def guided(vlm: SmallVlm, shown: Sequence[Shown], images: Any) -> list[list[float]]:
    """Every question is read by itself, because the tokens that are read depend on it."""
    asked = [(row, i, q) for row, each in enumerate(shown) for i, q in enumerate(each.questions)]
    prompts = [[BOS, *[IMAGE_TOKEN] * TOKENS, *vlm.encode(q.text)] for _, _, q in asked]
    found = [[0.0] * len(each.questions) for each in shown]
    for length in sorted({*map(len, prompts)}):  # prompts of one length need no padding
        alike = [n for n, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(alike), BATCH):
            some = alike[start : start + BATCH]
            rows = [asked[n] for n in some]
            answers = [vlm.encode_answer(q.answer) for *_, q in rows]
            right = right_behind(vlm, [prompts[n] for n in some], of_rows(images, [row for row, *_ in rows]), answers)
            for (row, i, _), is_right in zip(rows, right):
                found[row][i] = float(is_right)
    lists = [(row, i, q) for row, i, q in asked if q.asks == "list"]
    if lists:
        wanted = [[BOS, *[IMAGE_TOKEN] * TOKENS, *vlm.encode(q.text)] for *_, q in lists]
        said = generate(vlm, wanted, of_rows(images, [row for row, *_ in lists]))
        for (row, i, q), text in zip(lists, said):
            found[row][i] = f1(text, q.answer)
    return found


def of_rows(images: Any, rows: Sequence[int]) -> Any:
    """The images at `rows`, which may have one of them several times."""
    found = copy.copy(images)
    found.pooler_output = [images.pooler_output[row] for row in rows]
    setattr(found, ATTENTION, [getattr(images, ATTENTION)[row] for row in rows])
    return found


def right_behind(
    vlm: SmallVlm, prompts: Sequence[Sequence[int]], images: Any, answers: Sequence[Sequence[int]]
) -> list[bool]:
    """Whether greedy decoding would write each answer behind its prompt; the prompts are of one length."""
    ids = torch.tensor(prompts, device=vlm.model.device)
    longest = max(map(len, answers))
    wanted = torch.tensor([[*answer, *[UNASKED] * (longest - len(answer))] for answer in answers], device=ids.device)
    out = vlm.model(input_ids=ids, mm_encoder_outputs={"image": images}, use_cache=True, logits_to_keep=1)
    likeliest = out.logits[:, -1:].argmax(-1)
    if longest > 1:
        columns = ids.shape[1] + longest - 1
        places = torch.arange(ids.shape[1], columns, device=ids.device).expand(len(ids), -1)
        more = vlm.model(
            input_ids=wanted[:, :-1].clamp(min=0),
            attention_mask=torch.ones(len(ids), columns, dtype=torch.long, device=ids.device),
            position_ids=places,
            past_key_values=out.past_key_values,
        )
        likeliest = torch.cat([likeliest, more.logits.argmax(-1)], dim=1)
    right: list[bool] = ((likeliest == wanted) | (wanted == UNASKED)).all(dim=1).tolist()
    return right


def pixels_of(vlm: SmallVlm, setting: Setting, shown: Sequence[Shown]) -> tuple[Tensor, int]:
    """What the tower gets, and its side in pixels."""
    side = SMALLER[setting.keep] if setting.select == CONTROL else SIDE * PATCH_SIZE
    return preprocess([each.image for each in shown], side).to(vlm.model.device, vlm.model.dtype), side


def generate(vlm: SmallVlm, prompts: Sequence[Sequence[int]], images: Any) -> list[str]:
    """What greedy decoding writes behind prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=vlm.model.device)
    out = vlm.model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        mm_encoder_outputs={"image": images},
        max_new_tokens=48,
        do_sample=False,
    )
    return [vlm.decode(row) for row in out[:, longest:].tolist()]


def f1(said: str, wanted: str) -> float:
    """Of the items of two lists."""
    items, others = said.split(", "), wanted.split(", ")
    return 2 * len({*items} & {*others}) / (len(items) + len(others))


if __name__ == "__main__":
    main()
