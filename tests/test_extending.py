"""The families of docs/extending.md, registered from outside of the package as the page says."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import turbovlm
from turbovlm.registry import OWN, unregister
from vlms import IMAGE, TEXT, VIDEO, Vlm, qwen3_image, seeded

transformers = pytest.importorskip("transformers")
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
ENTRIES = {
    re.search(r"^([A-Z]\w+) = (?:variant|VlmFamily|Denoiser)\(", text, re.M)[1]: text
    for text in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
}


@pytest.fixture
def registered():
    """Run the page's snippet of one entry on a model; forget the entry afterwards."""
    entries = []

    def run(name, model):
        names = {"model": model}
        exec(ENTRIES[name], names)
        entries.append(names[name])
        return names["handle"]

    yield run
    unregister(*entries)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_fifteen_lines_at_most(name):
    lines = ENTRIES[name].split(f"{name} = ")[1].split("\n)\n")[0].splitlines()
    assert len(lines) + 1 <= 15


@pytest.mark.parametrize("kind", OWN)
def test_own_families_are_loaded_where_one_of_their_classes_is_seen(kind):
    module, begin = OWN[kind]
    paths = [path for family in importlib.import_module(module).FAMILIES for path in family.classes]
    assert [path for path in paths if begin and not path.startswith(begin)] == []


def pixio():
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    torch.manual_seed(0)
    return transformers.PixioModel(transformers.PixioConfig(**size, image_size=48, patch_size=8, n_cls_tokens=4)).eval()


def test_an_encoder(registered):
    model, pixels = pixio(), torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with pytest.raises(turbovlm.UnsupportedModelError):
        turbovlm.apply(model, r=4)
    with torch.no_grad():
        own = model(pixel_values=pixels).last_hidden_state
        handle = registered("PIXIO", model)
        merged = model(pixel_values=pixels).last_hidden_state
        assert handle.schedules[0].tokens == (40, 32, 32, 24, 24) and merged.shape == own.shape
        assert handle.features[0].last.sizes[:, 4:].sum(1).eq(36).all()
        handle.remove()
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, own)
        with turbovlm.apply(model, r=0):
            assert torch.equal(model(pixel_values=pixels).last_hidden_state, own)


def cosmos():
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Cosmos3OmniConfig(
        vision_config=vision,
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return transformers.Cosmos3OmniForConditionalGeneration(config)


def test_a_vision_language_model(registered):
    model, family = seeded(cosmos), Vlm(cosmos, qwen3_image, types="mm_token_type_ids")
    inputs = family.inputs([5, 6, "image", 7, 8], [9, "image", 14, 11, 12, 13])
    seen = inputs["attention_mask"].bool()
    with pytest.raises(turbovlm.UnsupportedModelError, match=r"no family describes Cosmos3OmniModel.*register"):
        turbovlm.apply(model, visual_keep=0.5)
    with torch.no_grad():
        own = model(**inputs).logits
        handle = registered("COSMOS_3", model)
        model(**inputs)
        assert [selection.kept.shape[1] for selection in handle.visual] == [8, 6]
        handle.remove()
        with turbovlm.apply(model, visual_keep=1.0):
            assert (model(**inputs).logits - own)[seen].abs().max() < 1e-5
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_denoiser(registered):
    diffusers = pytest.importorskip("diffusers")
    from turbovlm.profile import macs

    torch.manual_seed(0)
    size = {"patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 4, 8)}
    width = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    model = diffusers.BriaTransformer2DModel(**size, **width).eval()
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 256, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "timestep": torch.full((2,), 0.5),
        "img_ids": places,
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }
    with pytest.raises(turbovlm.UnsupportedModelError):
        turbovlm.apply(model, keep=0.5)
    with torch.no_grad():
        own, cost = model(**inputs)[0], macs(model, **inputs)
        handle = registered("BRIA", model)
        half = model(**inputs)[0]
        assert half.shape == own.shape and half.isfinite().all() and not torch.equal(half, own)
        assert macs(model, **inputs) < 0.75 * cost
        handle.remove()
        with turbovlm.apply(model, keep=1.0):
            assert torch.equal(model(**inputs)[0], own)
        assert torch.equal(model(**inputs)[0], own)


def test_what_is_no_entry_is_refused():
    for entry in (SimpleNamespace(family="mine"), "AIMv2", turbovlm.TurboConfig(r=1)):
        with pytest.raises(turbovlm.ConfigError, match="must be an encoder's Layout"):
            turbovlm.register(entry)


def test_a_family_registered_twice_is_refused(registered):
    registered("PIXIO", pixio())
    from turbovlm.encoder import variant
    from turbovlm.encoder.families.transformers import VIT

    known = turbovlm.registry.families("encoder")
    again = variant(VIT, family="mine")
    fresh = variant(VIT, family="fresh", block="my.Block")
    with pytest.raises(turbovlm.ConfigError, match=r"ViTLayer is registered already, as transformers ViT"):
        turbovlm.register(fresh, again)
    assert turbovlm.registry.families("encoder") == known  # nothing of a refused call stays


def test_two_entries_of_one_call_with_the_same_class_are_refused():
    from turbovlm.encoder import variant
    from turbovlm.encoder.families.transformers import VIT

    first, second = (variant(VIT, family=name, block="my.Block") for name in ("first", "second"))
    known = turbovlm.registry.families("encoder")
    with pytest.raises(turbovlm.ConfigError, match=r"my\.Block is registered already, as first"):
        turbovlm.register(first, second)
    assert turbovlm.registry.families("encoder") == known


def test_a_package_whose_families_cannot_be_loaded_is_named_every_time(monkeypatch):
    registry = turbovlm.registry
    points = [EntryPoint("mine", "no_such_package.families", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.setattr(registry, "_LOADED", registry._LOADED - {registry.ENTRY_POINTS})
    for _ in range(2):
        with pytest.raises(turbovlm.ConfigError, match=r"no_such_package\.families.*cannot be loaded.*update or"):
            turbovlm.apply(torch.nn.Linear(2, 2), r=1)
