"""A layout that is wrong of a tower is refused before anything is patched, whichever way it is wrong."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from families import FAMILIES
from turbovlm.encoder import variant
from turbovlm.encoder.attention import attention_of_guide
from turbovlm.encoder.families.transformers import YOLOS
from turbovlm.encoder.towers import matrix_shape
from turbovlm.patching import patches_on
from turbovlm.registry import register, unregister

transformers = pytest.importorskip("transformers")
DETECTIONS = 5
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def yolos(**settings):
    torch.manual_seed(0)
    given = {"image_size": [48, 48], "patch_size": 8, "num_detection_tokens": DETECTIONS} | SIZE
    given["use_mid_position_embeddings"] = settings.pop("use_mid_position_embeddings", False)
    model = transformers.YolosForObjectDetection(transformers.YolosConfig(**given, **settings)).eval()
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens)
    return model


def pixels(batch=2):
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def relaid():
    """Put a changed layout of YOLOS in the place of its own, for one test."""
    changed = []

    def change(**changes):
        layout = variant(YOLOS, **changes)
        unregister(YOLOS)
        register(layout)
        changed.append(layout)

    turbovlm.registry.families("encoder")
    yield change
    unregister(*changed)
    register(YOLOS)


@pytest.mark.parametrize("settings", [{}, {"partition": "alternate", "order": "partition"}, {"partition": "grid"}])
def test_detection_tokens_are_never_merged(settings):
    model = yolos()
    with turbovlm.apply(model, r=6, blocks="every", trace=True, **settings) as handle, torch.no_grad():
        out = model(pixel_values=pixels())
        tokens = 1 + 36 + DETECTIONS - 3 * 6
        for block, trace in enumerate(handle.trace):
            left = 1 + 36 + DETECTIONS - 6 * (block + 1)
            assert trace.sizes.shape[1] == left
            last = torch.arange(left - DETECTIONS, left).expand(2, -1)
            assert torch.equal(trace.source[:, -DETECTIONS:], last) and trace.sizes[:, -DETECTIONS:].eq(1).all()
            assert trace.source[:, 0].eq(0).all() and trace.sizes[:, 0].eq(1).all()
            inner = trace.source[:, 1:-DETECTIONS]
            assert inner.min() >= 1 and inner.max() < left - DETECTIONS
            assert torch.allclose(trace.sizes.sum(1), torch.tensor(1.0 + 36 + DETECTIONS))
        assert handle.schedules[0].tokens == (42, 36, 30, 24) and tokens == 24
    assert out.logits.shape[1] == DETECTIONS


@torch.no_grad()
def test_the_attention_of_a_guide_is_of_patches_alone():
    """Behind a merge: each patch has its token's part of what CLS pays, and nothing in front or behind counts."""
    model, seen = yolos(), []
    with turbovlm.apply(model, r=6, trace=True) as handle:
        layer = model.vit.encoder.layer[1] if hasattr(model.vit, "encoder") else model.vit.layers[1]
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(pixel_values=pixels())
        (feature,), (hidden,), trace = handle.features, seen, handle.trace
        row = attention_of_guide(layer, feature.layout, feature.config, 1, "cls", hidden, {})
    sizes, source = trace[0].sizes, trace[0].source[:, 1:-DETECTIONS]
    expected = (trace[1].semantic / sizes).gather(1, source)
    assert row.shape == (2, 36)
    torch.testing.assert_close(row, expected)


@torch.no_grad()
def test_half_of_the_patches_at_most_merge_beside_detection_tokens():
    model = yolos()
    with turbovlm.apply(model, r=100, trace=True) as handle:
        model(pixel_values=pixels())
        assert handle.schedules[0].tokens == (42, 24, 15, 11)
        assert [trace.sizes.shape[1] for trace in handle.trace] == [24, 15, 11]


def test_weights_of_attention_and_mlp_are_told_apart():
    (feature,) = turbovlm.apply(yolos(), r=1).features
    assert feature.shape.attention_weights == (4 * 32 * 32,) * 3
    assert feature.shape.mlp_weights == (2 * 32 * 64,) * 3


def test_a_packed_layer_is_as_large_as_it_says():
    packed = torch.nn.Module()
    packed.weight = torch.nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
    assert matrix_shape(packed) is None
    packed.out_features, packed.in_features = 5, 3
    assert matrix_shape(packed) == (5, 3)
    packed.in_features = "3"
    assert matrix_shape(packed) is None


def test_detections_stay_close_and_come_back():
    model, x = yolos(), pixels()
    with torch.no_grad():
        own = model(pixel_values=x).pred_boxes
        with turbovlm.apply(model, r=2) as handle:
            merged = model(pixel_values=x).pred_boxes
            restored = handle.restore(model.vit(pixel_values=x).last_hidden_state)
        assert torch.equal(model(pixel_values=x).pred_boxes, own)
    assert restored.shape[1] == 42 and (merged - own).abs().max() < 0.05


def test_tokens_behind_the_patches_that_a_layout_forgets(relaid):
    relaid(suffix=0)
    with pytest.raises(turbovlm.UnsupportedModelError, match=r"42 tokens reach its first block .* not 37"):
        turbovlm.apply(yolos(), r=6)


def test_special_tokens_that_a_layout_counts_as_patches(relaid):
    own = YOLOS.patches
    relaid(suffix=0, patches=lambda tower: own(tower) + DETECTIONS)
    model = yolos()
    with pytest.raises(turbovlm.UnsupportedModelError, match="token 37 does not depend on the image"):
        turbovlm.apply(model, r=6)
    assert not list(patches_on(model))


def test_patches_that_a_layout_counts_as_special_tokens(relaid):
    own = YOLOS.patches
    relaid(suffix=DETECTIONS + 2, patches=lambda tower: own(tower) - 2)
    with pytest.raises(turbovlm.UnsupportedModelError, match="token 35 depends on the image, so it is a patch"):
        turbovlm.apply(yolos(), r=6)


def test_a_later_block_that_computes_something_else():
    model = yolos()
    model.vit.encoder.layer[2].layernorm_after.register_buffer("unused", torch.zeros(1))
    kind = type(model.vit.encoder.layer[2])

    class Doubled(kind):
        def forward(self, hidden_states, **kwargs):
            return 2 * super().forward(hidden_states, **kwargs)

    model.vit.encoder.layer[2].__class__ = Doubled
    with pytest.raises(turbovlm.UnsupportedModelError, match=r"encoder.layer.2 .* differ from its own forward"):
        turbovlm.apply(model, r=6)


def test_positions_added_between_blocks_are_refused():
    with pytest.raises(turbovlm.UnsupportedModelError, match="position embeddings between its blocks"):
        turbovlm.apply(yolos(use_mid_position_embeddings=True), r=6)


@pytest.mark.parametrize("name", ["clip", "vit_mae", "timm_vit"])
def test_nothing_of_the_users_runs_or_changes(name):
    model = FAMILIES[name].make().train()
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
        module.register_forward_pre_hook(lambda *_: seen.append(1))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with turbovlm.apply(model, r=2):
        assert torch.equal(torch.rand(3), expected) and not seen
        assert all(module.training for module in model.modules())
    assert all(len(m._forward_hooks) == 1 and len(m._forward_pre_hooks) == 1 for m in model.modules())
