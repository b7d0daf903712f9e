"""Captions, answers and judgements that a model of `transformers` writes, or chooses from a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbovlm.errors import ConfigError, TurboError
from turbovlm.loading.processors import image_sizes, load_with_processor, size_arguments, transformers_class
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import Sample
from turbovlm_lab.evaluate.predictors.blip import BLIP, blip_file
from turbovlm_lab.evaluate.run import Predictor

LONGEST = {"captioning": 40, "vqa": 16, "nlvr2": 8}
"""New tokens of an answer."""
CHAT = {
    "captioning": "Describe this picture in one short sentence.",
    "vqa": "{}\nAnswer the question using a single word or phrase.",
    "nlvr2": "Is this true of the two pictures? {}\nAnswer with True or False.",
}
"""What models are asked that follow a chat template."""
PLAIN = {"captioning": "", "vqa": "{}", "nlvr2": "{}"}
OWN = {"Blip2ForConditionalGeneration": {"captioning": "", "vqa": "Question: {} Short answer:"}}
"""What a family was trained to be asked, by its class."""
WRITE = ("ForConditionalGeneration", "ForCausalLM", "ForImageTextToText")
CHOOSE = {"vqa": "ViltForQuestionAnswering", "nlvr2": "ViltForImagesAndTextClassification"}
TAKES = {
    "captioning": WRITE,
    "vqa": (*WRITE, "ForQuestionAnswering"),
    "nlvr2": (*WRITE, CHOOSE["nlvr2"]),
}
"""Endings of the names of classes that can do a task."""


@dataclass(frozen=True)
class _Asked:
    """A sample, read: its images and what is asked."""

    images: list[Any]
    text: str
    image_size: int | None


def generating(task: str, spec: AskedModel) -> Predictor:
    """Texts, by greedy search; of NLVR2 `"True"`, `"False"`, or what was written instead.

    Raises:
        TurboError: there is no such model, or it writes nothing about images.
        ConfigError: a prompt without `{}` where a question is to be asked.
    """
    if spec.library == BLIP:
        model, processor = blip_file(spec, task)
        kind = type(model)
    else:
        kind = transformers_class(spec, TAKES[task])
        if kind.__name__ == "BlipForConditionalGeneration" and task != "captioning":
            raise TurboError(
                f"{spec.text}: is a {kind.__name__}, which writes captions; BlipForQuestionAnswering answers"
            )
        model, processor = load_with_processor(spec, kind)
    is_chat = getattr(processor, "chat_template", None) is not None
    chooses = kind.__name__ in CHOOSE.values()
    if task == "nlvr2" and not (is_chat or chooses):
        raise TurboError(
            f"{spec.text}: is a {kind.__name__} without a chat template, in which it could be asked about two images"
        )
    own = OWN.get(kind.__name__, CHAT if is_chat else PLAIN)
    prompt = spec.prompt if spec.prompt is not None else own.get(task, PLAIN[task])
    if task != "captioning" and "{}" not in prompt:
        raise ConfigError(f"prompt={prompt!r}: must have {{}} where the {_asked_for(task)} stands")

    def prepare(sample: Sample, image_size: int | None) -> _Asked:
        return _Asked([image.open() for image in sample.images], prompt.replace("{}", sample.text), image_size)

    answer = _chosen if chooses else _written
    understood: Callable[[str], str] = _truth if task == "nlvr2" else str.strip

    @torch.inference_mode()
    def predict(asked: list[_Asked]) -> list[Any]:
        found = answer(task, spec, model, processor, asked, is_chat)
        return [understood(text) for text in found]

    return Predictor(model, prepare, predict, () if is_chat or chooses else image_sizes(model, processor))


def _written(task: str, spec: AskedModel, model: Any, processor: Any, asked: list[_Asked], is_chat: bool) -> list[str]:
    size = size_arguments(processor, asked[0].image_size, spec.text)
    if is_chat:
        inputs = _as_chat(processor, asked, size)
    else:
        images = [each.images[0] if len(each.images) == 1 else each.images for each in asked]
        texts = {"text": [each.text for each in asked]} if any(each.text for each in asked) else {}
        side = {"padding_side": "left"} if texts and _writes_behind(model) else {}
        try:
            inputs = processor(images=images, **texts, padding=True, return_tensors="pt", **side, **size)
        except ValueError as error:
            raise ConfigError(f"{spec.text}: cannot be asked {asked[0].text!r} ({error}); give it a prompt") from error
    inputs = inputs.to(spec.device, spec.dtype)
    more = {"interpolate_pos_encoding": True} if size else {}
    made: Tensor = model.generate(**inputs, **more, max_new_tokens=LONGEST[task], do_sample=False, num_beams=1)
    given = inputs.get("input_ids")
    if given is not None and torch.equal(made[:, : given.shape[1]], given):
        made = made[:, given.shape[1] :]
    texts_made: list[str] = processor.batch_decode(made, skip_special_tokens=True)
    if given is not None and model.config.model_type == "blip" and task == "captioning":
        begun = processor.batch_decode(given, skip_special_tokens=True)
        texts_made = [text.removeprefix(beginning) for text, beginning in zip(texts_made, begun)]
    return texts_made


def _writes_behind(model: Any) -> bool:
    """Whether a model goes on with what it is asked, so that this must end where answers begin, padded in front."""
    config = model.config
    reads_first = config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False)
    return config.model_type != "blip" and not reads_first


def _as_chat(processor: Any, asked: list[_Asked], size: dict[str, Any]) -> Any:
    """Answers are written behind the questions, so these are padded in front."""
    said = [
        [
            {
                "role": "user",
                "content": [*({"type": "image"} for _ in each.images), {"type": "text", "text": each.text}],
            }
        ]
        for each in asked
    ]
    texts = [processor.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in said]
    images = [each.images for each in asked]
    return processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", **size)


def _chosen(task: str, spec: AskedModel, model: Any, processor: Any, asked: list[_Asked], _: bool) -> list[str]:
    """ViLT's answers, from the list that it was trained with."""
    if asked[0].image_size is not None:
        raise ConfigError(f"{spec.text}: image_size={asked[0].image_size} cannot be asked of it")
    texts = processor.tokenizer([each.text for each in asked], padding=True, truncation=True, return_tensors="pt")
    images = [image for each in asked for image in each.images]
    pixels = processor.image_processor(images=images, return_tensors="pt")
    if task == "nlvr2":
        pixels = {name: value.unflatten(0, (len(asked), 2)) for name, value in pixels.items()}
    inputs = {name: value.to(spec.device) for name, value in {**texts, **pixels}.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(spec.dtype)
    best = model(**inputs).logits.argmax(dim=-1).tolist()
    return [model.config.id2label[number] for number in best]


def _truth(text: str) -> str:
    """The judgement that a text begins with."""
    first = text.strip().split()[0].strip(".,!").lower() if text.strip() else ""
    return {"true": "True", "yes": "True", "false": "False", "no": "False"}.get(first, text.strip())


def _asked_for(task: str) -> str:
    return {"vqa": "question", "nlvr2": "statement"}[task]
