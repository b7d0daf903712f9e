"""VLMEvalKit with merging: one of its models also as `turbo_NAME`.

# turbo_run.py
import runpy
from turbovlm import ReadConfig
from turbovlm_lab.plugins.vlmevalkit import register

register("llava_onevision_qwen2_7b_ov", ReadConfig(visual_keep=0.5))
runpy.run_path("run.py", run_name="__main__")  # VLMEvalKit's own

python turbo_run.py --model turbo_llava_onevision_qwen2_7b_ov --data MMBench_DEV_EN
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn

import turbovlm
from turbovlm.config import Config
from turbovlm.errors import ConfigError, TurboError

PREFIX = "turbo_"


def register(name: str, *configs: Config) -> str:
    """Add a model to VLMEvalKit's that merges.

    Args:
        name: one of `vlmeval.config.supported_VLM`.
        configs: how it merges, one config of each workflow at most.

    Returns:
        Its name there, `turbo_NAME`.

    Raises:
        ConfigError: VLMEvalKit has no model of that name.
        ModuleNotFoundError: VLMEvalKit is not installed.
    """
    from vlmeval.config import supported_VLM

    if name not in supported_VLM:
        raise ConfigError(f"name={name!r}: VLMEvalKit has no such model")
    supported_VLM[PREFIX + name] = accelerated(supported_VLM[name], *configs)
    return PREFIX + name


def accelerated(build: Callable[..., Any], *configs: Config) -> Callable[..., Any]:
    """What makes the same wrapper, its model accelerated.

    Calling it raises TurboError where the wrapper has no model of PyTorch as `model`, and what `turbovlm.apply` raises.
    """

    def made(*args: Any, **settings: Any) -> Any:
        wrapper = build(*args, **settings)
        model = getattr(wrapper, "model", None)
        if not isinstance(model, nn.Module):
            raise TurboError(f"{type(wrapper).__name__} has no model of PyTorch: there is nothing to accelerate")
        print(turbovlm.apply(model, *configs))
        return wrapper

    return made
