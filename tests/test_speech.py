"""Whisper whose decoder reads merged tokens by their sizes, and waveforms of unequal length."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import turbovlm
from families import WHISPER, _livelier, _mel
from turbovlm import StateError, UnsupportedModelError
from turbovlm.encoder.state import MERGED
from turbovlm.ops.attention import size_bias

FRAMES = 80
TALK = {"max_new_tokens": 12, "do_sample": False}
PROMPT = torch.tensor([[1, 7, 8], [1, 9, 4], [1, 5, 6]])


def whisper(name: str = "WhisperForConditionalGeneration", **settings: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    model: Any = _livelier(getattr(transformers, name)(transformers.WhisperConfig(**{**WHISPER, **settings})))
    return model


@pytest.fixture
def model() -> Any:
    """With what its `generate` must know of languages and time stamps: the last 51 of the words are times."""
    made = whisper(vocab_size=120)
    times = {"no_timestamps_token_id": 68, "max_initial_timestamp_index": 10, "is_multilingual": False}
    for key, value in {**times, "alignment_heads": [[0, 0], [1, 1]], "max_length": 40}.items():
        setattr(made.generation_config, key, value)
    return made


def features(batch: int = 2) -> torch.Tensor:
    return _mel(FRAMES, 8, "input_features", last=False)(batch)["input_features"]


@torch.no_grad()
def test_r0_changes_nothing(model):
    inputs = {"input_features": features(3), "decoder_input_ids": PROMPT}
    reference = model(**inputs).logits
    said = model.generate(features(3), **TALK)
    with turbovlm.apply(model, r=0):
        assert torch.equal(model(**inputs).logits, reference)
        assert torch.equal(model.generate(features(3), **TALK), said)


@torch.no_grad()
def test_remove_restores_everything(model):
    inputs = {"input_features": features(3), "decoder_input_ids": PROMPT}
    reference, before = model(**inputs).logits, [dict(module.__dict__) for module in model.modules()]
    handle = turbovlm.apply(model, r=6)
    assert (model(**inputs).logits - reference).abs().max() > 1e-3
    handle.remove()
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.equal(model(**inputs).logits, reference)


def twins(encoder: Any) -> None:
    """Let every token be there twice: the same features twice, the same positions twice."""
    with torch.no_grad():
        encoder.conv2.stride, encoder.conv2.padding = (2,), (0,)
        encoder.conv1.weight[..., [0, 2]] = 0
        kernel = encoder.conv2.weight[..., :1].clone()
        encoder.conv2.weight = torch.nn.Parameter(kernel)
        encoder.conv2.kernel_size = (1,)
        encoder.embed_positions.weight[1::2] = encoder.embed_positions.weight[::2]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_decoder_reads_doubles_as_if_they_were_not_merged(implementation):
    """Of tokens that are all there twice, half merge in the first block, and the decoder's output stays."""
    model = whisper(attn_implementation=implementation)
    twins(model.model.encoder)
    sound = features()[..., ::4].repeat_interleave(4, dim=-1)
    inputs = {"input_features": sound, "decoder_input_ids": PROMPT[:2]}
    reference = model(**inputs)
    tokens = model.model.encoder(sound).last_hidden_state
    torch.testing.assert_close(tokens[:, ::2], tokens[:, 1::2], rtol=0, atol=1e-5)
    with turbovlm.apply(model, r=(20, 0, 0, 0), degree="redundancy", partition="alternate") as handle:
        ours = model(**inputs)
        assert handle.features[0].last.lengths == (40, 20, 20, 20, 20)
        assert ours.encoder_last_hidden_state.shape[1] == 20
        torch.testing.assert_close(ours.logits, reference.logits, rtol=0, atol=1e-5)
    with turbovlm.apply(
        model, r=(13, 0, 0, 0), degree="redundancy", partition="alternate", proportional=False
    ):  # some twice, some once, and no sizes
        assert (model(**inputs).logits - reference.logits).abs().max() > 1e-3
    with turbovlm.apply(model, r=(13, 0, 0, 0), degree="redundancy", partition="alternate"):
        torch.testing.assert_close(model(**inputs).logits, reference.logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_decoder_is_the_library_s_own_with_a_bias(model):
    """The same as the model's decoder on the merged tokens, with log s as a mask of its cross-attention."""
    inputs = {"input_features": features(), "decoder_input_ids": PROMPT[:2]}
    with turbovlm.apply(model, r=6) as handle:
        ours = model(**inputs)
        sizes = handle.features[0].last.sizes
        handle.remove()
    assert sizes.sum(dim=1).tolist() == [40, 40] and sizes.max() > 1
    for layer in model.model.decoder.layers:
        layer.encoder_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": size_bias(sizes, torch.float32)}),
            with_kwargs=True,
        )
    merged = ours.encoder_last_hidden_state
    reference = model(encoder_outputs=(merged.clone(),), decoder_input_ids=PROMPT[:2]).logits
    torch.testing.assert_close(ours.logits, reference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_batches_and_the_cache_are_single_runs(model):
    with turbovlm.apply(model, r=6):
        together = model.generate(features(3), **TALK)
        for i in range(3):
            alone = model.generate(features(3)[i : i + 1], **TALK)
            assert torch.equal(alone[0], together[i, : alone.shape[1]])
        ids = together[:1]
        out = model(features(3)[:1], decoder_input_ids=ids[:, :4], use_cache=True)
        step = model(
            encoder_outputs=(out.encoder_last_hidden_state,),
            decoder_input_ids=ids[:, 4:5],
            past_key_values=out.past_key_values,
        ).logits
        whole = model(features(3)[:1], decoder_input_ids=ids[:, :5]).logits
        torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_beams_read_the_sizes_of_their_input(model):
    with turbovlm.apply(model, r=6) as handle:
        outputs = model.model.encoder(features())
        sizes, source = handle.features[0].last.sizes, handle.features[0].last.source()
        assert not torch.equal(sizes[0], sizes[1])
        ids, repeated = model._expand_inputs_for_generation(
            expand_size=3, is_encoder_decoder=True, input_ids=PROMPT[:2], encoder_outputs=outputs, use_cache=True
        )
        merged = getattr(repeated["encoder_outputs"][0], MERGED)
    assert torch.equal(merged.sizes, sizes[[0, 0, 0, 1, 1, 1]]) and ids.shape == (6, 3) and repeated["use_cache"]
    assert torch.equal(merged.source, source[[0, 0, 0, 1, 1, 1]])


LONG = {"return_timestamps": True, "return_segments": True}


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "max_new_tokens": 9}, LONG, {**LONG, "num_beams": 3}], ids=str
)
def test_what_is_said_of_doubles_is_what_is_said_without_merging(model, options):
    """Greedily, with beams, and of recordings longer than a window, of unequal length, read window by window."""
    twins(model.model.encoder)
    sound = features(2)[..., ::4].repeat_interleave(4, dim=-1)
    options = {**TALK, **options}
    if "return_segments" in options:
        sound = torch.cat([sound, sound.flip(-1), sound], dim=-1)
        mask = torch.ones(2, sound.shape[-1], dtype=torch.long)
        mask[1, 128:] = 0
        options["attention_mask"] = mask
        model.generation_config.suppress_tokens = list(range(70, 120, 2))  # times between doubles
    own = model.generate(sound, **options)
    encoded = []
    with turbovlm.apply(model, r=(13, 0, 0, 0), degree="redundancy", partition="alternate") as handle:
        model.model.encoder.register_forward_hook(lambda m, a, out: encoded.append(out.last_hidden_state.shape[1]))
        ours = model.generate(sound, **options)
        assert handle.features[0].last.lengths == (40, 27, 27, 27, 27)
    assert set(encoded) == {27}
    if "return_segments" in options:
        assert segments(ours) == segments(own) and len(encoded) > 2
    else:
        assert torch.equal(ours, own) and len(encoded) == 1


