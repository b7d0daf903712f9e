"""Any file in place of `turbo.json`: settings, or a `ConfigError` of one line that names the file; nothing else."""

from __future__ import annotations

import functools
import json
import os

import pytest
from hypothesis import strategies as st

from fuzz.drawing import fuzz
from turbovlm import Calibration, ConfigError, DenoiseConfig, ReadConfig, TurboConfig
from turbovlm.ops import LayeredDegree

CLASSES = (TurboConfig, ReadConfig, DenoiseConfig)
SAVED = (
    TurboConfig(r=[4, 0, 2], thresholds=[0.1, 0.2, 0.3]),
    TurboConfig(flops=0.6, degree=LayeredDegree(1.0, 0.5, 2)),
    TurboConfig(keep=0.5, partition="grid", grid=(4, 6)),
    ReadConfig(0.5, visual_select="information"),
    ReadConfig(64),
    DenoiseConfig((0.5, 0.75), refresh=2),
    DenoiseConfig({0.0: 0.5, 0.5: 1.0}),
)
FIRST = {"turbovlm": 1, "keep": 0.5, "degree": "layered", "beta": 0.5, "gamma": 1, "components": ["ffn"]}
NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([10**400, 2**63, 1e308, 5e-324]))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), st.sampled_from(["auto", "random", "r"]))
VALUES = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2))
)


@functools.cache
def contents(tmp):
    """What each of `SAVED` is as a file, a calibration's, and one of the first format."""
    found = [FIRST]
    for number, config in enumerate(SAVED):
        config.save(tmp / f"{number}.json")
        found.append(json.loads((tmp / f"{number}.json").read_text()))
    measured = Calibration(SAVED[0], 0.6, 0.01, 0.02, 0.8, 32, 1.4, ((0.9, 0.01), (0.6, 0.02)), "batch 8 on cpu")
    measured.save(tmp / "calibration.json")
    return [*found, json.loads((tmp / "calibration.json").read_text())]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


def read(file) -> int:
    """Load a file as all that it could be; how often it was."""
    loaded = 0
    for kind in (*CLASSES, Calibration):
        try:
            found = kind.load(file)
        except ConfigError as error:
            said = str(error)
            assert said.startswith(str(file)) and "\n" not in said and len(said) < 900, said[:2000]
            continue
        loaded += 1
        assert found == found or "nan" in repr(found)
        found.save(file.with_suffix(".again"))
        assert kind.load(file.with_suffix(".again")) == found
        str(found)
    return loaded


def places(content, here=()):
    """The path of every value in nested objects and lists."""
    yield here
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*here, key))


def changed(content, place, value):
    if not place:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[place[0]] = changed(content[place[0]], place[1:], value)
    return copy


def test_what_was_saved_is_read(tmp):
    contents(tmp)
    for number, config in enumerate(SAVED):
        assert type(config).load(tmp / f"{number}.json") == config and read(tmp / f"{number}.json") == 1
    assert read(tmp / "calibration.json") == 2


@fuzz(
    core=80,
    nightly=5000,
    which=st.integers(0, len(SAVED) + 1),
    changes=st.lists(st.tuples(st.integers(0, 60), VALUES), min_size=1, max_size=2),
    extra=st.one_of(st.none(), st.tuples(st.integers(0, 60), st.text(max_size=4), VALUES)),
)
def test_any_value_anywhere(tmp, which, changes, extra):
    content = contents(tmp)[which]
    for number, value in changes:
        every = list(places(content))
        content = changed(content, every[number % len(every)], value)
    objects = [place for place in places(content) if isinstance(at(content, place), dict)]
    if extra is not None and objects:
        place = objects[extra[0] % len(objects)]
        content = changed(content, place, {**at(content, place), extra[1]: extra[2]})
    (tmp / "drawn.json").write_text(json.dumps(content), encoding="utf-8")
    read(tmp / "drawn.json")


def at(content, place):
    for key in place:
        content = content[key]
    return content


@fuzz(
    core=40,
    nightly=3000,
    which=st.integers(0, len(SAVED) + 1),
    cut=st.floats(0, 1),
    put=st.tuples(
        st.floats(0, 1), st.one_of(st.binary(max_size=4), st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"{"]))
    ),
)
def test_any_bytes_anywhere(tmp, which, cut, put):
    """Cut, or with bytes put in that may be no text."""
    content = json.dumps(contents(tmp)[which]).encode()
    place = round(put[0] * len(content))
    (tmp / "bytes.json").write_bytes((content[:place] + put[1] + content[place:])[: round(cut * 2 * len(content))])
    read(tmp / "bytes.json")


def wrapped(content: str) -> str:
    return f'{{"turbovlm": 4, "kind": "TurboConfig", "settings": {content}}}'


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        wrapped('{"r": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        wrapped('{"r": ' + '{"r": ' * 50_000 + "1" + "}" * 50_000 + "}"),
        wrapped('{"r": ' + "9" * 5000 + "}"),
        wrapped('{"r": 4, "r": 8}'),
        wrapped('{"r": 4}').replace('"kind"', '"turbovlm": 3, "kind"'),
        wrapped('{"keep": NaN}'),
        wrapped('{"keep": -Infinity}'),
        wrapped('{"r": 4, "kep": 1}'),
        wrapped('{"r": 4, "degree": {"layered": {"alpha": 1, "beta": 1, "gamma": 0}, "more": 1}}'),
        wrapped('{"r": 4}').replace("4,", "true,"),
        wrapped('{"r": 4}').replace("4,", "5,"),
        wrapped('{"r": 4}').replace('"settings"', '"promise": [], "more": 1, "settings"'),
        "null",
        "",
    ],
    ids=str.__len__,
)
def test_refused(tmp, content):
    (tmp / "refused.json").write_text(content)
    assert read(tmp / "refused.json") == 0


def test_a_mark_in_front_is_no_part_of_it(tmp):
    (tmp / "mark.json").write_text(wrapped('{"r": 4}'), encoding="utf-8-sig")
    assert TurboConfig.load(tmp / "mark.json") == TurboConfig(r=4)


def test_what_is_no_file(tmp):
    (tmp / "loop.json").symlink_to(tmp / "loop.json")
    (tmp / "folder.json").mkdir()
    os.symlink(tmp / "nowhere", tmp / "dangling.json")
    for name in ("loop.json", "folder.json", "dangling.json", "absent.json", "a\0b.json", "x" * 300, "folder.json/x"):
        assert read(tmp / name) == 0
