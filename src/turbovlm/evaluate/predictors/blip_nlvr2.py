"""BLIP's NLVR2 model, by the file that its authors published: `transformers` has none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from turbovlm.evaluate.data import Sample
from turbovlm.evaluate.predictors.loading import Where, loading
from turbovlm.evaluate.run import Predictor

BLIP_NLVR2 = "blip-nlvr2"
"""What its name begins with."""
WORDS = "google-bert/bert-base-uncased"
"""Whose tokenizer BLIP was trained with."""
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def blip_nlvr2(where: Where) -> Predictor:
    """`blip-nlvr2:FILE`, such as `blip-nlvr2:model_base_nlvr.pth`; a tokenizer beside it goes before the hub's.

    Raises:
        TurboError: there is no such file, it does not fit, or there is no tokenizer.
    """
    from turbovlm.models import BlipForNLVR2

    model = BlipForNLVR2.from_checkpoint(where.name).eval().to(where.device, where.dtype)
    side = model.vision_model.config.image_size
    beside = Path(where.name).parent
    words = str(beside) if (beside / "tokenizer_config.json").exists() or (beside / "vocab.txt").exists() else WORDS
    with loading(dataclasses.replace(where, spec=words)):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
        pictures = transformers.BlipImageProcessor(
            size={"height": side, "width": side}, image_mean=MEAN, image_std=DEVIATION
        )

    def prepare(sample: Sample, image_size: int | None) -> tuple[Tensor, str]:
        pixels: Tensor = pictures([picture.open() for picture in sample.pictures], return_tensors="pt")["pixel_values"]
        return pixels, sample.text

    @torch.inference_mode()
    def predict(prepared: list[tuple[Tensor, str]]) -> list[str]:
        asked = tokenizer([text for _, text in prepared], padding=True, truncation=True, return_tensors="pt")
        pixels = torch.stack([each for each, _ in prepared]).to(where.device, where.dtype)
        scores = model(pixels, asked["input_ids"].to(where.device), asked["attention_mask"].to(where.device))
        return [("False", "True")[best] for best in scores.argmax(dim=1).tolist()]

    return Predictor(model, prepare, predict)