def segments(out: Any) -> list[list[tuple[float, float, list[int]]]]:
    return [[(float(s["start"]), float(s["end"]), s["tokens"].tolist()) for s in one] for one in out["segments"]]


@torch.no_grad()
def test_times_of_words_come_from_maps_over_all_positions(model):
    """The cross-attention maps have a column for every position, also for the times of words, and sum to 1."""
    model.set_attn_implementation("eager")
    inputs = {"input_features": features(), "decoder_input_ids": PROMPT[:2]}
    with turbovlm.apply(model, r=6) as handle:
        tokens = model.model.encoder(features()).last_hidden_state
        maps = model.model.decoder(PROMPT[:2], encoder_hidden_states=tokens, output_attentions=True).cross_attentions
        source = handle.features[0].last.source()
        for one in maps:
            assert one.shape == (2, 2, 3, 40)
            torch.testing.assert_close(one.sum(-1), torch.ones(2, 2, 3))
            for row, where in zip(one[:, 0, 0], source):  # positions of one token share
                assert all(len(row[where == token].unique()) == 1 for token in where.unique())
        out = model.generate(features(), return_token_timestamps=True, return_timestamps=True, **TALK)
        assert out["token_timestamps"].max() <= FRAMES / 100
        with pytest.raises(StateError, match="output_attentions=True"):
            model(**inputs, output_attentions=True)
    with turbovlm.apply(model, r=6, dense=True):
        out = model.generate(features(), return_token_timestamps=True, return_timestamps=True, **TALK)
        assert out["token_timestamps"].max() <= FRAMES / 100
    with turbovlm.apply(model, r=0):
        reference = model.generate(features(), return_token_timestamps=True, return_timestamps=True, **TALK)
    again = model.generate(features(), return_token_timestamps=True, return_timestamps=True, **TALK)
    assert torch.equal(reference["token_timestamps"], again["token_timestamps"])


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sound: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_features=sound, decoder_input_ids=words, use_cache=False).logits
        return found


