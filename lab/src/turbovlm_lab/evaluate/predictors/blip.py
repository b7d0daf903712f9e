"""BLIP by the files that its authors published, and by UPop's, which are pruned: `transformers` has neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbovlm.loading import library_errors
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import Sample
from turbovlm_lab.evaluate.run import Predictor

BLIP = "blip"
"""What the name of such a file begins with: `blip:FILE`."""
WORDS = "google-bert/bert-base-uncased"
"""Whose tokenizer BLIP was trained with."""
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def blip_file(spec: AskedModel, task: str) -> tuple[Any, Any]:
    """The model for a task, in eval mode, and its processor.

    Args:
        spec: `blip:FILE`, such as `blip:model_base_vqa_capfilt_large.pth`; a tokenizer beside the file goes before the
            hub's.
        task: of `turbovlm_lab.models.load_upop`.

    Raises:
        TurboError: there is no such file, it does not fit, or there is no tokenizer.
        ConfigError: it has no model for the task.
    """
    from turbovlm_lab.models import load_upop

    model = load_upop(spec.name, task).to(spec.device, spec.dtype)
    side = model.vision_model.config.image_size
    beside = Path(spec.name).parent
    words = str(beside) if (beside / "tokenizer_config.json").exists() or (beside / "vocab.txt").exists() else WORDS
    with library_errors(dataclasses.replace(spec, text=words)):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
        image_processor = transformers.BlipImageProcessor(
            size={"height": side, "width": side}, image_mean=MEAN, image_std=DEVIATION
        )
        processor = transformers.BlipProcessor(image_processor, tokenizer)
    return model, processor


def blip_nlvr2(spec: AskedModel) -> Predictor:
    """Statements about two images, `"True"` or `"False"`; see `blip_file`."""
    model, processor = blip_file(spec, "nlvr2")

    def prepare(sample: Sample, image_size: int | None) -> tuple[Tensor, str]:
        made = processor.image_processor([image.open() for image in sample.images], return_tensors="pt")
        return made["pixel_values"], sample.text

    @torch.inference_mode()
    def predict(prepared: list[tuple[Tensor, str]]) -> list[str]:
        asked = processor.tokenizer([text for _, text in prepared], padding=True, truncation=True, return_tensors="pt")
        pixels = torch.stack([each for each, _ in prepared]).to(spec.device, spec.dtype)
        scores = model(pixels, asked["input_ids"].to(spec.device), asked["attention_mask"].to(spec.device))
        return [("False", "True")[best] for best in scores.argmax(dim=1).tolist()]

    return Predictor(model, prepare, predict)
