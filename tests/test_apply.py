"""apply, the handle, refusals, and the models around a tower."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn as nn

import turbovlm
from families import FAMILIES, _livelier
from turbovlm import ConfigError, StateError, TurboConfig, TurboError, UnsupportedModelError

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 16,
}
IDS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 3, 2]])


@pytest.fixture
def vit():
    return FAMILIES["vit"].make()


@pytest.fixture
def images():
    return FAMILIES["vit"].inputs(2)["pixel_values"]


def test_readme_forms(vit, images):
    for settings in ({"r": 4}, {"keep": 0.5}, {"flops": 0.7}):
        with torch.no_grad(), turbovlm.apply(vit, **settings) as handle:
            out = vit(images).last_hidden_state
            assert out.shape[1] == handle.schedules[0].tokens[-1] < 37
    handle = turbovlm.apply(vit, TurboConfig(r=4))
    assert handle.active and handle.config.r == 4
    handle.remove()
    assert not handle.active
    assert "removed" in repr(handle)


def test_repr_says_what_happens(vit):
    with turbovlm.apply(vit, r=4) as handle:
        text = repr(handle)
    assert "4 blocks, 37 → 21 tokens, merged in 2 of them" in text and "layers.2: 29 → 21 tokens" in text
    assert "guided by cls" in text


def test_repr_counts_tokens_and_multiply_accumulates():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_384", num_classes=0)
    settings, encoder, *blocks = repr(turbovlm.apply(model, r=35, blocks="every")).splitlines()
    assert settings == "Turbo(r=35, degree=weighted_distance, alpha=1, partition=auto, keep_norm)"
    # by hand: weights of a block, attention, and two norms of 5 a value
    assert f"{12 * 577 * 768 * (12 * 768 + 2 * 577 + 2 * 5) / 1e9:.2f}" == "55.20"
    assert encoder == (
        "  model: 12 blocks, 577 → 157 tokens, merged in 12 of them, 55.20 → 34.08 GMACs in the blocks, "
        "62.0% of the encoder's left, "
        "guided by cls, similarity of heads, random halves"
    )
    assert len(blocks) == 12 and blocks[0] == "    blocks.0: 577 → 542 tokens, 4.600 → 4.498 GMACs"
    assert blocks[-1] == "    blocks.11: 192 → 157 tokens, 4.600 → 1.259 GMACs"


def test_only_random_halves_of_many_patches_are_compared_in_windows():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", img_size=640, num_classes=0)
    costs = {}
    for partition in ("random", "alternate"):
        with turbovlm.apply(model, r=8, partition=partition) as handle:
            costs[partition] = handle.schedules[0].macs_after[0]
    # 1,600 patches: 800 with 800, or in four windows; 384 channels of all heads
    assert costs["alternate"] - costs["random"] == (800 * 800 - 800 * 800 // 4) * 384


def test_settings_of_a_file_are_settled_as_those_of_a_program(vit, tmp_path):
    """Strings that were read are equal to a program's, but other objects."""
    TurboConfig(r=2).save(tmp_path / "turbo.json")
    with turbovlm.apply(vit, TurboConfig.load(tmp_path / "turbo.json")) as handle:
        (feature,) = handle.features
        assert (feature.guidance, feature.similarity, feature.partition) == ("cls", "heads", "all")


def test_applying_twice_raises_and_leaves_the_first(vit, images):
    with turbovlm.apply(vit, r=4) as handle, torch.no_grad():
        before = vit(images).last_hidden_state
        with pytest.raises(TurboError, match=r"accelerated already \(r=4\)"):
            turbovlm.apply(vit, r=8)
        assert handle.active and torch.equal(vit(images).last_hidden_state, before)


def test_an_old_handle_does_not_remove_a_new_one(vit):
    old = turbovlm.apply(vit, r=4)
    old.remove()
    new = turbovlm.apply(vit, r=8)
    old.remove()
    assert new.active and not old.active
    new.remove()


def test_get_handle(vit):
    with pytest.raises(TurboError, match="not accelerated"):
        turbovlm.get_handle(vit)
    handle = turbovlm.apply(vit, r=4)
    assert turbovlm.get_handle(vit).schedules == handle.schedules
    turbovlm.get_handle(vit).remove()
    assert not handle.active


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of r, keep and flops"),
        ({"r": 4, "keep": 0.5}, "exactly one"),
        ({"rate": 4}, "rate=4: no such setting; there are r, keep"),
        ({"r": [4, 4]}, "r has 2 entries, but the encoder has 4 blocks"),
    ],
)
def test_bad_settings(vit, settings, message):
    with pytest.raises(ConfigError, match=message):
        turbovlm.apply(vit, **settings)
    assert not [m for m in vit.modules() if "forward" in m.__dict__]


