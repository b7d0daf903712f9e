"""Compiled with dynamic shapes, exported to ONNX: still the same results."""

from __future__ import annotations

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import turbovlm
from families import FAMILIES
from marks import slow_but
from turbovlm import TurboConfig
from turbovlm.ops import LayeredDegree
from turbovlm.ops.degree import DEGREES

SOME = ("vit", "dinov2_registers", "clip", "blip_2", "timm_layerscale", "timm_eva02", "torchvision")
CORE = ("clip", "timm_eva02", "r")
"""Families, and the setting, that are not slow."""


SETTINGS = {
    "r": TurboConfig(r=5),
    "keep": TurboConfig(keep=0.5),
    "flops": TurboConfig(flops=0.7),
    "published": TurboConfig.paper(5),
    "pruned by hidden states": TurboConfig(r=5, similarity="hidden", reduce="prune", partition="grid"),
}


@pytest.fixture
def tower(name):
    model = FAMILIES[name].make().eval()
    yield model
    torch._dynamo.reset()


@pytest.mark.parametrize("name", slow_but(CORE, SOME))
@torch.no_grad()
def test_compiles_once_for_all_batch_sizes(tower, name):
    with turbovlm.apply(tower, r=5):
        # Not 3: Dynamo takes equal sizes, such as three images and three channels, for one.
        inputs = [FAMILIES[name].inputs(batch) for batch in (5, 2, 7)]
        references = [FAMILIES[name].output(tower(**one)) for one in inputs]
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(tower, fullgraph=True, backend=counter, dynamic=True)
        for one, reference in [*zip(inputs, references)] * 2:
            torch.testing.assert_close(FAMILIES[name].output(compiled(**one)), reference, rtol=0, atol=1e-5)
        assert counter.frame_count == 1


@pytest.fixture
def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    settings = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    model = timm.models.VisionTransformer(**settings, dynamic_img_size=True).eval()
    yield model
    torch._dynamo.reset()


@pytest.mark.parametrize("degree", [*DEGREES, LayeredDegree(alpha=20, beta=0.9, gamma=2)], ids=str)
@torch.no_grad()
def test_every_degree_compiles(vit, degree):
    with turbovlm.apply(vit, r=5, degree=degree):
        reference = vit(images(2, 48))
        torch.testing.assert_close(torch.compile(vit, fullgraph=True, backend="eager")(images(2, 48)), reference)


def images(batch, size):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("dynamic", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("setting", slow_but(CORE, SETTINGS))
@torch.no_grad()
def test_compiles_for_other_image_sizes(vit, setting, dynamic):
    with turbovlm.apply(vit, SETTINGS[setting]):
        inputs = [images(2, 48), images(2, 64), images(3, 80)]
        references = [vit(x) for x in inputs]
        counter = CompileCounter()
        compiled = torch.compile(vit, fullgraph=True, backend=counter, dynamic=dynamic)
        for _ in range(2):
            for x, reference in zip(inputs, references):
                torch.testing.assert_close(compiled(x), reference, rtol=0, atol=1e-5)
        assert counter.frame_count <= len(inputs)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_random_halves_of_several_blocks_compile(vit, dynamic):
    pixels = images(2, 48)
    with turbovlm.apply(vit, r=5, partition="random"):
        reference = vit(pixels)
        compiled = torch.compile(vit, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(pixels), reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", slow_but(CORE, SETTINGS))
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_runs_in_onnxruntime(vit, setting):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    pixels = images(2, 48)
    with turbovlm.apply(vit, SETTINGS[setting]) as handle:
        reference = vit(pixels)
        assert handle.schedules[0].tokens[-1] < 37
        program = torch.onnx.export(vit, (pixels,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    other = images(2, 48).roll(7, dims=-1)
    with turbovlm.apply(vit, SETTINGS[setting]):
        expected = vit(other)
    name = session.get_inputs()[0].name
    for given, wanted in ((pixels, reference), (other, expected)):
        (found,) = session.run(None, {name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
