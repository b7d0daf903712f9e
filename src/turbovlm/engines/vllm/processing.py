"""vLLM's processors with as many placeholders as tokens of an image are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from turbovlm.config import ReadConfig
from turbovlm.engines.vllm.families import served
from turbovlm.engines.vllm.settings import KEY, settings_of
from turbovlm.errors import ConfigError, TurboError
from turbovlm.vlm.select import kept_count

TOKENS = "turbovlm_tokens"
"""The output of a processor that says how many tokens an image has in the full prompt."""
IMAGE = "image"


@dataclass
class FewerDetails(PromptUpdateDetails):  # type: ignore[misc]
    """What stands for an image in the prompt, and how many of its tokens do not."""

    dropped: int = 0


class KeyedInfo:
    """Mixed into a model's processing info: images alone, under keys of their own in caches."""

    ctx: Any

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == IMAGE else 0 for modality, limit in limits.items()}

    @property
    def model_id(self) -> str:
        """What vLLM hashes beside an image: with settings, its features are others."""
        said = json.dumps(getattr(self.ctx.model_config.hf_config, KEY), sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()[:16]
        return f"{super().model_id} {KEY} {digest}"  # type: ignore[misc]


class FewerInfo(KeyedInfo):
    """The same where fewer tokens are read."""

    def get_mm_max_tokens_per_item(self, *args: Any, **kwargs: Any) -> Any:
        """How many tokens an image has at most, which the encoder's cache is made for; None where vLLM looks itself."""
        found = super().get_mm_max_tokens_per_item(*args, **kwargs)  # type: ignore[misc]
        if found is None:
            return None
        return {modality: _kept(self.ctx, n) if modality == IMAGE else n for modality, n in found.items()}


class FewerPlaceholders:
    """Mixed into a model's processor: `kept_count` of each image's placeholders, and how many tokens it has."""

    info: Any

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates: Mapping[str, Any] = super()._get_mm_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        fewer = []
        family = served(self.info.ctx.model_config.architecture)
        assert family is not None
        for index, of_image in enumerate(updates.get(IMAGE, ())):
            parts = 1
            if family.apart and family.tiles is not None:
                outputs = {name: elem.data[None] for name, elem in out_mm_kwargs[IMAGE][index].items()}
                parts = family.tiles(outputs)[0]
            shorter, counts = zip(*(self._shorten(update, parts) for update in of_image))
            assert len(set(counts)) == 1
            tokens = MultiModalFieldElem(data=torch.tensor(counts[0]), field=MultiModalBatchedField(keep_on_cpu=True))
            out_mm_kwargs[IMAGE][index][TOKENS] = tokens
            fewer.append(list(shorter))
        return {**updates, IMAGE: fewer} if fewer else updates

    def _shorten(self, update: Any, parts: int) -> tuple[Any, int]:
        """A resolved update with fewer placeholders, of an image of that many parts, and how many there were."""
        content = update.content
        full = list(content.full)
        is_token = torch.ones(len(full), dtype=torch.bool) if content.is_embed is None else content.is_embed(full)
        places = is_token.nonzero().flatten().tolist()
        n = len(places)
        if places[-1] - places[0] != n - 1:
            raise ConfigError("an image's placeholders with other tokens between them: not served with visual_keep")
        k = _kept(self.info.ctx, n // parts) * parts
        last = places[0] + k
        shorter = [*full[:last], *full[places[-1] + 1 :]]
        mask = torch.cat([is_token[:last], is_token[places[-1] + 1 :]])
        is_embed = None if content.is_embed is None else lambda _: mask
        return update.with_content(FewerDetails(shorter, is_embed, dropped=n - k)), n

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        prompt, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        found = settings_of(self.info.ctx.model_config.hf_config)
        assert found is not None
        dropped = sum(updates[0].content.dropped for updates in mm_res.prompt_updates.get(IMAGE, ()))
        if len(prompt) + dropped > found[1]:
            raise TurboError(
                f"a prompt of {len(prompt) + dropped} tokens, of which {dropped} are not read: those that are read "
                f"keep the positions of the full prompt, and the model has {found[1]} of them"
            )
        return prompt, places


def _kept(ctx: Any, tokens: int) -> int:
    """How many of an image's tokens are read."""
    reading = _reading(ctx)
    assert reading is not None and reading.visual_keep is not None
    return kept_count(reading.visual_keep, tokens, fewest=reading.min_visual_tokens)


def _reading(ctx: Any) -> ReadConfig | None:
    found = settings_of(ctx.model_config.hf_config)
    return None if found is None else found[0].reading


def register_fewer(cls: Any) -> Any:
    """Register for `cls`, a subclass of a model of vLLM's, its base's processor; with settings, one that shortens."""
    base = cls._processor_factory

    def info(ctx: Any) -> Any:
        found = base.info(ctx)
        if settings_of(ctx.model_config.hf_config) is None:
            return found
        return _mixed(KeyedInfo if _reading(ctx) is None else FewerInfo, found)(ctx)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        found = base.processor(info, dummy_inputs)
        return found if _reading(info.ctx) is None else _mixed(FewerPlaceholders, found)(info, dummy_inputs)

    return MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=base.dummy_inputs)(cls)


def _mixed(mixin: type, made: Any) -> type:
    """The class of what a factory of vLLM's has made, with `mixin` in front."""
    return type(f"{mixin.__name__}{type(made).__name__}", (mixin, type(made)), {})
