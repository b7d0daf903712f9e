"""Visual tokens dropped inside the language model, against choosing before it, at equal cost.

    python studies/visual_tokens/inside.py                # writes inside.{json,md} in results/
    python studies/visual_tokens/inside.py --images 50 --before information coverage     # as committed
    python studies/visual_tokens/inside.py --images 8 --out /tmp   # few images, to see that it runs

Inside: after some layers the question's last token attends to the visual tokens that are left, and those it attends to
least are dropped for the layers that follow: once after two layers, as FastV does, or after a third and after two
thirds of them, as PyramidDrop. Before: `visual_keep`, by the selections asked for, at the share that the layers inside
read on average, so that the language model multiplies as often, but for what the scores themselves take. Which tokens
are dropped inside depends on the question, which choosing before does not know.

Questions count as in evaluate.py; lists of all there is are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from crowds import asked, crowd, draw, style_of
from evaluate import BATCH, RESULTS, SELECTIONS, Setting, Shown, ask, look
from model import assembled
from torch import Tensor
from tqdm import tqdm

from turbovlm_lab.evaluate.statistics import difference, mean
from turbovlm_lab.zoo.small_vlm import BOS, TOKENS, WEIGHTS, SmallVlm

TOGETHER = 4
"""Images whose questions are read together, each with its own copy of the image's tokens."""


@dataclass(frozen=True)
class Stages:
    """Shares of the visual tokens that are left from a layer on, by the number of that layer."""

    name: str
    left: tuple[tuple[int, float], ...]

    def mean(self, layers: int) -> float:
        """The share that a layer reads on average."""
        share, found, of = 1.0, [], dict(self.left)
        for layer in range(layers):
            share = of.get(layer, share)
            found.append(share)
        return float(np.mean(found))


