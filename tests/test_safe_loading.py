"""Files that come from elsewhere are data: nothing in them is run."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path

import pytest
import torch

from turbovlm import process
from turbovlm.errors import TurboError
from turbovlm.loading import ModelSpec
from turbovlm.loading.models import load_model

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "lab/src", "studies", "benchmarks", "tools", "examples", "docs", "integrations")
RUNS_CODE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle")
OWN = {
    "src/turbovlm/engines/ray.py": "what its own processes hand each other, through Ray, which pickles anyway",
    "benchmarks/corpus_actors.py": "the same",
    "benchmarks/corpus_costs.py": "measures that",
}
"""Files that may unpickle, and why."""


def sources():
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def calls(path):
    """Each call of a file: its dotted name, its keywords and its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {each.arg: each.value for each in node.keywords}, node.lineno


def says(keywords, name, value):
    return isinstance(keywords.get(name), ast.Constant) and keywords[name].value is value


def wrong(name, keywords, where):
    """Why a call may run what a file holds; None if it may not."""
    module, _, function = name.rpartition(".")
    if name == "torch.load" and not says(keywords, "weights_only", True):
        return "torch.load without weights_only=True"
    if function in ("load", "loads", "Unpickler", "open") and module in RUNS_CODE and where not in OWN:
        return name
    if name in ("np.load", "numpy.load") and "allow_pickle" in keywords and not says(keywords, "allow_pickle", False):
        return "np.load with pickles"
    if module == "yaml" and function not in ("safe_load", "safe_dump", "dump"):
        return name
    if "trust_remote_code" in keywords and not says(keywords, "trust_remote_code", False):
        return "code of a hub"
    if "weights_only" in keywords and says(keywords, "weights_only", False):
        return "weights_only=False"
    return name if name in ("eval", "exec", "torch.hub.load", "pd.read_pickle", "pandas.read_pickle") else None


def test_no_call_runs_what_a_file_holds():
    found = []
    assert len(sources()) > 300
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        found += [f"{where}:{line}: {said}" for name, words, line in calls(path) if (said := wrong(name, words, where))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "eval(f)",
    ],
)
def test_the_test_notices(code, tmp_path):
    (tmp_path / "a.py").write_text(code)
    assert [wrong(*call[:2], "src/a.py") for call in calls(tmp_path / "a.py")] != [None]


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_trap_is_one(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_weights_of_a_folder_are_not_run(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    config.architectures = ["ViTModel"]
    config.save_pretrained(tmp_path / "model")
    torch.save({"embeddings.cls_token": Trap(tmp_path / "sprung")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(TurboError, match="could not load it"):
        load_model(ModelSpec(str(tmp_path / "model")), pretrained=True)
    assert not (tmp_path / "sprung").exists()


def test_code_of_a_folder_is_not_run(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass Config: pass\n")
    with pytest.raises(TurboError, match="could not load it"):
        load_model(ModelSpec(str(tmp_path)))
    assert not (tmp_path / "sprung").exists()


def test_a_library_that_would_run_a_checkpoint_is_kept_from_it(tmp_path, monkeypatch):
    """torchvision's checkpoints come by `torch.hub`, which asks for all that is in them."""
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint.pth")
    for name, value in process.SAFE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("before", "after"), [({}, "1"), ({process.UNSAFE: "1"}, None)])
def test_the_command_sets_it_unless_the_user_has_decided_otherwise(before, after, monkeypatch):
    environment = dict(before)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(process.signal, "getsignal", lambda number: None)
    process.begin()
    assert environment.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == after
