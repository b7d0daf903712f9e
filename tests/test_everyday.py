"""Everyday machinery around accelerated encoders: hooks, adapters, tracing, transforms, replicas, threads, trainers."""

import copy
import io
import threading

import pytest
import timm
import torch
import torch.nn as nn
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from peft import LoraConfig, get_peft_model
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import VisionTransformer
from transformers import BertConfig, CLIPVisionConfig, ViTConfig

import turbovlm
from turbovlm import StateError, TurboError, UnsupportedModelError

torch.manual_seed(0)
IMAGES = torch.randn(2, 3, 48, 48)
OTHERS = torch.randn(2, 3, 48, 48)
SMALL = {
    "image_size": 48,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def timm_vit(**settings):
    torch.manual_seed(0)
    small = {"pretrained": False, "img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **{**small, "num_classes": 5, **settings}).eval()


def transformers_vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(ViTConfig(**SMALL, num_labels=5)).eval()


def torchvision_vit():
    torch.manual_seed(0)
    model = VisionTransformer(48, 8, 3, 2, 32, 64, num_classes=5).eval()
    nn.init.normal_(model.heads[0].weight)
    return model


def open_clip_tower():
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=3, width=32, head_width=16, patch_size=8, image_size=48)
    return CLIP(16, vision, CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2)).visual.eval()


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


ATTENTION = {
    "timm": (timm_vit, "blocks.1.attn"),
    "transformers": (transformers_vit, "vit.layers.1.attention"),
    "torchvision": (torchvision_vit, "encoder.layers.encoder_layer_1.self_attention"),
    "open_clip": (open_clip_tower, "transformer.resblocks.1.attn"),
}


@pytest.fixture(params=ATTENTION)
def attention(request):
    make, path = ATTENTION[request.param]
    model = make()
    return model, model.get_submodule(path)


@torch.no_grad()
def test_hooks_on_attention_see_what_they_see_without_turbovlm(attention):
    model, module = attention
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(IMAGES)
    with turbovlm.apply(model, r=0, trace=True):  # the accelerated path, without a merge
        model(IMAGES)
    (own_input, own), (found_input, found) = seen
    torch.testing.assert_close(found_input, own_input, atol=1e-5, rtol=0)
    torch.testing.assert_close(first(found), first(own), atol=1e-5, rtol=0)
    assert type(found) is type(own) and (not isinstance(own, tuple) or len(found) == len(own) == 2)


def doubled_tokens(args):
    """What attention gets, with the tokens doubled wherever they come."""
    doubled = 2 * args[0]
    return tuple(doubled if each is args[0] else each for each in args)


@torch.no_grad()
def test_hooks_on_attention_steer(attention):
    model, module = attention
    direction = 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))

    def steer(m, args, out):
        return out + direction if isinstance(out, torch.Tensor) else (out[0] + direction, *out[1:])

    plain = first(model(IMAGES))

    def doubled(m, args):
        return doubled_tokens(args)

    hooks = [module.register_forward_hook(steer), module.register_forward_pre_hook(doubled)]
    steered = first(model(IMAGES))
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(first(model(IMAGES)), steered, atol=1e-4, rtol=0)
    with turbovlm.apply(model, r=2):
        found = first(model(IMAGES))
        assert (found - steered).norm() < 0.3 * (found - plain).norm()
        for hook in hooks:
            hook.remove()
        assert (first(model(IMAGES)) - plain).norm() < 0.3 * (found - plain).norm()


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_hooks_on_blocks_steer(name):
    """What a hook on a block returns is what the next one gets, and its tokens are merged as those it replaces were."""
    make, path = ATTENTION[name]
    model = make()
    block, direction = model.get_submodule(path.rpartition(".")[0]), torch.linspace(-3, 3, 32)
    plain = first(model(IMAGES))
    hook = block.register_forward_hook(
        lambda m, a, out: (out[0] + direction,) if isinstance(out, tuple) else out + direction
    )
    steered = first(model(IMAGES))
    assert (plain - steered).abs().max() > 1e-3
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(first(model(IMAGES)), steered, atol=1e-4, rtol=0)
    with turbovlm.apply(model, r=4, blocks="every", trace=True) as handle:
        found = first(model(IMAGES))
        hook.remove()
        block.register_forward_hook(lambda m, a, out: first(out).add_(direction) is None or None)  # the same in place
        assert torch.equal(first(model(IMAGES)), found)
        assert [block.sizes.shape[1] for block in handle.trace] == [33, 29, 25]


