"""Both packages as wheels: what is in them, and that they work where nothing of this checkout is."""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path

import pytest

import turbovlm

pytest.importorskip("build")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MOST_BYTES = 512 * 1024
"""Half a megabyte."""


@pytest.fixture(scope="module")
def release():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("release")


@pytest.fixture(scope="module")
def wheels(release, tmp_path_factory):
    return release.build(tmp_path_factory.mktemp("dist"))


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def test_what_is_in_them(wheels):
    library, lab = wheels
    version = turbovlm.__version__
    assert [wheel.name for wheel in wheels] == [
        f"{name}-{version}-py3-none-any.whl" for name in ("turbovlm", "turbovlm_lab")
    ]
    assert library.stat().st_size < MOST_BYTES
    for wheel, package in zip(wheels, ("turbovlm", "turbovlm_lab")):
        names = zipfile.ZipFile(wheel).namelist()
        assert f"{package}/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
        assert not [
            name for name in names if "test" in Path(name).stem.split("_") or name.startswith(("tests/", "lab/"))
        ]
        source = ROOT / ("src" if package == "turbovlm" else "lab/src")
        wanted = {path.relative_to(source).as_posix() for path in (source / package).rglob("*") if path.is_file()}
        assert {name for name in wanted if "__pycache__" not in name} <= {*names}
    assert any(name.endswith(".safetensors") for name in zipfile.ZipFile(lab).namelist())
    assert "Requires-Dist: torch>=2.6" in metadata(library)
    assert "Requires-Dist: turbovlm[cli,plot,transformers,visualize]<0.3,>=0.2" in metadata(lab)


def test_they_work_where_nothing_else_of_this_is(release, wheels, tmp_path):
    python = release.install(tmp_path / "venv", wheels, beside=True)
    where = release.run(
        str(python), "-c", "import turbovlm, turbovlm_lab; print(turbovlm.__file__, turbovlm_lab.__file__)"
    )
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in where.split())
    turbo = str(python.with_name("turbovlm"))
    assert release.run(turbo, "--version") == f"turbovlm {turbovlm.__version__}\n"
    found = json.loads(release.run(turbo, "doctor", "--json"))
    assert found["ok"] and all(check["passed"] for check in found["self_test"])
    assert {each["name"] for each in found["plug-ins"]} >= {"demo", "evaluate", "reproduce", "zoo", "paper"}
    plan = json.loads(release.run(turbo, "inspect", "zoo:drawings", "--json"))  # whose weights are in the wheel
    assert plan["family"] == "FLUX"