@torch.no_grad()
def test_encoder_and_decoder_compile_to_one_graph_and_export(model):
    logits, inputs = Logits(model), (features(), PROMPT[:2])
    with turbovlm.apply(model, r=6):
        reference = logits(*inputs)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(logits, fullgraph=True, backend=counter, dynamic=False)
        torch.testing.assert_close(compiled(*inputs), reference, rtol=0, atol=1e-5)
        assert counter.frame_count == 1
        exported = torch.export.export(logits, inputs).module()
        torch.testing.assert_close(exported(*inputs), reference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_static_caches_hold_what_is_left(model):
    with turbovlm.apply(model, r=6):
        ours = model.generate(features(3), cache_implementation="static", disable_compile=True, **TALK)
        assert torch.equal(ours, model.generate(features(3), **TALK))


@torch.no_grad()
def test_copies_and_pickles_read_merged_tokens_too(model):
    inputs = {"input_features": features(), "decoder_input_ids": PROMPT[:2]}
    with turbovlm.apply(model, r=6):
        reference = model(**inputs).logits
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    plain = model(**inputs).logits
    for each in copies:
        assert torch.equal(each(**inputs).logits, reference)
        turbovlm.get_handle(each).remove()
        assert torch.equal(each(**inputs).logits, plain)


@torch.no_grad()
def test_dense_gives_the_decoder_every_position(model):
    inputs = {"input_features": features(), "decoder_input_ids": PROMPT[:2]}
    with turbovlm.apply(model, r=6, dense=True) as handle:
        assert model(**inputs).encoder_last_hidden_state.shape[1] == 40
        assert "restored to 40 tokens (residual)" in repr(handle)
    with turbovlm.apply(model, r=6) as handle:
        assert model(**inputs).encoder_last_hidden_state.shape[1] == 16
        assert "model.decoder cross-attends to merged tokens, in proportion to their sizes" in repr(handle)


@torch.no_grad()
def test_tokens_without_their_sizes_are_refused(model):
    with turbovlm.apply(model, r=6):
        tokens = model.model.encoder(features()).last_hidden_state
        with pytest.raises(StateError, match=r"got 16 of 40 tokens without their sizes: something moved"):
            model(encoder_outputs=(tokens.clone(),), decoder_input_ids=PROMPT[:2])
        with pytest.raises(StateError, match=r"encoder_outputs=….: its tokens were merged; give it the input itself"):
            model.generate(encoder_outputs=(tokens,), **TALK)
        assistant = whisper("WhisperForCausalLM")
        with pytest.raises(StateError, match="WhisperForCausalLM would read merged tokens without their sizes"):
            model.generate(features(), assistant_model=assistant, **TALK)
        whole = torch.zeros(2, 40, 32)
        assert model(encoder_outputs=(whole,), decoder_input_ids=PROMPT[:2]).logits.isfinite().all()


def test_attention_that_takes_no_bias_is_refused(model):
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="attn_implementation='flash_attention_2': merged tokens are"):
        turbovlm.apply(model, r=6)
    model.config._attn_implementation = "sdpa"
    with turbovlm.apply(model, r=6), torch.no_grad():
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(StateError, match="attn_implementation='flex_attention'"):
            model(features(), decoder_input_ids=PROMPT[:2])


def test_training_goes_through_the_decoder(model):
    """Gradients reach the encoder; a step is the loss of merged tokens."""
    model.train()
    with turbovlm.apply(model, r=6):
        model(features(), labels=PROMPT[:2]).loss.backward()
    for layer in model.model.encoder.layers:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
