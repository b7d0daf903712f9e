"""Fewer visual tokens in vLLM: a plug-in that `vllm serve` loads by itself, off until it is given settings.

`register` is the entry point. `settings.py` says what may be set and what is refused; `families.py` which models there
are; `processing.py` shortens prompts, `models.py` what the encoder returns, and `positions.py` keeps the positions;
`encoders.py` says which towers merge tokens inside.
"""

from __future__ import annotations

from turbovlm.engines.vllm.families import FAMILIES, MODELS
from turbovlm.engines.vllm.settings import release_supported


def register() -> None:
    """Register turbovlm's subclasses of vLLM's models, and check settings when an engine's config is made.

    vLLM calls it in each of its processes. Without settings, the subclasses do what their bases do. In a release that
    turbovlm does not know nothing is registered, and settings are refused.
    """
    from vllm import ModelRegistry, __version__

    from turbovlm.engines.vllm.configure import check_when_configured

    check_when_configured()
    if release_supported(__version__):
        for family in FAMILIES:
            ModelRegistry.register_model(family.architecture, f"{MODELS}:{family.architecture}")