def test_bad_arguments(vit):
    with pytest.raises(ConfigError, match="not both"):
        turbovlm.apply(vit, TurboConfig(r=4), keep=0.5)
    with pytest.raises(ConfigError, match=r"apply\(model, r=16\)"):
        turbovlm.apply(vit, 16)
    with pytest.raises(UnsupportedModelError, match="dict is no torch"):
        turbovlm.apply({}, r=4)
    siglip = FAMILIES["siglip"].make()
    with pytest.raises(ConfigError, match=r"guidance='cls'.*no CLS token"):
        turbovlm.apply(siglip, r=4, guidance="cls")
    with turbovlm.apply(siglip, r=4) as handle:
        assert "guided by mean" in repr(handle)


def test_trace_and_restore_ask_for_a_forward_first(vit, images):
    with turbovlm.apply(vit, r=4) as handle:
        with pytest.raises(StateError, match="trace=True"):
            _ = handle.trace
        with pytest.raises(StateError, match="run the model first"):
            handle.restore(torch.zeros(2, 21, 3))
    with turbovlm.apply(vit, r=4, trace=True) as handle, pytest.raises(StateError, match="run the model first"):
        _ = handle.trace


def test_trace_holds_the_papers_quantities(vit, images):
    with torch.no_grad(), turbovlm.apply(vit, TurboConfig.paper(4, trace=True)) as handle:
        vit(images)
        trace = handle.trace
    for entry, tokens in zip(trace, (37, 33, 29, 25)):
        assert entry.redundancy.shape == entry.semantic.shape == entry.degree.shape == (2, tokens)
        torch.testing.assert_close(entry.semantic.sum(1), torch.ones(2))
        candidates = ~entry.redundancy.isnan()
        assert candidates[:, 2::2].all() and not candidates[:, 0].any() and not candidates[:, 1::2].any()
        expected = entry.redundancy - 180 * entry.semantic
        torch.testing.assert_close(entry.degree[candidates], expected[candidates])
    assert [entry.name for entry in trace] == [f"layers.{i}" for i in range(4)]


def test_restore_gives_every_position_its_tokens_value(vit, images):
    with turbovlm.apply(vit, r=6, trace=True) as handle:
        out = vit(images).last_hidden_state
        full = handle.restore(out)
        assert full.shape == (2, 37, 32)
        source = handle.trace[-1].source
        for b in range(2):
            torch.testing.assert_close(full[b], out[b, source[b]])
        full.square().sum().backward()
        assert vit.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0
        sizes = handle.restore(handle.trace[-1].sizes)
        torch.testing.assert_close((1 / sizes).sum(1), torch.tensor([13.0, 13.0]))
        grid = handle.restore(torch.zeros(2, 13, 4, 4))
        assert grid.shape == (2, 37, 4, 4)
        with pytest.raises(StateError, match=r"expected \(2, 13\)"):
            handle.restore(out[:, 1:])
        with pytest.raises(ConfigError, match="tower='text'"):
            handle.restore(out, tower="text")
        vit(images[:1])
        assert handle.restore(torch.zeros(1, 13, 2)).shape == (1, 37, 2)


@torch.no_grad()
def test_dense_hands_on_every_position(vit, images):
    with turbovlm.apply(vit, r=6) as handle:
        copies = handle.restore(vit(images).last_hidden_state)
    with turbovlm.apply(vit, r=6, dense=True, restore="copy") as handle:
        dense = vit(images).last_hidden_state
        torch.testing.assert_close(dense, copies)
        assert torch.equal(handle.restore(dense), dense)
        assert "restored to 37 tokens (copy)" in str(handle)
    with turbovlm.apply(vit, r=6, dense=True):
        assert vit(images).last_hidden_state.shape == copies.shape
    with pytest.raises(ConfigError, match="restore='linear'"):
        turbovlm.apply(vit, r=6, restore="linear")


