"""Families of denoisers of images whose blocks merge whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import turbovlm
from denoisers import DENOISERS, Watch, livelier, noise
from doubled import double
from image_denoisers import IMAGE_DENOISERS
from turbovlm.errors import ConfigError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")
SCOPES = ({"scope": "block"}, {"scope": "stack", "span": 2}, {"scope": "stack", "span": 8})
UNGUIDED = ("hidream", "flux2", "lumina2", "kandinsky5", "kandinsky5 video", "prx", "krea2")
"""Those whose self-attention is not known to turbovlm by its projections."""
ROUGH = ("kandinsky5", "kandinsky5 video")
"""Those that run in float32 only, and round queries and keys to bfloat16."""
ROWS, COLUMNS = 16, 24


@pytest.fixture(params=IMAGE_DENOISERS)
def name(request):
    return request.param


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs, return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(out) if isinstance(out, list) else out


def in_float64(value: Any) -> Any:
    if isinstance(value, list):
        return [in_float64(each) for each in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def alone(inputs: dict[str, Any], image: int) -> dict[str, Any]:
    """What a batch of two is given, for one of its images."""
    given = {
        name: value[image : image + 1] if getattr(value, "ndim", 1) and len(value) == 2 else value
        for name, value in inputs.items()
    }
    layers = given.get("encoder_hidden_states_llama3")  # each of them has the batch
    return given if layers is None else {**given, "encoder_hidden_states_llama3": layers[:, image : image + 1]}


@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_a_stack_is_its_blocks_on_equal_tokens(name, given):
    """Sizes, positions, masks, text and update, against the model's own blocks on all tokens."""
    family = IMAGE_DENOISERS[name]
    model, inputs, tolerance = family(), family.inputs(1, ROWS, COLUMNS), 1e-3
    if name not in ROUGH:
        model, tolerance = model.double(), 1e-9
        inputs = {key: in_float64(value) for key, value in inputs.items()}
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, restore="copy", **given) as handle:
        merged = run(model, inputs)
        double(model, handle.features[0])
    again = run(model, inputs)
    assert (merged - plain).abs().max() > 10 * tolerance * plain.abs().max()
    torch.testing.assert_close(again, merged, rtol=0, atol=tolerance * float(merged.abs().max()))


@pytest.mark.parametrize("given", SCOPES[::2], ids=str)
def test_merges_and_comes_back(name, given):
    family = IMAGE_DENOISERS[name]
    model, inputs = family(), family.inputs(2, ROWS, COLUMNS)
    plain = run(model, inputs)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    with turbovlm.apply(model, keep=1.0, **given):
        assert torch.equal(run(model, inputs), plain)
    with turbovlm.apply(model, keep=0.5, **given) as handle:
        merged = run(model, inputs)
        assert torch.equal(run(model, inputs), merged) and merged.isfinite().all() and merged.shape == plain.shape
        assert "left whole" not in repr(handle) and "→" in repr(handle)
    assert 1e-4 * plain.std() < (merged - plain).abs().mean() < 2 * plain.std()
    assert torch.equal(run(model, inputs), plain)
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before


def test_a_batch_is_as_single_images(name):
    family = IMAGE_DENOISERS[name]
    model, inputs = family(), family.inputs(2, ROWS, COLUMNS)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        together = run(model, inputs)
        for i in (0, 1):
            close = {"rtol": 1e-3, "atol": (2e-2 if name in ROUGH else 1e-4) * float(together.std())}
            torch.testing.assert_close(run(model, alone(inputs, i))[0], together[i], **close)


