"""Whoever reads several blocks, a grid, or what is not known: every position comes back, block by block."""

import pytest
import timm
import torch
import torch.nn as nn
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from transformers import BeitConfig, CLIPVisionConfig, Dinov2Config, ViTConfig

import turbovlm
from families import FAMILIES
from turbovlm import ConfigError, StateError

SMALL = {
    "image_size": 48,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
TIMM = {"pretrained": False, "img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
IMAGES = torch.nn.functional.interpolate(
    torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=48, mode="bilinear"
)
PATCHES = 36


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def timm_vit(**settings):
    return seeded(lambda: timm.create_model("vit_tiny_patch16_224", **{**TIMM, "num_classes": 5, **settings}))


@torch.no_grad()
def collected(model, blocks, call):
    """What the blocks of `model` hand on in a call, as hooks see it."""
    seen = []
    hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in blocks]
    call()
    for hook in hooks:
        hook.remove()
    return seen


GRIDS = {
    "features_only": (lambda: timm_vit(features_only=True, out_indices=(1, 3)), lambda m: m(IMAGES)),
    "forward_intermediates": (timm_vit, lambda m: m.forward_intermediates(IMAGES, indices=[1, 3])[1]),
    "with norm": (timm_vit, lambda m: m.forward_intermediates(IMAGES, 2, norm=True, intermediates_only=True)),
    "stopped early": (
        timm_vit,
        lambda m: m.forward_intermediates(IMAGES, [0, 1], stop_early=True, intermediates_only=True),
    ),
    "without CLS": (
        lambda: timm_vit(class_token=False, global_pool="avg"),
        lambda m: m.forward_intermediates(IMAGES, indices=[1, 3])[1],
    ),
    "get_intermediate_layers": (timm_vit, lambda m: m.get_intermediate_layers(IMAGES, n=2, reshape=True)),
    "eva": (
        lambda: seeded(lambda: timm.create_model("eva02_tiny_patch14_224", **TIMM)),
        lambda m: m.forward_intermediates(IMAGES, indices=[0, 2])[1],
    ),
    "open_clip": (
        lambda: seeded(
            lambda: CLIP(
                16,
                CLIPVisionCfg(layers=4, width=32, head_width=16, patch_size=8, image_size=48),
                CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2),
            )
        ),
        lambda m: m.visual.forward_intermediates(IMAGES, indices=[1, 3])["image_intermediates"],
    ),
    "Dinov2Backbone": (
        lambda: seeded(
            lambda: transformers.Dinov2Backbone(
                Dinov2Config(
                    **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, out_features=["stage1", "stage3"]
                )
            )
        ),
        lambda m: m(IMAGES).feature_maps,
    ),
    "BeitBackbone": (
        lambda: seeded(lambda: transformers.BeitBackbone(BeitConfig(**SMALL, out_features=["stage2", "stage4"]))),
        lambda m: m(IMAGES).feature_maps,
    ),
    "BEiT segmentation": (
        lambda: seeded(lambda: transformers.BeitForSemanticSegmentation(BeitConfig(**SMALL, out_indices=[1, 2, 3, 4]))),
        lambda m: [m(IMAGES).logits],
    ),
}


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_grids_of_several_blocks_have_their_shape_and_are_near_the_models_own(name):
    make, call = GRIDS[name]
    model = make()
    own = call(model)
    with turbovlm.apply(model, r=4):
        found = call(model)
    assert [each.shape for each in found] == [each.shape for each in own]
    for one, other in zip(found, own):
        assert not torch.equal(one, other)
        assert torch.cosine_similarity(one.flatten(1), other.flatten(1)).min() > 0.9  # a scrambled grid has about 0.5
    assert all(torch.equal(one, other) for one, other in zip(call(model), own))


@torch.no_grad()
def test_a_backbone_whose_states_are_asked_for_still_has_its_stages():
    model = GRIDS["Dinov2Backbone"][0]()
    with turbovlm.apply(model, r=4):
        maps = model(IMAGES).feature_maps
        for states in (True, [2]):
            found = model(IMAGES, output_hidden_states=states).feature_maps
            assert all(torch.equal(one, other) for one, other in zip(found, maps, strict=True))


@torch.no_grad()
def test_depth_pro_lays_out_what_it_reads():
    """Its head cuts tokens to a square, so that too few would be scrambled without an error."""
    tower = {"model_type": "dinov2", "image_size": 64, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4}
    tower |= {"num_attention_heads": 2, "mlp_ratio": 2}
    config = transformers.DepthProConfig(
        fusion_hidden_size=16,
        patch_size=64,
        intermediate_hook_ids=[2, 1],
        intermediate_feature_dims=[16, 16],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[16, 16],
        image_model_config=tower,
        patch_model_config=tower,
        fov_model_config=tower,
        use_fov_model=False,
        num_fov_head_layers=0,
    )
    model = seeded(lambda: transformers.DepthProForDepthEstimation(config))
    images = nn.functional.interpolate(IMAGES, size=128, mode="bilinear")
    own = model(images).predicted_depth
    with turbovlm.apply(model, r=1):
        found = model(images).predicted_depth
    assert torch.cosine_similarity(found.flatten(), own.flatten(), 0) > 0.98


