"""Models as tasks ask them: by hub id, folder or name, and the small ones that come with turbovlm."""

from __future__ import annotations

import dataclasses
from typing import Any

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.predictors.blip import BLIP, blip_nlvr2
from turbovlm_lab.evaluate.predictors.clip import clip_by_names
from turbovlm_lab.evaluate.predictors.encoders import classification, retrieval
from turbovlm_lab.evaluate.predictors.generating import generating
from turbovlm_lab.evaluate.predictors.images import DEFAULT, Features, Making, text_to_image
from turbovlm_lab.evaluate.run import Predictor

MODELS = {
    "classification": (
        "an image classifier of transformers or timm:NAME; CLIP, SigLIP or open_clip:NAME by class names; zoo:clip"
    ),
    "retrieval": "CLIP, SigLIP or BLIP's ITM model of transformers, open_clip:hf-hub:ID, blip:FILE, or zoo:clip",
    "captioning": "BLIP, BLIP-2, LLaVA, Qwen-VL or another of transformers that writes, blip:FILE, or zoo:clip-scenes",
    "vqa": "BLIP-VQA, BLIP-2, ViLT, LLaVA, Qwen-VL or one of transformers that answers, blip:FILE, or zoo:clip-scenes",
    "nlvr2": "ViLT's NLVR2 model, one of transformers that chats about two images, blip:FILE, or zoo:clip-scenes",
    "text-to-image": "a pipeline of diffusers",
    "saliency": "zoo:saliency",
}
"""What each task takes."""
LIBRARIES = {
    "classification": ("timm", "open_clip"),
    "retrieval": ("open_clip", BLIP),
    "captioning": (BLIP,),
    "vqa": (BLIP,),
    "nlvr2": (BLIP,),
    "text-to-image": ("diffusers",),
}
"""That a model's name may begin with, beside those of transformers and the zoo."""


def load_predictor(task: str, spec: AskedModel, data: Data, making: Making, features: Features | None) -> Predictor:
    """A model of the user's, ready to be asked.

    Args:
        task: one of `MODELS`.
        spec: the model.
        data: what it will be asked.
        making: how images are made; of text-to-image alone.
        features: how images are compared; of text-to-image alone.

    Raises:
        TurboError: there is no such model, or it is for another task.
        ConfigError: it does not fit the data.
    """
    found = _loaded(task, spec, data, making, features)
    return dataclasses.replace(found, about={**found.about, **_about(spec, making, features)})


def _loaded(task: str, spec: AskedModel, data: Data, making: Making, features: Features | None) -> Predictor:
    if spec.text == "zoo:clip" and task == "classification":
        return clip_by_names(spec, data)
    if spec.names is not None:
        raise ConfigError(f"names={spec.names!r}: only zoo:clip takes embeddings of names, in classification")
    if spec.library == "zoo":
        from turbovlm_lab.evaluate.builtin_models import zoo_predictor

        return zoo_predictor(task, spec.name, data.samples, making, features)
    if spec.library not in ("transformers", *LIBRARIES.get(task, ())):
        raise TurboError(f"{spec.text}: {spec.library!r} has no model for {task}, which takes {MODELS[task]}")
    if task == "classification":
        return classification(spec, data)
    if task == "retrieval":
        return retrieval(spec)
    if task == "text-to-image":
        if features is None:
            raise ValueError("text-to-image needs features")
        return text_to_image(spec, data.samples, making, features)
    if task == "saliency":
        raise TurboError(f"{spec.text}: saliency takes {MODELS[task]}")
    if task == "nlvr2" and spec.library == BLIP:
        return blip_nlvr2(spec)
    return generating(task, spec)


def _about(spec: AskedModel, making: Making, features: Features | None) -> dict[str, Any]:
    """What was asked for beside the defaults, and what changes predictions."""
    default = AskedModel(spec.text)
    how = {"dtype": (spec.dtype, default.dtype), "prompt": (spec.prompt, default.prompt)}
    how |= {name: (getattr(making, name), getattr(DEFAULT, name)) for name in ("steps", "guidance", "seed", "strength")}
    about = {name: str(value).removeprefix("torch.") for name, (value, usual) in how.items() if value != usual}
    return about if features is None else {**about, "features": getattr(features, "__name__", "")}
