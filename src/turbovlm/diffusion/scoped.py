"""Merging while a call lasts, in a denoiser that others use too.

In programs with a graph of nodes, or extensions, one denoiser stands behind many of them, of which some merge and some
do not. So nothing stays on it between calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn

from turbovlm.config import DenoiseConfig
from turbovlm.diffusion.feature import DenoiseFeature
from turbovlm.diffusion.find import find_denoiser
from turbovlm.errors import TurboError, UnsupportedModelError
from turbovlm.patching import Patch, install, patches_of, patches_on, take_off
from turbovlm.registry import families, family_of


class Scoped:
    """Settings that are in force in a denoiser within `on(denoiser)`, and nowhere else.

    A copy looks for the blocks again, as it is used with copies of denoisers.

    Args:
        config: the settings; `refresh` and a `keep` over the steps need a pipeline of `diffusers`.
    """

    def __init__(self, config: DenoiseConfig) -> None:
        self.config = config
        self._found: tuple[weakref.ref[nn.Module], DenoiseFeature, list[Patch]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Scoped:
        return Scoped(self.config)

    def find(self, denoiser: nn.Module) -> DenoiseFeature:
        """What is done to a denoiser, checked; nothing is put on it.

        Raises:
            UnsupportedModelError: nothing in it is known.
            ConfigError, TurboError: as from `turbovlm.apply`.
        """
        return self._patches_for(denoiser)[0]

    @contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[DenoiseFeature]:
        """Merge in a denoiser until the end of a `with`, and leave it as it was.

        Raises:
            UnsupportedModelError, ConfigError, TurboError: as `find`; or it is accelerated already.
        """
        feature, patches = self._patches_for(denoiser)
        if any(patches_of(denoiser)):
            raise TurboError(f"this {type(denoiser).__name__} is accelerated already: of two, take one away")
        install(patches)
        try:
            yield feature
        finally:
            take_off([patch for patch in patches_on(denoiser) if patch.feature is feature])

    def _patches_for(self, denoiser: nn.Module) -> tuple[DenoiseFeature, list[Patch]]:
        """The same objects at every call, for which compilers guard."""
        if self._found is not None and self._found[0]() is denoiser:
            return self._found[1:]
        if all(family_of("denoiser", module) is None for module in denoiser.modules()):
            known = ", ".join(family.family for family in families("denoiser"))
            raise UnsupportedModelError(
                f"a {type(denoiser).__name__} of {type(denoiser).__module__} has no block that turbovlm knows; image "
                f"generation is accelerated in {known}"
            )
        feature = find_denoiser(denoiser, self.config, denoiser)
        self._found = weakref.ref(denoiser), feature, feature.patches(denoiser)
        return self._found[1:]
