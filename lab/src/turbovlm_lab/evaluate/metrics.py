"""The field's official metrics: from kept libraries where there are any, else as published evaluation code has them.

Per sample where a metric is a mean over samples, so that runs can be compared in pairs.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from turbovlm.errors import DataError, TurboError

PYCOCOEVALCAP = "BLEU and CIDEr need pycocoevalcap: pip install 'turbovlm-lab[evaluate]'"
_PUNCTUATION = tuple(';/[]"{}()=+\\_->' + "<@`,?!")
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED for mark in re.finditer("'", word)
}


def normalised_answer(answer: str) -> str:
    """An answer as VQA's evaluation compares it: no punctuation or articles, numbers as digits, apostrophes put back.

    Antol et al., "VQA: Visual Question Answering", and the evaluation code published with VQAv2.
    """
    given = text = re.sub(r"[\n\t]", " ", answer).strip()
    in_number = re.search(r"\d,\d", given) is not None
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if beside_blank or in_number else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """An answer is right in so far as three people gave it; the mean over all choices of all people but one.

    With one answer to compare with, as GQA has: whether it is the same. The code published with VQAv2 normalises
    nothing where everybody agrees, so that "Yes" would be wrong where ten people say "yes". Here, as by those who
    report such models, answers are normalised there too; nothing changes for models that write as people did.
    """
    given, said = normalised_answer(answer), [normalised_answer(each) for each in answers]
    if len(said) == 1:
        return float(given == said[0])
    same = sum(each == given for each in said)
    return sum(min(1.0, (same - (each == given)) / 3) for each in said) / len(said)


def recalled(similarity: Tensor, right: Tensor, k: int) -> Tensor:
    """Whether one of the right ones is among the `k` most similar.

    Args:
        similarity: `[queries, gallery]`.
        right: whether that one is right, `[queries, gallery]`.
        k: up to the size of the gallery.

    Returns:
        `[queries]`, bool.
    """
    best = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return right.gather(1, best).any(dim=1)


def caption_scores(
    made: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool = False
) -> tuple[float, list[float]]:
    """Corpus BLEU-4, and CIDEr of each caption, whose mean is the corpus', by pycocoevalcap. Both as shares, not in %.

    Args:
        made: one per image.
        references: what people said of it.
        tokenized: captions are words already, in lower case and without punctuation. Others are cut by the Penn
            Treebank's rules, for which pycocoevalcap runs Java.

    Raises:
        TurboError: there is no pycocoevalcap, or no Java where it is needed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise TurboError(PYCOCOEVALCAP) from error
    wanted = {number: list(said) for number, said in enumerate(references)}
    found = {number: [caption] for number, caption in enumerate(made)}
    if not tokenized:
        wanted, found = _treebank(wanted), _treebank(found)
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    _, cider = Cider().compute_score(wanted, found)
    return float(bleu[3]), [float(score) for score in cider]


def needs_java() -> None:
    """To be called before hours are spent on captions that will be cut by the Penn Treebank's rules.

    Raises:
        TurboError: there is no pycocoevalcap, or no Java.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise TurboError(PYCOCOEVALCAP)
    if shutil.which("java") is None:
        raise TurboError("BLEU and CIDEr cut captions with the official tokenizer, which needs Java: install a JRE")


def _treebank(captions: dict[int, list[str]]) -> dict[int, list[str]]:
    needs_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # the tokenizer reads a caption per line, and takes more characters for ends of lines than pycocoevalcap removes
    every = {number: [{"caption": " ".join(text.split())} for text in texts] for number, texts in captions.items()}
    cut: dict[int, list[str]] = PTBTokenizer().tokenize(every)
    return cut


def region_scores(heat: Tensor, mask: Tensor) -> dict[str, float]:
    """How well a map of saliency finds a region.

    Args:
        heat: `[height, width]`, from 0 to 1.
        mask: the region, `[height, width]`, bool.

    Returns:
        `IoU` of where the map reaches half its largest value; `MAE`, the mean distance from the mask; `AUC`, how often
        a pixel of the region has more than one outside.

    Raises:
        DataError: the region is empty or everywhere.
    """
    from scipy.stats import rankdata

    if not mask.any() or mask.all():
        raise DataError(f"a mask is {'everywhere' if mask.any() else 'empty'}: nothing can be compared with it")
    found, inside = heat >= heat.max() / 2, mask.flatten()
    ranks = torch.from_numpy(rankdata(heat.double().flatten().numpy()))
    more, fewer = int(inside.sum()), int((~inside).sum())
    area = (ranks[inside].sum() - more * (more + 1) / 2) / (more * fewer)
    return {
        "IoU": float((found & mask).sum() / (found | mask).sum()),
        "MAE": float((heat - mask.to(heat.dtype)).abs().mean()),
        "AUC": float(area),
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between normal distributions of the means and covariances of `a` and `b`, `[samples, width]` (Heusel et al.).

    FID, where they are the Inception network's features.
    """
    first, second = (torch.cov(x.double().T) for x in (a, b))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    gap = (a.double().mean(dim=0) - b.double().mean(dim=0)).square().sum()
    return float(gap + first.trace() + second.trace() - 2 * cross)