@torch.no_grad()
def test_residuals_are_what_set_tokens_apart(vit, images):
    """With MLPs that add nothing, and merges in the last block alone, nothing is lost."""
    for layer in vit.layers:
        for parameter in layer.mlp.parameters():
            parameter.zero_()
    full = vit(images).last_hidden_state
    amounts = [0, 0, 0, 12]
    with turbovlm.apply(vit, r=amounts, dense=True):
        torch.testing.assert_close(vit(images).last_hidden_state, full)
    with turbovlm.apply(vit, r=amounts, dense=True, reduce="prune"):
        torch.testing.assert_close(vit(images).last_hidden_state, full)
    with turbovlm.apply(vit, r=amounts, dense=True, restore="copy"):
        assert not torch.allclose(vit(images).last_hidden_state, full, atol=1e-3)


def test_changing_batch_and_image_sizes():
    vit = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, depth=3, num_heads=2, img_size=64, patch_size=8, dynamic_img_size=True
    ).eval()
    with torch.no_grad(), turbovlm.apply(vit, keep=0.5, trace=True) as handle:
        for batch, height, width in [(2, 64, 64), (1, 64, 64), (3, 40, 72), (1, 24, 104), (2, 8, 16)]:
            assert vit(torch.randn(batch, 3, height, width)).isfinite().all()
            patches = (height // 8) * (width // 8)
            left = handle.schedule(patches + 1).tokens[-1]
            assert handle.trace[-1].sizes.shape == (batch, left)
            assert handle.trace[-1].source.shape == (batch, patches + 1)


@pytest.mark.parametrize("name", ["vit", "deit", "timm_registers", "clip", "siglip", "timm_no_cls", "torchvision"])
@pytest.mark.parametrize("order", ["partition", "spatial"])
@torch.no_grad()
def test_duplicate_invariance(name, order):
    """Every patch token doubled: merging the doubles under proportional attention leaves the output unchanged."""
    family = FAMILIES[name]
    model = family.make().double()
    tower = turbovlm.encoder.towers.find_towers(model)[0]
    patches, prefix = tower.tokens - tower.prefix, tower.prefix
    order_of = [*range(prefix), *(i for p in range(prefix, prefix + patches) for i in (p, p))]
    tower.blocks[0][1].register_forward_pre_hook(lambda block, args: (args[0][:, order_of], *args[1:]))
    inputs = {key: value.double() for key, value in family.inputs(2).items()}
    reference = family.output(model(**inputs))
    amounts = (patches, *(0 for _ in tower.blocks[1:]))
    with turbovlm.apply(
        model, r=amounts, degree="redundancy", similarity="keys", partition="alternate", order=order
    ) as handle:
        out = family.output(model(**inputs))
        assert handle.features[0].last.sizes[:, prefix:].eq(2).all()
        if out.ndim == 3 and not tower.restore:
            assert out.shape[1] == prefix + patches
            out = handle.restore(out)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_grid_partition_keeps_one_token_per_cell(vit, images):
    with turbovlm.apply(vit, r=100, partition="grid", trace=True) as handle:
        vit(images)
        last = handle.trace[-1]
    assert last.sizes.shape == (2, 1 + 9)
    corners = [1 + i * 6 + j for i in (0, 2, 4) for j in (0, 2, 4)]
    for b in range(2):
        assert len(set(last.source[b, corners].tolist())) == 9


def test_the_schedule_matches_what_happens(vit, images):
    for settings in (
        {"r": (3, 0, 50, 2)},
        {"keep": 0.4},
        {"flops": 0.6},
        {"r": 5, "min_tokens": 30},
        {"r": 100, "partition": "grid"},
        {"keep": 0.4, "partition": "grid"},
    ):
        with torch.no_grad(), turbovlm.apply(vit, **settings, trace=True) as handle:
            vit(images)
            assert tuple(t.sizes.shape[1] for t in handle.trace) == handle.schedules[0].tokens[1:]
    with turbovlm.apply(vit, r=4) as handle, pytest.raises(ConfigError, match="tokens=0"):
        handle.schedule(0)


def test_output_attentions_is_refused(vit, images):
    with turbovlm.apply(vit, r=4), pytest.raises(StateError, match="output_attentions"):
        vit(images, output_attentions=True)


def test_a_block_with_another_librarys_forward_is_left_alone(vit):
    block = vit.layers[2]
    block.forward = functools.partial(type(block).forward, block)
    with pytest.raises(TurboError, match="forward of its own"):
        turbovlm.apply(vit, r=4)
    assert "forward" not in vit.layers[0].__dict__


def test_a_block_that_computes_something_else_is_refused(vit):
    from transformers.models.vit.modeling_vit import ViTLayer

    class Gated(ViTLayer):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs) * 0.5

    vit.layers[0].__class__ = Gated
    with pytest.raises(UnsupportedModelError, match="differ from its own forward"):
        turbovlm.apply(vit, r=4)


