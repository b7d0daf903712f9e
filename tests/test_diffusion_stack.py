"""Blocks that merge whole, alone and in stacks."""

from __future__ import annotations

import copy

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, Watch, noise, unet_inputs
from doubled import double
from test_diffusion import run
from turbovlm.errors import ConfigError

diffusers = pytest.importorskip("diffusers")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SCOPES = ({"scope": "block"}, {"scope": "stack", "span": 2}, {"scope": "stack", "span": 8})


@pytest.fixture(params=DENOISERS)
def family(request):
    return DENOISERS[request.param]


@torch.no_grad()
@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_a_stack_is_its_blocks_on_equal_tokens(family, given):
    """Sizes, positions, text and update, against the model's own blocks on all tokens."""
    model, inputs = family().double(), family.inputs(1, 32, 32)
    inputs = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    with turbovlm.apply(model, keep=0.5, restore="copy", **given) as handle:
        merged = run(model, inputs)
        double(model, handle.features[0])
    torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_merges_and_comes_back(family, given):
    model, inputs = family(), family.inputs(2, 32, 32)
    plain = run(model, inputs)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with turbovlm.apply(model, keep=1.0, **given):
        assert torch.equal(run(model, inputs), plain)
    with turbovlm.apply(model, keep=0.5, **given) as handle:
        merged = run(model, inputs)
        assert torch.equal(run(model, inputs), merged) and merged.isfinite().all()
        assert "left whole" not in repr(handle) and "→" in repr(handle)
    assert 1e-4 * plain.std() < (merged - plain).abs().mean() < plain.std()
    assert torch.equal(run(model, inputs), plain)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_a_batch_is_as_single_images(family):
    model, inputs = family(), family.inputs(2, 32, 32)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        together = run(model, inputs)
        for i in (0, 1):
            alone = {
                name: x[i : i + 1] if torch.is_tensor(x) and x.ndim and len(x) == 2 else x for name, x in inputs.items()
            }
            alone["added_cond_kwargs"] = {
                name: None if x is None else x[i : i + 1] for name, x in inputs.get("added_cond_kwargs", {}).items()
            }
            alone = {name: x for name, x in alone.items() if name in inputs}
            torch.testing.assert_close(run(model, alone)[0], together[i], rtol=1e-3, atol=1e-4 * float(together.std()))


def test_stacks_are_about_equally_long_and_of_one_list():
    model = DENOISERS["sdxl"]()
    with turbovlm.apply(model, keep=0.5, scope="stack", span=4) as handle:
        stacks = dict.fromkeys(place.stack for place in handle.features[0].places)
        assert [len(stack.blocks) for stack in stacks] == [2, 3] * 6
        assert "stacks of up to 4 blocks" in repr(handle)


@torch.no_grad()
def test_a_block_with_a_reader_inside_is_left_whole_and_parts_its_stack():
    model, inputs = DENOISERS["pixart"](), DENOISERS["pixart"].inputs(1, 32, 32)
    lengths: dict[int, int] = {}
    for i, block in enumerate(model.transformer_blocks):
        block.ff.net[0].proj.register_forward_hook(lambda m, args, out, i=i: lengths.update({i: args[0].shape[1]}))
    with pytest.warns(UserWarning, match="leaves all blocks whole"), turbovlm.apply(model, keep=0.5, scope="stack"):
        run(model, inputs)
    assert set(lengths.values()) == {256}
    model, lengths = DENOISERS["pixart"](), {}
    block = model.transformer_blocks[1]
    block.ff.net[0].proj.register_forward_hook(lambda m, args, out: lengths.update({1: args[0].shape[1]}))
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        assert run(model, inputs).isfinite().all()
        assert "left whole: transformer_blocks.1: its ff.net.0.proj has a hook" in repr(handle)
    assert lengths == {1: 256}


