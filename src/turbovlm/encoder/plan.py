"""From the settings and an encoder to what its blocks do: every `"auto"` settled, its cost read off its modules."""

from __future__ import annotations

from dataclasses import replace

from turbovlm.config import ENCODER_RESTORES, GENERATION, TurboConfig
from turbovlm.encoder.block import Plan
from turbovlm.encoder.layout import fetch
from turbovlm.encoder.schedule import EncoderShape, check_depth
from turbovlm.encoder.towers import Tower, check_readable, matrix_entries
from turbovlm.errors import ConfigError


def plan_encoder(tower: Tower, config: TurboConfig) -> Plan:
    """How an encoder that was found will merge: every `"auto"` settled.

    Raises:
        ConfigError: settings that this encoder, or no encoder, can have.
    """
    config = _for_encoder(config)
    check_depth(config, len(tower.blocks), tower.name)
    if config.guidance == "cls" and not tower.cls:
        where = tower.name or type(tower.module).__name__
        raise ConfigError(f"guidance='cls': {where} ({tower.layout.family}) has no CLS token; use 'mean' or 'auto'")
    if config.flops is not None and not tower.plain_stem:
        raise ConfigError(
            f"flops={config.flops}: {tower.name or type(tower.module).__name__} begins with a convolutional network "
            "whose cost does not follow from its shape; use r or keep"
        )
    guidance = ("cls" if tower.cls else "mean") if config.guidance == "auto" else config.guidance
    similarity = ("hidden" if tower.layout.text else "heads") if config.similarity == "auto" else config.similarity
    restore = ("copy" if tower.layout.text else "residual") if config.restore == "auto" else config.restore
    return Plan(
        config=config,
        spelling=tower.spelling,
        shape=_shape(tower, config, similarity),
        tower=tower.name,
        names=tuple(name for name, _ in tower.blocks),
        native_tokens=tower.tokens,
        guidance=guidance,
        similarity=similarity,
        restore=restore if tower.restore or config.dense else None,
        plain_stem=tower.plain_stem,
    )


def _for_encoder(config: TurboConfig) -> TurboConfig:
    for name in GENERATION:
        value = getattr(config, name)
        if value != TurboConfig.__dataclass_fields__[name].default:
            raise ConfigError(f"{name}={value!r}: only image generation has it")
    if config.restore not in ENCODER_RESTORES:
        raise ConfigError(f"restore={config.restore!r}: only image generation has it; encoders {ENCODER_RESTORES}")
    config = config.settled("weighted_distance", "keep_norm")
    if config.partition != "auto":
        return config
    if config.grid is not None:
        raise ConfigError(f'grid={config.grid!r}: only partition="grid" uses it')
    return replace(config, partition="random")


def _shape(tower: Tower, config: TurboConfig, similarity: str) -> EncoderShape:
    spelling, widths = tower.spelling, tower.attention_widths
    in_mlp = [
        sum(matrix_entries(fetch(block, path), f"{name}.{'.'.join(path)}") for path in spelling.mlp)
        for name, block in tower.blocks
    ]
    if isinstance(spelling.project, tuple):
        for name, block in tower.blocks:
            for path in spelling.project:
                check_readable(fetch(block, path), f"{name}.{'.'.join(path)}")
    everything = [matrix_entries(block, name) for name, block in tower.blocks]
    heads = [int(fetch(block, spelling.heads)) for _, block in tower.blocks]
    if similarity == "hidden":
        compared = (tower.hidden_size,) * len(widths)
    else:
        compared = widths if similarity == "heads" else tuple(width // count for width, count in zip(widths, heads))
    return EncoderShape(
        attention_weights=tuple(whole - mlp for whole, mlp in zip(everything, in_mlp)),
        mlp_weights=tuple(in_mlp),
        attention_widths=widths,
        hidden_size=tower.hidden_size,
        similarity_width=compared,
        patch_weights=tower.patch_weights,
        prefix=tower.prefix,
        windowed=config.partition == "random",
    )
