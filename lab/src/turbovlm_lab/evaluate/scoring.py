"""What predictions are worth: each task's metrics, and how often two runs agree."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import DataError
from turbovlm_lab.evaluate import metrics
from turbovlm_lab.evaluate.data import Data

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Score:
    """One metric of one run.

    Attributes:
        name: as the field calls it.
        value: a share for all but CIDEr, MAE and FID.
        parts: what each sample, or each of its captions, has to do with it: `value` is their mean; empty if it is none.
        groups: which parts are drawn together, one number each: those of one image.
        higher: whether more is better.
    """

    name: str
    value: float
    parts: tuple[float, ...] = ()
    groups: tuple[int, ...] = ()
    higher: bool = True


def scores(task: str, data: Data, predictions: Sequence[Any]) -> list[Score]:
    """The task's metrics, the one to compare by first.

    Raises:
        DataError: predictions that do not fit the data.
    """
    return SCORES[task](data, predictions)


def agreement(task: str, predictions: Sequence[Any], base: Sequence[Any]) -> list[float]:
    """For each sample how much the answers of two runs are the same: 0 or 1; overlap of regions, for saliency.

    A retrieval's answer is the caption that is nearest to the image.
    """
    if task == "retrieval":
        return [_same(a, b) for a, b in zip(_nearest(predictions), _nearest(base), strict=True)]
    return [AGREE[task](a, b) for a, b in zip(predictions, base, strict=True)]


def encode_map(heat: Tensor) -> str:
    """A map `[height, width]` from 0 to 1 as text: a PNG of 8 bits."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((heat * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_map(text: str) -> Tensor:
    """What `encode_map` was given, to 8 bits."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return torch.from_numpy(np.array(image)).float() / 255


def _classification(data: Data, predictions: Sequence[list[int]]) -> list[Score]:
    number = {name: i for i, name in enumerate(data.classes)}
    right = [number[sample.answers[0]] for sample in data.samples]
    top1 = [float(best[0] == answer) for best, answer in zip(predictions, right)]
    top5 = [float(answer in best[:5]) for best, answer in zip(predictions, right)]
    found = [_mean("top-1", data, top1)]
    return found if len(data.classes) <= 5 else [*found, _mean("top-5", data, top5)]


def _captioning(data: Data, predictions: Sequence[str]) -> list[Score]:
    references = [sample.answers for sample in data.samples]
    bleu, cider = metrics.caption_scores(predictions, references, tokenized=data.tokenized)
    return [_mean("CIDEr", data, cider), Score("BLEU-4", bleu)]


def _vqa(data: Data, predictions: Sequence[str]) -> list[Score]:
    right = [metrics.vqa_accuracy(said, sample.answers) for said, sample in zip(predictions, data.samples)]
    return [_mean("accuracy", data, right)]


def _nlvr2(data: Data, predictions: Sequence[str]) -> list[Score]:
    right = [float(said == sample.answers[0]) for said, sample in zip(predictions, data.samples)]
    return [_mean("accuracy", data, right)]


def _retrieval(data: Data, predictions: Sequence[dict[str, Any]]) -> list[Score]:
    images = torch.tensor([each["picture"] for each in predictions])
    captions = torch.tensor([vector for each in predictions for vector in each["captions"]])
    owner = torch.tensor([i for i, each in enumerate(predictions) for _ in each["captions"]])
    similarity, right = images @ captions.T, torch.arange(len(images))[:, None] == owner
    groups = tuple(owner.tolist())
    found = []
    for k in RECALLS:
        if k < len(images):
            of_texts = metrics.recalled(similarity, right, k).float().tolist()
            of_images = metrics.recalled(similarity.T, right.T, k).float().tolist()
            found.append(_mean(f"text R@{k}", data, of_texts))
            found.append(Score(f"image R@{k}", sum(of_images) / len(of_images), tuple(of_images), groups))
    if not found:
        raise DataError(f"{data.name}: has one image; there is nothing to retrieve it from")
    return found


def _saliency(data: Data, predictions: Sequence[str]) -> list[Score]:
    each = []
    for sample, said in zip(data.samples, predictions):
        heat = decode_map(said)
        assert sample.mask is not None
        mask = _to_tensor(sample.mask.open("L")) >= 0.5
        full = F.interpolate(heat[None, None], size=tuple(mask.shape), mode="bilinear", align_corners=False)[0, 0]
        try:
            each.append(metrics.region_scores(full, mask))
        except DataError as error:
            raise DataError(f"{sample.mask.name}: {error}") from error
    iou, area = (_mean(name, data, [found[name] for found in each]) for name in ("IoU", "AUC"))
    mae = _mean("MAE", data, [found["MAE"] for found in each], higher=False)
    return [iou, area, mae]


def _mean(name: str, data: Data, parts: Sequence[float], higher: bool = True) -> Score:
    """Samples of the same image are drawn together."""
    number: dict[tuple[str, ...], int] = {}
    groups = (number.setdefault(tuple(p.name for p in s.images), len(number)) for s in data.samples)
    return Score(name, sum(parts) / len(parts), tuple(parts), tuple(groups), higher)


def _to_tensor(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).float() / 255


def _same(a: Any, b: Any) -> float:
    return float(a == b)


def _same_region(a: str, b: str) -> float:
    first, second = (heat >= heat.max() / 2 for heat in (decode_map(a), decode_map(b)))
    return float((first & second).sum() / (first | second).sum())


def _nearest(predictions: Sequence[dict[str, Any]]) -> list[int]:
    """Of all captions, each image's."""
    images = torch.tensor([each["picture"] for each in predictions])
    captions = torch.tensor([vector for each in predictions for vector in each["captions"]])
    nearest: list[int] = (images @ captions.T).argmax(dim=1).tolist()
    return nearest


SCORES: dict[str, Callable[[Data, Sequence[Any]], list[Score]]] = {
    "classification": _classification,
    "retrieval": _retrieval,
    "captioning": _captioning,
    "vqa": _vqa,
    "nlvr2": _nlvr2,
    "saliency": _saliency,
}
AGREE: dict[str, Callable[[Any, Any], float]] = {
    "classification": lambda a, b: _same(a[0], b[0]),
    "captioning": _same,
    "vqa": _same,
    "nlvr2": _same,
    "saliency": _same_region,
}
