"""`turbovlm.calibrate` on small models: what it finds, what it promises, what it refuses."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn as nn

import turbovlm
from turbovlm import ConfigError, TurboConfig, TurboError
from turbovlm.calibration.bound import upper_bound
from turbovlm.calibration.drift import Subject
from turbovlm.calibration.handing import handed_on
from turbovlm.calibration.search import Encoder

transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=8, **SIZE)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def images():
    """Smooth ones, in which patches are alike."""
    small = torch.randn(36, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=64, mode="bilinear")


@pytest.fixture(scope="module")
def varied():
    """From a few patches that differ to many."""
    chance = torch.Generator().manual_seed(0)
    small = (torch.randn(1, 3, 2 + number, 2 + number, generator=chance) for number in range(36))
    return torch.cat([torch.nn.functional.interpolate(each, size=64, mode="bilinear") for each in small])


def ratio_of(model, config):
    with turbovlm.apply(model, config) as handle:
        return handle.schedules[0].ratio


def test_a_schedule_for_one_cost(vit, images):
    before = vit(images[:2])[0]
    went = []
    config = turbovlm.calibrate(vit, images, flops=0.7, effort=3, progress=went.append)
    assert torch.equal(vit(images[:2])[0], before) and "forward" not in vars(vit.layers[0])
    assert len(config.r) == 4 and config.keep is config.flops is None
    assert ratio_of(vit, config) == pytest.approx(0.7, abs=0.006)
    promise = config.promise
    assert promise.flops == pytest.approx(0.7, abs=0.006) and promise.images == 18 and promise.coverage == 0.8
    assert 0 < promise.drift < 1 and promise.drift < promise.bound and promise.speedup is None
    assert [share for share, _ in promise.curve] == sorted(share for share, _ in promise.curve)
    assert sum(went) > 36 + 18 * 10
    again = turbovlm.calibrate(vit, images, flops=0.7, effort=3)
    assert again == config and again.promise == promise
    assert turbovlm.calibrate(vit, images, flops=0.7, effort=3, seed=1).promise != promise


def test_what_is_given_stays(vit, images):
    config = turbovlm.calibrate(vit, images, flops=0.7, effort=1, similarity="queries", dense=True, seed=3)
    assert config.similarity == "queries" and config.dense


def test_the_search_pays(vit, images):
    """On the images that were searched on, no setting that it began with is better."""
    config = turbovlm.calibrate(vit, images, flops=0.7, effort=20)
    subject = Subject(vit, images, 36, handed_on(vit), 16, lambda _: None)
    searched = sorted(random.Random(0).sample(range(36), 36)[:18])
    with turbovlm.apply(vit, r=1) as handle:
        encoder = Encoder(handle.features[0].shape, 65)
    even = encoder.amounts(encoder.even(), 0.7)
    assert subject.drift(config, searched).mean() <= subject.drift(TurboConfig(r=even), searched).mean()


def test_the_cheapest_within_a_tolerance(vit, images):
    config = turbovlm.calibrate(vit, images, max_drift=0.2, effort=3)
    less = turbovlm.calibrate(vit, images, max_drift=0.05, effort=3)
    assert ratio_of(vit, config) < ratio_of(vit, less) < 1
    with pytest.raises(ConfigError, match=r"max_drift=1e-09 is out of reach: with 95% .* the least is 0\.\d+"):
        turbovlm.calibrate(vit, images, max_drift=1e-9, effort=1)


def test_a_speed_is_measured(vit, images, monkeypatch):
    """As fast as the arithmetic allows, by a clock of our own."""
    from turbovlm.calibration import calibrate as module

    monkeypatch.setattr(module, "speedup_of", lambda subject, config: 0.9 / ratio_of(vit, config))
    config = turbovlm.calibrate(vit, images, speedup=1.3, effort=1)
    assert config.promise.speedup == pytest.approx(1.3, rel=0.02)
    assert ratio_of(vit, config) == pytest.approx(0.9 / 1.3, abs=0.02)


def test_what_each_family_hands_on(images):
    torch.manual_seed(0)
    text = {**SIZE, "vocab_size": 99, "max_position_embeddings": 16}
    vision = {**SIZE, "image_size": 64, "patch_size": 8}
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    shapes = {}
    for name, model in {
        "clip": clip,
        "classifier": transformers.ViTForImageClassification(transformers.ViTConfig(**vision, num_labels=5)).eval(),
        "encoder": transformers.ViTModel(transformers.ViTConfig(**vision)).eval(),
        "captioner": transformers.BlipForConditionalGeneration(
            transformers.BlipConfig(vision_config=vision, text_config={**text, "encoder_hidden_size": 32})
        ).eval(),
    }.items():
        out = Subject(model, {"pixel_values": images[:4]}, 4, handed_on(model), 2, lambda _: None)
        shapes[name] = [tuple(part.shape[1:]) for part in out.own]
        drift = out.drift(TurboConfig(r=4), range(4))
        assert drift.shape == (4,) and (drift > 0).all()
    width = clip.config.projection_dim
    assert shapes == {
        "clip": [(1, width)],
        "classifier": [(1, 5)],
        "encoder": [(1, 32), (64, 32)],
        "captioner": [(1, 32), (64, 32)],
    }


def test_a_measure_of_ones_own(vit, images):
    config = turbovlm.calibrate(
        vit, {"pixel_values": images}, flops=0.8, effort=1, measure=lambda model, given: model(**given).pooler_output
    )
    assert config.promise.drift > 0
    with pytest.raises(ConfigError, match=r"measure: must give a tensor or several, got NoneType"):
        turbovlm.calibrate(vit, images, flops=0.8, measure=lambda model, given: None)
    with pytest.raises(ConfigError, match=r"measure: gave a tensor of shape \(16,\)"):
        turbovlm.calibrate(vit, images, flops=0.8, measure=lambda model, given: model(given)[0][:, 0, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of flops, max_drift and speedup: got none"),
        ({"flops": 0.5, "speedup": 2}, "got flops, speedup"),
        ({"flops": 1.0}, r"flops=1.0: must be a share in \(0, 1\)"),
        ({"flops": "half"}, "flops='half': must be a number"),
        ({"max_drift": 0}, "max_drift=0: must be in"),
        ({"speedup": 0.9}, "speedup=0.9: must be more than 1"),
        ({"flops": 0.05}, "flops=0.05 is out of reach"),
        ({"flops": 0.5, "effort": 0}, "effort=0: must be an integer ≥ 1"),
        ({"flops": 0.5, "r": 3}, "r: .*calibrate finds"),
        ({"flops": 0.5, "min_tokens": 9}, "min_tokens: calibrate finds"),
        ({"flops": 0.5, "partition": "grid"}, "partition='grid'"),
        ({"speedup": 1.5, "per_image": True}, "per_image: a speed-up is measured in batches"),
        ({"flops": 0.5, "degree": "entropy"}, "degree='entropy'"),
    ],
)
def test_bad_targets(vit, images, given, message):
    with pytest.raises(ConfigError, match=message):
        turbovlm.calibrate(vit, images, **given)


def test_bad_images(vit, images):
    with pytest.raises(ConfigError, match="images: 20 are too few, at least 30"):
        turbovlm.calibrate(vit, images[:20], flops=0.5)
    with pytest.raises(ConfigError, match=r"images: must be what the model takes.*got str"):
        turbovlm.calibrate(vit, {"pixel_values": "cat.jpg"}, flops=0.5)
    with pytest.raises(ConfigError, match="NaN"):
        turbovlm.calibrate(vit, images.where(images < 1, torch.nan), flops=0.5)
    with pytest.raises(ConfigError, match=r"different lengths: \[35, 36\]"):
        turbovlm.calibrate(vit, {"a": images, "b": images[1:]}, flops=0.5)


def test_bad_models(vit, images):
    with pytest.raises(ConfigError, match=r"model: must be a torch.nn.Module, got str"):
        turbovlm.calibrate("vit", images, flops=0.5)
    with pytest.raises(TurboError, match="training mode"):
        turbovlm.calibrate(vit.train(), images, flops=0.5)
    vit.eval()
    with turbovlm.apply(vit, r=1), pytest.raises(TurboError, match="accelerated already"):
        turbovlm.calibrate(vit, images, flops=0.5)
    broken = transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=8, **SIZE)).eval()
    with torch.no_grad():
        broken.layernorm.weight.fill_(torch.nan)
    with pytest.raises(TurboError, match="NaN or infinite on these images"):
        turbovlm.calibrate(broken, images, flops=0.5)


def test_an_interruption_leaves_the_model_as_it_was(vit, images):
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) == 9:
            raise KeyboardInterrupt

    before = vit(images[:1])[0]
    with pytest.raises(KeyboardInterrupt):
        turbovlm.calibrate(vit, images, flops=0.5, progress=stop)
    assert torch.equal(vit(images[:1])[0], before) and "forward" not in vars(vit.layers[0])


@pytest.mark.parametrize(("count", "coverage", "above"), [(15, 0.8, 0), (31, 0.9, 0), (61, 0.95, 0), (128, 0.95, 1)])
def test_the_bound_is_the_smallest_that_is_sure(count, coverage, above):
    """With 15, 31 and 61 images the largest value is above 80, 90 and 95 % of as many others."""
    values = [float(i) for i in range(count)]
    bound = upper_bound(values)
    assert bound.coverage == coverage and bound.value == count - 1 - above
    with pytest.raises(ConfigError, match="14 images allow no bound"):
        upper_bound(values[:14])


def test_the_bound_holds():
    """Of a distribution with a heavy tail: of as many others, as many as it says are below in at least 95 of 100."""
    chance = random.Random(0)
    held = 0
    for _ in range(400):
        seen, others = ([chance.paretovariate(1.5) for _ in range(64)] for _ in range(2))
        bound = upper_bound(seen)
        held += sum(value <= bound.value for value in others) >= int(bound.coverage * 64)
    assert 0.94 * 400 <= held < 400


def test_saved_and_loaded(vit, images, tmp_path):
    config = turbovlm.calibrate(vit, images, flops=0.8, effort=1)
    config.save(tmp_path / "turbo.json")
    loaded = TurboConfig.load(tmp_path / "turbo.json")
    assert loaded == config and loaded.promise == config.promise
    TurboConfig(keep=0.5, grid=(2, 3), partition="grid").save(tmp_path / "grid.json")
    assert TurboConfig.load(tmp_path / "grid.json") == TurboConfig(keep=0.5, grid=(2, 3), partition="grid")
    with pytest.raises(ConfigError, match="a function cannot be saved"):
        TurboConfig(r=1, degree=lambda r, a, block: r).save(tmp_path / "no.json")
    for content, message in {
        '{"r": 1}': "holds no settings of turbovlm",
        "[1]": "holds no settings of turbovlm",
        "r=1": "holds no settings of turbovlm",
        '{"turbovlm": 99, "r": 1}': "is of format 99",
        '{"turbovlm": 1, "r": 1, "speed": 2}': "does not know: speed",
        '{"turbovlm": 1, "r": -1}': "r=-1",
    }.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            TurboConfig.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="there is no such file"):
        TurboConfig.load(tmp_path / "none.json")


@pytest.fixture
def folder(vit, images, tmp_path):
    image = pytest.importorskip("PIL.Image")
    vit.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    pictures = tmp_path / "pictures" / "some"
    pictures.mkdir(parents=True)
    for number, picture in enumerate(((images[:30] + 3) * 40).clamp(0, 255).byte().permute(0, 2, 3, 1)):
        image.fromarray(picture.numpy()).save(pictures / f"{number}.png")
    return tmp_path


def test_from_the_command_line(folder, vit, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from turbovlm.cli import main

    monkeypatch.chdir(folder)
    assert main(["calibrate", "./vit", "pictures", "--flops", "0.7", "--effort", "1", "--limit", "30"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    config = TurboConfig.load("turbo.json")
    assert "On 15 images that took no part in the search the mean drift is" in said
    assert (
        f"at least 80% of as many other images like these drift no further than {config.promise.bound:.4f}".lower()
        in said.lower()
    )
    assert ratio_of(vit, config) == pytest.approx(0.7, abs=0.011)
    page = (folder / "turbo.html").read_text()
    assert "<svg" in page and f"{config.promise.bound:.4f}" in page and "30 pictures of pictures" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["./vit", "none", "--flops", "0.5"], "none: there is no such folder"),
        (["./vit", "vit", "--flops", "0.5"], "vit: holds no pictures"),
        (["./none", "pictures", "--flops", "0.5"], "there is no such folder"),
        (["zoo:emoji", "pictures", "--flops", "0.5"], "makes images, and takes none"),
        (["./vit", "pictures", "--flops", "0.5", "--out", "turbo.txt"], "must end in .json"),
        (["./vit", "pictures", "--flops", "0.5", "--out", "none/turbo.json"], "there is no folder none"),
        (["./vit", "pictures", "--flops", "0.5", "--effort", "0"], "--effort 0: must be an integer ≥ 1"),
        (["./vit", "pictures", "--flops", "0.5", "--limit", "20"], "images: 20 are too few, at least 30"),
    ],
)
def test_bad_input_on_the_command_line(folder, capsys, monkeypatch, given, message):
    from turbovlm.cli import main

    monkeypatch.chdir(folder)
    assert main(["calibrate", *given]) == 2
    assert message in capsys.readouterr().err
    (folder / "pictures" / "some" / "broken.png").write_text("no picture")
    assert main(["calibrate", "./vit", "pictures", "--flops", "0.5"]) == 2
    assert "broken.png" in capsys.readouterr().err


@torch.no_grad()
def test_thresholds_leave_each_picture_what_it_needs(vit, varied):
    amounts, counts = [8] * 4, []
    with turbovlm.apply(vit, r=amounts, trace=True) as handle:
        vit(varied)
        middle = [entry.degree[~entry.degree.isnan()].median().item() for entry in handle.trace]
    with turbovlm.apply(vit, r=amounts, thresholds=middle, trace=True) as handle:
        for image in varied:
            vit(image[None])
            counts.append([65, *(entry.sizes.shape[1] for entry in handle.trace)])
            for before, after, entry, threshold in zip(counts[-1], counts[-1][1:], handle.trace, middle):
                known = entry.degree[~entry.degree.isnan()]
                assert before - after == min((known > threshold).sum(), (before - 1) // 2)
        vit(varied)
        assert handle.trace[0].sizes.shape[1] == max(each[1] for each in counts)
    assert len({each[-1] for each in counts}) > 3
    plain = vit(varied[:2])[0]
    with turbovlm.apply(vit, r=amounts, thresholds=[1e9] * 4):
        torch.testing.assert_close(vit(varied[:2])[0], plain)


def test_thresholds_cannot_be_compiled(vit, images):
    with (
        turbovlm.apply(vit, TurboConfig(r=[8] * 4, thresholds=[-0.05] * 4)),
        torch.no_grad(),
        pytest.raises(Exception, match="cannot be compiled: use r"),
    ):
        torch.compile(vit, backend="eager", fullgraph=True)(images[:1])


def test_thresholds_for_one_cost(vit, varied, tmp_path, monkeypatch):
    from turbovlm.calibration import calibrate as module

    fixed = turbovlm.calibrate(vit, varied, flops=0.7, effort=1)
    monkeypatch.setattr(module, "clearly_less", lambda drift, other: True)
    config = turbovlm.calibrate(vit, varied, flops=0.7, effort=1, per_image=True)
    assert config.r == fixed.r and len(config.thresholds) == 4
    assert config.promise.flops == pytest.approx(0.7, abs=0.06) and config.promise.drift != fixed.promise.drift
    monkeypatch.setattr(module, "clearly_less", lambda drift, other: False)
    assert turbovlm.calibrate(vit, varied, flops=0.7, effort=1, per_image=True) == fixed
    config.save(tmp_path / "turbo.json")
    assert TurboConfig.load(tmp_path / "turbo.json") == config
