"""A small dual encoder for drawings on photographs: images and sentences to vectors that can be compared.

Images go through ten blocks of the pretrained ViT-S/14 of `turbovlm_lab.zoo.saliency`, sentences through MiniLM
(`turbovlm_lab.zoo.minilm`); both stay as they were pretrained. What was trained are two projections. The image's
reads CLS and the mean of the patches; it is the head of a `transformers.Dinov2ForImageClassification`, before which
every position gets its token's value where tokens are merged.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import TurboError
from turbovlm_lab.zoo.minilm import SentenceEncoder, load_minilm
from turbovlm_lab.zoo.reader import scene_encoder

WEIGHTS = Path(__file__).parent / "weights" / "dual_encoder.safetensors"
CLASSIFIER = Path(__file__).parent / "weights" / "emoji_classifier.safetensors"
WIDTH, HIDDEN = 256, 768


def unseen(code: str) -> bool:
    """Whether an emoji is one of the fifth that no model is trained on, by its code points."""
    return hashlib.sha256(code.encode()).digest()[0] % 5 == 0


class Projection(nn.Module):
    """A linear map and a small correction to it, `[batch, width] -> [batch, 256]`, of length 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, WIDTH)
        self.hidden = nn.Linear(width, HIDDEN)
        self.out = nn.Linear(HIDDEN, WIDTH)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.normalize(self.linear(x) + self.out(F.gelu(self.hidden(x))), dim=-1)


class DualEncoder(nn.Module):
    """Images and sentences in one space, `[batch, 256]`, of length 1.

    Attributes:
        vision: a `transformers.Dinov2ForImageClassification` whose classifier is the projection.
        sentences: MiniLM.
        text: the sentences' projection.
    """

    def __init__(self, vision: Any, sentences: SentenceEncoder) -> None:
        super().__init__()
        self.vision = vision
        self.sentences = sentences
        self.text = Projection(384)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values`: `[batch, 3, height, width]`, as `zoo.preprocess` gives them."""
        vectors: Tensor = self.vision(pixel_values=pixel_values).logits
        return vectors

    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """One vector per sentence."""
        vectors: Tensor = self.text(self.sentences(**self.sentences.tokens(sentences)))
        return vectors


def vision_tower() -> Any:
    """The ViT with a projection of random weights for a head."""
    from transformers import Dinov2ForImageClassification

    encoder = scene_encoder()
    model: Any = Dinov2ForImageClassification(encoder.config)
    model.dinov2 = encoder
    model.classifier = Projection(2 * encoder.config.hidden_size)
    return model.eval()


def load_dual_encoder(weights: Path | str = WEIGHTS) -> DualEncoder:
    """The model with its weights, in eval mode, fp32, on the CPU.

    Args:
        weights: a safetensors file of the projections.

    Raises:
        TurboError: the weights, the pretrained ViT's, MiniLM's or `transformers` are not there.
    """
    stored = _stored(weights)
    model = DualEncoder(vision_tower(), load_minilm())
    parts = {"image": model.vision.classifier, "text": model.text}
    for part, module in parts.items():
        prefix = f"{part}."
        module.load_state_dict({n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)})
    return model.eval()


def load_emoji_classifier(weights: Path | str = CLASSIFIER) -> Any:
    """A `transformers.Dinov2ForImageClassification` of Unicode's eight groups of emoji, in alphabetical order.

    A linear probe on the ViT of the dual encoder; in eval mode, fp32, on the CPU.

    Args:
        weights: a safetensors file of `weight`, `[classes, 768]`, and `bias`.

    Raises:
        TurboError: the weights, the pretrained ViT's or `transformers` are not there.
    """
    stored = _stored(weights)
    model = vision_tower()
    model.classifier = nn.Linear(stored["weight"].shape[1], len(stored["weight"]))
    model.classifier.load_state_dict(stored)
    return model.eval()


def _stored(weights: Path | str) -> dict[str, Tensor]:
    if importlib.util.find_spec("transformers") is None:
        raise TurboError("this model needs transformers: pip install 'turbovlm[transformers]'")
    if not Path(weights).is_file():
        raise TurboError(f"{weights}: there are no such weights; studies/pairs/train.py makes them")
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(weights).items()}