REFUSED = [
    (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "hierarchy of stages"),
    (lambda: timm.create_model("resnet18"), "BasicBlock"),
    (lambda: timm.create_model("beit_base_patch16_224", depth=2), "relative_position_bias_table"),
    (lambda: timm.create_model("vit_srelpos_small_patch16_224", depth=2), "RelPosBlock|not inside"),
    (lambda: timm.create_model("vit_tiny_patch16_224", depth=2, block_fn=_parallel()), "side by side"),
    (lambda: nn.Sequential(nn.Linear(2, 2)), "Linear"),
    (
        lambda: transformers.BeitModel(transformers.BeitConfig(**SMALL, use_relative_position_bias=True)),
        "relative position bias",
    ),
    (lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), "its attention is causal"),
]


def _parallel():
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_refusals_name_what_was_found(index):
    make, message = REFUSED[index]
    with pytest.raises(UnsupportedModelError, match=message) as error:
        turbovlm.apply(make(), r=4)
    assert isinstance(error.value, TurboError)


def test_an_unknown_vlm_with_placeholders_is_refused():
    vision = transformers.CLIPVisionConfig(**SMALL)
    text = transformers.LlamaConfig(**TEXT)
    unknown = transformers.VipLlavaForConditionalGeneration(
        transformers.VipLlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    )
    with pytest.raises(UnsupportedModelError, match="one placeholder per visual token"):
        turbovlm.apply(unknown, r=4)


@torch.no_grad()
def test_dual_encoders_keep_their_text_tower(images):
    vision = dict(SMALL)
    for model, key in [
        (transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision)), "vision_model"),
        (transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=vision)), "vision_model"),
    ]:
        model = _livelier(model)
        reference = model(input_ids=IDS, pixel_values=images)
        with turbovlm.apply(model, r=5) as handle:
            out = model(input_ids=IDS, pixel_values=images)
            assert [s.tower for s in handle.schedules] == [key]
        assert torch.equal(out.text_embeds, reference.text_embeds)
        assert not torch.equal(out.image_embeds, reference.image_embeds)
        assert torch.equal(model(input_ids=IDS, pixel_values=images).image_embeds, reference.image_embeds)


@torch.no_grad()
def test_blip_generates_accelerated(images):
    text = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": -1}  # no caption ends
    config = transformers.BlipConfig(text_config=text, vision_config=SMALL)
    model = _livelier(transformers.BlipForConditionalGeneration(config))
    reference = model.generate(pixel_values=images, max_new_tokens=4)
    with turbovlm.apply(model, r=5, trace=True) as handle:
        assert handle.schedules[0].tower == "vision_model"
        merged = model.vision_model(images).last_hidden_state
        assert merged.shape[1] == handle.trace[-1].sizes.shape[1] == 22
        words = torch.full((2, 1), model.decoder_input_ids)
        for _ in range(4):  # greedily, without a cache
            logits = model.text_decoder(input_ids=words, encoder_hidden_states=merged).logits[:, -1]
            words = torch.cat([words, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(model.generate(pixel_values=images, max_new_tokens=4), words)
    assert torch.equal(model.generate(pixel_values=images, max_new_tokens=4), reference)


HEADS = [
    ("ViTForImageClassification", "ViTConfig", {}, False),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}, False),
    ("Dinov2ForImageClassification", "Dinov2Config", {}, True),
    ("Dinov2Backbone", "Dinov2Config", {}, True),
    ("CLIPForImageClassification", "CLIPVisionConfig", {}, True),
    ("SiglipForImageClassification", "SiglipVisionConfig", {}, True),
    ("ViTForMaskedImageModeling", "ViTConfig", {}, True),
    ("ViTMAEForPreTraining", "ViTMAEConfig", {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32}, True),
]


