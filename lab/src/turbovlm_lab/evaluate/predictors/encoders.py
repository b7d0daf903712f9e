"""Classification and retrieval: with models of `transformers` and `timm`, and CLIP's like of `open_clip`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import ConfigError
from turbovlm.loading import library_errors
from turbovlm.loading.processors import image_sizes, load_timm, load_with_processor, size_arguments, transformers_class
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import Data, Sample
from turbovlm_lab.evaluate.predictors.blip import BLIP, blip_file
from turbovlm_lab.evaluate.run import Predictor

BEST = 5
"""Classes in a prediction, the likeliest first."""
TEMPLATE = "a photo of a {}."
DIGITS = 6


@dataclass(frozen=True)
class Pair:
    """A model of images and sentences in one space.

    Attributes:
        model: what is accelerated.
        pixels: an image and the image size to what `see` is given, on the CPU: a tensor, or several by name.
        see: a batch of it to vectors, `[batch, width]`; its second argument is whether the size is not the model's own.
        read: sentences to vectors, `[batch, width]`.
        image_sizes: as `Predictor` has them.
    """

    model: Any
    pixels: Callable[[Any, int | None], Any]
    see: Callable[[Any, bool], Tensor]
    read: Callable[[Sequence[str]], Tensor]
    image_sizes: Sequence[int] = ()


def classification(spec: AskedModel, data: Data) -> Predictor:
    """Top-5 classes: of a classifier, or of a model of images and sentences that is given the names of the classes.

    Raises:
        TurboError: there is no such model.
        ConfigError: the model's classes are not those of the data.
    """
    if spec.library == "timm":
        return _timm_classifier(spec, data)
    if spec.library == "open_clip":
        return by_names(open_clip_pair(spec), data, spec.prompt or TEMPLATE)
    kind = transformers_class(spec, ("ForImageClassification", "CLIPModel", "SiglipModel", "Siglip2Model"))
    if not kind.__name__.endswith("ForImageClassification"):
        return by_names(transformers_pair(spec), data, spec.prompt or TEMPLATE)
    model, processor = load_with_processor(spec, kind)
    order = class_order(data.classes, model.config.id2label, spec.text)
    other_size = _interpolation(model)

    def prepare(sample: Sample, image_size: int | None) -> tuple[Tensor, bool]:
        given = size_arguments(processor, image_size, spec.text)
        pixels = processor(images=sample.images[0].open(), return_tensors="pt", **given)["pixel_values"][0]
        return pixels, image_size is not None

    @torch.inference_mode()
    def predict(prepared: list[tuple[Tensor, bool]]) -> list[Any]:
        pixels = torch.stack([each for each, _ in prepared]).to(spec.device, spec.dtype)
        logits = model(pixel_values=pixels, **(other_size if prepared[0][1] else {})).logits
        return likeliest(logits[:, order.to(logits.device)])

    return Predictor(model, prepare, predict, image_sizes(model, processor))


def retrieval(spec: AskedModel) -> Predictor:
    """Vectors of an image and of its captions, of length 1.

    Raises:
        TurboError: there is no such model, or it is no model of images and sentences.
    """
    return vectors_of(open_clip_pair(spec) if spec.library == "open_clip" else transformers_pair(spec))


def vectors_of(pair: Pair) -> Predictor:
    """A predictor of `{"picture": […], "captions": [[…], …]}`."""

    def prepare(sample: Sample, image_size: int | None) -> tuple[Any, bool, tuple[str, ...]]:
        return pair.pixels(sample.images[0].open(), image_size), image_size is not None, sample.answers

    @torch.inference_mode()
    def predict(prepared: list[tuple[Any, bool, tuple[str, ...]]]) -> list[Any]:
        seen = F.normalize(pair.see(_stacked([p for p, _, _ in prepared]), prepared[0][1]).float(), dim=-1)
        said = F.normalize(pair.read([text for _, _, texts in prepared for text in texts]).float(), dim=-1)
        each = torch.split(said, [len(texts) for _, _, texts in prepared])
        return [{"picture": _numbers(p), "captions": [_numbers(c) for c in cs]} for p, cs in zip(seen, each)]

    return Predictor(pair.model, prepare, predict, pair.image_sizes)


def transformers_pair(spec: AskedModel) -> Pair:
    """CLIP, SigLIP and their like, or BLIP's contrastive part.

    Raises:
        TurboError: it is none of these.
    """
    if spec.library == BLIP:
        model, processor = blip_file(spec, "retrieval")
        kind = type(model)
    else:
        kind = transformers_class(spec, ("CLIPModel", "SiglipModel", "Siglip2Model", "BlipForImageTextRetrieval"))
        model, processor = load_with_processor(spec, kind)
    other_size = _interpolation(getattr(model, "vision_model", model))
    is_siglip, has_shapes = "Siglip" in kind.__name__, kind.__name__ == "Siglip2Model"

    def pixels(image: Any, image_size: int | None) -> Any:
        given = size_arguments(processor, image_size, spec.text)
        made = processor.image_processor(images=image, return_tensors="pt", **given)
        # SigLIP 2 of any aspect ratio is also told the image's shape in patches
        return {name: value[0] for name, value in made.items()} if has_shapes else made["pixel_values"][0]

    def see(batch: Any, is_other_size: bool) -> Tensor:
        if has_shapes:
            given = {name: value.to(spec.device) for name, value in batch.items()}
            return _pooled(model.get_image_features(**given | {"pixel_values": given["pixel_values"].to(spec.dtype)}))
        batch = batch.to(spec.device, spec.dtype)
        more = other_size if is_other_size else {}
        if kind.__name__ == "BlipForImageTextRetrieval":
            seen: Tensor = model.vision_proj(model.vision_model(pixel_values=batch, **more).last_hidden_state[:, 0])
            return seen
        return _pooled(model.get_image_features(pixel_values=batch, **more))

    def read(sentences: Sequence[str]) -> Tensor:
        # SigLIP was trained on sentences padded to one length, without a mask of the padding
        length = min(processor.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        how = {"padding": "max_length" if is_siglip else True, "truncation": True, "max_length": length}
        words = processor.tokenizer(list(sentences), **how, return_tensors="pt")
        words = words.to(spec.device)
        if kind.__name__ == "BlipForImageTextRetrieval":
            out = model.text_encoder(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
            vectors: Tensor = model.text_proj(out.last_hidden_state[:, 0])
            return vectors
        return _pooled(model.get_text_features(**{"input_ids": words["input_ids"]} if is_siglip else words))

    return Pair(model, pixels, see, read, image_sizes(model, processor))


def open_clip_pair(spec: AskedModel) -> Pair:
    """`open_clip:hf-hub:ID` or `open_clip:local-dir:FOLDER`.

    Raises:
        TurboError: there is no such model.
    """
    with library_errors(spec):
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(spec.name, device=spec.device)
        tokenizer = open_clip.get_tokenizer(spec.name)
    model = model.eval().to(spec.dtype)

    def pixels(image: Any, image_size: int | None) -> Tensor:
        if image_size is not None:
            raise ConfigError(
                f"{spec.text}: open_clip's image sizes are fixed; image_size={image_size} cannot be asked"
            )
        made: Tensor = transform(image)
        return made

    def see(batch: Tensor, _: bool) -> Tensor:
        vectors: Tensor = model.encode_image(batch.to(spec.device, spec.dtype))
        return vectors

    def read(sentences: Sequence[str]) -> Tensor:
        vectors: Tensor = model.encode_text(tokenizer(list(sentences)).to(spec.device))
        return vectors

    return Pair(model, pixels, see, read)


def class_order(classes: Sequence[str], labels: dict[int, str], spec: str) -> Tensor:
    """Which of a model's outputs is which class of the data: by their names, or if there are as many, by their order.

    Raises:
        ConfigError: neither can be.
    """
    of_name = {name.casefold(): number for number, name in labels.items()}
    if all(name.casefold() in of_name for name in classes):
        return torch.tensor([of_name[name.casefold()] for name in classes])
    if len(classes) == len(labels):
        return torch.arange(len(classes))
    unknown = next(name for name in classes if name.casefold() not in of_name)
    raise ConfigError(
        f"{spec}: has {len(labels)} classes and the data have {len(classes)}, of which it does not know {unknown!r}"
    )


def likeliest(logits: Tensor) -> list[Any]:
    """The best classes of each row."""
    found: list[Any] = logits.topk(min(BEST, logits.shape[1]), dim=1).indices.tolist()
    return found


def by_names(pair: Pair, data: Data, template: str) -> Predictor:
    """Top-5 classes, by how near an image is to their names in `template`.

    Raises:
        ConfigError: the template has no place for a name.
    """
    if "{}" not in template:
        raise ConfigError(f"prompt={template!r}: must have {{}} where the name of the class stands")
    with torch.inference_mode():
        names = [template.format(name.replace("_", " ")) for name in data.classes]
        read = torch.cat([pair.read(names[i : i + 64]) for i in range(0, len(names), 64)])
        classes = F.normalize(read.float(), dim=-1)

    def prepare(sample: Sample, image_size: int | None) -> tuple[Any, bool]:
        return pair.pixels(sample.images[0].open(), image_size), image_size is not None

    @torch.inference_mode()
    def predict(prepared: list[tuple[Any, bool]]) -> list[Any]:
        seen = pair.see(_stacked([pixels for pixels, _ in prepared]), prepared[0][1])
        return likeliest(F.normalize(seen.float(), dim=-1) @ classes.T)

    return Predictor(pair.model, prepare, predict, pair.image_sizes)


def _timm_classifier(spec: AskedModel, data: Data) -> Predictor:
    model, transform = load_timm(spec)
    if getattr(model, "num_classes", 0) != len(data.classes):
        raise ConfigError(f"{spec.text}: has {model.num_classes} classes and the data have {len(data.classes)}")

    def prepare(sample: Sample, image_size: int | None) -> Tensor:
        if image_size is not None:
            raise ConfigError(
                f"{spec.text}: timm's image sizes are fixed; image_size={image_size} cannot be asked of it"
            )
        pixels: Tensor = transform(sample.images[0].open())
        return pixels

    @torch.inference_mode()
    def predict(prepared: list[Tensor]) -> list[Any]:
        return likeliest(model(torch.stack(prepared).to(spec.device, spec.dtype)))

    return Predictor(model, prepare, predict)


def _interpolation(module: Any) -> dict[str, bool]:
    """What a forward is given for images that are not of its own size."""
    has = "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
    return {"interpolate_pos_encoding": True} if has else {}


def _stacked(each: Sequence[Any]) -> Any:
    if isinstance(each[0], dict):
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}
    return torch.stack(list(each))


def _pooled(out: Any) -> Tensor:
    vectors: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return vectors


def _numbers(vector: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in vector.tolist()]
