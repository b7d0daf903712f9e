"""Every snippet of the pages: Python runs on small models, shell commands parse, JSON and TOML load.

A snippet that is not run says why, in a comment in front of it: `<!-- not run: … -->`. Those of families.md,
extending.md and tomesd.md run in test_docs.py, test_extending.py and test_tomesd_page.py.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

import turbovlm
from families import SPECTROGRAM, WAVE
from pipelines import PIPES
from test_docs import whisper
from turbovlm.engines.vllm.settings import RELEASES, serving_from
from turbovlm.patching import patches_on
from vlms import VLMS, blip, noise, seeded

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
diffusers = pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M)
ELSEWHERE = ("families.md", "extending.md", "tomesd.md")
"""Pages whose Python other tests run."""

LANGUAGES = ("python", "bash", "json", "toml", "text")


@dataclass(frozen=True)
class Snippet:
    """A block of code on a page, and why it is not run, where it is not."""

    page: str
    line: int
    language: str
    text: str
    why: str | None

    def __str__(self):
        return f"{self.page}:{self.line}"


def snippets(page):
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text[: match.start("text")].count("\n") + 1
        yield Snippet(page.name, line, match["language"], match["text"], match["why"])


PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [snippet for page in PAGES for snippet in snippets(page)]


def of(language):
    return [s for s in ALL if s.language == language and s.why is None]


def test_every_block_of_code_is_known():
    for page in PAGES:
        fences = re.findall(r"^```", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == 2 * sum(snippet.page == page.name for snippet in ALL), page.name
    assert {snippet.language for snippet in ALL} <= set(LANGUAGES), "what is only shown is text"


def prompted(monkeypatch):
    """A small pipeline that takes a prompt, as ones with a text encoder do; and its image-to-image twin."""

    def of_text(name, size):
        pipe = PIPES[name]()

        class Prompted(type(pipe)):
            def __call__(self, prompt, image=None, generator=None, **settings):
                given = PIPES[name].inputs(*size)
                if image is not None:
                    given["image"] = image.resize(size)
                generator = torch.Generator().manual_seed(0) if generator is None else generator
                return super().__call__(**{**given, **settings}, num_inference_steps=5, generator=generator)

        pipe.__class__ = Prompted
        return pipe

    text, image = "text to image", "image to image"
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda name: of_text(text, (32, 32)))
    monkeypatch.setattr(diffusers.StableDiffusionImg2ImgPipeline, "from_pipe", lambda pipe: of_text(image, (32, 32)))
    return {"pipe": of_text(text, (32, 32)), "prompt": "a fox", "generator": torch.Generator().manual_seed(0)}


def dinov2(**settings):
    size = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}
    return seeded(lambda: transformers.Dinov2Model(transformers.Dinov2Config(**{**size, **settings})))


def start(monkeypatch):
    create, compare = timm.create_model, turbovlm.profile.compare
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    once = {"rounds": 1, "warmup": 0}
    monkeypatch.setattr(turbovlm.profile, "compare", lambda *given, rounds: compare(*given, **once))
    return {}


def encoders(monkeypatch):
    from turbovlm_lab import models

    monkeypatch.setattr(models, "load_upop", lambda path: seeded(lambda: blip("ImageTextRetrieval")))
    return {"model": dinov2(), "images": noise(0, 2, 3, 224, 224)}


def reading(monkeypatch):
    family = VLMS["qwen2_5_vl"]
    return {"model": seeded(family.make), "inputs": family.inputs([5, "image", 6, 7]) | {"max_new_tokens": 3}}


def sound(monkeypatch):
    def of(name, config, settings):
        return lambda path: seeded(lambda: getattr(transformers, name)(getattr(transformers, config)(**settings)))

    for name, make in {
        "WhisperForConditionalGeneration": lambda path: seeded(whisper),
        "ASTForAudioClassification": of("ASTForAudioClassification", "ASTConfig", SPECTROGRAM),
        "Wav2Vec2ForCTC": of("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVE),
    }.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", make)
    return {"inputs": {"input_features": noise(0, 1, 8, 80)}}


def calibrated(monkeypatch):
    images = noise(0, 30, 3, 32, 32) * torch.linspace(0.5, 2, 30)[:, None, None, None]
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
    return {"model": dinov2(**size), "images": images}


def compressed(monkeypatch):
    pytest.importorskip("torchao")
    pytest.importorskip("torch_pruning")
    return {"model": dinov2(), "pixels": noise(0, 1, 3, 224, 224)}


def other_methods(monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224").eval()
    return {"model": model, "images": noise(0, 1, 3, 224, 224)}


def studio(monkeypatch):
    turbovlm.TurboConfig(r=2).save("turbo.json")
    return {"model": dinov2()}


SETTINGS = {
    "index.md": start,
    "models.md": encoders,
    "language.md": reading,
    "diffusion.md": prompted,
    "audio.md": sound,
    "calibrate.md": calibrated,
    "compression.md": compressed,
    "migration.md": other_methods,
    "studio.md": studio,
}
"""What the snippets of a page find: names, and functions of libraries that make small models."""


@pytest.fixture
def ready(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda page: {"turbovlm": turbovlm, **SETTINGS.get(page, lambda _: {})(monkeypatch)}


@pytest.mark.parametrize(
    "snippet", [s for s in of("python") if s.page not in ELSEWHERE and s.page != "index.md"], ids=str
)
def test_python_runs(snippet, ready):
    names = ready(snippet.page)
    if "input_values" in snippet.text:
        names["input_values"] = noise(0, 1, 72, 32) if "AST" in snippet.text else noise(0, 1, 9000)
    if snippet.page == "migration.md" and "visual_keep" in snippet.text:
        names |= {"model": seeded(VLMS["llava"].make), "inputs": VLMS["llava"].inputs([5, "image", 6])}
    model = names.get("model")
    with torch.set_grad_enabled("torch_pruning" in snippet.text):  # which traces by gradients
        exec(snippet.text, names)
        if model is not None and patches_on(model) and "inputs" in names:  # what it was applied for works
            assert model.generate(**names["inputs"]).isfinite().all()
    if "[B, 257, 384]" in snippet.text:
        assert names["tokens"].shape == (2, 257, 384) and names["patches"].shape == (2, 256, 384)


def test_the_first_page_is_one_script(ready, capsys):
    names = ready("index.md")
    printed = [s.text for s in ALL if s.page == "index.md" and s.language == "text"]
    with torch.no_grad():
        for snippet in of("python"):
            if snippet.page == "index.md":
                exec(snippet.text, names)
    said = capsys.readouterr().out
    assert len(printed) == 1 and said.startswith(printed[0])
    assert not patches_on(names["model"]) or names["handle"].active
    assert "speed-up" in said


def commands(snippet):
    """The commands of a shell snippet, as lists of words."""
    for line in snippet.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


SHELL = [(str(snippet), words) for snippet in of("bash") for words in commands(snippet)]


@pytest.fixture(scope="module")
def parser():
    from turbovlm.cli import whole_parser

    return whole_parser()


PACKAGES = {"turbovlm": ".", "turbovlm-lab": "lab"}
"""Where the packages lie that are installed by their names."""


def project(folder):
    import tomllib

    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(("where", "words"), SHELL, ids=[f"{where}-{words[0]}" for where, words in SHELL])
def test_a_command_is_one(where, words, parser):
    if words[0] == "turbovlm":
        assert callable(parser.parse_args(words[1:]).run)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["pip", "install"]:
        for what in words[2:]:
            folder, _, named = what.partition("[")
            place = PACKAGES.get(folder, folder.removeprefix("./") or ".")
            known = project(place)["optional-dependencies"]
            assert not named or set(named.rstrip("]").split(",")) <= set(known)
    else:
        assert words[:2] == ["vllm", "serve"], "not a command that can be checked: <!-- not run: why --> before it"
        given = json.loads(words[words.index("--additional-config") + 1])
        assert serving_from(given["turbovlm"], RELEASES[-1])


@pytest.mark.parametrize("snippet", [*of("json"), *of("toml")], ids=str)
def test_data_load(snippet):
    if snippet.language == "json":
        assert json.loads(snippet.text)
    else:
        import tomllib

        assert tomllib.loads(snippet.text)


NAME = re.compile(r"`(turbovlm(?:_lab)?(?:\.\w+)+)")
NO_NAMES = {"turbovlm.families", "turbovlm.commands", "turbovlm.models"}
"""Groups of entry points."""


def resolve(path):
    """The module or the attribute that a dotted path names."""
    module, _, rest = path.partition(".")
    found = import_module(module)
    for part in rest.split("."):
        if not hasattr(found, part):
            import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def test_names_in_the_text_exist():
    names = {name for page in PAGES for name in NAME.findall(page.read_text(encoding="utf-8"))} - NO_NAMES
    assert len(names) > 20
    for name in sorted(names):
        resolve(name)


def messages():
    """Every string of the package, with `…` for what is put into it."""
    for path in (ROOT / "src" / "turbovlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_the_troubleshooting_page_are_those_that_are_raised():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = re.findall(r"^### `(.+)`$", text, re.M)
    known = list(messages())
    assert len(said) > 40
    assert not [message for message in said if not any(within(message, each) for each in known)]


def within(message, known):
    """Whether the parts of a message between `…` stand in another, one after the other."""
    place = 0
    for part in message.split("…"):
        place = known.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True