@torch.no_grad()
def test_a_block_that_is_asked_hands_out_what_its_tokens_are_and_the_next_goes_on_with_the_merged_ones():
    model = timm_vit()
    with turbovlm.apply(model, r=4, restore="copy", trace=True) as handle:
        merged = collected(model, model.blocks, lambda: model(IMAGES))
        trace = handle.trace
        whole = model.forward_intermediates(IMAGES, norm=False, output_fmt="NLC", return_prefix_tokens=True)[1]
        assert [t.source.tolist() for t in handle.trace] == [t.source.tolist() for t in trace]
    for state, block, (patches, prefix) in zip(merged, trace, whole):
        assert state.shape[1] == block.sizes.shape[1]
        expected = state.gather(1, block.source[:, :, None].expand(-1, -1, state.shape[2]))
        assert torch.equal(torch.cat([prefix, patches], dim=1), expected)


@torch.no_grad()
def test_what_merges_have_lost_is_given_back_in_every_block():
    """With `restore="residual"`, tokens that were merged differ again, and are nearer to the model's."""
    model = timm_vit()
    own = model.forward_intermediates(IMAGES, indices=[3], intermediates_only=True)[0]
    gaps = {}
    for restore in ("copy", "residual"):
        with turbovlm.apply(model, r=6, restore=restore):
            gaps[restore] = (model.forward_intermediates(IMAGES, indices=[3], intermediates_only=True)[0] - own).norm()
    assert gaps["residual"] < 0.8 * gaps["copy"]


STATES = {
    "vit": lambda: transformers.ViTModel(ViTConfig(**SMALL)),
    "clip": lambda: transformers.CLIPVisionModel(CLIPVisionConfig(**SMALL)),
    "classifier": lambda: transformers.ViTForImageClassification(ViTConfig(**SMALL)),
}


@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_hidden_states_are_restored_when_they_are_collected(name):
    model = seeded(STATES[name])
    own = model(IMAGES, output_hidden_states=True).hidden_states
    with turbovlm.apply(model, r=4):
        merged = model(IMAGES)[0]
        *found, last = model(IMAGES, output_hidden_states=True).hidden_states
        assert [h.shape for h in found] == [h.shape for h in own[:-1]] and torch.equal(found[0], own[0])
        assert last.shape[1] == 1 + PATCHES - 16  # what the encoder hands on, whoever looks
        assert torch.equal(model(IMAGES, output_hidden_states=True)[0], merged)
        model.config.output_hidden_states = True
        assert [h.shape for h in model(IMAGES).hidden_states[:-1]] == [h.shape for h in own[:-1]]
        model.config.output_hidden_states = False
    with turbovlm.apply(model, r=4, dense=True):
        assert [h.shape for h in model(IMAGES, output_hidden_states=True).hidden_states] == [h.shape for h in own]


@torch.no_grad()
def test_one_hidden_state_alone_is_restored():
    """Releases of transformers that take indices collect those states alone."""
    model = seeded(STATES["vit"])
    with turbovlm.apply(model, r=4):
        out = model(IMAGES, output_hidden_states=[-2])
        if sum(state is not None for state in out.hidden_states) != 1:
            pytest.skip("this release of transformers takes True and False only")
        assert out.hidden_states[-2].shape[1] == 1 + PATCHES
        assert out.last_hidden_state.shape[1] == 1 + PATCHES - 16


@torch.no_grad()
def test_restore_takes_the_output_of_any_block():
    model = timm_vit()
    with turbovlm.apply(model, r=4, blocks="every", trace=True) as handle:
        states = collected(model, model.blocks, lambda: model(IMAGES))
        trace = handle.trace
        for k, (state, block) in enumerate(zip(states, trace), 1):
            expected = state.gather(1, block.source[:, :, None].expand(-1, -1, state.shape[2]))
            assert torch.equal(handle.restore(state), expected)  # it knows its forward
            assert torch.equal(handle.restore(state * 1), expected)  # by its length
            assert torch.equal(handle.restore(state * 1, block=k), expected)
            assert torch.equal(handle.restore(block.sizes), block.sizes.gather(1, block.source))
        with pytest.raises(StateError, match=r"\(2, 29\) or \(2, 37\)"):  # not what block 2 handed on
            handle.restore(states[0] * 1, block=2)
        with pytest.raises(ConfigError, match="block=5: must be an integer from 0 to 4"):
            handle.restore(states[0] * 1, block=5)
        model(IMAGES[:1])
        assert handle.restore(states[1]).shape == (2, 1 + PATCHES, 32)  # those of an earlier forward, all the same
        with pytest.raises(StateError, match="not the last forward's"):
            handle.restore(states[1] * 1)


