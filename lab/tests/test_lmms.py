"""lmms-eval, asked for its models with merging, on a small LLaVA."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import turbovlm
from folders import llava_folder
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.plugins.lmms import accelerated

models = pytest.importorskip("lmms_eval.models")
pytest.importorskip("transformers")


PLACE = {"device": "cpu", "device_map": "cpu"}
TEMPLATE = "{% for message in messages %}user : {{ message['content'] }} {% endfor %}assistant :"


def image(number):
    noise = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return Image.fromarray(noise.numpy())


def answers(model, count=3):
    """As lmms-eval's evaluator asks."""
    from lmms_eval.api.instance import Instance

    docs = [{"image": image(number)} for number in range(count)]
    model.task_dict = {"task": {"test": docs}}
    requests = []
    for number in range(count):
        asked = ("what is a dog", {"max_new_tokens": 5}, lambda doc: [doc["image"]], number, "task", "test")
        about = {"task": "task", "doc_id": number, "repeats": 1}
        requests.append(Instance(request_type="generate_until", arguments=asked, idx=0, metadata=about))
    return model.generate_until(requests)


def test_every_model_is_there_twice():
    known = models.list_available_models()
    own = {name for name in known if not name.startswith("turbo_")}
    assert {f"turbo_{name}" for name in own} <= set(known) and "llava_hf" in own


def test_a_model_that_merges(tmp_path):
    pytest.importorskip("decord")
    folder = llava_folder(tmp_path)
    plain = models.get_model("llava_hf", force_simple=True)(pretrained=folder, chat_template=TEMPLATE, **PLACE)
    none = models.get_model("turbo_llava_hf", force_simple=True)(
        pretrained=folder, chat_template=TEMPLATE, r=0, **PLACE
    )
    assert answers(none) == answers(plain) and all(answers(plain))
    kind = models.get_model("turbo_llava_hf", force_simple=True)
    merging = kind.create_from_arg_string(
        f"pretrained={folder},visual_keep=0.5,r=2", {"chat_template": TEMPLATE, **PLACE}
    )
    assert issubclass(kind, models.get_model("llava_hf", force_simple=True)) and kind.is_simple
    assert turbovlm.get_handle(merging.model).schedules == merging.turbo.schedules and all(answers(merging))
    (chosen,) = merging.turbo.visual
    assert chosen is not None
    chat = models.get_model("turbo_llava_hf")
    assert not chat.is_simple and issubclass(chat, models.get_model("llava_hf"))


def test_what_cannot_be_accelerated():
    class Remote:
        """Asks a server."""

        def __init__(self, url):
            self.url = url

    with pytest.raises(TurboError, match="Remote runs no model of PyTorch in this process"):
        accelerated(Remote)(url="x", r=2)
    with pytest.raises(ConfigError, match=r"keep=1\.5"):
        accelerated(Remote)(url="x", keep=1.5)
