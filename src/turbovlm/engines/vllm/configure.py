"""The check of settings when vLLM makes an engine's config: before a model is loaded or a process started."""

from __future__ import annotations

import functools
from typing import Any

from turbovlm.engines.vllm.settings import KEY, Serving, family_served, put_settings, serving_from
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
        serving = serving_from(given[KEY], __version__)
        config = original(self, *args, **kwargs)
        configure(config, serving)
        init_logger("vllm.plugins.turbovlm").info("turbovlm: %s, %s", serving.amount, serving.summary)
        return config

    setattr(create_engine_config, CHECKED, True)
    EngineArgs.create_engine_config = create_engine_config


def configure(config: Any, serving: Serving) -> None:
    """Put the settings where processors and models of every process find them.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        UnsupportedModelError: the model is not known, or not with these settings.
        ConfigError: the engine has features that do not go with them.
    """
    model = config.model_config
    family = family_served(model.architecture, model.hf_config, serving)
    refuse_features(config, serving)
    text = model.hf_text_config
    columns = int(getattr(text, "max_position_embeddings", model.max_model_len))
    put_settings(model.hf_config, serving, columns)
    if serving.reading is not None and not family.packed:
        # vLLM keeps positions of a prompt's own where a config says that they have planes; they are all equal here,
        # and `models.FewerTokens.forward` hands one of them on
        model.hf_config.mrope_section = [1, 1, 1]
        text.max_position_embeddings = columns + model.max_model_len


def refuse_features(config: Any, serving: Serving) -> None:
    """Refuse an engine that would not read positions, or features, where the plug-in puts them.

    Raises:
        ConfigError: naming what was asked for.
    """
    refused = []
    if serving.reading is not None:
        refused.append((_beside_reading(config), ""))
        if needs_attention(serving.reading):
            refused.append((_beside_attention(config), "choose tokens by no attention"))
    if serving.encoder is not None:
        refused.append((_beside_merging(config), f"leave out {serving.encoder.amount}"))
    found = [([name for name, is_asked in asked.items() if is_asked], instead) for asked, instead in refused]
    found = [(names, instead) for names, instead in found if names]
    if found:
        names = ", ".join(dict.fromkeys(name for names, _ in found for name in names))
        hints = [instead for _, instead in found]
        without = f", or {' and '.join(hints)}" if all(hints) else ""
        raise ConfigError(
            f"{names}: does not go with {KEY!r} in --additional-config: leave out one of the two{without}"
        )


def _beside_reading(config: Any) -> dict[str, bool]:
    """What reads features or positions elsewhere than a shorter prompt has them."""
    multimodal, parallel = config.model_config.multimodal_config, config.parallel_config
    return {
        "runner": config.model_config.runner_type != "generate",
        "enable_mm_embeds": multimodal.enable_mm_embeds,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "enable_dbo": parallel.use_ubatching,
        "speculative_config": config.speculative_config is not None,
        "kv_transfer_config": config.kv_transfer_config is not None,
        "ec_transfer_config": config.ec_transfer_config is not None,
        "cudagraph_mm_encoder": config.compilation_config.cudagraph_mm_encoder,
        "enable_tower_connector_lora": _adapts_tower(config),
        "video_pruning_rate": bool(multimodal.video_pruning_rate),
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
    }


def _beside_attention(config: Any) -> dict[str, bool]:
    """What runs a tower where its attention is not seen."""
    multimodal, parallel = config.model_config.multimodal_config, config.parallel_config
    return {
        "compile_mm_encoder": config.compilation_config.compile_mm_encoder,
        "mm_encoder_tp_mode": multimodal.mm_encoder_tp_mode == "data" and parallel.tensor_parallel_size > 1,
    }


def _beside_merging(config: Any) -> dict[str, bool]:
    """What runs a tower, or its blocks, in another way than merged tokens can go."""
    offloaded = config.offload_config
    return {
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size > 1,
        "compile_mm_encoder": config.compilation_config.compile_mm_encoder,
        "cudagraph_mm_encoder": config.compilation_config.cudagraph_mm_encoder,
        "quantization": config.model_config.quantization is not None,
        "mm_encoder_attn_dtype": config.model_config.multimodal_config.mm_encoder_attn_dtype is not None,
        "enable_tower_connector_lora": _adapts_tower(config),
        "cpu_offload_gb": offloaded.uva.cpu_offload_gb > 0,
        "offload_group_size": offloaded.prefetch.offload_group_size > 0,
        "enable_mm_embeds": config.model_config.multimodal_config.enable_mm_embeds,
    }


def _adapts_tower(config: Any) -> bool:
    return config.lora_config is not None and bool(config.lora_config.enable_tower_connector_lora)