@torch.no_grad()
def test_a_tower_that_does_something_between_its_blocks_is_refused():
    model = timm_vit()
    model.blocks = nn.Sequential(*[layer for block in model.blocks for layer in (block, nn.Tanh())])
    with turbovlm.apply(model, r=4), pytest.raises(StateError, match=r"blocks.2 got tokens without turbovlm's state"):
        model(IMAGES)


@torch.no_grad()
def test_a_replaced_output_of_another_shape_is_refused():
    model = timm_vit()
    model.blocks[0].register_forward_hook(lambda m, a, out: out[:, :-1])
    with turbovlm.apply(model, r=4), pytest.raises(StateError, match=r"blocks.1 got tokens without turbovlm's state"):
        model(IMAGES)
    model = timm_vit()
    model.blocks[0].register_forward_hook(lambda m, a, out: out + 1)
    with turbovlm.apply(model, r=4), pytest.raises(StateError, match="restored to every position, was replaced"):
        model.forward_intermediates(IMAGES)


@torch.no_grad()
def test_gradients_of_hooks_on_attention(attention):
    """Grad-CAM on attention: its gradient is that of the model."""
    model, module = attention
    with torch.enable_grad():
        seen = []
        module.register_full_backward_hook(lambda m, inputs, outputs: seen.append(outputs[0]))
        first(model(IMAGES)).square().sum().backward()
        with turbovlm.apply(model, r=0, trace=True):
            first(model(IMAGES)).square().sum().backward()
    torch.testing.assert_close(seen[1], seen[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_forward_around_attentions_is_called(attention):
    model, module = attention
    own = first(model(IMAGES))
    with turbovlm.apply(model, r=0, trace=True):
        inner = module.forward
        module.forward = lambda *args, **kwargs: inner(*doubled_tokens(args), **kwargs)
        changed = first(model(IMAGES))
        assert not torch.allclose(changed, own, atol=1e-3)
        module.forward = lambda *args, **kwargs: (torch.zeros_like(args[0]), None)
        with pytest.raises(StateError, match="does not call the one before"):
            model(IMAGES)


def test_a_forward_of_attentions_own_is_refused_at_apply(attention):
    model, module = attention
    module.forward = module.forward.__get__(module)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(TurboError, match="has a forward of its own, set by another library"):
        turbovlm.apply(model, r=2)


@torch.no_grad()
def test_hooks_on_dropped_out_maps_are_refused_where_the_model_would_call_them():
    model = timm_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    model.blocks[2].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(StateError, match=r"blocks.2.attn.attn_drop has hooks, .* never builds its attention map"):
        turbovlm.apply(model, r=2)
    for block in model.blocks:  # fused attention calls no dropout, with or without turbovlm
        block.attn.fused_attn = True
    with turbovlm.apply(model, r=2):
        model(IMAGES)
        model.blocks[2].attn.fused_attn = False
        with pytest.raises(StateError, match=r"blocks.2.attn.attn_drop has hooks"):
            model(IMAGES)


@torch.no_grad()
def test_hooks_on_attention_with_the_residual_inside_are_refused():
    model = transformers.BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()
    words = torch.arange(16).unsqueeze(0)
    with turbovlm.apply(model, r=2):
        model(words)
        model.encoder.layer[1].attention.register_forward_hook(lambda *_: None)
        with pytest.raises(StateError, match=r"encoder.layer.1.attention has hooks, but an accelerated block does not"):
            model(words)


@torch.no_grad()
def test_hooks_of_transformers_itself_are_no_obstacle():
    """Once states were collected, its hooks stay on attentions for good."""
    model = transformers.BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()
    words = torch.arange(16).unsqueeze(0)
    with turbovlm.apply(model, r=2):
        merged = model(words).last_hidden_state
        assert {h.shape[1] for h in model(words, output_hidden_states=True).hidden_states} == {16}
        assert torch.equal(model(words).last_hidden_state, merged)
    with turbovlm.apply(model, r=2):
        assert torch.equal(model(words).last_hidden_state, merged)


@torch.no_grad()
def test_maps_asked_for_in_the_config_are_refused():
    torch.manual_seed(0)
    model = transformers.ViTModel(ViTConfig(**SMALL, attn_implementation="eager")).eval()
    with turbovlm.apply(model, r=2):
        model(IMAGES)
        model.config.output_attentions = True
        with pytest.raises(StateError, match="output_attentions=True"):
            model(IMAGES)
        model(IMAGES, output_attentions=False)
        model.config.output_attentions = False
        model(IMAGES)
    with turbovlm.apply(model, r=0):  # nothing merges: the block's own forward builds them
        assert len(model(IMAGES, output_attentions=True).attentions) == 3


@torch.no_grad()
def test_a_module_exchanged_after_apply_is_refused():
    model = timm_vit()
    with turbovlm.apply(model, r=2):
        model.blocks[1].attn = nn.Identity()
        with pytest.raises(
            StateError, match=r"attn was a timm\..*Attention when turbovlm was applied and is a torch\..*Identity now"
        ):
            model(IMAGES)


def adapted(model, targets):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)).eval()