@pytest.mark.parametrize(("name", "config", "settings", "restored"), HEADS)
@torch.no_grad()
def test_heads_that_need_every_position_get_it(name, config, settings, restored, images):
    small = {k: v for k, v in SMALL.items() if "Dinov2" not in config or k != "intermediate_size"}
    if name == "ViTMAEForPreTraining":
        settings = {**settings, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    cls = getattr(transformers, name)
    made = getattr(transformers, config)(**small, **settings)
    if name in ("CLIPForImageClassification", "SiglipForImageClassification"):
        made = getattr(transformers, config.replace("Vision", ""))(vision_config=small, text_config=TEXT)
    model = _livelier(cls(made))
    with turbovlm.apply(model, r=5) as handle:
        out = model(images)
        assert handle.features[0].restore == ("residual" if restored else None)
        assert ("restored to" in repr(handle)) == restored
    for value in out.values():
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all()


def test_a_convolutional_stem_is_not_guessed():
    with torch.device("meta"):
        model = timm.create_model("vit_small_r26_s32_224")
    with turbovlm.apply(model, r=4) as handle:
        assert "convolutional network before the blocks is not counted" in repr(handle)
    with pytest.raises(ConfigError, match=r"flops=0\.7: VisionTransformer begins with a convolutional network"):
        turbovlm.apply(model, flops=0.7)


def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    with turbovlm.apply(model, r=13):
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def small_clip():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 12}
    config = transformers.CLIPVisionConfig(**sizes, image_size=64, patch_size=8, projection_dim=16)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def small_vit(**settings):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2}
    return timm.models.VisionTransformer(**sizes, **settings).eval()


def merging_blocks(handle):
    return [block for block, r in enumerate(handle.features[0].schedule().merged) if r]


def test_clip_merges_in_the_middle():
    model, middle = small_clip(), [4, 5, 6, 7]
    for amount in ({"flops": 0.7}, {"keep": 0.4}):
        with turbovlm.apply(model, **amount) as handle:
            (feature,) = handle.features
            assert merging_blocks(handle) == middle
            assert feature.partition == "all" and "any patch into any other" in repr(handle)
            model(torch.randn(1, 3, 64, 64))
            assert feature.last.lengths[-1] == feature.schedule().tokens[-1] < 65
        with turbovlm.apply(model, **amount, dense=True) as handle:
            assert merging_blocks(handle) == middle
    with turbovlm.apply(small_vit(pre_norm=True), flops=0.7) as handle:
        assert merging_blocks(handle) == middle


def test_every_second_block_merges_any_patches_and_every_block_halves():
    model, every, second = small_vit(), list(range(12)), list(range(0, 12, 2))
    for settings, blocks, partition in (
        ({"flops": 0.7, "dense": True}, second, "all"),
        ({"flops": 0.7, "dense": True, "partition": "all"}, second, "all"),
        ({"flops": 0.7, "blocks": "every"}, every, "random"),
        ({"flops": 0.7, "blocks": "every", "partition": "all"}, every, "all"),
        ({"flops": 0.7, "partition": "alternate"}, every, "alternate"),
        ({"flops": 0.7, "order": "partition"}, every, "random"),
        ({"r": 4}, second, "all"),
        ({"r": 4, "blocks": second}, second, "all"),
        ({"r": 4, "blocks": "every"}, every, "random"),
        ({"r": 4, "partition": "alternate"}, every, "alternate"),
        ({"r": 4, "order": "partition"}, every, "random"),
        ({"r": [4] * 12}, every, "random"),
        ({"r": [8, 0] * 6}, second, "all"),
        ({"r": [8] * 6, "blocks": second}, second, "all"),
    ):
        with turbovlm.apply(model, **settings) as handle:
            assert merging_blocks(handle) == blocks and handle.features[0].partition == partition


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (6, [0, 2, 4]),
        (12, [0, 2, 4, 6, 8, 10]),
        (13, [0, 3, 6, 9, 12]),
        (24, [0, 4, 8, 12, 16, 20]),
        (27, [0, 5, 10, 15, 20, 25]),
        (40, [0, 7, 14, 21, 28, 35]),
    ],
)
def test_six_blocks_merge_at_most(depth, blocks):
    with torch.device("meta"):
        model = timm.models.VisionTransformer(img_size=128, patch_size=8, embed_dim=32, depth=depth, num_heads=2)
    for amount in ({"r": 2}, {"keep": 0.7}):
        with turbovlm.apply(model, **amount) as handle:
            assert merging_blocks(handle) == blocks
            assert handle.schedules[0].tokens[-1] == (257 - 2 * depth if "r" in amount else 180)


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"blocks=\[3, 12\]: the encoder .*has 12 blocks, counted from 0 to 11"):
        turbovlm.apply(small_clip(), flops=0.6, blocks=[3, 12])