class Grid(nn.Module):
    """A head that nobody knows: it lays out tokens as a grid."""

    def __init__(self, tower, call):
        super().__init__()
        self.tower, self.call = tower, call

    def forward(self, images):
        patches = self.call(self.tower, images)[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        return patches[:, : side * side].reshape(len(images), side, side, -1)


UNKNOWN = {
    "transformers": (STATES["clip"], lambda tower, images: tower(images).last_hidden_state),
    "timm": (timm_vit, lambda tower, images: tower.forward_features(images)),
}


@pytest.mark.parametrize("name", UNKNOWN)
@torch.no_grad()
def test_an_unknown_head_gets_every_position(name):
    make, call = UNKNOWN[name]
    model = Grid(seeded(make), call).eval()
    own = model(IMAGES)
    with turbovlm.apply(model, r=4) as handle:
        assert model(IMAGES).shape == own.shape
        assert torch.cosine_similarity(model(IMAGES).flatten(1), own.flatten(1)).min() > 0.9
        assert ("Grid" in str(handle)) == (name == "transformers")
        tower = call(model.tower, IMAGES)
        assert tower.shape[1] == 1 + PATCHES
    with turbovlm.apply(model.tower, r=4):  # whoever applies to the tower gets merged tokens
        assert call(model.tower, IMAGES).shape[1] == 1 + PATCHES - 16


@torch.no_grad()
def test_wrappers_that_pass_on_are_no_readers():
    model = nn.DataParallel(seeded(STATES["clip"]))
    with turbovlm.apply(model, r=4):
        assert model.module(IMAGES).last_hidden_state.shape[1] == 1 + PATCHES - 16


def test_gradients_flow_through_what_is_handed_out():
    model = timm_vit()
    with turbovlm.apply(model, r=4):
        states = model.forward_intermediates(IMAGES, indices=[1, 3], intermediates_only=True)
        sum(state.square().mean() for state in states).backward()
    assert all(block.mlp.fc1.weight.grad.abs().max() > 0 for block in model.blocks)


def test_a_change_in_place_of_what_was_handed_out_is_refused():
    model = timm_vit()
    model.blocks[1].register_forward_hook(lambda m, a, out: out.add_(1.0))
    with turbovlm.apply(model, r=4), torch.no_grad():
        model(IMAGES)  # merged tokens: the change is what the next block gets
        with pytest.raises(StateError, match=r"blocks.1 handed out, restored .* was changed in place"):
            model.forward_intermediates(IMAGES, indices=[1, 3])


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    model = timm_vit()
    with turbovlm.apply(model, r=4):
        own = model.forward_intermediates(IMAGES, indices=[1, 3], intermediates_only=True)
        compiled = torch.compile(model.forward_intermediates, fullgraph=True)
        for one, other in zip(compiled(IMAGES, indices=[1, 3], intermediates_only=True), own):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


CHANGES = {
    "pooling": (timm_vit, lambda m: m.reset_classifier(5, "avg"), "pools its tokens otherwise"),
    "first blocks only": (timm_vit, lambda m: setattr(m, "blocks", m.blocks[:2]), "no longer has the blocks"),
    "a block more": (
        STATES["vit"],
        lambda m: m.layers.append(type(m.layers[0])(m.config)),
        "another number of blocks",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_tower_that_was_changed_after_apply_is_refused(name):
    make, change, message = CHANGES[name]
    model = seeded(make)
    handle = turbovlm.apply(model, r=4)
    model(IMAGES)
    change(model)
    with pytest.raises(StateError, match=message):
        model(IMAGES)
    handle.remove()
    model(IMAGES)
    with turbovlm.apply(model, r=4):
        model(IMAGES)


def test_another_classifier_is_no_change():
    model = timm_vit()
    with turbovlm.apply(model, r=4), torch.no_grad():
        model.reset_classifier(7)
        assert model(IMAGES).shape == (2, 7)


@torch.no_grad()
def test_the_handle_tells_what_the_last_forward_ran():
    model = seeded(lambda: timm.create_model("vit_tiny_patch16_224", **TIMM, dynamic_img_size=True))
    with turbovlm.apply(model, r=4) as handle:
        model(IMAGES)
        assert "last forward" not in str(handle)  # its native size
        model(torch.randn(1, 3, 64, 64))
        ratio = handle.schedule(65).ratio
        assert f"last forward: 65 → 49 tokens, {ratio:.1%} of the encoder's GMACs left" in str(handle)
        model.forward_intermediates(torch.randn(1, 3, 64, 64), [0, 1], stop_early=True)
        assert "last forward: 65 → 57 tokens in its first 2 blocks" in str(handle)


@pytest.mark.parametrize("name", ["timm_vit", "clip", "dinov2", "open_clip"])
@torch.no_grad()
def test_families_restore_the_same_however_they_are_asked(name):
    """The last block's tokens of `dense=True` are those of the same forward restored by the handle."""
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs(2)
    with turbovlm.apply(model, r=4, restore="copy") as handle:
        merged = family.output(model(**inputs))
        restored = handle.restore(merged) if merged.ndim == 3 else merged
    with turbovlm.apply(model, r=4, restore="copy", dense=True):
        torch.testing.assert_close(family.output(model(**inputs)), restored, atol=1e-6, rtol=0)
