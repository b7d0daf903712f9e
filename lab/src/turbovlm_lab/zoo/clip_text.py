"""Any text in the space of CLIP's images: MiniLM's sentence embedding and a map from there, trained here.

The package with CLIP's image tower has no text tower, so `turbovlm_lab.zoo.clip` has no text side of its own. MiniLM
(`turbovlm_lab.zoo.minilm`) understands texts, and the map, `weights/clip_text_map.safetensors`, leads from its vectors
to where CLIP's text tower would put them. `studies/clip/train_text.py` trains it; `weights/clip_text_map.md` says on
what, and how far it falls short of that tower. Names whose real embeddings are at hand are better read by
`turbovlm_lab.zoo.clip_names`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo.clip_names import ClipNames
from turbovlm_lab.zoo.minilm import SentenceEncoder, load_minilm

WEIGHTS = Path(__file__).parent / "weights" / "clip_text_map.safetensors"
TEMPLATE = "a photo of a {}"


@dataclass(frozen=True, eq=False)
class ClipText:
    """A text encoder for CLIP ViT-B/16's images.

    Attributes:
        encoder: MiniLM.
        weight, bias: the map from its vectors to a direction, `[512, 384]` and `[512]`.
        mean: of the vectors of CLIP's texts, `[512]`: all lie in a narrow cone around it.
        spread: how far from the mean, in that direction, a text lies.
    """

    encoder: SentenceEncoder
    weight: Tensor
    bias: Tensor
    mean: Tensor
    spread: float

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """The vectors of whole texts, of length 1, `[texts, 512]`, fp32.

        Raises:
            ConfigError: no texts, or an empty one.
        """
        if not texts:
            raise ConfigError("texts=[]: at least one text is needed")
        if not all(text.strip() for text in texts):
            raise ConfigError(f"texts={list(texts)}: one is empty")
        sentences = self.encoder(**self.encoder.tokens(texts))
        direction = F.normalize(F.linear(sentences, self.weight, self.bias), dim=-1)
        return F.normalize(self.mean + self.spread * direction, dim=-1)

    def names(self, labels: Sequence[str]) -> ClipNames:
        """Names to choose between for an image, each as "a photo of a …".

        Args:
            labels: any words, in English.

        Raises:
            ConfigError: fewer than two labels, an empty one, or one twice.
        """
        plain = tuple(label.strip() for label in labels)
        if len(plain) < 2:
            raise ConfigError(f"labels={list(labels)}: give at least two different ones, to choose between")
        if "" in plain:
            raise ConfigError(f"labels={list(labels)}: one is empty")
        known: set[str] = set()
        for label in plain:
            if label.lower() in known:
                raise ConfigError(f"labels={list(labels)}: {label!r} is given twice")
            known.add(label.lower())
        return ClipNames(plain, self.embed([TEMPLATE.format(label) for label in plain]))


def load_clip_text(weights: Path | str = WEIGHTS) -> ClipText:
    """The text encoder with its weights, in eval mode, fp32, on the CPU.

    Args:
        weights: a safetensors file of the map's.

    Raises:
        TurboError: the weights, MiniLM or `transformers` are not there.
    """
    if not Path(weights).is_file():
        raise TurboError(f"{weights}: there are no such weights; studies/clip/train_text.py makes them")
    from safetensors.torch import load_file

    stored = {name: value.float() for name, value in load_file(weights).items()}
    return ClipText(load_minilm(), stored["weight"], stored["bias"], stored["mean"], float(stored["spread"]))
