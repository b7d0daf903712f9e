"""The studio's parts without a browser: choices and links, uploads, what is drawn, and that nothing is left applied."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import pytest
import torch
from PIL import Image

import turbovlm
from turbovlm import TurboConfig
from turbovlm.errors import ConfigError, DataError, TurboError
from turbovlm_lab.studio.choices import SCHEDULES, Choice, decreasing, listed
from turbovlm_lab.studio.generating import WHISPER
from turbovlm_lab.studio.patches import as_json, payload
from turbovlm_lab.studio.photos import photos_of
from turbovlm_lab.studio.subjects import IMAGE, Models, Sample, Subject, View
from turbovlm_lab.studio.uploads import read_recording, read_upload

pytest.importorskip("transformers")


class Nothing:
    """A loaded subject of twelve blocks."""

    model, depth, fixed = torch.nn.Identity(), 12, {"dense": True}


def subject(**changes) -> Subject:
    return Subject("vit", "a ViT", "", IMAGE, Nothing, **changes)


@pytest.mark.parametrize(
    "choice",
    [
        Choice("flops", 0.6),
        Choice("r", 7, alpha=0.5, degree="damped", similarity="keys", partition="alternate"),
        Choice("r", 4, schedule="list", listed="0, 4, 9"),
        *(Choice("r", 4, schedule=name) for name in SCHEDULES),
    ],
)
def test_a_choice_survives_its_link(choice):
    again, wrong = Choice.of_link(subject(), choice.to_link(subject()))
    assert again == choice and wrong is None


def test_what_a_link_has_wrong_is_named_and_left_out():
    query = {"amount": "r", "value": "inf", "degree": "best", "alpha": "<b>", "schedule": "odd"}
    choice, wrong = Choice.of_link(subject(), query)
    assert choice == Choice("r", 12.0)
    for part in ("value=inf", "degree=best", "alpha=<b>", "schedule=odd: must be one of constant"):
        assert part in wrong
    assert Choice.of_link(subject(), {"amount": "keep", "value": "7"})[0].value == 1.0


def test_schedules_are_lists_of_r():
    assert sum(decreasing(10, 12)) == pytest.approx(120, abs=6)
    assert decreasing(10, 12)[0] == 20 and decreasing(10, 12)[-1] == 0
    assert Choice("r", 4, schedule="constant").settings(subject(), Nothing) == {"r": [4] * 12, "dense": True}
    assert Choice("keep", 0.5, schedule="constant").settings(subject(), Nothing)["blocks"] == "every"
    assert listed("0, 4 9") == [0, 4, 9]
    with pytest.raises(ConfigError, match="whole numbers, one for each block"):
        listed("1, 2.5")
    with pytest.raises(ConfigError, match="goes with r"):
        Choice("flops", 0.6, schedule="decreasing").settings(subject(), Nothing)


def test_configs_are_the_library_s_own():
    (config,) = Choice("r", 4, degree="redundancy").configs(subject(), Nothing)
    assert config == TurboConfig(r=4, degree="redundancy", dense=True)
    with pytest.raises(ConfigError, match="alpha"):
        Choice("r", 4, degree="redundancy", alpha=2.0).configs(subject(), Nothing)


def test_images_are_read_as_they_were_taken(tmp_path):
    file = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3000, 1500), (9, 99, 199)).save(file, exif=exif)
    assert read_upload(file).size == (512, 1024)
    Image.new("P", (40, 20)).save(tmp_path / "b.gif", save_all=True, append_images=[Image.new("P", (40, 20), 3)])
    assert read_upload(tmp_path / "b.gif").mode == "RGB"


def _bomb(path: Path) -> None:
    Image.new("1", (15_000, 13_000)).save(path)


def _truncated(path: Path) -> None:
    Image.effect_noise((300, 300), 90).save(path)
    path.write_bytes(path.read_bytes()[:9_000])


def _tiff(path: Path) -> None:
    Image.new("RGB", (9, 9)).save(path, "TIFF")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "is not an image"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(bytes(25_000_001)), "25.0 MB is too large; at most 25 MB"),
        (_bomb, "at most 40"),
        (_truncated, "does not decode"),
        (_tiff, "is not an image; PNG, JPEG, WEBP, BMP, GIF are taken"),
    ],
)
def test_what_is_refused_is_said_with_its_name(tmp_path, make, said):
    file = tmp_path / "some.png"
    make(file)
    with pytest.raises(DataError, match=rf"^some\.png: .*{said}"):
        read_upload(file)


def test_recordings(tmp_path):
    def write(name: str, seconds: float, rate: int, channels: int = 1) -> Path:
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((channels, 2, rate, 0, "NONE", ""))
            file.writeframes(bytes(int(seconds * rate) * 2 * channels))
        return tmp_path / name

    sound, picture = read_recording(write("two.wav", 1.5, 44_100, 2))
    assert len(sound) == 24_000 and picture.size[1] == 128
    with pytest.raises(DataError, match=r"long\.wav: lasts 31 seconds; up to 30 are taken"):
        read_recording(write("long.wav", 31, 8_000))
    spoken = photos_of(WHISPER)
    assert [2 < len(each.wave) / 16_000 < 5 for each in spoken] == [True, True]
    assert all("LibriVox" in each.credit for each in spoken)
    (tmp_path / "text.wav").write_text("RIFF but no more than a text")
    with pytest.raises(DataError, match="is not a WAV file"):
        read_recording(tmp_path / "text.wav")


def test_what_is_drawn_is_what_was_merged():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=4)).eval()
    with turbovlm.apply(model, r=[0, 9, 9, 0], trace=True) as handle, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
        drawn = payload(View(Image.new("RGB", (32, 32), (1, 2, 3)), (8, 8), handle.trace))
    assert (drawn["rows"], drawn["columns"], len(drawn["colors"])) == (8, 8, 64)
    assert [len(block["sizes"]) for block in drawn["blocks"]] == [64, 55, 46, 46]
    before = list(range(64))
    for block in drawn["blocks"]:
        assert block["before"] == before and len(block["r"]) == len(set(before))
        before = block["source"]
        for token, size in enumerate(block["sizes"]):
            assert before.count(token) == size
    assert json.loads(as_json(drawn)) == drawn and "<" not in as_json({"a": "</script>"})


def test_a_model_is_loaded_once_and_what_is_missing_is_said():
    loads = []
    here = Subject("here", "", "", IMAGE, lambda: loads.append(1) or Nothing())
    absent = Subject("absent", "", "", IMAGE, Nothing, needs=lambda: "pip install it")
    models = Models([absent, here])
    assert models.first is here
    assert models["here"] is models["here"] and loads == [1]
    with pytest.raises(TurboError, match="pip install it"):
        models["absent"]
    with pytest.raises(ConfigError, match="must be one of absent, here"):
        models["other"]
    with pytest.raises(TurboError, match="absent: pip install it"):
        _ = Models([absent]).first


def test_a_folder_s_model_runs_and_is_left_as_it_was(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

    from turbovlm_lab.studio.folders import folder_subject

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**sizes, image_size=32, patch_size=4, id2label={0: "a", 1: "b", 2: "c"})
    image = Image.radial_gradient("L").convert("RGB")
    for kind, labels in ((ViTForImageClassification, 3), (ViTModel, 0)):
        folder = tmp_path / kind.__name__
        kind(config).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        found = folder_subject(folder)
        loaded = found.load()
        outcome = loaded.run(Sample("x", image), Choice("r", 6).configs(found, loaded))
        assert len(outcome.merged.labels) == labels and outcome.drift is not None and 0 < outcome.drift < 1
        assert outcome.complete().merged.gmacs < outcome.unmerged.gmacs and outcome.merged.tokens[-1] == 65 - 24
        unmerged, merged = outcome.time()
        assert unmerged.runs == merged.runs >= 3
        with pytest.raises(TurboError, match="not accelerated"):
            turbovlm.get_handle(loaded.model)
        whole = loaded.run(Sample("x", image), Choice("r", 0).configs(found, loaded))
        assert whole.drift == pytest.approx(0, abs=1e-5)
        assert whole.complete().merged.gmacs == whole.unmerged.gmacs
