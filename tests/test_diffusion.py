"""Image generation: merged before, restored behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, Watch, noise, unet, unet_inputs
from families import _livelier as livelier
from turbovlm.diffusion.run import Run, run_within
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError
from turbovlm.ops import plain

pytest.importorskip("diffusers")
ROWS, COLUMNS = 32, 32


@pytest.fixture(params=DENOISERS)
def family(request):
    return DENOISERS[request.param]


@pytest.fixture
def model(family):
    return family()


@torch.no_grad()
def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


@torch.no_grad()
def check_merges_and_comes_back(model, inputs, told, given):
    """It is the model itself where all is kept and behind it; in between it says `told` in its handle."""
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=1.0, **given):
        assert torch.equal(run(model, inputs), plain)
    with turbovlm.apply(model, keep=0.5, **given) as handle:
        merged = run(model, inputs)
        assert torch.equal(run(model, inputs), merged) and merged.isfinite().all()
        assert merged.shape == plain.shape
        assert "left whole" not in repr(handle) and told in repr(handle)
    assert 1e-4 * plain.std() < (merged - plain).abs().mean() < plain.std()
    assert torch.equal(run(model, inputs), plain)


def test_all_tokens_kept_is_the_model_itself(family, model):
    inputs = family.inputs(2, ROWS, COLUMNS)
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=1.0):
        assert torch.equal(run(model, inputs), plain)


def test_merges_and_comes_back(family, model):
    inputs = family.inputs(2, ROWS, COLUMNS)
    plain, keys = run(model, inputs), list(model.state_dict())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with turbovlm.apply(model, keep=0.5) as handle:
        merged = run(model, inputs)
        assert handle.active and "50% of the tokens" in repr(handle)
        assert torch.equal(run(model, inputs), merged)
        assert list(model.state_dict()) == keys
    assert merged.shape == plain.shape and merged.isfinite().all()
    assert 1e-4 * plain.std() < (merged - plain).abs().mean() < plain.std()
    assert torch.equal(run(model, inputs), plain)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    handle.remove()


@pytest.mark.parametrize("size", [(32, 20), (24, 40), (33, 27)])
def test_any_size(request, family, model, size):
    name = request.node.callspec.params["family"]
    if name == "dit":
        size = (size[0] // 2 * 2,) * 2  # the library's own model takes squares only
    elif name not in ("sd15", "sdxl"):
        size = size[0] // 2 * 2, size[1] // 2 * 2
    inputs = family.inputs(1, *size)
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
    assert merged.shape == plain.shape and not torch.equal(merged, plain)


def test_a_batch_is_as_single_images(family, model):
    """In fp64: products of another batch are rounded in another way, and tokens that are nearly as alike may change."""
    model, inputs = model.double(), precise(family.inputs(3, ROWS, COLUMNS))
    with turbovlm.apply(model, keep=0.5):
        together = run(model, inputs)
        for i in range(3):
            alone = run(model, one(inputs, i))
            torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9 * float(alone.abs().max()))


def precise(value):
    if isinstance(value, dict):
        return {name: precise(one) for name, one in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def one(inputs, index):
    def pick(name, value):
        if isinstance(value, dict):
            return {k: pick(k, v) for k, v in value.items()}
        shared = (
            not isinstance(value, torch.Tensor) or value.ndim == 0 or (name.endswith("_ids") and value.shape[0] != 3)
        )
        return value if shared else value[index : index + 1]

    return {name: pick(name, value) for name, value in inputs.items()}


def test_less_kept_differs_more(family, model):
    inputs = family.inputs(1, ROWS, COLUMNS)
    plain, gaps = run(model, inputs), []
    for keep in (0.9, 0.6, 0.3):
        with turbovlm.apply(model, keep=keep):
            gaps.append(float((run(model, inputs) - plain).abs().mean()))
    assert gaps == sorted(gaps)


def test_copies_and_pickles_merge(family, model):
    inputs = family.inputs(1, ROWS, COLUMNS)
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert torch.equal(run(twin, inputs), merged)
        turbovlm.get_handle(twin).remove()
        assert torch.equal(run(twin, inputs), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "columns", "settings"),
    [("sd15", 32, {}), ("sd3", 32, {}), ("flux", 32, {}), ("flux", 24, {}), ("flux", 24, {"grid": (16, 12)})],
)
def test_compiles_as_one_graph(name, columns, settings):
    model, inputs = DENOISERS[name](), DENOISERS[name].inputs(1, 32, columns)
    torch.compiler.reset()
    with turbovlm.apply(model, keep=0.5, **settings):
        eager = run(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(compiled, inputs), eager, rtol=0, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(run(compiled, inputs), eager, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_flux_says_when_it_is_told_of_another_image():
    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(1, 32, 24)
    torch.compiler.reset()
    with turbovlm.apply(model, keep=0.5, grid=(16, 13)), pytest.raises(Exception, match="the image has 192 tokens"):
        run(torch.compile(model, fullgraph=True, backend="eager"), inputs)


def in_a_run(model, function, *args, **kwargs):
    """Call a part of an accelerated denoiser as in a forward of one latent; also give the run."""
    feature = turbovlm.get_handle(model).features[0]
    run = Run(feature, model, plain, 1, None, feature.config.keep, {})
    return run_within(run, function, *args, **kwargs), run


@torch.no_grad()
@pytest.mark.parametrize("component", ["attention", "cross_attention", "ffn"])
def test_cells_of_equal_tokens_change_nothing(component):
    """Where the four tokens of every cell are equal, merging them and restoring them is exact."""
    model = DENOISERS["sd15"]().double()
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    cells = noise(3, 1, 8, 8, 32).double().repeat_interleave(2, 1).repeat_interleave(2, 2)
    x, text = cells.reshape(1, 256, 32), noise(4, 1, 7, 32).double()
    plain = block(x, encoder_hidden_states=text)
    with turbovlm.apply(model, keep=0.25, components=[component]):
        merged, run = in_a_run(model, block, x, encoder_hidden_states=text)
    assert [choice.merge.sizes.shape for choice in run.choices.values()] == [(1, 64)]
    torch.testing.assert_close(merged, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("components", [["attention"], ["ffn"], ["cross_attention", "ffn"]])
def test_components(components):
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, ROWS, COLUMNS)
    read = {}
    for part, path in {"attention": "attn1.to_q", "cross_attention": "attn2.to_q", "ffn": "ff.net.0.proj"}.items():
        module = model.get_submodule(f"down_blocks.0.attentions.1.transformer_blocks.0.{path}")
        Watch(module, lambda x, out, part=part: read.__setitem__(part, max(read.get(part, 0), out.shape[1])))
    with turbovlm.apply(model, keep=0.5, components=components):
        run(model, inputs)
    assert read == {part: 512 if part in components else 1024 for part in ("attention", "cross_attention", "ffn")}


@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_components_that_no_block_has(name):
    model = DENOISERS[name]()
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"components=\['cross_attention'\]: .* they have attention, ffn"):
        turbovlm.apply(model, keep=0.5, scope="part", components=["cross_attention"])
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before
    with turbovlm.apply(model, keep=0.5, scope="part") as handle:
        assert "of the tokens in attention, ffn\n" in repr(handle)


def pipeline():
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    decoder = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **kinds)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(
        vae=decoder, unet=DENOISERS["sd15"](), scheduler=DDIMScheduler(), **parts, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, **settings):
    prompt = {"prompt_embeds": noise(5, 1, 7, 32), "negative_prompt_embeds": noise(6, 1, 7, 32)}
    out = pipe(
        **prompt, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0), **settings
    )
    return out.images


def test_a_pipeline_makes_the_same_image_for_a_seed():
    pipe = pipeline()
    plain = image(pipe)
    with turbovlm.apply(pipe, keep=0.5):
        merged = image(pipe)
        assert torch.equal(image(pipe), merged) and not torch.equal(merged, plain)
        assert turbovlm.get_handle(pipe).config.keep == 0.5
        wide = image(pipe, height=40, width=88)
        assert wide.shape[-2:] == (20, 44)
    assert torch.equal(image(pipe), plain)


def read_by(choice):
    """Tokens of a group of blocks, before and after."""
    return choice.tokens, choice.tokens if choice.merge is None else choice.merge.sizes.shape[1]


def test_a_share_for_each_resolution():
    """The latent's own, half of it, and whatever is smaller."""
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    torch.manual_seed(0)
    model = livelier(unet(**kinds)).eval()
    inputs = unet_inputs(1, 32, 24)

    def read(keep):
        with turbovlm.apply(model, keep=keep) as handle:
            out = model(**inputs).sample
            return out, {read_by(choice) for choice in handle.features[0].last.values()}, str(handle)

    uniform, _, _ = read(0.5)
    same, _, _ = read((0.5, 0.5))
    assert torch.equal(uniform, same) and torch.equal(same, read([0.5])[0])
    different, seen, shown = read((0.5, 0.75))
    assert seen == {(768, 384), (192, 144)} and "50%, 75% of the tokens" in shown
    assert not torch.allclose(different, uniform, atol=1e-4)
    assert read((1.0, 0.5))[1] == {(768, 768), (192, 96)}
    with pytest.raises(ConfigError, match=r"keep=0\.1: must be ≥ 0\.25: one token in every 2×2 cell stays"):
        turbovlm.apply(model, keep=(0.5, 0.1))