INSIDE = (
    Stages("after 2 of 18 layers", ((2, 0.5),)),
    Stages("after 2 of 18 layers", ((2, 0.15),)),
    Stages("after 6 and 12 of 18 layers", ((6, 0.5), (12, 0.25))),
    Stages("after 6 and 12 of 18 layers", ((6, 0.1), (12, 0.05))),
)
BEFORE = tuple(name for name in ("information", "attention", "coverage") if name in SELECTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, metavar="N", help="(default 100)")
    parser.add_argument("--before", nargs="+", choices=SELECTIONS, default=BEFORE, help=f"(default {BEFORE})")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="(default: those that ship)")
    parser.add_argument("--device", default="cpu", help="(default cpu)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    vlm, style, shown = assembled(args.weights, args.device), style_of("test"), []
    for number in range(args.images):
        seen, chance = crowd("test", number)
        shown.append(Shown(seen, draw(seen, style)[0], [q for q in asked(seen, chance) if q.asks != "list"]))
    seen = [look(vlm, shown[start : start + BATCH]) for start in tqdm(range(0, len(shown), BATCH), "looking")]
    features = [image for outputs in seen for image in outputs.pooler_output]
    owners = [number for number, each in enumerate(shown) for _ in each.questions]
    depth, rows = len(vlm.model.model.language_model.layers), []
    for stages in tqdm((Stages("all tokens", ()), *INSIDE), unit=" settings"):
        share = stages.mean(depth)
        right = ask_inside(vlm, stages, shown, features)
        rows.append({"how": stages.name, "left": stages.left, "share": share, "right": right})
        for select in args.before if stages.left else ():
            right = ask(vlm, Setting(select, share, "merge"), shown, seen)
            rows.append({"how": f"before, {select}", "left": stages.left, "share": share, "right": right})
    weights = hashlib.sha256(args.weights.read_bytes()).hexdigest()
    found = {"images": args.images, "weights": weights, "asked": owners, "rows": rows}
    (args.out / "inside.json").write_text(json.dumps(found) + "\n")
    (args.out / "inside.md").write_text(report(found))
    sys.stdout.write(report(found))


@torch.no_grad()
def ask_inside(vlm: SmallVlm, stages: Stages, shown: Sequence[Shown], features: Sequence[Tensor]) -> list[float]:
    """Whether each answer is right; `features` are the images', `[196, width]` each."""
    model, scores = vlm.model, []
    for start in range(0, len(shown), TOGETHER):
        some = shown[start : start + TOGETHER]
        visual = torch.stack([*features[start : start + TOGETHER]])
        texts = [
            (image, vlm.encode(q.text), vlm.encode_answer(q.answer))
            for image, each in enumerate(some)
            for q in each.questions
        ]
        hidden = staged(model.model.language_model, visual, texts, stages)
        for row, (_, question, answer) in enumerate(texts):
            said = hidden[row, len(question) - 1 :][: len(answer)]
            likeliest = F.linear(said, model.lm_head.weight).argmax(-1).tolist()
            scores.append(float(likeliest == list(answer)))
    return scores


def staged(
    language_model: Any, visual: Tensor, texts: Sequence[tuple[int, Sequence[int], Sequence[int]]], stages: Stages
) -> Tensor:
    """Gemma's layers, from some of which on fewer visual tokens are left.

    Args:
        language_model: a Gemma 3 without its head, whose windows are wider than a sequence.
        visual: `[images, V, width]`.
        texts: for each row, the number of its image, and the tokens of a question and of its answer.
        stages: what is left from which layer on.

    Returns:
        Hidden states of the texts' columns, `[rows, columns, width]`; rows are padded at their end.
    """
    words, device = language_model.get_input_embeddings(), visual.device
    columns = max(len(question) + len(answer) - 1 for _, question, answer in texts)
    ids = torch.zeros(len(texts), columns, dtype=torch.long, device=device)
    for row, (_, question, answer) in enumerate(texts):
        whole = torch.tensor([*question, *answer][:-1], device=device)
        ids[row, : len(whole)] = whole
    ends = torch.tensor([len(question) - 1 for _, question, _ in texts], device=device)
    first = words(torch.full_like(ids[:, :1], BOS))
    hidden = torch.cat([first, visual[[image for image, _, _ in texts]].to(first.dtype), words(ids)], dim=1)
    positions = torch.arange(hidden.shape[1], device=device).expand(len(texts), -1)
    left, of = visual.shape[1], dict(stages.left)
    for number, (layer, kind) in enumerate(zip(language_model.layers, language_model.config.layer_types)):
        rotary = language_model.rotary_emb(hidden, positions, kind)
        if number in of:
            scores = attention_row(layer, hidden, rotary, ends + 1 + left)[:, 1 : 1 + left]
            fewer = max(1, round(of[number] * visual.shape[1]))
            kept = scores.topk(fewer, dim=1).indices.sort(dim=1).values + 1
            behind = torch.arange(1 + left, hidden.shape[1], device=device).expand(len(texts), -1)
            index = torch.cat([torch.zeros_like(kept[:, :1]), kept, behind], dim=1)
            hidden = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            positions, left = positions.gather(1, index), fewer
            rotary = language_model.rotary_emb(hidden, positions, kind)
        length = hidden.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        mask = torch.zeros(length, length, dtype=hidden.dtype, device=device)
        mask = mask.masked_fill(future, torch.finfo(hidden.dtype).min).expand(len(texts), 1, -1, -1)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    found: Tensor = language_model.norm(hidden)[:, -columns:]
    return found


def attention_row(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor) -> Tensor:
    """What one column of each row attends to in a layer, the mean over heads, `[rows, columns]`; 0 behind it.

    Args:
        layer: of Gemma 3.
        hidden: what it is given, `[rows, columns, width]`.
        rotary: cosines and sines of the columns' positions.
        at: the column of each row.
    """
    from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb

    attention, x = layer.self_attn, layer.input_layernorm(hidden)
    q, k = (
        norm(project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2))
        for project, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm))
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    query = q.gather(2, at.view(-1, 1, 1, 1).expand(-1, q.shape[1], 1, q.shape[3])).squeeze(2).float()
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    scores = torch.einsum("rhd,rhnd->rhn", query * attention.scaling, keys)
    unseen = torch.arange(hidden.shape[1], device=hidden.device) > at.unsqueeze(1)
    return scores.masked_fill(unseen.unsqueeze(1), float("-inf")).softmax(dim=-1).mean(dim=1)


def report(found: dict[str, Any]) -> str:
    lines = [
        "# Visual tokens dropped inside the language model, and before it",
        "",
        f"{found['images']} crowded scenes, {len(found['asked'])} questions; shares of right answers with 95 %",
        f"bootstrap intervals over images. A layer reads the share given of {TOKENS} visual tokens, on average. The",
        "last column is how much higher the share right is than that of dropping inside, at the same cost.",
        f"Weights: sha256 {found['weights'][:16]}….",
        "",
        "| dropped | left from a layer on | share read | right | above inside |",
        "|---|---|--:|---|---|",
    ]
    inside: list[float] = []
    for row in found["rows"]:
        every = mean(row["right"], found["asked"])
        left = ", ".join(f"{share:g} from {layer}" for layer, share in row["left"])
        gap = ""
        if row["how"].startswith("before"):
            apart = difference(row["right"], inside, found["asked"])
            gap = f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"
        else:
            inside = row["right"]
        right = f"{every.value:.3f} [{every.low:.3f}, {every.high:.3f}]"
        lines.append(f"| {row['how']} | {left} | {row['share']:.3f} | {right} | {gap} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
