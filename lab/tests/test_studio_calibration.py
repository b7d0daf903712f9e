"""The studio's calibration: what is asked for, what was held out, and the lines that use it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("transformers")

from PIL import Image

import turbovlm
from turbovlm.calibration.calibrate import split
from turbovlm.errors import ConfigError
from turbovlm.patching import patches_on
from turbovlm_lab.studio.calibration import (
    LOADS,
    Calibrated,
    Wanted,
    calibrate_encoder,
    calibrate_pipeline,
    lines_of,
    prompts_in,
)
from turbovlm_lab.studio.encoders import CLIP, ImageEncoder
from turbovlm_lab.studio.image_sets import ImageSet, Named
from turbovlm_lab.studio.jobs import Report, Stopped
from turbovlm_lab.studio.subjects import IMAGE, Subject
from turbovlm_lab.zoo.saliency import squares_of


def small() -> ImageEncoder:
    """A ViT of 65 tokens with random weights and three labels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=3)).eval()

    def prepare(images, side):
        return squares_of(images, side, 4, (0.5,) * 3, (0.5,) * 3)

    return ImageEncoder(model, 32, 4, prepare, lambda model, x: model(x).logits, lambda *_: {}, "a ViT")


def noise(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(tuple(Named(f"noise{place}", Image.fromarray(each.numpy())) for place, each in enumerate(pixels)))


SUBJECT = Subject("small", "small ViT", "", IMAGE, small, encodes=True)


@pytest.fixture(scope="module")
def loaded() -> ImageEncoder:
    return small()


@pytest.fixture(scope="module")
def made(loaded) -> Calibrated:
    return calibrate_encoder(loaded, SUBJECT, noise(30), Wanted("flops", 0.7, effort=1), Report())


def test_what_was_searched_on_and_what_was_held_out(made, loaded) -> None:
    assert made.found.images == len(made.held) == 15
    assert sorted((*made.searched, *made.held)) == sorted(noise(30).names)
    assert made.found.flops == pytest.approx(0.7, abs=0.02)
    assert not list(patches_on(loaded.model))


def test_the_held_out_are_those_that_the_drift_was_measured_on(made, loaded) -> None:
    pictures = noise(30)
    pixels = loaded.prepare([named.image for named in pictures.images])
    with torch.inference_mode():
        whole = loaded.encode(loaded.model, pixels)
        with turbovlm.apply(loaded.model, made.found):
            merged = loaded.encode(loaded.model, pixels)
    held = [pictures.names.index(name) for name in made.held]
    centre = whole.mean(dim=0)
    drift = 1 - torch.cosine_similarity(merged[held] - centre, whole[held] - centre)
    assert drift.mean().item() == pytest.approx(made.found.drift, abs=1e-5)


def test_halves_do_not_overlap() -> None:
    searched, held = split(31, 3)
    assert sorted(searched + held) == list(range(31))
    assert split(31, 3) == (searched, held) != split(31, 4)


def test_the_lines_run(made, tmp_path: Path) -> None:
    made.found.save(tmp_path / "turbo.json")
    lines = lines_of(made, str(tmp_path / "turbo.json")).replace("model = ...", "model = given()")
    scope: dict[str, object] = {"given": lambda: small().model}
    exec(lines, scope)
    assert str(scope["handle"].config.r) == str(made.found.config.r)


def test_lines_of_built_in_models_name_what_there_is() -> None:
    for line in LOADS.values():
        module, name = re.match(r"from ([\w.]+) import (\w+)\n", line).groups()
        assert callable(getattr(__import__(module, fromlist=[name]), name))
    assert CLIP.key in LOADS


def test_stopping_leaves_the_model_alone(loaded) -> None:
    report = Report()
    seen = []

    def advance(steps: int = 1) -> None:
        seen.append(steps)
        if len(seen) == 5:
            report.stop()
        report.check()

    report.advance = advance
    with pytest.raises(Stopped):
        calibrate_encoder(loaded, SUBJECT, noise(30), Wanted("max_drift", 0.1), report)
    assert len(seen) == 5
    assert not list(patches_on(loaded.model))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [(("flops", 1.5), "flops=1.5: must be a share"), (("speed", 2), "target='speed'"), (("speedup", 1), "speedup=1")],
)
def test_what_cannot_be_asked_for(wanted, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        Wanted(*wanted)


def test_too_few_or_too_many_images_are_refused_before_anything_runs() -> None:
    for count, said in ((3, "3 are too few, at least 30"), (201, "at most 200")):
        with pytest.raises(ConfigError, match=said):
            calibrate_encoder(None, SUBJECT, noise(count), Wanted("flops", 0.6), Report())
    with pytest.raises(ConfigError, match="prompts: 2 are too few"):
        calibrate_pipeline(None, SUBJECT, ["a", "b"], Wanted("flops", 0.6), Report())


def test_prompts_are_lines_that_differ() -> None:
    assert prompts_in("red  apple\n\n pizza \nred apple\n") == ["red apple", "pizza"]
