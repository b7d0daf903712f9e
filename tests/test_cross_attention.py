"""What cross-attends to a tower's merged tokens counts them by size: doubles, a reference, generation, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import turbovlm
from families import _livelier
from reference import attention as reference_attention
from turbovlm import ConfigError, StateError, UnsupportedModelError
from turbovlm.encoder import rows
from turbovlm.encoder.cross_attention import Merged, attach, merged_into
from vlms import CLIP, EOS, IMAGE, PAD, TEXT, blip, blip2, llava, noise, seeded, vision_encoder_decoder

transformers = pytest.importorskip("transformers")
PATCHES = 36
PIXELS = noise(0, 2, 3, 6, 8, 3, 1, 8).expand(-1, -1, -1, -1, -1, 2, -1).reshape(2, 3, 48, 48)
"""Every patch is there twice, side by side."""
IDS = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 10]])
DOUBLES = {"degree": "redundancy", "partition": "alternate"}
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A model, the path of its tower, and what it says of two images."""

    make: Callable[[], Any]
    tower: str
    say: Callable[[Any], torch.Tensor]


def captions(model: Any) -> torch.Tensor:
    return model(pixel_values=PIXELS, input_ids=IDS).logits


def answers(model: Any) -> torch.Tensor:
    answered = model(pixel_values=PIXELS, input_ids=IDS, decoder_input_ids=IDS, labels=IDS)
    return answered.loss[None]


def matches(model: Any) -> torch.Tensor:
    return model(pixel_values=PIXELS, input_ids=IDS).itm_score


def decoded(model: Any) -> torch.Tensor:
    return model(pixel_values=PIXELS, decoder_input_ids=IDS).logits


def queried(model: Any) -> torch.Tensor:
    return model.get_image_features(pixel_values=PIXELS, return_dict=True).pooler_output


def instructed(model: Any) -> torch.Tensor:
    asked = {"qformer_input_ids": IDS, "qformer_attention_mask": torch.ones_like(IDS)}
    return model.get_image_features(pixel_values=PIXELS, return_dict=True, **asked).pooler_output


