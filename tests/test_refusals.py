"""Refusals: one line, the true reason, the part that reads images by name, and nothing recommended that is refused."""

import pytest
import timm
import torch
import torch.nn as nn
import transformers

import turbovlm
from turbovlm import UnsupportedModelError
from turbovlm.encoder.obstacles import obstacle
from turbovlm.encoder.parts import parts_of

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 100}
GROUPED = {**TEXT, "num_key_value_heads": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}


def refusal(model, **settings):
    """The one line that `apply` says of a model."""
    with pytest.raises(UnsupportedModelError) as error:
        turbovlm.apply(model, **settings or {"r": 4})
    assert "\n" not in str(error.value)
    return str(error.value)


def of(name, **config):
    """A model of `transformers` by its prefix."""
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))


def swin():
    return of("Swin", **SWIN)


LIBRARIES = {
    "hierarchy": (swin, "its blocks (SwinLayer) form a hierarchy of stages (widths 16, 32)"),
    "convolutional": (lambda: timm.create_model("resnet18"), "no attention: its blocks (BasicBlock) are convolutional"),
    "convolutional, no lists": (lambda: timm.create_model("vgg11"), "no attention: it is a convolutional network"),
    "mixer": (
        lambda: timm.create_model("mixer_s32_224"),
        "no attention: its blocks (MixerBlock) mix tokens by a layer",
    ),
    "recurrence": (
        lambda: of("Mamba", hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=50),
        "no attention: its blocks (MambaBlock) are a recurrence over tokens in order",
    ),
    "causal": (lambda: of("Llama", **GROUPED), "its blocks (LlamaDecoderLayer) have causal attention"),
    "causal, by a mask": (
        lambda: of("OpenAIGPT", n_embd=32, n_head=4, n_layer=2, n_positions=16, vocab_size=50),
        "causal attention",
    ),
    "table": (lambda: timm.create_model("beit_base_patch16_224", depth=2), "table (attn.relative_position_bias_table)"),
    "windows": (
        lambda: transformers.LwDetrViTBackbone(
            transformers.LwDetrViTConfig(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, num_windows=4)
        ),
        "attend within windows (num_windows=",
    ),
    "talking heads": (lambda: timm.create_model("cait_xxs24_224", depth=2), "proj_l beside"),
    "gated attention": (lambda: timm.create_model("convit_tiny", depth=2), "gating_param"),
    "convolution inside": (
        lambda: timm.create_model("xcit_nano_12_p16_224", depth=2),
        "convolution over neighbours inside",
    ),
    "branches": (lambda: timm.create_model("tnt_s_patch16_224", depth=2), "several widths side by side"),
    "parallel": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", depth=2, block_fn=timm.models.vision_transformer.ParallelScalingBlock
        ),
        "attention and MLP run side by side",
    ),
    "table of the model": (
        lambda: timm.create_model("vit_srelpos_small_patch16_224", depth=2),
        "its blocks (RelPosBlock) look positions up in a table (shared_rel_pos.",
    ),
    "sparse": (
        lambda: of("BigBird", **TEXT, block_size=4, max_position_embeddings=64),
        "its attention is sparse over blocks or hashes of tokens",
    ),
    "one that a layout could describe": (
        lambda: transformers.PixioModel(transformers.PixioConfig(**IMAGE)),
        "its blocks (PixioLayer) look like a ViT's, but no layout describes them yet: docs/extending.md",
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_reason(name):
    build, reason = LIBRARIES[name]
    with torch.device("meta"):
        model = build()
    assert reason in refusal(model)


class Block(nn.Module):
    """A norm, attention, a norm and an MLP; what tests add to it is in the way."""

    def __init__(self, width=16, keys=16, **more):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.q, self.attn.out = nn.Linear(width, width), nn.Linear(width, width)
        self.attn.k, self.attn.v = nn.Linear(width, keys), nn.Linear(width, keys)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        for name, value in more.items():
            setattr(self, name, value)


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.ModuleList(blocks)


def grouped():
    block = Block(keys=8)
    block.attn.num_heads, block.attn.num_kv_heads = 4, 2
    return block


OWN = {
    "plain": (lambda: Block(), "look like a ViT's"),
    "windows": (lambda: Block(window_size=7), "attend within windows (window_size=7)"),
    "one window is none": (lambda: Block(window_size=0), "look like a ViT's"),
    "experts": (lambda: Block(experts=nn.ModuleList([nn.Linear(16, 16)])), "send tokens to experts (experts)"),
    "cross": (lambda: Block(cross_attn=nn.MultiheadAttention(16, 4)), "attend to another sequence as well"),
    "convolution": (lambda: Block(mix=nn.Conv2d(16, 16, 3)), "have a convolution over neighbours inside (mix)"),
    "pointwise is none": (lambda: Block(mix=nn.Conv2d(16, 16, 1)), "look like a ViT's"),
    "pooling": (lambda: Block(mix=nn.AvgPool1d(2)), "pool neighbours inside (mix)"),
    "grouped": (grouped, "share keys between heads (grouped queries, 2 for 4)"),
    "one norm": (lambda: Block(norm2=None), "have one norm (norm1) for attention and MLP"),
    "table": (lambda: Block(rel_pos=nn.Parameter(torch.zeros(9, 4))), "look positions up in a table (rel_pos)"),
    "unknown": (
        lambda: Block(tail=nn.Parameter(torch.zeros(1))),
        "tail beside): docs/extending.md says what one needs",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_block_of_ones_own(name):
    build, reason = OWN[name]
    (part,) = parts_of(Net(build(), build()))
    assert part.reads == {"images"} and len(part.blocks) == 2
    assert reason in obstacle(part)
    assert reason in refusal(Net(build(), build()))


def test_stages_and_branches_are_told_apart():
    stages = Net(Block(16), Block(16), Block(32, 32), Block(32, 32))
    branches = Net(Block(16), Block(32, 32), Block(16), Block(32, 32))
    assert "hierarchy of stages (widths 16, 32)" in refusal(stages)
    assert "several widths side by side (16, 32)" in refusal(branches)


def dual(vision):
    return transformers.VisionTextDualEncoderModel(vision_model=vision, text_model=of("Bert", **TEXT))


def test_text_is_not_merged_beside_images_that_nothing_is_known_of():
    message = refusal(dual(swin()))
    assert "vision_model (SwinModel) reads images: its blocks (SwinLayer) form a hierarchy" in message
    assert "to merge words, apply to text_model alone" in message

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.read = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), of("Bert", **TEXT)

    assert "look (Sequential) reads images" in refusal(Own())
    assert turbovlm.apply(dual(of("ViT", **IMAGE)), r=1).schedules[0].tower == "vision_model"


def test_a_convolution_over_words_is_no_image():
    """TextCNN's heads on a text encoder: kernels as wide as a word."""
    model = nn.Sequential(of("Bert", **TEXT), nn.Conv2d(1, 4, (3, 32)))
    assert turbovlm.apply(model, r=1).schedules[0].tower == "0"


def test_an_image_captioner_names_its_encoder():
    bert = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = transformers.VisionEncoderDecoderModel(encoder=swin(), decoder=transformers.BertLMHeadModel(bert))
    message = refusal(model)
    assert "encoder (SwinModel)" in message
    assert "alone" not in message  # its decoder is refused as well


def vlm(name, **more):
    config = getattr(transformers, f"{name}Config")(
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        text_config=transformers.LlamaConfig(**GROUPED),
        image_token_id=90,
        **more,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def test_visual_keep_is_named_only_where_it_works():
    several = vlm("Llava", vision_feature_layer=[-1, -2])
    assert "visual_keep shortens what its language model reads" in refusal(several)
    turbovlm.apply(several, visual_keep=0.5).remove()
    unknown = vlm("VipLlava")
    assert "visual_keep has no reader for it either" in refusal(unknown)
    assert "merge in" not in refusal(unknown, visual_keep=0.5)


def test_visual_keep_of_a_model_without_language_names_what_works():
    assert "r, keep or flops merge in ViTModel" in refusal(of("ViT", **IMAGE), visual_keep=0.5)
    assert "merge in" not in refusal(swin(), visual_keep=0.5)


def test_cross_keep_names_visual_keep_only_where_it_works():
    assert "visual_keep shortens" in refusal(vlm("Llava"), cross_keep=0.5)
    assert "visual_keep" not in refusal(vlm("VipLlava"), cross_keep=0.5)


class Held:
    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (None, "NoneType is no torch.nn.Module, and holds none"),
        ("google/vit-base-patch16-224", "'google/vit-base-patch16-224' is a name, no model: load it first"),
        (transformers.ViTModel, "ViTModel is a class, no model: apply to an instance"),
        ([nn.Linear(2, 2)] * 2, "list is no torch.nn.Module: apply to each of the 2"),
        (Held(nn.Linear(2, 2)), "it has model (Linear)"),
    ],
    ids=["None", "name", "class", "list", "holder"],
)
def test_what_is_no_model(thing, message):
    assert message in refusal(thing)


def test_programs_have_no_blocks():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
    exported = torch.export.export(model, (x,))
    for program in (torch.fx.symbolic_trace(model), torch.jit.trace(model, x), exported, exported.module()):
        assert "apply to the model before it is traced" in refusal(program)
