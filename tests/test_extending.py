"""The families of docs/extending.md, registered from outside of the package as the page says."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import turbovlm
from turbovlm.registry import OWN, unregister
from turbovlm.vlm import Packed
from vlms import IMAGE, TEXT, VIDEO, Vlm, qwen3_image, seeded

transformers = pytest.importorskip("transformers")
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
ENTRY = re.compile(r"^([A-Z]\w+) = (?:Layout|variant|VlmFamily|Denoiser|replace)\(", re.M)
ENTRIES = {ENTRY.search(text)[1]: text for text in SNIPPETS if "turbovlm.register(" in text}
MY_MODULE = next(text for text in SNIPPETS if "class Vit(" in text)
SAID = re.findall(r"^\| .+ \| `… (.+?)` \|$", PAGE, re.M)
"""Messages of the checks, as the page has them."""


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


def my_module(monkeypatch, name, text):
    """A module of a package of one's own, which the page's entries name."""
    module = types.ModuleType(f"my_package.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(text, module.__dict__)
    return module


def test_an_encoder_from_scratch(registered, monkeypatch):
    torch.manual_seed(0)
    model = my_module(monkeypatch, "vit", MY_MODULE).Vit().eval()
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(turbovlm.UnsupportedModelError, match="no layout describes them yet"):
        turbovlm.apply(model, r=4)
    with torch.no_grad():
        own = model(images)
        handle = registered("MY_VIT", model)
        merged = model(images)
        assert handle.schedules[0].tokens[-1] == 65 - 6 * 4 and not torch.equal(merged, own)
        assert handle.features[0].last.sizes[:, 1:].sum(1).eq(64).all()
        handle.remove()
        assert torch.equal(model(images), own)


def empty(*names):
    return lambda tower: {name: torch.empty(1, 3, 64, 64, device="meta") for name in names}


WRONG = {
    "has no norm_1; this release of": {"norm1": "norm_1"},
    "no layout describes them yet": {"block": "my_package.vit.Blocks"},
    "not inside an encoder turbovlm knows": {"towers": ("my_package.vit.ViT",)},
    "its forward does not take pixels, the inputs of its layout": {"inputs": empty("pixels")},
    "65 tokens reach its first block of an input of native size, and not 66": {"prefix": 2},
    "token 0 does not depend on the image": {"prefix": 0, "suffix": 1, "cls": False},
    "its two halves differ from its own forward by": {"mlp": ("mlp",)},
    r"after_attention=\(\) names no module": {"after_attention": ()},
}
"""What a wrong entry is refused with; the page has all but the last."""


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_entry_is_refused_as_the_page_says(message, registered, monkeypatch):
    model = my_module(monkeypatch, "vit", MY_MODULE).Vit().eval()
    names = {"model": model}
    exec(ENTRIES["MY_VIT"].split("turbovlm.register(")[0], names)
    wrong = dataclasses.replace(names["MY_VIT"], **WRONG[message])
    turbovlm.register(wrong)
    try:
        with pytest.raises(turbovlm.UnsupportedModelError, match=message) as raised:
            turbovlm.apply(model, r=4)
    finally:
        unregister(wrong)
    patterns = {said: ".*".join(map(re.escape, said.split("…"))) for said in SAID}
    found = [said for said, pattern in patterns.items() if re.search(pattern, str(raised.value))]
    assert len(found) == (0 if "after_attention" in message else 1)


def test_the_page_has_no_other_messages():
    assert len(SAID) == len(WRONG) - 1


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tower": "vision"}, "Cosmos3OmniModel has no vision;"),
        ({"packed": None}, r"tower runs all images as one sequence: its VlmFamily needs packed=Packed"),
        ({"packed": Packed(project=("q_proj", "k_proj"))}, r"has no attn\.q_proj;"),
        ({"packed": Packed(norm="norm_1")}, "has no norm_1;"),
    ],
)
def test_a_wrong_entry_of_a_vision_language_model_is_refused(wrong, message):
    names = {"model": None}
    exec(ENTRIES["COSMOS_3"].split("turbovlm.register(")[0], names)
    entry = dataclasses.replace(names["COSMOS_3"], **wrong)
    turbovlm.register(entry)
    try:
        with pytest.raises(turbovlm.UnsupportedModelError, match=message):
            turbovlm.apply(seeded(cosmos), visual_keep=0.5)
    finally:
        unregister(entry)


def test_a_denoiser(registered):
    diffusers = pytest.importorskip("diffusers")
    from turbovlm.profile import macs

    torch.manual_seed(0)
    size = {"in_channels": 4, "out_channels": 4, "num_layers": 4, "sample_width": 16, "sample_height": 16}
    width = {"attention_head_dim": 16, "num_attention_heads": 2, "text_embed_dim": 32, "max_text_seq_length": 7}
    model = diffusers.ConsisIDTransformer3DModel(**size, **width, sample_frames=9, time_embed_dim=8).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "timestep": torch.full((2,), 500),
        "return_dict": False,
    }
    with pytest.raises(turbovlm.UnsupportedModelError):
        turbovlm.apply(model, keep=0.5)
    with torch.no_grad():
        own, cost = model(**inputs)[0], macs(model, **inputs)
        handle = registered("CONSISID", model)
        half = model(**inputs)[0]
        assert half.shape == own.shape and half.isfinite().all() and not torch.equal(half, own)
        assert macs(model, **inputs) < 0.75 * cost
        handle.remove()
        with turbovlm.apply(model, keep=1.0):
            assert torch.equal(model(**inputs)[0], own)
        assert torch.equal(model(**inputs)[0], own)


MY_DIT = """
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, time):
        x = x + self.attention(self.norm1(x)) * time
        return x + self.mlp(self.norm2(x))


class Dit(nn.Module):
    def __init__(self, width=32, patch=2):
        super().__init__()
        self.patch = patch
        self.embed, self.out = nn.Conv2d(4, width, patch, patch), nn.Linear(width, 4 * patch**2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, latent, time):
        x = self.embed(latent).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, time[:, None, None])
        return F.fold(self.out(x).transpose(1, 2), latent.shape[2:], self.patch, stride=self.patch)
"""


def test_a_denoiser_from_scratch(registered, monkeypatch):
    pytest.importorskip("diffusers")
    from turbovlm.diffusion import Part
    from turbovlm.profile import macs

    torch.manual_seed(0)
    model = my_module(monkeypatch, "dit", MY_DIT).Dit().eval()
    inputs = {"latent": torch.randn(2, 4, 32, 32), "time": torch.full((2,), 0.5)}
    with torch.no_grad():
        own, cost = model(**inputs), macs(model, **inputs)
        handle = registered("MY_DIT", model)
        half = model(**inputs)
        assert "256 → 128 tokens" in repr(handle)
        assert half.isfinite().all() and not torch.equal(half, own) and macs(model, **inputs) < 0.75 * cost
        handle.remove()
        with turbovlm.apply(model, keep=1.0):
            assert torch.equal(model(**inputs), own)
        (entry,) = (family for family in turbovlm.registry.families("denoiser") if family.family == "my DiT")
        unregister(entry)
        parts = (*entry.blocks[0].parts, Part("mlp", "ffn"))
        again = dataclasses.replace(entry, blocks=(dataclasses.replace(entry.blocks[0], parts=parts),))
        turbovlm.register(again)
        handle = turbovlm.apply(model, keep=0.5)
        assert "mlp: it is a Sequential of torch.nn.modules.container" in repr(handle)
        handle.remove()
        unregister(again)


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