def test_a_hook_on_a_block_sees_all_tokens():
    model, inputs, seen = DENOISERS["pixart"](), DENOISERS["pixart"].inputs(1, 32, 32), []
    hook = lambda block, args, kwargs, out: seen.append((args[0].shape[1], out.shape[1]))  # noqa: E731
    model.transformer_blocks[1].register_forward_hook(hook, with_kwargs=True)
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        run(model, inputs)
        assert "left whole" not in repr(handle)
    assert seen == [(256, 256)]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_what_is_added_between_blocks_finds_all_tokens(name):
    model, inputs = DENOISERS[name](), DENOISERS[name].inputs(1, 32, 32)
    added = "block_controlnet_hidden_states" if name == "sd3" else "controlnet_block_samples"
    inputs[added] = [noise(5, 1, 256, 32)] * 2
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        merged = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, scope="block"):
        torch.testing.assert_close(run(model, inputs), merged, rtol=1e-3, atol=0.05 * float(merged.std()))


def test_skipped_blocks():
    model, inputs = DENOISERS["sd3"](), DENOISERS["sd3"].inputs(1, 32, 32)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        for skipped in ([0], [2], [0, 1, 2]):
            assert run(model, {**inputs, "skip_layers": skipped}).isfinite().all()


def test_blocks_that_are_taken_out_or_replaced():
    for change in (
        lambda blocks: blocks.__delitem__(2),
        lambda blocks: blocks.__delitem__(1),
        lambda blocks: blocks.__setitem__(1, Same()),
        lambda blocks: blocks.__setitem__(2, Same()),
    ):
        model, inputs = DENOISERS["pixart"](), DENOISERS["pixart"].inputs(1, 32, 32)
        with turbovlm.apply(model, keep=0.5, scope="stack"):
            run(model, inputs)
            change(model.transformer_blocks)
            assert run(model, inputs).isfinite().all()


class Same(torch.nn.Module):
    def forward(self, x, **kwargs):
        assert x.shape[1] == 256
        return x


@pytest.mark.parametrize("dim", [0, 1])
def test_a_forward_in_chunks_is_left_whole(dim):
    model, inputs = DENOISERS["sd15"](), unet_inputs(2, 32, 32)
    plain = run(model, inputs)
    for block in model.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(1 if dim == 0 else 256, dim)
    with turbovlm.apply(model, keep=0.5, scope="block"), pytest.warns(UserWarning, match="_chunk_size is set"):
        torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-4)


