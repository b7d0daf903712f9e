"""Which model and data each comparison runs with: the user's, by a file that names them, or built-in ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from turbovlm.errors import ConfigError, DataError
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.asking import asked, beginning
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.predictors.images import Making
from turbovlm_lab.evaluate.readers import read
from turbovlm_lab.evaluate.study import file_name
from turbovlm_lab.reproduce.declared import Declared
from turbovlm_lab.reproduce.running import Source

REQUIRED, OPTIONAL = ("model", "data"), ("images", "split", "limit", "prompt", "steps")
"""What an entry of the sources' file has; each is what `turbovlm evaluate` calls so."""
EXAMPLES = {
    "nlvr2": {"model": "blip:model_base_nlvr.pth", "data": ["nlvr2/dev.json"], "images": "nlvr2/dev"},
    "table1/BLIP-B/NLVR2/UPop": {
        "model": "blip:model_base_nlvr_nlvr2_2x_compressed.pth",
        "data": ["nlvr2/dev.json"],
        "images": "nlvr2/dev",
    },
    "vqa": {
        "model": "Salesforce/blip-vqa-base",
        "data": ["v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"],
        "images": "coco/val2014",
    },
    "captioning": {
        "model": "Salesforce/blip-image-captioning-base",
        "data": ["dataset_coco.json"],
        "images": "coco",
        "split": "test",
    },
    "retrieval": {
        "model": "Salesforce/blip-itm-base-flickr",
        "data": ["dataset_flickr30k.json"],
        "images": "flickr30k-images",
        "split": "test",
    },
    "table5/BLIP-B/COCO": {
        "model": "Salesforce/blip-itm-base-coco",
        "data": ["dataset_coco.json"],
        "images": "coco",
        "split": "test",
    },
    "classification": {
        "model": "timm:vit_small_patch16_224.augreg_in21k_ft_in1k",
        "data": ["imagenet"],
        "split": "val",
    },
    "text-to-image": {
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "data": ["prompts.txt"],
        "images": "imagenet-images",
        "steps": 50,
    },
}
"""A file of sources to begin with: an entry for each task; one for a comparison goes before its task's."""


@dataclass
class Sources:
    """Sources by comparison, each loaded once.

    Attributes:
        folder: predictions are kept below it.
        entries: of the user, by task or key; None for built-in models.
        images: how many, of each built-in task.
        device, dtype, batch, workers: how models run.
    """

    folder: Path
    entries: Mapping[str, Mapping[str, Any]] | None
    images: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 16
    workers: int = 0
    _loaded: dict[str, Source] = field(default_factory=dict, repr=False)

    def named(self, declared: Declared) -> str | None:
        """The entry that a comparison runs with: its own, its table's or its task's; None if there is none.

        A pruned model's is its own alone; no built-in model is pruned.
        """
        if declared.pruned:
            return declared.key if declared.key in (self.entries or ()) else None
        if self.entries is None:
            return declared.task
        return next((n for n in (declared.key, declared.name, declared.task) if n in self.entries), None)

    def load(self, name: str, task: str, strength: float | None = None) -> Source:
        """The model and data of an entry; the model loaded before is kept, so ask for one entry's comparisons in turn.

        Args:
            name, task: the entry.
            strength: of text-to-image that begins with images.

        Raises:
            TurboError: see `asked` and `read`.
        """
        key = f"{name} {task} {strength}"
        if key not in self._loaded:
            self._loaded.clear()
            builtin = self.entries is None
            self._loaded[key] = self._builtin(task, strength) if builtin else self._given(name, task, strength)
        return self._loaded[key]

    def data(self, name: str, task: str) -> Data:
        """The data of a user's entry."""
        assert self.entries is not None
        entry = self.entries[name]
        return read(task, entry["data"], entry.get("images"), entry.get("split"), entry.get("limit"))

    def _given(self, name: str, task: str, strength: float | None) -> Source:
        assert self.entries is not None
        entry = self.entries[name]
        data = self.data(name, task)
        spec = AskedModel(entry["model"], self.device, self.dtype, entry.get("prompt"))
        if strength is not None:
            data = beginning(data)
        predictor, scoring = asked(task, spec, data, Making(entry.get("steps"), strength=strength))
        return self._source(task, entry["model"], data, predictor, scoring, _folder(f"{name}-{task}", strength))

    def _builtin(self, task: str, strength: float | None) -> Source:
        from turbovlm_lab.evaluate.builtin_data import DATA
        from turbovlm_lab.evaluate.builtin_models import MODELS

        data = DATA[task](self.images) if strength is None else beginning(DATA[task](self.images))
        predictor, scoring = asked(task, AskedModel(MODELS[task]), data, Making(strength=strength), features="vit")
        return self._source(task, MODELS[task], data, predictor, scoring, _folder(task, strength))

    def _source(self, task: str, name: str, data: Data, predictor: Any, scoring: Any, folder: str) -> Source:
        path = self.folder / "predictions" / folder
        return Source(task, name, predictor, data, path, self.entries is None, scoring, self.batch, self.workers)


def _folder(name: str, strength: float | None) -> str:
    return file_name(name if strength is None else f"{name}-from-pictures")


def read_sources(path: Path, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A user's file of sources: JSON, an object of objects.

    Args:
        path: the file.
        known: keys of comparisons, tables and tasks.

    Raises:
        DataError: it is not there, is no JSON, or names what there is not; the message says what is allowed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; --template {path} writes one to begin with") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: must be an object with an entry per task or comparison")
    for name, entry in content.items():
        if name not in known:
            raise DataError(f"{path}: {name!r} is no task or comparison; `turbovlm reproduce --list` names them")
        if not isinstance(entry, dict) or not {*REQUIRED} <= entry.keys() <= {*REQUIRED, *OPTIONAL}:
            raise DataError(f"{path}: {name!r} must have {' and '.join(REQUIRED)}, and may have {', '.join(OPTIONAL)}")
        for key, value in entry.items():
            if not _fits(key, value):
                raise DataError(f"{path}: {name!r} has {key}={value!r}; must be {_KINDS.get(key, 'a text')}")
    return content


_KINDS = {"data": "a text or a list of texts", "limit": "an integer ≥ 1", "steps": "an integer ≥ 1"}


def _fits(key: str, value: Any) -> bool:
    if key in ("limit", "steps"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    texts = value if key == "data" and isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def write_template(path: Path) -> None:
    """A file of sources to begin with.

    Raises:
        ConfigError: there is a file of that name.
    """
    if path.exists():
        raise ConfigError(f"--template {path}: there is such a file; it is not written over")
    path.write_text(json.dumps(EXAMPLES, indent=2) + "\n", encoding="utf-8")
