"""The check of settings when vLLM makes an engine's config: before a model is loaded or a process started."""

from __future__ import annotations

import functools
from typing import Any

from turbovlm.config import ReadConfig
from turbovlm.engines.vllm.settings import KEY, family_served, put_settings, reading_from
from turbovlm.errors import ConfigError
from turbovlm.vlm.select import needs_attention

CHECKED = "_turbovlm_checked"
"""Marks the method that checks, so that it is wrapped once."""


def check_when_configured() -> None:
    """Have `EngineArgs.create_engine_config` check the settings under `additional_config["turbovlm"]`."""
    from vllm import __version__
    from vllm.engine.arg_utils import EngineArgs
    from vllm.logger import init_logger

    original = EngineArgs.create_engine_config
    if hasattr(original, CHECKED):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.additional_config
        if not isinstance(given, dict) or KEY not in given:
            return original(self, *args, **kwargs)
        reading = reading_from(given[KEY], __version__)
        config = original(self, *args, **kwargs)
        configure(config, reading)
        init_logger("vllm.plugins.turbovlm").info("turbovlm: %s, %s of each image", reading.amount, reading.summary)
        return config

    setattr(create_engine_config, CHECKED, True)
    EngineArgs.create_engine_config = create_engine_config


def configure(config: Any, reading: ReadConfig) -> None:
    """Put the settings where processors and models of every process find them.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        UnsupportedModelError: the model is not known.
        ConfigError: the engine has features that do not go with shorter prompts.
    """
    model = config.model_config
    family = family_served(model.architecture, model.hf_config, reading)
    refuse_features(config, needs_attention(reading))
    text = model.hf_text_config
    columns = int(getattr(text, "max_position_embeddings", model.max_model_len))
    put_settings(model.hf_config, reading, columns)
    if not family.packed:
        # vLLM keeps positions of a prompt's own where a config says that they have planes; they are all equal here,
        # and `models.FewerTokens.forward` hands one of them on
        model.hf_config.mrope_section = [1, 1, 1]
        text.max_position_embeddings = columns + model.max_model_len


def refuse_features(config: Any, attention: bool) -> None:
    """Refuse an engine that would not read positions, or features, where the plug-in puts them.

    Args:
        attention: whether the tower's attention is read.

    Raises:
        ConfigError: naming what was asked for.
    """
    multimodal, parallel = config.model_config.multimodal_config, config.parallel_config
    asked = {
        "runner": config.model_config.runner_type != "generate",
        "enable_mm_embeds": multimodal.enable_mm_embeds,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "enable_dbo": parallel.use_ubatching,
        "speculative_config": config.speculative_config is not None,
        "kv_transfer_config": config.kv_transfer_config is not None,
        "ec_transfer_config": config.ec_transfer_config is not None,
        "cudagraph_mm_encoder": config.compilation_config.cudagraph_mm_encoder,
        "enable_tower_connector_lora": config.lora_config is not None
        and config.lora_config.enable_tower_connector_lora,
        "video_pruning_rate": bool(multimodal.video_pruning_rate),
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
    }
    of_attention = {
        "compile_mm_encoder": config.compilation_config.compile_mm_encoder,
        "mm_encoder_tp_mode": multimodal.mm_encoder_tp_mode == "data" and parallel.tensor_parallel_size > 1,
    }
    if attention:
        asked |= of_attention
    if found := [name for name, is_asked in asked.items() if is_asked]:
        without = ", or choose tokens by no attention" if {*found} <= {*of_attention} else ""
        raise ConfigError(
            f"{', '.join(found)}: does not go with {KEY!r} in --additional-config: leave out one of the two{without}"
        )
