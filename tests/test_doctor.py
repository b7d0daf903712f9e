"""`turbovlm doctor`: what it says where all is well, and what and how it says it where something is not."""

from __future__ import annotations

import importlib.util
import json

import pytest

import turbovlm
from turbovlm import ops, registry
from turbovlm.cli import diagnosis, main, selftest

pytest.importorskip("rich")
pytest.importorskip("packaging")


def hide(monkeypatch, *names):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else found(name, *more))


def quickly(monkeypatch):
    """Without the self-test, where another part is looked at."""
    monkeypatch.setattr(selftest, "run", lambda *_: [])


def document(capsys, code):
    assert main(["doctor", "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("hidden", "names"),
    [
        (("transformers", "timm"), ["plain PyTorch"]),
        (("transformers",), ["plain PyTorch", "timm ViT"]),
        ((), ["plain PyTorch", "transformers ViT"]),
    ],
)
def test_the_self_test_passes_and_leaves_nothing_behind(hidden, names, monkeypatch):
    for name in names[1:]:
        pytest.importorskip(name.split()[0])
    hide(monkeypatch, *hidden)
    before, tried = registry.families("encoder"), []
    checks = selftest.run(["cpu"], False, lambda done, what: tried.append(what))
    assert all(check.passed for check in checks), checks
    subjects = ["ops on cpu", *(f"{name} on cpu" for name in names for _ in range(3))]
    assert [check.subject for check in checks] == subjects
    assert len(tried) == len(checks) == selftest.count(["cpu"], False)
    assert registry.families("encoder") == before


def test_a_library_that_does_not_import(monkeypatch):
    monkeypatch.setattr(selftest, "_transformers", lambda: 1 / 0)
    hide(monkeypatch, "timm")
    checks = selftest.run(["cpu"], False, lambda *_: None)
    assert [check.passed for check in checks] == [True] * 4 + [False] * 3 and "ZeroDivisionError" in checks[-1].found


@pytest.mark.slow
def test_the_self_test_compiles(monkeypatch):
    hide(monkeypatch, "transformers", "timm")
    checks = selftest.run(["cpu"], True, lambda *_: None)
    assert checks[-1].what == "torch.compile agrees" and all(check.passed for check in checks), checks


def test_faults_are_noticed(monkeypatch, capsys):
    hide(monkeypatch, "transformers", "timm")
    match, apply = ops.match, turbovlm.apply
    monkeypatch.setattr(ops, "match", lambda x, r, A, **how: match(x, r, A.flip(1), **how))
    assert not selftest._formulas("cpu")[0]
    monkeypatch.setattr(ops, "match", match)
    monkeypatch.setattr(turbovlm, "apply", lambda model, r, **how: apply(model, r=2 if r == 0 else r, **how))
    found = document(capsys, 1)
    assert [check["passed"] for check in found["self_test"]] == [True, False, True, True] and not found["ok"]
    assert "r=0 changes nothing" in found["problems"][0]["what"] and found["problems"][0]["remedy"]
    monkeypatch.setattr(turbovlm, "apply", lambda model, r, **how: apply(model, r=r, **{**how, "proportional": False}))
    checks = selftest.run(["cpu"], False, lambda *_: None)
    assert [check.passed for check in checks][2] is False  # equal patches count once
    monkeypatch.setattr(turbovlm, "apply", lambda *_, **__: 1 / 0)
    checks = selftest.run(["cpu"], False, lambda *_: None)
    assert not any(check.passed for check in checks[1:]) and "ZeroDivisionError" in checks[1].found


def test_a_release_out_of_range(monkeypatch, capsys):
    quickly(monkeypatch)
    installed = diagnosis._installed
    monkeypatch.setattr(diagnosis, "_installed", lambda name: "2.1.0" if name == "torch" else installed(name))
    monkeypatch.setattr(diagnosis, "_plugins", lambda found: iter(()))
    (problem,) = document(capsys, 1)["problems"]
    assert problem == {"what": "torch 2.1.0 is installed, not >=2.6", "remedy": "pip install --upgrade 'turbovlm'"}


def test_a_lab_of_another_release(monkeypatch, capsys):
    import importlib.metadata

    quickly(monkeypatch)
    requires = importlib.metadata.requires
    asked = {"turbovlm-lab": ["turbovlm[cli]<0.2,>=0.1", "onnx>=1.17"]}
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked.get(name) or requires(name))
    monkeypatch.setattr(diagnosis, "_installed", lambda name: "0.1.0" if name == "turbovlm-lab" else None)
    (problem,) = document(capsys, 1)["problems"]
    assert "made for turbovlm <0.2,>=0.1" in problem["what"] and "turbovlm-lab" in problem["remedy"]


def test_a_plug_in_that_does_not_load(monkeypatch, capsys):
    from importlib.metadata import EntryPoint

    quickly(monkeypatch)
    broken = EntryPoint("mine", "no_such_package.families", "turbovlm.families")
    monkeypatch.setattr(diagnosis, "entry_points", lambda group: [broken] if group == broken.group else [])
    found = document(capsys, 1)
    assert "ModuleNotFoundError" in found["problems"][0]["what"] and "families" not in found
    assert [each["name"] for each in found["plug-ins"]] == ["mine"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    quickly(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    (problem,) = document(capsys, 1)["problems"]
    assert "models of the hub" in problem["what"] and "HF_HOME" in problem["remedy"]


def test_families_of_installed_libraries(monkeypatch, capsys):
    quickly(monkeypatch)
    hide(monkeypatch, "open_clip")
    found = {each["library"]: each for each in document(capsys, 0)["families"]}
    assert found["timm"]["encoder"] == {"known": 2, "there": 2} and found["timm"]["missing"] == []
    assert not found["open_clip"]["installed"] and found["open_clip"]["encoder"] == {"known": 1, "there": 0}
    assert found["transformers"]["vlm"]["known"] > 40


def test_what_it_needs(monkeypatch, capsys):
    hide(monkeypatch, "packaging")
    assert main(["doctor"]) == 2
    assert "pip install 'turbovlm[cli]'" in capsys.readouterr().err