@pytest.mark.parametrize("scope", ["block", "stack"])
def test_text_is_never_merged(name, scope):
    """Layers of the image's tokens get half of them, and as many words as ever."""
    family = IMAGE_DENOISERS[name]
    model, inputs = family(), family.inputs(1, ROWS, COLUMNS)
    lengths: dict[str, int] = {}
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not path.endswith((".proj_mlp", ".proj_out")):  # which merge as parts, too
            Watch(layer, lambda x, out, path=path: lengths.update({path: x.shape[1] if x.ndim == 3 else 0}))
    run(model, inputs)
    plain = dict(lengths)
    with turbovlm.apply(model, keep=0.5, scope=scope) as handle:
        run(model, inputs)
        places = [f"{place.name}." for place in handle.features[0].places]
        (tokens,) = {choice.tokens for choice in handle.features[0].last.values()}
    for path, length in plain.items():
        merged = length >= tokens and path.startswith(tuple(places))
        assert lengths[path] == length - (tokens // 2 if merged else 0), path
    for place in places:
        assert any(lengths[path] < length for path, length in plain.items() if path.startswith(place))


def test_images_of_several_sizes_in_a_batch_are_refused():
    model, inputs = IMAGE_DENOISERS["z-image"](), IMAGE_DENOISERS["z-image"].inputs(2, ROWS, COLUMNS)
    inputs["x"][1] = inputs["x"][1][:, :, 2:]
    with turbovlm.apply(model, keep=0.5, scope="stack"), pytest.raises(UnsupportedModelError, match="several sizes"):
        run(model, inputs)


def test_images_and_text_in_turn_are_refused():
    model, inputs = IMAGE_DENOISERS["z-image"](), IMAGE_DENOISERS["z-image"].inputs(1, ROWS, COLUMNS)
    inputs["x"], inputs["cap_feats"] = [inputs["x"] * 2], [inputs["cap_feats"] * 2]
    with turbovlm.apply(model, keep=0.5), pytest.raises(UnsupportedModelError, match="was given lists of images"):
        run(model, inputs)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "siglip", "siglip_processor"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.ZImageOmniPipeline(transformer=model, scheduler=scheduler, **parts)
    with pytest.raises(UnsupportedModelError, match="ZImageOmniPipeline gives its denoiser images, text and padding"):
        turbovlm.apply(pipe, keep=0.5)
    pipe = diffusers.ZImagePipeline(transformer=model, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)
    turbovlm.apply(pipe, keep=0.5).remove()


def test_captions_of_several_lengths_leave_blocks_whole():
    """Words are in front of the image, and each image's begins elsewhere."""
    model, inputs = IMAGE_DENOISERS["lumina2"](), IMAGE_DENOISERS["lumina2"].inputs(2, ROWS, COLUMNS)
    inputs["encoder_attention_mask"][1, 4:] = 0
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        assert run(model, inputs).isfinite().all()
        assert "its attention_mask is set" in repr(handle) and "noise_refiner" in repr(handle)


def test_what_matters(name):
    """It needs the self-attention's projections, which turbovlm does not know of all."""
    family = IMAGE_DENOISERS[name]
    model, inputs = family(), family.inputs(2, ROWS, COLUMNS)
    given = {"keep": 0.5, "scope": "stack", "degree": "weighted_difference"}
    if name in UNGUIDED:
        with pytest.raises(ConfigError, match="give degree='redundancy'"):
            turbovlm.apply(model, **given)
        return
    with turbovlm.apply(model, **given):
        merged = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        assert merged.isfinite().all() and not torch.equal(run(model, inputs), merged)


@pytest.mark.parametrize("name", [name for name in IMAGE_DENOISERS if "hunyuan" not in name])
def test_gradients_are_those_of_checkpoints(name):
    """Not of HunyuanImage, whose own checkpointing is given arguments that it does not take."""
    family = IMAGE_DENOISERS[name]
    model, inputs = family(), family.inputs(1, ROWS, COLUMNS)
    if name == "chroma":
        del inputs["attention_mask"]  # which checkpointed single blocks are not given
    found = []
    with turbovlm.apply(model, keep=0.5, scope="stack", span=2):
        for checkpointed in (False, True):
            if checkpointed:
                model.enable_gradient_checkpointing()
            model.train().zero_grad()
            run.__wrapped__(model, inputs).square().mean().backward()
            found.append({path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1))


def test_a_cache_of_keys_leaves_blocks_whole():
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    model, inputs = IMAGE_DENOISERS["glm"](), IMAGE_DENOISERS["glm"].inputs(1, ROWS, COLUMNS)
    inputs["kv_caches"] = GlmImageKVCache(num_layers=3)
    inputs["kv_caches"].set_mode("write")
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, scope="stack"), pytest.warns(UserWarning, match="its kv_cache is set"):
        assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", ["qwen", "chroma", "z-image"])
