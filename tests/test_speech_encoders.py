"""Encoders of sound by themselves: their heads, padding, dropout, training, costs and what is refused."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from families import FAMILIES, WAVE, _livelier, _wave
from test_speech import features, whisper
from turbovlm import ConfigError, StateError, TurboConfig, UnsupportedModelError
from turbovlm.ops.partition import partition_tokens


@torch.no_grad()
def test_what_averages_positions_gets_all_of_them():
    model = whisper("WhisperForAudioClassification", num_labels=5, classifier_proj_size=8)
    with turbovlm.apply(model, r=6) as handle:
        logits = model(features()).logits
        assert "restored to 40 tokens" in repr(handle) and handle.features[0].last.lengths[-1] == 16
    assert (logits - model(features()).logits).abs().max() > 1e-4
    weighted = whisper("WhisperForAudioClassification", use_weighted_layer_sum=True, num_labels=5)
    reference = weighted(features()).logits
    with turbovlm.apply(weighted, r=0):
        torch.testing.assert_close(weighted(features()).logits, reference, rtol=0, atol=1e-6)
    with turbovlm.apply(weighted, r=6):
        assert weighted(features()).logits.shape == (2, 5)


def test_time_has_no_grid():
    model = whisper()
    with pytest.raises(
        ConfigError, match=r"partition='grid': the tokens of model.encoder .* follow each other in time"
    ):
        turbovlm.apply(model, r=4, partition="grid")
    for partition in ("alternate", "random"):
        turbovlm.apply(model, r=4, partition=partition).remove()


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "hubert_stable"])
def test_training_that_skips_blocks_is_refused(name):
    model, inputs = FAMILIES[name].make(), FAMILIES[name].inputs(2)
    if name == "whisper":
        model.layerdrop = 0.3
    else:
        model.config.layerdrop = 0.3
    with turbovlm.apply(model, r=4):
        model(**inputs)
        model.train()
        with pytest.raises(StateError, match=r"layerdrop=0.3: in training the model skips blocks at random"):
            model(**inputs)


def test_dropout_between_the_steps_is_the_model_s_own():
    model, inputs = FAMILIES["whisper"].make(), FAMILIES["whisper"].inputs(2)
    certain = model(**inputs).last_hidden_state
    for layer in model.layers:
        layer.dropout = layer.activation_dropout = 0.3
    model.train()

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return model(**inputs).last_hidden_state

    own = run()
    assert (own - certain).abs().max() > 0.1
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(run(), own, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
@pytest.mark.parametrize("norms_first", [False, True])
def test_padding_of_waveforms_is_read_by_nobody(kind, norms_first):
    """Whatever stands behind a shorter recording, its positions get the same, and so do those of the longer one."""
    import transformers

    torch.manual_seed(0)
    settings = {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": norms_first}
    model = _livelier(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings)))
    waves = _wave(2)["input_values"]
    mask = torch.ones_like(waves, dtype=torch.long)
    mask[1, 40_000:] = 0
    noise = waves.clone()
    noise[1, 40_000:] = 3 * torch.randn(40_000, generator=torch.Generator().manual_seed(0))

    def real(x: torch.Tensor) -> list[torch.Tensor]:
        both = model(x, attention_mask=mask).last_hidden_state
        return [both[0], both[1, :20]]

    own = real(waves)
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(real(waves), own, rtol=0, atol=1e-5)
    with turbovlm.apply(model, r=2) as handle:
        ours = real(waves)
        assert handle.features[0].last.sizes.sum(dim=1).tolist() == [40, 20]
        torch.testing.assert_close(real(noise), ours, rtol=0, atol=1e-5)
        alone = model(waves[:1]).last_hidden_state[0]
    torch.testing.assert_close(alone, ours[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1], own[1], rtol=0, atol=1e-4)  # 8 tokens of its padding have merged, no sound


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
def test_ctc_heads_read_every_position(kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**WAVE, vocab_size=30)
    model = _livelier(getattr(transformers, f"{kind}ForCTC")(config))
    waves = _wave(2)["input_values"]
    full = model(waves).logits
    with turbovlm.apply(model, r=4) as handle:
        logits = model(waves).logits
        assert logits.shape == full.shape and "restored to 40 tokens (copy)" in repr(handle)
    assert 0 < (logits - full).abs().max() < full.abs().max()


@torch.no_grad()
def test_a_spectrogram_s_two_classes_stay():
    """AST's CLS and distillation tokens never merge, and its head reads them."""
    import transformers

    from families import SPECTROGRAM

    torch.manual_seed(0)
    model = _livelier(transformers.ASTForAudioClassification(transformers.ASTConfig(**SPECTROGRAM, num_labels=5)))
    inputs = FAMILIES["ast"].inputs(2)
    with turbovlm.apply(model, r=6, trace=True) as handle:
        model(**inputs)
        for entry in handle.trace:
            assert (entry.sizes[:, :2] == 1).all() and entry.prefix == 2
    with turbovlm.apply(model, r=6, partition="grid", grid=(4, 9)) as handle:
        model(**inputs)
        assert handle.features[0].last.lengths == (38, 32, 26, 20, 14)


def test_relative_positions_of_wavlm_are_refused_by_name():
    import transformers

    torch.manual_seed(0)
    with pytest.raises(
        UnsupportedModelError, match=r"WavLMEncoderLayer\) look positions up in a table \(attention.rel_attn_embed"
    ):
        turbovlm.apply(transformers.WavLMModel(transformers.WavLMConfig(**WAVE)), r=4)


def test_an_unknown_reader_of_whisper_gets_every_position():
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hears = FAMILIES["whisper"].make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.hears(x).last_hidden_state
            return found

    mine = Mine()
    with turbovlm.apply(mine, TurboConfig(keep=0.5)) as handle, torch.no_grad():
        assert mine(features()).shape == (2, 40, 32)
        assert "as Mine is not known to do without" in repr(handle)


@pytest.mark.parametrize("name", ["whisper", "ast", "wav2vec2", "hubert_stable"])
def test_what_stands_before_the_blocks_is_counted(name):
    """All of the encoder's multiply-accumulates but for norms, the convolutions before the blocks included."""
    model, inputs = FAMILIES[name].make(), FAMILIES[name].inputs(1)
    counted = turbovlm.profile.macs(model, **inputs)
    with turbovlm.apply(model, r=0) as handle:
        shape, schedule = handle.features[0].shape, handle.schedules[0]
    norms = 5 * shape.hidden_size * (2 * sum(schedule.tokens[1:]) + schedule.tokens[-1])
    assert shape.macs(schedule.tokens) - norms == pytest.approx(counted, rel=0.02)


def test_windows_of_random_halves_are_stretches_of_time():
    """Whisper's 1,500 tokens merge within three windows, of which each is a stretch of about ten seconds."""
    partition = partition_tokens(1500, kind="random")
    assert partition.windows == 3
    for index in range(3):
        both = torch.cat([half.chunk(3)[index] for half in (partition.candidates, partition.destinations)])
        assert both.numel() == 500 and both.max() - both.min() < 600