def test_positions_that_a_block_adds_are_left_alone():
    model, inputs = DENOISERS["pixart"](), DENOISERS["pixart"].inputs(1, 32, 32)
    plain = run(model, inputs)
    inputs["attention_mask"] = torch.ones(1, 256)
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle, pytest.warns(UserWarning, match="attention_mask"):
        torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-4)
        assert "its attention_mask is set" in repr(handle)


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_gradients_are_those_of_checkpoints(name):
    model, inputs = DENOISERS[name](), DENOISERS[name].inputs(1, 32, 32)
    found = []
    with turbovlm.apply(model, keep=0.5, scope="stack", span=2):
        for checkpointed in (False, True):
            if checkpointed:
                model.enable_gradient_checkpointing()
            model.train().zero_grad()
            model(**inputs, return_dict=False)[0].square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scope": "layer"}, r"scope='layer': must be one of part, block, stack"),
        ({"scope": "stack", "span": 0}, "span=0"),
        ({"scope": "block", "span": 2}, "span.*scope='block' has no stacks"),
        ({"scope": "part", "span": 2}, "span.*scope='part' has no stacks"),
        ({"scope": "stack", "components": ["attention"]}, "components.*scope='stack' merges whole blocks"),
        ({"scope": "block", "queries_only": True}, "queries_only.*scope='block' merges whole blocks"),
        ({"queries_only": True, "components": ["ffn"]}, "queries_only.*components has no 'attention'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, said):
    model = DENOISERS["pixart"]()
    with pytest.raises(ConfigError, match=said):
        turbovlm.apply(model, keep=0.5, **given)


@torch.no_grad()
def test_queries_only_leaves_keys_whole():
    model, inputs, seen = DENOISERS["sd15"](), unet_inputs(2, 32, 32), {}
    attention = model.get_submodule(f"{BLOCK}.attn1")

    Watch(attention.to_k, lambda x, out: seen.update(keys=x.shape[1]))
    Watch(attention.to_q, lambda x, out: seen.update(queries=x.shape[1]))
    with turbovlm.apply(model, keep=0.5, components=["attention"], queries_only=True) as handle:
        assert "the queries of attention" in repr(handle)
        run(model, inputs)
    assert seen == {"keys": 1024, "queries": 512}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_queries_only_is_refused_where_one_sequence_makes_all(name):
    with pytest.raises(ConfigError, match=r"queries_only=True: .* makes queries and keys of one sequence"):
        turbovlm.apply(DENOISERS[name](), keep=0.5, components=["attention"], queries_only=True)


@torch.no_grad()
def test_a_compiled_denoiser_is_one_graph(family):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs, counter = family(), family.inputs(2, 32, 32), CompileCounter()
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        merged = run(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(2):
            torch.testing.assert_close(run(compiled, inputs), merged, rtol=0, atol=1e-5 * float(merged.abs().max()))
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("name", "graphs"), [("sdxl", 1), ("flux", 3)])
def test_blocks_that_are_compiled_by_themselves_are_compiled_once(name, graphs, before):
    """As the model's own are: FLUX's single blocks are given tokens that lie in two ways in memory."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs, counter = DENOISERS[name](), DENOISERS[name].inputs(2, 32, 32), CompileCounter()
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        merged = run(model, inputs)
    if before:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
    close = {"rtol": 0, "atol": 1e-5 * float(merged.abs().max())}
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        if not before:
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for _ in range(2):
            torch.testing.assert_close(run(model, inputs), merged, **close)
        assert counter.frame_count == graphs and "left whole" not in repr(handle)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(run(copied, inputs), merged, **close)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(run(model, inputs), merged, **close)
    torch.testing.assert_close(run(model, inputs), plain, **close)


@torch.no_grad()
def test_a_hook_of_a_block_that_is_compiled_by_itself_sees_all_tokens():
    model, inputs, seen = DENOISERS["sdxl"](), DENOISERS["sdxl"].inputs(1, 32, 32), []
    block = model.down_blocks[1].attentions[0].transformer_blocks[1]
    block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.compile_repeated_blocks(backend="eager")
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        run(model, inputs)
        assert "it is compiled by itself, with a hook" in repr(handle)
    assert seen == [256]


@torch.no_grad()
def test_first_blocks_are_left_whole():
    lengths: dict[int, int] = {}
    model, inputs = DENOISERS["pixart"](), DENOISERS["pixart"].inputs(1, 32, 32)
    for i, block in enumerate(model.transformer_blocks):
        Watch(block.attn1.to_q, lambda x, out, i=i: lengths.update({i: x.shape[1]}))
    with turbovlm.apply(model, keep=0.5, whole_first=1) as handle:
        run(model, inputs)
        assert "behind the first 1, which are left whole" in repr(handle)
    assert lengths == {0: 256, 1: 128, 2: 128}
    with pytest.raises(ConfigError, match="whole_first=3: this PixArtTransformer2DModel has 3 blocks"):
        turbovlm.apply(model, keep=0.5, whole_first=3)
    with pytest.raises(ConfigError, match="whole_first=1: a UNet has convolutions"):
        turbovlm.apply(DENOISERS["sd15"](), keep=0.5, whole_first=1)
    with pytest.raises(ConfigError, match=r"whole_first.*scope='part' merges in all blocks"):
        turbovlm.apply(model, keep=0.5, scope="part", whole_first=1)
