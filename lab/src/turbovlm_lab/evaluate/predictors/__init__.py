"""Models as tasks ask them: by hub id, folder or name, and the small ones that come with turbovlm."""

from __future__ import annotations

import dataclasses
from typing import Any

from turbovlm.errors import TurboError
from turbovlm.loading import Where
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.predictors.blip import BLIP, blip_nlvr2
from turbovlm_lab.evaluate.predictors.encoders import classification, retrieval
from turbovlm_lab.evaluate.predictors.generating import generating
from turbovlm_lab.evaluate.predictors.pictures import DEFAULT, Features, Making, text_to_image
from turbovlm_lab.evaluate.run import Predictor

MODELS = {
    "classification": "an image classifier of transformers or timm:NAME; CLIP, SigLIP or open_clip:NAME by class names",
    "retrieval": "CLIP, SigLIP or BLIP's ITM model of transformers, open_clip:hf-hub:ID, or blip:FILE",
    "captioning": "BLIP, BLIP-2, LLaVA, Qwen-VL or another model of transformers that writes, or blip:FILE",
    "vqa": "BLIP-VQA, BLIP-2, ViLT, LLaVA, Qwen-VL or another model of transformers that answers, or blip:FILE",
    "nlvr2": "ViLT's NLVR2 model, one of transformers that follows a chat with two pictures, or blip:FILE",
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


def load_predictor(task: str, where: Where, data: Data, making: Making, features: Features | None) -> Predictor:
    """A model of the user's, ready to be asked.

    Args:
        task: one of `MODELS`.
        where: the model.
        data: what it will be asked.
        making: how pictures are made; of text-to-image alone.
        features: how pictures are compared; of text-to-image alone.

    Raises:
        TurboError: there is no such model, or it is for another task.
        ConfigError: it does not fit the data.
    """
    found = _loaded(task, where, data, making, features)
    return dataclasses.replace(found, about={**found.about, **_about(where, making, features)})


def _loaded(task: str, where: Where, data: Data, making: Making, features: Features | None) -> Predictor:
    if where.library == "zoo":
        from turbovlm_lab.evaluate.builtin_models import zoo_predictor

        return zoo_predictor(task, where.name, data.samples, making, features)
    if where.library not in ("transformers", *LIBRARIES.get(task, ())):
        raise TurboError(f"{where.spec}: {where.library!r} has no model for {task}, which takes {MODELS[task]}")
    if task == "classification":
        return classification(where, data)
    if task == "retrieval":
        return retrieval(where)
    if task == "text-to-image":
        if features is None:
            raise ValueError("text-to-image needs features")
        return text_to_image(where, data.samples, making, features)
    if task == "saliency":
        raise TurboError(f"{where.spec}: saliency takes {MODELS[task]}")
    if task == "nlvr2" and where.library == BLIP:
        return blip_nlvr2(where)
    return generating(task, where)


def _about(where: Where, making: Making, features: Features | None) -> dict[str, Any]:
    """What was asked for beside the defaults, and what changes predictions."""
    default = Where(where.spec)
    how = {"dtype": (where.dtype, default.dtype), "prompt": (where.prompt, default.prompt)}
    how |= {name: (getattr(making, name), getattr(DEFAULT, name)) for name in ("steps", "guidance", "seed", "strength")}
    about = {name: str(value).removeprefix("torch.") for name, (value, usual) in how.items() if value != usual}
    return about if features is None else {**about, "features": getattr(features, "__name__", "")}
