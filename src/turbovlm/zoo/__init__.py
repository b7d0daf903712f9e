"""Pretrained models that come as Python packages, for demos, tests and measurements."""

from turbovlm.zoo.minilm import SentenceEncoder, load_minilm
from turbovlm.zoo.saliency import SaliencyHead, SaliencyViT, load_saliency_vit, preprocess

__all__ = ["SaliencyHead", "SaliencyViT", "SentenceEncoder", "load_minilm", "load_saliency_vit", "preprocess"]
