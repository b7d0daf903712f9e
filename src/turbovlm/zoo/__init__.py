"""Pretrained models that come as Python packages or are small enough to ship, for demos, tests and measurements."""

from turbovlm.zoo.emoji import emoji_prompts, load_emoji_pipeline
from turbovlm.zoo.minilm import SentenceEncoder, load_minilm
from turbovlm.zoo.saliency import SaliencyHead, SaliencyViT, load_saliency_vit, preprocess

__all__ = [
    "SaliencyHead",
    "SaliencyViT",
    "SentenceEncoder",
    "emoji_prompts",
    "load_emoji_pipeline",
    "load_minilm",
    "load_saliency_vit",
    "preprocess",
]