def test_what_cannot_be_done_says_why():
    model = DENOISERS["sd15"]()
    with pytest.raises(ConfigError, match="r=4: TurboConfig has it"):
        turbovlm.apply(model, r=4)
    with pytest.raises(ConfigError, match=r"keep=0\.2: must be ≥ 0\.25: one token in every 2×2 cell stays"):
        turbovlm.apply(model, keep=0.2)
    for setting in (
        {"dense": True},
        {"guidance": "cls"},
        {"partition": "alternate"},
        {"trace": True},
        {"similarity": "keys"},
    ):
        with pytest.raises(ConfigError, match=rf"{next(iter(setting))}=.*: .*Config has it, which is for"):
            turbovlm.apply(model, keep=0.5, **setting)
    with pytest.raises(ConfigError, match=r"grid=\(8, 8\): UNet2DConditionModel is given images"):
        turbovlm.apply(model, keep=0.5, grid=(8, 8))
    with pytest.raises(ConfigError, match="components='ffn'"):
        turbovlm.DenoiseConfig(keep=0.5, components="ffn")
    with pytest.raises(ConfigError, match=r"components=\['mlp'\]: must be some of attention, cross_attention, ffn"):
        turbovlm.DenoiseConfig(keep=0.5, components=["mlp"])
    with turbovlm.apply(model, keep=0.5), pytest.raises(TurboError, match="accelerated already"):
        turbovlm.apply(model, keep=0.5)
    from diffusers import AutoencoderKL, UNet2DModel

    with pytest.raises(UnsupportedModelError, match="without a block that turbovlm knows"):
        turbovlm.apply(AutoencoderKL(), keep=0.5)
    convolutions = UNet2DModel(
        block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    with pytest.raises(UnsupportedModelError, match="without a block that turbovlm knows"):
        turbovlm.apply(convolutions, keep=0.5)
    with pytest.raises(UnsupportedModelError, match=r"no torch\.nn\.Module"):
        turbovlm.apply(object(), keep=0.5)
    from diffusers import DDPMScheduler, WuerstchenDecoderPipeline

    pipe = WuerstchenDecoderPipeline(None, None, AutoencoderKL(), DDPMScheduler(), None)
    with pytest.raises(UnsupportedModelError, match=r"it has decoder \(AutoencoderKL\), and neither of unet, transf"):
        turbovlm.apply(pipe, keep=0.5)
    with pytest.raises(ConfigError, match="DenoiseConfig has it, which is for denoisers"):
        turbovlm.apply(torch.nn.Sequential(vit()), keep=0.5, components=["ffn"])


def test_too_small_a_latent_is_said_to_be():
    model = DENOISERS["sd15"]()
    with turbovlm.apply(model, keep=0.5) as handle:
        run(model, unet_inputs(1, 32, 32))
        assert "1024 → 512 tokens" in repr(handle) and "256 → 128 tokens" in repr(handle)
        run(model, unet_inputs(1, 12, 12))
        assert "144 → 72 tokens" in repr(handle) and "36 tokens: fewer than 64 are left" in repr(handle)
        with pytest.warns(
            UserWarning, match="its blocks read at most 36 tokens of an image, and images of fewer than 64"
        ):
            run(model, unet_inputs(1, 6, 6))
    with turbovlm.apply(model, keep=0.5, min_tokens=2000), pytest.warns(UserWarning, match="fewer than 2000"):
        run(model, unet_inputs(1, 32, 32))


@pytest.mark.parametrize("keep", [0.25, 0.3])
def test_one_token_stays_of_every_cell_that_is_cut_off(keep):
    """Odd sizes have more cells than a quarter of the tokens; what is told is what is read."""
    model, read = DENOISERS["sd15"](), []
    part = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj")
    Watch(part, lambda x, out: read.append(x.shape[1]))
    with turbovlm.apply(model, keep=keep) as handle:
        run(model, unet_inputs(1, 33, 27))
        assert f"891 → {read[0]} tokens" in repr(handle)
    assert read == [max(17 * 14, round(keep * 33 * 27))]


def test_a_block_outside_of_its_denoiser_says_so():
    model = DENOISERS["sd15"]()
    block = model.down_blocks[0].attentions[1].transformer_blocks[0]
    with turbovlm.apply(model, keep=0.5), pytest.raises(StateError, match="runs outside of its denoiser's forward"):
        block(noise(3, 1, 256, 32), encoder_hidden_states=noise(4, 1, 7, 32))


def test_blocks_of_other_models_are_refused():
    from diffusers import PriorTransformer, TransformerTemporalModel

    size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    for model in (PriorTransformer(embedding_dim=32, **size), TransformerTemporalModel(in_channels=32, **size)):
        with pytest.raises(UnsupportedModelError, match=f"is in a {type(model).__name__}, of which"):
            turbovlm.apply(model, keep=0.5)


@pytest.mark.parametrize(("dim", "given"), [(0, "1 of 2 latents"), (1, "256 of 1024 tokens")])
def test_a_forward_in_chunks_is_refused(dim, given):
    model, inputs = DENOISERS["sd15"](), unet_inputs(2, ROWS, COLUMNS)
    blocks = [module for module in model.modules() if hasattr(module, "set_chunk_feed_forward")]
    with turbovlm.apply(model, keep=0.5, scope="part"):
        whole = run(model, inputs)
        for block in blocks:
            block.set_chunk_feed_forward(1 if dim == 0 else 256, dim=dim)
        with pytest.raises(StateError, match=f"was given {given}.*into chunks"):
            run(model, inputs)
        for block in blocks:
            block.set_chunk_feed_forward(None)
        assert torch.equal(run(model, inputs), whole)


def vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)