def test_what_is_added_between_blocks_finds_all_tokens(name):
    model, inputs = IMAGE_DENOISERS[name](), IMAGE_DENOISERS[name].inputs(1, ROWS, COLUMNS)
    samples: Any = [noise(5, 1, 96, 32)] * 2
    inputs["controlnet_block_samples"] = {1: noise(5, 1, 160, 32)} if name == "z-image" else samples
    if name == "chroma":
        inputs["controlnet_single_block_samples"] = samples
    plain = run(model, inputs)
    found = []
    for given in SCOPES[::2]:
        with turbovlm.apply(model, keep=0.5, **given) as handle:
            found.append(run(model, inputs))
            assert "left whole" not in repr(handle)
    torch.testing.assert_close(*found, rtol=1e-3, atol=0.05 * float(plain.std()))
    assert not torch.equal(found[0], plain)


@pytest.mark.parametrize("batch", [1, 2])
def test_kept_keys_of_the_text_and_references(batch):
    """Qwen-Image 2.1 reads them in the first step alone; behind it the image's tokens ask all that were kept."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    family = IMAGE_DENOISERS["qwen 2.1"]
    model, inputs = family().double(), family.inputs(batch, ROWS, COLUMNS)
    inputs = {key: in_float64(value) for key, value in inputs.items()}
    with turbovlm.apply(model, keep=0.5, restore="copy") as handle:
        whole = run(model, inputs)[:, -96:]
        kept = QwenImage21KVCache(3)
        first = run(model, {**inputs, "kv_cache": kept, "kv_cache_mode": "extract"})[:, -96:]
        later = run(model, {**inputs, "kv_cache": kept, "kv_cache_mode": "cached"})
        assert "left whole" not in repr(handle) and "96 → 48 tokens" in repr(handle)
    assert torch.equal(first, whole) and later.shape == whole.shape
    torch.testing.assert_close(later, whole, rtol=0, atol=1e-9 * float(whole.abs().max()))
    assert not torch.allclose(run(model, inputs)[:, -96:], whole)


def test_masks_of_flex_attention_leave_blocks_whole():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    model, inputs = IMAGE_DENOISERS["qwen 2.1"](), IMAGE_DENOISERS["qwen 2.1"].inputs(1, ROWS, COLUMNS)
    for block in model.transformer_blocks:
        block.attn.set_processor(QwenImage21FlexAttnProcessor())
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5), pytest.warns(UserWarning, match="its attention_mask is a BlockMask"):
        assert torch.equal(run(model, inputs), plain)


def test_images_that_are_filled_up_stay_whole():
    """HiDream fills those that are not square up to a fixed length."""
    model, inputs = IMAGE_DENOISERS["hidream"](), IMAGE_DENOISERS["hidream"].inputs(1, ROWS, COLUMNS)
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :ROWS]
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5), pytest.warns(UserWarning, match="its hidden_states_masks is set"):
        assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen"])
def test_control_networks_of_transformers(kind):
    """They keep what each block gives, so each merges by itself."""
    family = IMAGE_DENOISERS["qwen"] if kind == "qwen" else DENOISERS[kind]
    model, inputs = family(), family.inputs(1, ROWS, COLUMNS)
    name = {"flux": "Flux", "sd3": "SD3", "qwen": "QwenImage"}[kind]
    size = {"num_layers": 2} if kind == "sd3" else {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    more = {"num_single_layers": 2} if kind == "flux" else {}
    network = livelier(getattr(diffusers, f"{name}ControlNetModel").from_transformer(model, **size, **more))
    cond = {"controlnet_cond": torch.randn_like(inputs["hidden_states"])}
    if kind == "sd3":
        cond = {"controlnet_cond": noise(9, 1, 5, ROWS, COLUMNS)}

    def given() -> list[Tensor]:
        out = network(**inputs, **cond, return_dict=False)
        return [sample for each in out for sample in ([each] if torch.is_tensor(each) else each or ())]

    plain = given()
    with turbovlm.apply(network, keep=0.5) as handle:
        merged = given()
        assert "left whole" not in repr(handle) and "96 → 48 tokens" in repr(handle)
    assert len(merged) == len(plain) and not torch.equal(merged[-1], plain[-1])
    assert all(torch.equal(a, b) for a, b in zip(plain, given()))


def test_wrappers_of_other_libraries_are_refused():
    """They may run the block in their own way, as what is compiled by itself does."""
    model = IMAGE_DENOISERS["qwen"]()
    model.transformer_blocks[1] = torch.compile(model.transformer_blocks[1], backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks.1._orig_mod is in a OptimizedModule"):
        turbovlm.apply(model, keep=0.5)
