"""Encoders that spell the block of CLIP, ViT or DINOv2 in names of their own: what merges goes through their blocks."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from families import Family, _hidden, _images, _transformers
from turbovlm.encoder.state import STATE

transformers = pytest.importorskip("transformers")


def clip(name: str, **settings: object) -> Family:
    return Family(_transformers(f"{name}VisionModel", f"{name}VisionConfig", **settings), _images(), _hidden)


def _kosmos():
    from transformers.models.kosmos2 import configuration_kosmos2, modeling_kosmos2

    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = configuration_kosmos2.Kosmos2VisionConfig(**size, image_size=48, patch_size=8)
    return modeling_kosmos2.Kosmos2VisionModel(config).eval()


VARIANTS = {
    "metaclip_2": clip("MetaClip2"),
    "altclip": clip("AltCLIP"),
    "chinese_clip": clip("ChineseCLIP"),
    "owlvit": clip("OwlViT"),
    "owlv2": clip("Owlv2"),
    "git": clip("Git"),
    "kosmos2": Family(_kosmos, _images(), _hidden),
    "mlcd": clip("MLCD"),
    "aimv2": clip("Aimv2"),
    "janus": clip("Janus", mlp_ratio=2, projection_dim=32),
    "tipsv2": clip("Tipsv2", mlp_ratio=2),
    "flava": Family(_transformers("FlavaImageModel", "FlavaImageConfig"), _images(), _hidden),
    "vitpose": Family(
        _transformers("VitPoseBackbone", "VitPoseBackboneConfig", image_size=[48, 48], patch_size=[8, 8]),
        _images(),
        lambda out: out.feature_maps[-1],
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_nothing_merged_is_the_model_itself(name):
    family = VARIANTS[name]
    model, inputs = family.make(), family.inputs(2)
    own = family.output(model(**inputs))
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    with turbovlm.apply(model, r=0):
        torch.testing.assert_close(family.output(model(**inputs)), own, rtol=0, atol=1e-5)
    with turbovlm.apply(model, r=4) as handle:
        merged = family.output(model(**inputs))
        tokens = handle.schedules[0].tokens
    assert not torch.equal(merged, own) and merged.isfinite().all()
    assert tokens[0] - tokens[-1] == 16
    assert torch.equal(family.output(model(**inputs)), own)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_merged_tokens_go_through_the_models_own_blocks(name):
    """Where sizes do not count, the library's blocks do on the merged tokens what the accelerated ones do."""
    family = VARIANTS[name]
    model, inputs = family.make(), family.inputs(2)
    calls = []

    def keep(block, args, kwargs, out):
        calls.append((args, kwargs, out[0] if isinstance(out, tuple) else out))

    with turbovlm.apply(model, r=[9, 0, 0, 0], proportional=False, restore="copy") as handle:
        (feature,) = handle.features
        blocks = [model.get_submodule(path) for path in feature.names]
        hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
        model(**inputs)
        for hook in hooks:
            hook.remove()
    hidden, state, accelerated = calls[0][2], getattr(calls[0][2], STATE), calls[-1][2]
    restored = accelerated.shape[1] != hidden.shape[1]
    assert hidden.shape[1] == calls[0][0][0].shape[1] - 9
    for row in range(2):
        x = hidden[row : row + 1]
        for block, (args, kwargs, _) in zip(blocks[1:], calls[1:]):
            others = list(args[1:])
            if name == "mlcd":  # angles, of which the first row is that of CLS
                places = torch.cat([torch.zeros(1, dtype=torch.long), state.positions[row] + 1])
                others[0] = [angles[places] for angles in others[0]]
            out = block(x, *others, **kwargs)
            x = out[0] if isinstance(out, tuple) else out
        x = x[:, state.source()[row]] if restored else x
        torch.testing.assert_close(x[0], accelerated[row], rtol=0, atol=1e-5)