def test_control_beside_it():
    """What a ControlNet adds comes in between, and nothing is lost of it."""
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, ROWS, COLUMNS)
    shapes = [(32, 32), (32, 32), (32, 32), (32, 16), (64, 16), (64, 16)]
    residual = {"down_block_additional_residuals": [noise(i, 1, c, side, side) for i, (c, side) in enumerate(shapes)]}
    residual["mid_block_additional_residual"] = noise(7, 1, 64, 16, 16)
    with turbovlm.apply(model, keep=0.5):
        assert (run(model, {**inputs, **residual}) - run(model, inputs)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_control_reads_fewer_tokens_too(count):
    from diffusers import ControlNetModel, MultiControlNetModel

    unet, inputs = DENOISERS["sd15"](), unet_inputs(1, 20, 28)
    nets = [livelier(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))) for _ in range(2)]
    each = [{"controlnet_cond": noise(i, 1, 3, 40, 56).sigmoid(), "conditioning_scale": 1.0} for i in range(2)]
    if count == 1:
        control, given = nets[0], each[0]
    else:
        control, given = MultiControlNetModel(nets), {name: [one[name] for one in each] for name in each[0]}

    def added():
        down, mid = control(**inputs, **given, return_dict=False)
        return torch.cat([part.flatten() for part in (*down, mid)])

    plain = added()
    with turbovlm.apply(control, keep=0.5, scope="part") as handle:
        merged = added()
        assert repr(handle).count("560 → 280 tokens") == repr(handle).count("140 → 70 tokens") == count
    assert not torch.equal(merged, plain) and torch.equal(added(), plain)
    if count == 2:
        parts = []
        for net, one in zip(nets, each):
            with turbovlm.apply(net, keep=0.5, scope="part"):
                down, mid = net(**inputs, **one, return_dict=False)
            parts.append(torch.cat([part.flatten() for part in (*down, mid)]))
        torch.testing.assert_close(merged, parts[0] + parts[1])
