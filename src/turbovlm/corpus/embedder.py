"""A model that turns prepared images into columns of a table: embeddings, labels or captions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import turbovlm
from turbovlm.corpus.job import EMBEDDINGS, Job
from turbovlm.corpus.reading import Batch, Images
from turbovlm.encoder.towers import Tower, find_towers
from turbovlm.errors import ConfigError, TurboError, UnsupportedModelError
from turbovlm.loading import ModelSpec, library_errors, running
from turbovlm.loading.models import as_far_as_shapes_go, load_model, load_outline
from turbovlm.loading.processors import load_with_processor, transformers_class

GENERATING = "AutoModelForImageTextToText"


@dataclass(frozen=True)
class Rows(Images):
    """What became of a batch.

    Attributes:
        columns: by output, a value for each image; None for those with an error.
    """

    columns: dict[str, list[Any]]


class Embedder:
    """A model with its weights, accelerated, and what a job keeps of its output.

    Args:
        job: what is to become of each image.

    Attributes:
        outputs: the job's, or the first embedding that the model has.

    Raises:
        TurboError: the model cannot be loaded.
        ConfigError: it has not such an output, or a setting has no effect.
        UnsupportedModelError: nothing in it can be accelerated.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.spec = job, job.model
        self.generates = "caption" in job.outputs
        self.model, self.processor = _load(job)
        if job.settings:
            turbovlm.apply(self.model, **job.settings)
        self.outputs = check_outputs(job, self.model)
        self.texts = self._encode_labels() if job.labels else None

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Rows:
        """Encode the images of a batch, a forward for each size."""
        names = [*self.outputs, *(["score"] if "label" in self.outputs else [])]
        columns: dict[str, list[Any]] = {name: [None] * len(batch.names) for name in names}
        for places, arrays in batch.groups:
            inputs = {name: self._placed(value) for name, value in arrays.items()}
            alone = running(self.spec.text, "take these images")
            with (
                contextlib.nullcontext() if self.job.settings else alone
            ):  # which says that it is the model's own fault
                found = self._captions(inputs) if self.generates else self._encode(inputs)
            for name, values in found.items():
                for place, value in zip(places, values):
                    columns[name][place] = value
        return Rows(batch.shard, batch.number, batch.last, batch.names, batch.sizes, batch.errors, columns)

    def _placed(self, array: np.ndarray[Any, Any]) -> Tensor:
        value = torch.from_numpy(array).to(self.spec.device)
        return value.to(self.spec.dtype) if value.is_floating_point() else value

    def _encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Sequence[Any]]:
        made = compute(self.model, inputs, self.outputs, self.texts)
        found: dict[str, Sequence[Any]] = {}
        for name in self.outputs:
            value = made[name].float().cpu()
            if name != "label":
                found[name] = list(value.numpy())
                continue
            scores, places = value.softmax(dim=-1).max(dim=-1)
            found["label"] = [self._label(place) for place in places.tolist()]
            found["score"] = scores.tolist()
        return found

    def _label(self, place: int) -> str:
        names = self.job.labels or _class_names(self.model)
        return names[place] if names is not None else str(place)

    def _captions(self, inputs: Mapping[str, Tensor]) -> dict[str, Sequence[Any]]:
        made = self.model.generate(**inputs, max_new_tokens=self.job.max_new_tokens, do_sample=False)
        if not getattr(self.model.config, "is_encoder_decoder", False) and "input_ids" in inputs:
            width = inputs["input_ids"].shape[1]
            if torch.equal(made[:, :width], inputs["input_ids"]):  # some give the answer alone
                made = made[:, width:]
        texts = self.processor.batch_decode(made, skip_special_tokens=True)
        return {"caption": [text.strip() for text in texts]}

    @torch.inference_mode()
    def _encode_labels(self) -> Tensor:
        """Embeddings of the labels, `[labels, width]`, of length 1."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or not hasattr(self.model, "get_text_features"):
            raise ConfigError(
                f"labels: {self.spec.text} embeds no texts; it chooses from its own classes, or give a dual encoder"
            )
        # SigLIP was trained on texts of full length alone
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        tokens = tokenizer(list(self.job.labels), padding=padding, truncation=True, return_tensors="pt")
        found = _tensor(self.model.get_text_features(**tokens.to(self.spec.device)))
        return torch.nn.functional.normalize(found.float(), dim=-1)


def check_outputs(job: Job, model: nn.Module) -> tuple[str, ...]:
    """The job's outputs, or the first embedding that the model has.

    Args:
        job: with or without outputs.
        model: with weights or on the meta device.

    Raises:
        ConfigError: the model has not such an output; the message says which it has.
    """
    if "caption" in job.outputs:
        if not callable(getattr(model, "generate", None)):
            raise ConfigError(f"outputs: {job.model.text} generates no text, so it has no caption")
        return job.outputs
    has = outputs_of(model, bool(job.labels))
    for output in job.outputs:
        if output not in has:
            more = "; give labels, that it chooses from" if output == "label" and "projected" in has else ""
            raise ConfigError(f"outputs: {job.model.text} has no {output}; it has {', '.join(has)}{more}")
    embeddings = [name for name in EMBEDDINGS if name in has]
    if not job.outputs and not embeddings:
        raise ConfigError(f"outputs: {job.model.text} has no embedding; it has {', '.join(has) or 'none'}")
    return job.outputs or tuple(embeddings[:1])


def outputs_of(model: nn.Module, labels: bool = False) -> list[str]:
    """The outputs that a model has: embeddings, and a label where it classifies or there are labels to choose from."""
    tower = _tower(model)
    inputs = tower.random_inputs(1, _dtype(model), _device(model))
    if not hasattr(model, "forward_features"):
        inputs = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else inputs
    else:
        inputs = {"x": next(iter(inputs.values()))}
    found: dict[str, Tensor] = {}
    with torch.no_grad(), as_far_as_shapes_go():
        found = compute(model, inputs, (), None)
    if "label" not in found and labels and "projected" in found:
        return [*found, "label"]
    return list(found)


def compute(
    model: nn.Module, inputs: Mapping[str, Tensor], wanted: Sequence[str], texts: Tensor | None
) -> dict[str, Tensor]:
    """What an encoder has of images: its embeddings and logits, `[batch, width]`, by one forward.

    Args:
        model: of transformers or timm.
        inputs: its arguments by name.
        wanted: outputs that are asked for; all of them if empty.
        texts: embeddings of labels, which then give the logits.

    Raises:
        ConfigError: it has not what is asked for.
    """
    if hasattr(model, "forward_features"):
        return _of_timm(model, inputs["x"])
    tower, whole = _tower(model), model
    found: dict[str, Tensor] = {}
    dual = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    classifies = type(model).__name__.endswith("ForImageClassification")
    reads: Any = whole.get_image_features if dual else whole if classifies else tower.module
    with _output_of(tower.module) as inner:
        out = reads(**inputs)
    if dual:
        found["projected"] = _tensor(out)
        if texts is not None:
            images = torch.nn.functional.normalize(found["projected"].float(), dim=-1)
            found["label"] = images @ texts.T * _scale(model)
    if "pooler_output" in inner:
        found["pooled"] = inner["pooler_output"]
    if tower.cls and "last_hidden_state" in inner:
        found["cls"] = inner["last_hidden_state"][:, 0]
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        found["label"] = logits
    return {name: value for name, value in found.items() if not wanted or name in wanted}


def _of_timm(model: Any, images: Tensor) -> dict[str, Tensor]:
    tokens = model.forward_features(images)
    found = {"pooled": model.forward_head(tokens, pre_logits=True)}
    if getattr(model, "num_prefix_tokens", 0) > 0 and getattr(model, "has_class_token", False):
        found["cls"] = tokens[:, 0]
    if model.num_classes > 0:
        found["label"] = model.forward_head(tokens)
    return found


def _tower(model: nn.Module) -> Tower:
    towers = find_towers(model)
    vision = [tower for tower in towers if "text" not in tower.name and "audio" not in tower.name]
    if len(vision) != 1:
        named = ", ".join(tower.title for tower in towers)
        raise UnsupportedModelError(f"{type(model).__name__}: must have one vision encoder, has {named or 'none'}")
    return vision[0]


@contextlib.contextmanager
def _output_of(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the tensors that a module gives in the meantime, at once: what calls it may put others in their place."""
    seen: dict[str, Tensor] = {}

    def look(_module: nn.Module, _inputs: Any, out: Any) -> None:
        for name in ("pooler_output", "last_hidden_state"):
            value = getattr(out, name, None)
            if isinstance(value, Tensor):
                seen[name] = value

    hook = module.register_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def _tensor(out: Any) -> Tensor:
    """Features as releases of transformers hand them out: a tensor, or what has been pooled."""
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found