@torch.no_grad()
def test_adapters_of_packed_attention_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"attn is a MultiheadAttention, whose adapter"):
        turbovlm.apply(adapted(open_clip_tower(), ["attn"]), r=2)
    model = open_clip_tower()
    with turbovlm.apply(model, r=2, blocks="every"):
        adapted(model, ["attn"])
        with pytest.raises(StateError, match=r"resblocks.0.attn was a torch.* and is a peft.*MultiheadAttention now"):
            model(IMAGES)


@torch.no_grad()
def test_adapters_that_have_no_effect_have_none():
    """torch's attention reads the weight of its `out_proj` and never calls it; an adapter there changes nothing."""
    model = torchvision_vit()
    with turbovlm.apply(model, r=0, trace=True):
        wrapped = adapted(model, ["out_proj"])
        found = wrapped(IMAGES)
    torch.testing.assert_close(found, wrapped(IMAGES), atol=1e-5, rtol=0)


LINEAR = {
    "timm": (timm_vit, ["qkv", "proj"]),
    "transformers": (transformers_vit, ["q_proj", "v_proj", "query", "value"]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_adapters_of_projections_work_before_and_after_apply(name):
    make, targets = LINEAR[name]
    wanted = first(adapted(make(), targets)(IMAGES))
    model = make()
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(first(adapted(model, targets)(IMAGES)), wanted, atol=1e-5, rtol=1e-5)
    wrapped = adapted(make(), targets)
    with turbovlm.apply(wrapped, r=2):
        first(wrapped(IMAGES)).square().sum().backward()
    adapters = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    assert adapters and all(p.grad.abs().max() > 0 for p in adapters)


SETTINGS = {
    "default": {"r": 4},
    "published": {"r": 4, "partition": "alternate", "similarity": "keys", "reduce": "merge"},
    "restored": {"r": 4, "dense": True, "restore": "residual"},
}
MODELS = {"timm": timm_vit, "transformers": transformers_vit, "torchvision": torchvision_vit}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_traced_by_torchscript(name, settings):
    model = MODELS[name]()
    with turbovlm.apply(model, **SETTINGS[settings]), torch.no_grad():
        traced = torch.jit.trace(model, IMAGES, check_trace=False, strict=False)
        found, wanted = traced(OTHERS), model(OTHERS)
        if name == "transformers":
            found, wanted = found["logits"], wanted.logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_exported_to_onnx_by_torchscript(settings):
    runtime = pytest.importorskip("onnxruntime")
    model, file = timm_vit(), io.BytesIO()
    with turbovlm.apply(model, **SETTINGS[settings]):
        torch.onnx.export(model, (IMAGES,), file, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"])
        session = runtime.InferenceSession(file.getvalue())
        found = torch.from_numpy(session.run(None, {"x": OTHERS.numpy()})[0])
        torch.testing.assert_close(found, model(OTHERS), atol=1e-5, rtol=1e-4)


def test_thresholds_cannot_be_traced():
    model = timm_vit()
    with turbovlm.apply(model, r=(4, 4, 4), thresholds=(-9.0,) * 3), pytest.raises(StateError, match="thresholds"):
        torch.jit.trace(model, IMAGES, check_trace=False)


@pytest.mark.parametrize("settings", SETTINGS)
def test_mapped_over_a_batch(settings):
    model = timm_vit()
    with turbovlm.apply(model, **SETTINGS[settings]):
        parameters = dict(model.named_parameters())

        def one(image):
            return torch.func.functional_call(model, parameters, (image[None],))[0]

        torch.testing.assert_close(torch.func.vmap(one)(OTHERS), model(OTHERS), atol=1e-5, rtol=1e-5)


def test_gradients_of_every_sample():
    model = timm_vit()
    with turbovlm.apply(model, r=4):
        parameters = dict(model.named_parameters())

        def loss(values, image):
            return torch.func.functional_call(model, values, (image[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, OTHERS)
        for index, image in enumerate(OTHERS):
            model.zero_grad()
            loss(parameters, image).backward()
            for name, parameter in parameters.items():
                torch.testing.assert_close(each[name][index], parameter.grad, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_replica_runs_its_own_modules():
    model = timm_vit()
    with turbovlm.apply(model, r=4):
        tokens = torch.randn(1, 37, 32)
        replica = model.blocks[0]._replicate_for_data_parallel()
        replica._modules = {name: copy.deepcopy(module) for name, module in replica._modules.items()}
        replica.mlp.fc2.bias += 1
        torch.testing.assert_close(replica(tokens) - 1, model.blocks[0](tokens), atol=1e-5, rtol=1e-5)
    assert "_replicate_for_data_parallel" not in model.blocks[0].__dict__


@torch.no_grad()
def test_symbolic_traces_are_refused():
    model = torchvision_vit()
    with turbovlm.apply(model, r=4), pytest.raises(StateError, match=r"got a Proxy, no tensor: .*torch.fx"):
        create_feature_extractor(model, {"heads": "logits"})
    create_feature_extractor(model, {"heads": "logits"})(IMAGES)


ROTARY = (
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
)


@pytest.mark.parametrize("name", ROTARY)
def test_patch_dropout_with_rotary_positions(name):
    """Every image has patches of its own then; merged ones keep the angles of their partners."""
    torch.manual_seed(0)
    model = timm.create_model(
        name, img_size=48, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, patch_drop_rate=0.25
    ).train()

    def run():
        torch.manual_seed(1)
        return model(IMAGES)

    own = run()
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(run(), own, atol=1e-5, rtol=1e-5)
    with turbovlm.apply(model, r=4, blocks="every", trace=True) as handle:
        run().sum().backward()
        assert [trace.sizes.shape[1] for trace in handle.trace] == [
            handle.trace[0].source.shape[1] - 4 * k for k in (1, 2, 3)
        ]
    assert model.blocks[1].mlp.fc2.weight.grad.abs().max() > 0 if hasattr(model.blocks[1].mlp, "fc2") else True


@torch.no_grad()
def test_each_thread_has_its_own_last_forward():
    model = timm_vit(dynamic_img_size=True)
    sizes = (48, 64, 80, 96)
    with turbovlm.apply(model, r=4, trace=True) as handle:
        expected, found, barrier = {}, {}, threading.Barrier(len(sizes))
        for size in sizes:
            model(torch.full((1, 3, size, size), 0.1))
            expected[size] = handle.trace[-1].source

        def work(size):
            barrier.wait()
            for _ in range(5):
                model(torch.full((1, 3, size, size), 0.1))
            barrier.wait()
            found[size] = handle.trace[-1].source, handle.restore(torch.zeros(1, (size // 8) ** 2 + 1 - 12, 2)).shape

        workers = [threading.Thread(target=work, args=(size,)) for size in sizes]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for size in sizes:
            source, restored = found[size]
            assert torch.equal(source, expected[size]) and restored == (1, (size // 8) ** 2 + 1, 2)
        assert torch.equal(handle.trace[-1].source, expected[96])  # this thread's own
    with turbovlm.apply(model, r=4, trace=True) as handle:
        worker = threading.Thread(target=model, args=(IMAGES,))
        worker.start()
        worker.join()
        assert handle.trace[-1].source.shape == (2, 37)  # this thread had none: the latest of any


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 48, 48, generator=generator), "labels": torch.tensor(index % 5)}


def test_transformers_trainer(tmp_path):
    model = transformers_vit()
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=4,
        per_device_train_batch_size=4,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())
    batch = torch.utils.data.default_collate([Images()[index] for index in range(8)])
    with turbovlm.apply(model, r=4):
        with torch.no_grad():
            out = model(**batch)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(out.loss), abs=1e-4)
        logits = torch.from_numpy(trainer.predict(Images()).predictions)
        torch.testing.assert_close(logits, out.logits, atol=1e-4, rtol=1e-4)
        trainer.train()
        assert float(model(**batch).loss) != float(out.loss)


@torch.no_grad()
def test_accelerates_unwrapped_model():
    from accelerate import Accelerator

    model = transformers.CLIPVisionModel(CLIPVisionConfig(**SMALL)).eval()
    own = model(IMAGES).last_hidden_state
    handle = turbovlm.apply(model, r=4)
    merged = model(IMAGES).last_hidden_state
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp = True  # what mixed_precision sets; the state of accelerate is one for the whole process
    prepared = accelerator.prepare(model)
    assert "_original_forward" in model.__dict__
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert "_original_forward" not in model.__dict__
    torch.testing.assert_close(unwrapped(IMAGES).last_hidden_state, merged)
    handle.remove()
    torch.testing.assert_close(unwrapped(IMAGES).last_hidden_state, own)
