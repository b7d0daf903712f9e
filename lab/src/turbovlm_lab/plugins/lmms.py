"""lmms-eval with merging: each of its models also as `turbo_NAME`, which takes the amounts among its arguments.

    lmms_eval --model turbo_llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,visual_keep=0.5 --tasks gqa

lmms-eval finds `manifests` by the entry point `lmms_eval.models`. Its classes are made here when it asks for them.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn

import turbovlm
from turbovlm.errors import TurboError
from turbovlm.workflows import configs_from

PREFIX = "turbo_"
_KINDS = ("simple", "chat")


def manifests() -> list[Any]:
    """What lmms-eval registers: all its own models under another name."""
    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS, AVAILABLE_SIMPLE_MODELS
    from lmms_eval.models.registry_v2 import ModelManifest

    known = dict(zip(_KINDS, (AVAILABLE_SIMPLE_MODELS, AVAILABLE_CHAT_TEMPLATE_MODELS)))
    names = sorted({name for models in known.values() for name in models})
    return [
        ModelManifest(
            PREFIX + name,
            **{f"{kind}_class_path": f"{__name__}.{kind}__{name}" for kind in _KINDS if name in known[kind]},
        )
        for name in names
    ]


def __getattr__(name: str) -> Any:
    """`simple__NAME` and `chat__NAME`: lmms-eval's class of that model, accelerated when it is made."""
    kind, _, model = name.partition("__")
    if kind not in _KINDS or not model:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.models import get_model

    return accelerated(get_model(model, force_simple=kind == "simple"))


def accelerated(base: Any) -> Any:
    """A class of lmms-eval's whose model merges.

    Beside what `base` takes it takes `r`, `keep` or `flops` of `TurboConfig`, and `visual_keep`, `visual_select`,
    `question`, `change`, `visual_tolerance` and `min_visual_tokens` of `ReadConfig`; it has the `Handle` as `turbo`.
    Making one raises TurboError where `base` runs no model of PyTorch in this process, and what `turbovlm.apply`
    raises.
    """

    def start(
        self: Any,
        r: int | None = None,
        keep: float | None = None,
        flops: float | None = None,
        visual_keep: float | int | None = None,
        visual_select: str | None = None,
        question: float | None = None,
        change: float | None = None,
        visual_tolerance: float | None = None,
        min_visual_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        named = {"r": r, "keep": keep, "flops": flops, "visual_keep": visual_keep, "visual_select": visual_select}
        named |= {"question": question, "change": change, "visual_tolerance": visual_tolerance}
        named |= {"min_visual_tokens": min_visual_tokens}
        asked = {name: value for name, value in named.items() if value is not None}
        configs = configs_from((), asked, denoises=False, model=base.__name__)
        base.__init__(self, **settings)
        model = getattr(self, "model", None)
        if not isinstance(model, nn.Module):
            raise TurboError(
                f"{base.__name__} runs no model of PyTorch in this process: there is nothing to accelerate"
            )
        self.turbo = turbovlm.apply(model, *configs)
        print(self.turbo)

    return type(f"Turbo{base.__name__}", (base,), {"__init__": start, "__module__": __name__, "__doc__": base.__doc__})
