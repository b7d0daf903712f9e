"""A is aligned with the visual tokens: compared with what the tower's own attention pays, token by token."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

import turbovlm
from more_vlms import MORE
from turbovlm.errors import StateError, UnsupportedModelError
from turbovlm.vlm.marks import ATTENTION
from vlms import CLIP, IMAGE, TEXT, VLMS, noise, seeded, visual_of

transformers = pytest.importorskip("transformers")

CAPTURED: list = []


def probe(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The library's attention, whose queries and keys are kept."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    CAPTURED.append((module, query.detach(), key.detach(), scaling, attention_mask))
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def probed(tower):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", sdpa_mask)
    configs = {id(module.config): module.config for module in tower.modules() if hasattr(module, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "probe"
    try:
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name


def apart(captured):
    """The same, with the images of a sequence apart that a mask keeps apart."""
    for module, query, key, scaling, mask in captured:
        seen = mask if mask is None or mask.dtype == torch.bool else mask == 0
        if seen is None or (seen == seen[:, :, :1]).all():
            yield module, query, key, scaling, seen
            continue
        first = [0, *((seen[0, 0, 1:] != seen[0, 0, :-1]).any(1).nonzero().squeeze(1) + 1).tolist(), query.shape[2]]
        for start, end in pairwise(first):
            yield module, query[:, :, start:end], key[:, :, start:end], scaling, None


def rows_of(guide, guidance, prefix, suffix=0):
    """A of every position of the tower, `[positions of all images]`, from the queries and keys kept."""
    found = []
    for module, query, key, scaling, mask in apart(CAPTURED):
        if not any(module is part for part in guide.modules()):
            continue
        seen = None if mask is None else mask[:, 0, :1].bool()  # `[images, 1, positions]`
        weights = torch.ones_like(query[:, :1, :, :1]) if seen is None else seen.transpose(1, 2).unsqueeze(1).float()
        weights[:, :, :prefix] = 0
        weights[:, :, weights.shape[2] - suffix :] = 0
        mean = (query * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
        asking = query[:, :, :1] if guidance == "cls" else mean
        scores = (asking.double() @ key.double().transpose(2, 3)) * scaling
        scores = scores if seen is None else scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
        found.append(scores.softmax(-1).mean(1).flatten())
    return torch.cat(found)


def features_of(model, pixels, kind, **call):
    method = f"get_{kind}_features"
    return getattr(model if hasattr(model, method) else model.model, method)(**pixels, return_dict=True, **call)


def members(model, guide, pixels, kind, positions):
    """Which visual tokens are made of each position behind the guide, `[tokens, positions]`, 0 or 1."""

    behind = next(getattr(guide, name) for name in ("mlp", "feed_forward", "ffn") if hasattr(guide, name))

    def run(position):
        def disturb(module, inputs, output):
            changed = output.clone(memory_format=torch.contiguous_format)
            changed.view(-1, output.shape[-1])[position] += 9 * torch.linspace(-1, 1, output.shape[-1])
            return changed

        hook = None if position is None else behind.register_forward_hook(disturb)
        outputs = features_of(model, pixels, kind)
        features = outputs.last_hidden_state if outputs.pooler_output is None else outputs.pooler_output
        found = torch.cat(list(features)).view(-1, 32)
        if hook is not None:
            hook.remove()
        return found

    plain = run(None)
    changes = torch.stack([(run(p) - plain).abs().amax(-1) for p in range(positions)], dim=1)
    return (changes > 1e-6).double()


@torch.no_grad()
def check(model, pixels, kind="image", guidance="auto", **settings):
    """See that A of every visual token is what the guide pays to the positions that the token is made of."""
    CAPTURED.clear()
    with turbovlm.apply(model, visual_keep=0.5, guidance=guidance, **settings) as handle:
        feature = handle.features[-1]
        part = model.get_submodule(feature.part)
        guide = part.get_submodule(feature.guide)
        with probed(part.get_submodule(feature.family.tower)):
            outputs = features_of(model, pixels, kind)
        row = rows_of(guide, feature.guidance, feature.prefix, feature.suffix)
        found = torch.cat(getattr(outputs, ATTENTION)).double()
    wanted = members(model, guide, pixels, kind, len(row)) @ row
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert found.std() > 0
    return found, len(row)


ALIKE = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "glm46v", "gemma4_both_ways", "lighton_ocr", "cohere2_vision")
"""Families whose towers, and what tokens are made of, are those of others."""
TOWERS_READ = [*VLMS, *(name for name, family in MORE.items() if family.attention and name not in ALIKE)]


@pytest.mark.parametrize("name", TOWERS_READ)
def test_a_is_what_the_tower_pays_to_each_token(name):
    family = (VLMS | MORE)[name]
    model = seeded(family.make)
    check(model, visual_of(family.inputs([5, "image", 6, "image", 7]), family))


def llava_with(tower, strategy, layer=-2):
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config))


DINO = {"image_size": 48, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
TOWERS = {
    "CLIP": lambda: transformers.CLIPVisionConfig(**CLIP),
    "SigLIP": lambda: transformers.SiglipVisionConfig(**CLIP),
    "DINOv2 with registers": lambda: transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=4),
}
PIXELS = {"pixel_values": noise(3, 2, 3, 48, 48)}


@pytest.mark.parametrize("guidance", ["auto", "mean"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", TOWERS)
def test_tokens_in_front_of_the_patches_are_counted_as_they_are_read(tower, strategy, guidance):
    """`"default"` leaves the first token out, whatever it is; `"full"` hands on CLS and registers as well."""
    model = llava_with(TOWERS[tower](), strategy)
    found, positions = check(model, PIXELS, guidance=guidance)
    assert len(found) == positions - 2 * (strategy == "default")
    check(model, PIXELS, guidance=guidance, r=0)


@pytest.mark.parametrize("layer", [-1, 2, [-3, -1]])
def test_the_guide_is_the_last_block_that_is_read(layer):
    model = llava_with(TOWERS["CLIP"](), "default", layer)
    check(model, PIXELS)
    with turbovlm.apply(model, visual_keep=0.5) as handle:
        assert handle.features[0].guide.endswith(f"layers.{1 if layer == 2 else 3}")


@pytest.mark.parametrize("layer", [-1, -2, 2])
def test_internvl_reads_the_block_that_its_config_names(layer):
    family = VLMS["internvl"]
    config = family.make().config
    config.vision_feature_layer = layer
    check(seeded(lambda: transformers.InternVLForConditionalGeneration(config)), PIXELS)


@pytest.mark.parametrize("blocks", [[1, 7], [-1], [], [9]])
def test_full_attention_beyond_the_towers_depth(blocks):
    family = VLMS["qwen2_5_vl"]
    config = family.make().config
    config.vision_config.fullatt_block_indexes = blocks
    model = seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config))
    pixels = visual_of(family.inputs(["image", 6, "image"]), family)
    if blocks == [1, 7]:  # behind the guide, windows mix their patches
        with turbovlm.apply(model, visual_keep=0.5) as handle, torch.no_grad():
            (feature,) = handle.features
            assert feature.guide == "visual.blocks.1"
            features_of(model, pixels, "image")
    else:
        check(model, pixels)


@torch.no_grad()
def test_padding_inside_an_image():
    """Idefics 3 pads images of a batch to one size: nothing is paid to what is padding."""
    family = VLMS["idefics3"]
    model = seeded(family.make)
    pixels = visual_of(family.inputs(["image", 6, "image"]), family)
    mask = torch.ones(2, 1, 48, 48, dtype=torch.bool)
    mask[1, :, :, 32:] = False
    found, _ = check(model, {**pixels, "pixel_attention_mask": mask})
    assert (found.view(2, 3, 3)[1, :, 2] == 0).all() and (found.view(2, 3, 3)[0, :, 2] > 0).all()


def planted(model, part, guide, feature, position):
    """Have the guide pay nearly all it has to one position, counted over all images."""
    from turbovlm.vlm import tower

    def packed_row(block, spelled, hidden, arguments, proportional):
        return torch.nn.functional.one_hot(torch.tensor(position), len(hidden)).float()

    def attention_of_guide(block, layout, config, prefix, guidance, hidden, arguments):
        images, tokens = hidden.shape[:2]
        row = torch.nn.functional.one_hot(torch.tensor(position), images * tokens).float()
        return row.view(images, tokens)[:, prefix:]

    patch = pytest.MonkeyPatch()
    patch.setattr(tower, "packed_row", packed_row)
    patch.setattr(tower, "attention_of_guide", attention_of_guide)
    return patch


@pytest.mark.parametrize("settings", [{"visual_select": "attention"}, {"reduce": "prune"}, {"alpha": 9}], ids=str)
@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_the_token_that_is_looked_at_stays(name, settings):
    family = VLMS[name]
    model = seeded(family.make)
    inputs = family.inputs([5, "image", 6, 7])
    pixels = visual_of(inputs, family)
    for position in (10, 25):
        with turbovlm.apply(model, visual_keep=0.2, **settings) as handle:
            (feature,) = handle.features
            part = model.get_submodule(feature.part)
            guide = part.get_submodule(feature.guide)
            patch = planted(model, part, guide, feature, position)
            model(**inputs)
            kept = handle.visual[0].kept[0].tolist()
            patch.undo()
        token = members(model, guide, pixels, "image", position + 1)[:, position].nonzero().flatten().tolist()
        assert len(token) == 1 and token[0] in kept


@pytest.mark.filterwarnings("ignore:visual_keep=1 is a count")
@pytest.mark.parametrize("reduce", ["merge", "prune"])
@torch.no_grad()
def test_one_token_is_the_one_that_is_looked_at(reduce):
    from turbovlm.vlm.select import select

    features = noise(0, 40, 36, 8)
    semantic = torch.full((40, 36), 0.01)
    looked_at = torch.arange(40) % 36
    semantic[torch.arange(40), looked_at] = 1.0
    found = select(features, semantic, 1, turbovlm.ReadConfig(1, visual_select="attention", reduce=reduce))
    assert torch.equal(found.kept[:, 0], looked_at)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@torch.no_grad()
def test_another_layer_in_the_call(name):
    """What the call reads is not what the guide of `apply` has seen: refused; without a guide it is as it is."""
    family = VLMS[name]
    model = seeded(family.make)
    inputs = family.inputs([5, "image", 6, 7])
    with turbovlm.apply(model, visual_keep=0.5):
        own = model.config.vision_feature_layer
        model(**inputs, vision_feature_layer=own)
        with pytest.raises(StateError, match=r"vision_feature_layer=1: the visual tokens are of another block than"):
            model(**inputs, vision_feature_layer=1)
        model.config.vision_feature_layer = 1
        with pytest.raises(StateError, match="the visual tokens are of another block"):
            model(**inputs)
        model.config.vision_feature_layer = own
    full = model(**inputs, vision_feature_layer=1).logits
    with turbovlm.apply(model, visual_keep=1.0, visual_select="uniform"):
        found = model(**inputs, vision_feature_layer=1).logits
    torch.testing.assert_close(found, full, rtol=0, atol=1e-5)


@torch.no_grad()
def test_another_layer_of_a_tower_that_merges():
    """Blocks behind the last one that merges have every position, those before it do not."""
    model = llava_with(TOWERS["CLIP"](), "default")
    ids = torch.tensor([[3] + [IMAGE] * 36 + [4, 5]] * 2)
    cases = [
        ({"r": 4, "blocks": "every"}, (1, -3, 2, -4), (3, 4, -1, -2)),
        ({"r": 4}, (2, -3), (1, 3, 4, -4)),
        ({"r": [0, 4, 4]}, (2, -3), (1, 3, 4, -4)),
        ({"r": 4, "blocks": "every", "visual_keep": 0.5, "visual_select": "uniform"}, (1, 2), (3, 4)),
    ]
    for settings, merged, whole in cases:
        with turbovlm.apply(model, **settings):
            for layer in whole:
                model(input_ids=ids, **PIXELS, vision_feature_layer=layer)
            for layer in merged:
                with pytest.raises(StateError, match=rf"vision_feature_layer={layer}: the tokens of .*merged there"):
                    model(input_ids=ids, **PIXELS, vision_feature_layer=layer)
            model.config.vision_feature_layer = 2
            with pytest.raises(StateError, match="vision_feature_layer=2: the tokens of"):
                model(input_ids=ids, **PIXELS)
            model.config.vision_feature_layer = -2
    plain = model(input_ids=ids, **PIXELS, vision_feature_layer=1).logits
    with turbovlm.apply(model, r=0):
        found = model(input_ids=ids, **PIXELS, vision_feature_layer=1).logits
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


def test_a_projector_that_reads_no_block():
    model = llava_with(TOWERS["CLIP"](), "default", 0)
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer=0: the output of a block"):
        turbovlm.apply(model, visual_keep=0.5)