def _scale(model: Any) -> float:
    """What cosines are multiplied by before the softmax."""
    scale = getattr(model, "logit_scale", None)
    return float(scale.exp()) if isinstance(scale, Tensor) else 1.0


def _class_names(model: Any) -> Sequence[str] | None:
    names = getattr(getattr(model, "config", None), "id2label", None)
    return None if names is None else [str(names[place]) for place in range(len(names))]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _load(job: Job) -> tuple[Any, Any]:
    """The model and, where texts are read or written, its processor."""
    spec = job.model
    if spec.added is not None or spec.library == "timm":
        if job.labels or "caption" in job.outputs:
            what = "labels" if job.labels else "outputs: caption"
            raise ConfigError(f"{what}: only models of transformers read or write texts here, not {spec.text}")
        return load_model(spec, pretrained=True), None
    if spec.library != "transformers":
        raise TurboError(f"{spec.text}: {spec.library!r} is none of transformers, timm")
    return load_with_processor(spec, _kind(job))


def _kind(job: Job) -> Any:
    if "caption" not in job.outputs:
        return transformers_class(job.model)
    with library_errors(job.model):
        import transformers

        return getattr(transformers, GENERATING)


def check(job: Job) -> None:
    """Refuse a job that the model cannot do, by its config alone.

    Raises:
        TurboError: there is no such model.
        ConfigError, UnsupportedModelError: as `Embedder`.
    """
    spec: ModelSpec = job.model
    outline = load_outline(spec)
    if outline is None:
        return
    if job.settings:
        turbovlm.apply(outline, **job.settings).remove()
    check_outputs(job, outline)