def instruct_blip() -> Any:
    size = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    qformer = {**size, "num_hidden_layers": 2, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    config = transformers.InstructBlipConfig(
        vision_config=CLIP,
        qformer_config=qformer,
        text_config=transformers.OPTConfig(
            vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, **SPECIAL
        ),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return transformers.InstructBlipForConditionalGeneration(config)


def with_decoder(decoder: Any) -> Any:
    tower = transformers.ViTModel(transformers.ViTConfig(**CLIP))
    model = transformers.VisionEncoderDecoderModel(encoder=tower, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 2, PAD
    return model


def gpt2(width: int = 32) -> Any:
    """With another width than the tower's, a projection stands between."""
    size = {"vocab_size": 100, "n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL}
    return with_decoder(transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, add_cross_attention=True)))


def trocr() -> Any:
    size = {"vocab_size": 100, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.TrOCRConfig(**size, max_position_embeddings=64, decoder_start_token_id=2, **SPECIAL)
    return with_decoder(transformers.TrOCRForCausalLM(config))


def mbart() -> Any:
    size = {"vocab_size": 100, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.MBartConfig(**size, max_position_embeddings=64, is_decoder=True, add_cross_attention=True)
    return with_decoder(transformers.MBartForCausalLM(config))


CASES = {
    "BLIP, captions": Case(lambda: blip("ConditionalGeneration"), "vision_model", captions),
    "BLIP, answers": Case(lambda: blip("QuestionAnswering"), "vision_model", answers),
    "BLIP, matching": Case(lambda: blip("ImageTextRetrieval"), "vision_model", matches),
    "BLIP-2": Case(blip2, "vision_model", queried),
    "InstructBLIP": Case(instruct_blip, "vision_model", instructed),
    "BERT": Case(vision_encoder_decoder, "encoder", decoded),
    "GPT-2": Case(gpt2, "encoder", decoded),
    "GPT-2, projected": Case(lambda: gpt2(48), "encoder", decoded),
    "TrOCR": Case(trocr, "encoder", decoded),
    "mBART": Case(mbart, "encoder", decoded),
}


def made(name: str) -> tuple[Any, Case]:
    """A model whose tower takes both of two equal patches for the same."""
    case = CASES[name]
    model = _livelier(seeded(case.make))
    embeddings = model.get_submodule(case.tower).embeddings
    places = getattr(embeddings, "position_embeddings", None)
    places = embeddings.position_embedding if places is None else places
    with torch.no_grad():
        places[:, 2::2] = places[:, 1::2]
    return model, case


def tokens_of(model: Any, case: Case) -> torch.Tensor:
    return model.get_submodule(case.tower)(pixel_values=PIXELS).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_doubles_are_read_as_if_they_were_not_merged(name):
    """All or some of them merged in the tower, or behind it, or both; without sizes it is another model."""
    model, case = made(name)
    reference, before = case.say(model), [dict(module.__dict__) for module in model.modules()]
    tokens = tokens_of(model, case)
    torch.testing.assert_close(tokens[:, 1::2], tokens[:, 2::2], rtol=0, atol=1e-5)
    behind = {"visual_keep": PATCHES - 5, "visual_select": "redundancy"}
    for settings in (
        {"r": (18, 0, 0, 0), **DOUBLES},
        {"r": (13, 0, 0, 0), **DOUBLES},
        behind,
        {"r": (5, 0, 0, 0), "partition": "alternate", **behind, "visual_keep": PATCHES - 7},
    ):
        with turbovlm.apply(model, **settings) as handle:
            torch.testing.assert_close(case.say(model), reference, rtol=0, atol=2e-5)
            merged = merged_into(tokens_of(model, case))
            assert merged.sizes.sum(dim=1).tolist() == [37, 37] and merged.sizes.max() == 2
            assert "in proportion to their sizes" in repr(handle)
    for settings in ({"r": (13, 0, 0, 0), **DOUBLES}, behind):
        with turbovlm.apply(model, **settings, proportional=False):
            assert (case.say(model) - reference).abs().max() > 1e-4
    assert torch.equal(case.say(model), reference)
    assert [dict(module.__dict__) for module in model.modules()] == before


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_where_nothing_is_merged_nothing_changes(name):
    model, case = made(name)
    reference = case.say(model)
    for settings in ({"r": 0}, {"visual_keep": 1.0}, {"r": 0, "visual_keep": 1.0, "reduce": "prune"}):
        with turbovlm.apply(model, **settings):
            assert torch.equal(case.say(model), reference)


HEADS = 4
PROJECTED = {
    "BLIP, captions": lambda a, x: (a.query(x[0]), a.key(x[1]), a.value(x[1])),
    "BLIP-2": lambda a, x: (a.query(x[0]), a.key(x[1]), a.value(x[1])),
    "BERT": lambda a, x: (a.query(x[0]), a.key(x[1]), a.value(x[1])),
    "GPT-2": lambda a, x: (a.q_attn(x[0]), *a.c_attn(x[1]).chunk(2, dim=-1)),
    "TrOCR": lambda a, x: (a.q_proj(x[0]), a.k_proj(x[1]), a.v_proj(x[1])),
}
OUT = {"GPT-2": "c_proj", "TrOCR": "out_proj"}


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTED)
def test_one_cross_attention_is_that_of_plain_float64(name):
    model = made(name)[0].double()
    sizes = torch.tensor([[1.0, 3, 1, 7, 2], [1, 1, 1, 1, 10]], dtype=torch.float64)
    tokens = attach(noise(1, 2, 5, 32).double(), Merged.of(sizes, None, True))
    words = noise(2, 2, 3, 32).double()
    with turbovlm.apply(model, r=1) as handle:
        spelling = handle.features[0].cross_attention.attentions[-1]
        found = model.get_submodule(spelling.path)(words, **{spelling.tokens: tokens})[0]
    module = model.get_submodule(spelling.path)
    for image in range(2):
        q, k, v = PROJECTED[name](module, (words[image], tokens[image]))
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
        heads = [reference_attention(q[h], k[h], v[h], sizes[image], 8**-0.5) for h in range(HEADS)]
        expected = torch.cat(heads, dim=-1)
        expected = module.get_submodule(OUT[name])(expected) if name in OUT else expected
        torch.testing.assert_close(found[image], expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "BLIP-2", "mBART"])
def test_either_attention(name, implementation):
    model, case = made(name)
    model.set_attn_implementation(implementation)
    reference = case.say(model)
    with turbovlm.apply(model, r=(13, 0, 0, 0), **DOUBLES):
        torch.testing.assert_close(case.say(model), reference, rtol=0, atol=2e-5)


def generated(model: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    if hasattr(model, "text_decoder"):
        prompt = {} if hasattr(model, "text_encoder") else {"attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}
        ids = torch.cat([IDS, IDS[:, :1]], dim=1)
        return model.generate(pixel_values=PIXELS, input_ids=ids, **prompt, **options)
    return model.generate(pixel_values=PIXELS, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False, "num_beams": 2}], ids=str
)
@pytest.mark.parametrize("name", ["BLIP, captions", "BLIP, answers", "BERT", "GPT-2, projected", "TrOCR"])
def test_what_is_said_of_doubles_is_what_is_said_without_merging(name, options):
    """Greedily, with beams, with cached keys and without; of prompts that are padded."""
    model, _ = made(name)
    said = generated(model, **options)
    for settings in ({"r": (13, 0, 0, 0), **DOUBLES}, {"visual_keep": PATCHES - 5, "visual_select": "redundancy"}):
        with turbovlm.apply(model, **settings):
            assert torch.equal(generated(model, **options), said)
    assert torch.equal(generated(model, **options), said)


@torch.no_grad()
def test_cross_keep_goes_on_from_what_was_merged():
    """Sizes of the tower's tokens count in the first layer, and in what the later ones merge."""
    model, case = made("BLIP, matching")
    reference = case.say(model)
    with turbovlm.apply(model, r=(18, 0, 0, 0), **DOUBLES, cross_keep=1.0) as handle:
        torch.testing.assert_close(case.say(model), reference, rtol=0, atol=2e-5)
        assert len(handle.cross) == 0
    sizes = []
    with turbovlm.apply(model, r=(18, 0, 0, 0), **DOUBLES, cross_keep=0.5):
        for layer in model.text_encoder.encoder.layer:
            layer.crossattention.self.register_forward_hook(
                lambda module, args, kwargs, out: sizes.append(merged_into(kwargs["encoder_hidden_states"]).sizes),
                with_kwargs=True,
            )
        case.say(model)
    assert [each.shape[1] for each in sizes] == [19, 15, 10]
    assert all(each.sum(dim=1).tolist() == [37, 37] for each in sizes)


@torch.no_grad()
def test_masks_and_sizes_add_up():
    """Tokens that a mask hides stay hidden, whatever stands for them."""
    model, case = made("BLIP-2")
    full = tokens_of(model, case)
    queries = model.query_tokens.expand(2, -1, -1)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        seen = torch.ones(2, 19, dtype=torch.long)
        seen[1, 4:9] = 0
        doubled = torch.cat([seen[:, :1], seen[:, 1:].repeat_interleave(2, dim=1)], dim=1)
        given = {"encoder_hidden_states": full, "encoder_attention_mask": doubled}
        reference = model.qformer(query_embeds=queries, **given).last_hidden_state
        with turbovlm.apply(model, r=(18, 0, 0, 0), **DOUBLES):
            tokens = tokens_of(model, case)
            left = torch.zeros_like(seen).scatter(1, merged_into(tokens).source, doubled)
            given = {"encoder_hidden_states": tokens, "encoder_attention_mask": left}
            found = model.qformer(query_embeds=queries, **given).last_hidden_state
            torch.testing.assert_close(found, reference, rtol=0, atol=2e-5)
            with pytest.raises(StateError, match="a mask of 37 tokens of the encoder, which were merged into 19"):
                model.qformer(query_embeds=queries, encoder_hidden_states=tokens, encoder_attention_mask=doubled)


@torch.no_grad()
def test_maps_have_a_column_for_every_patch():
    model, case = made("BLIP, captions")
    with turbovlm.apply(model, r=(13, 0, 0, 0), **DOUBLES):
        tokens = tokens_of(model, case)
        out = model.text_decoder(input_ids=IDS, encoder_hidden_states=tokens, output_attentions=True)
    assert [each.shape for each in out.cross_attentions] == [(2, 4, 4, 37)] * 3
    torch.testing.assert_close(out.cross_attentions[0].sum(-1), torch.ones(2, 4, 4))
    own = model.text_decoder(input_ids=IDS, encoder_hidden_states=tokens_of(model, case), output_attentions=True)
    torch.testing.assert_close(out.cross_attentions[0], own.cross_attentions[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_keep_their_sizes():
    """As re-ranking takes them: one image beside several texts."""
    model, case = made("BLIP, matching")
    index = torch.tensor([1, 0, 1])
    reference = model.text_encoder(input_ids=IDS[[0, 0, 1]], encoder_hidden_states=tokens_of(model, case)[index])
    with turbovlm.apply(model, r=(13, 0, 0, 0), **DOUBLES):
        tokens = tokens_of(model, case)
        found = model.text_encoder(input_ids=IDS[[0, 0, 1]], encoder_hidden_states=rows(tokens, index))
        torch.testing.assert_close(found.last_hidden_state, reference.last_hidden_state, rtol=0, atol=2e-5)
        with pytest.raises(StateError, match=r"got 24 of 37 tokens without their sizes.*rows of it by turbovlm"):
            model.text_encoder(input_ids=IDS[[0, 0, 1]], encoder_hidden_states=tokens[index])
    with turbovlm.apply(model, r=(13, 0, 0, 0), **DOUBLES, proportional=False):
        assert model.text_encoder(input_ids=IDS, encoder_hidden_states=tokens_of(model, case) * 1)[0].isfinite().all()


@torch.no_grad()
def test_copies_and_pickles_read_by_size_too():
    model, case = made("GPT-2, projected")
    plain = case.say(model)
    with turbovlm.apply(model, r=4, visual_keep=0.5):
        found, copies = case.say(model), [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        assert torch.equal(case.say(each), found)
        turbovlm.get_handle(each).remove()
        assert torch.equal(case.say(each), plain)


@pytest.mark.parametrize("name", ["BLIP, captions", "BERT"])
def test_gradients_pass_through(name):
    """With checkpoints too, which run layers again on detached tokens."""
    model, case = made(name)
    found = []
    with turbovlm.apply(model, r=4, visual_keep=0.5):
        for reentrant in (None, False, True):
            if reentrant is not None:
                model.train()
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            model.zero_grad()
            case.say(model).square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    towers = [gradient for name, gradient in found[0].items() if name.startswith(case.tower)]
    assert len(towers) > 20 and all(gradient.isfinite().all() for gradient in towers)
    for each in found[1:]:
        assert each.keys() == found[0].keys()
        for name, gradient in each.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_halves_and_autocast():
    model, case = made("BERT")
    reference = case.say(model)
    with turbovlm.apply(model, r=(13, 0, 0, 0), **DOUBLES):
        with torch.autocast("cpu", torch.bfloat16):
            assert (case.say(model).float() - reference).abs().max() < 0.2
        model.bfloat16()
        pixels = PIXELS.bfloat16()
        assert (model(pixel_values=pixels, decoder_input_ids=IDS).logits.float() - reference).abs().max() < 0.2


@pytest.mark.slow
@torch.no_grad()
def test_one_graph():
    model, case = made("BLIP, captions")
    torch._dynamo.reset()
    with turbovlm.apply(model, r=4, visual_keep=0.5):
        reference = case.say(model)
        compiled = torch.compile(lambda: case.say(model), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(), reference, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_what_cannot_count_sizes_is_refused():
    model, _ = made("BERT")
    model.decoder.bert.config._attn_implementation = "flash_attention_2"
    for settings in ({"r": 4}, {"visual_keep": 0.5}):
        with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2': merged.*proportional=False"):
            turbovlm.apply(model, **settings)
    for settings in ({"r": 4, "dense": True}, {"r": 4, "proportional": False}, {"visual_keep": 0.5, "reduce": "prune"}):
        turbovlm.apply(model, **settings).remove()
    model, _ = made("BERT")
    for layer in model.decoder.bert.encoder.layer:
        layer.look = layer.crossattention
        del layer.crossattention
    with pytest.raises(UnsupportedModelError, match=r"decoder \(BertLMHeadModel of .*: no cross-attention is found"):
        turbovlm.apply(model, r=4)
    with pytest.raises(ConfigError, match="proportional=False: it would have no effect"):
        turbovlm.apply(seeded(llava), visual_keep=0.5, proportional=False)
    with pytest.raises(ConfigError, match="proportional=False: it would have no effect"):
        turbovlm.apply(made("BERT")[0], visual_keep=0.5, reduce="prune", proportional=False)
