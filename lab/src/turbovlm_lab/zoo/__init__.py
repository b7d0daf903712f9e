"""Pretrained models that come as Python packages or are small enough to ship, for demos, tests and measurements."""

from turbovlm_lab.zoo.drawings import load_drawings_pipeline
from turbovlm_lab.zoo.emoji import emoji_prompts, load_emoji_pipeline
from turbovlm_lab.zoo.minilm import SentenceEncoder, load_minilm
from turbovlm_lab.zoo.moving import load_moving_pipeline, moving_prompts
from turbovlm_lab.zoo.saliency import SaliencyHead, SaliencyViT, load_saliency_vit, preprocess

__all__ = [
    "SaliencyHead",
    "SaliencyViT",
    "SentenceEncoder",
    "emoji_prompts",
    "load_drawings_pipeline",
    "load_emoji_pipeline",
    "load_minilm",
    "load_moving_pipeline",
    "load_saliency_vit",
    "moving_prompts",
    "preprocess",
]
