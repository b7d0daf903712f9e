"""The feature that merges tokens in a denoiser: what it puts on modules, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch.nn as nn

from turbovlm.config import DenoiseConfig
from turbovlm.diffusion.choose import WHOLE_BLOCK, Site, least_tokens
from turbovlm.diffusion.denoiser import Holder, denoiser_forward
from turbovlm.diffusion.merge_part import part_forward, parts_forward
from turbovlm.diffusion.merge_stack import Place, attention_forward, block_forward, block_slot
from turbovlm.diffusion.refresh import Steps
from turbovlm.diffusion.run import Choice
from turbovlm.patching import Patch
from turbovlm.shares import in_words
from turbovlm.threads import Remembering


@dataclass(frozen=True)
class Unit:
    """What merges, or is left whole, at once: a part of a block, or a block.

    Attributes:
        name: its path; `block` of the block that it is, or is in.
        component: what it is; `kind`, for people.
        group: names those that are said in one line; `key`, those that share a merge.
    """

    name: str
    block: str
    component: str
    kind: str
    group: str
    key: str


@dataclass(eq=False)
class DenoiseFeature(Remembering[dict[str, Choice]]):
    """What the patches of one accelerated denoiser share.

    Attributes:
        config: the settings.
        family: the families of its blocks, for people.
        sites: the parts that are patched, in the order of the denoiser: those that merge, or the attentions of blocks
            that do.
        blocks: paths of the blocks that have them.
        places: of those blocks, where these merge; else none.
        holders: paths of the denoisers and of the modules that have the blocks.
        semantic: whether A is computed, for the degree.
        steps: the pipeline's steps, whose forwards share what was chosen.
        whole: units that read all tokens, by their paths, and why: at `apply`, then in the last forward.
        removed, last: as in `turbovlm.patching.Feature`; `last` is what each group read in the last forward, by
            `Site.key`, where that was not compiled.
    """

    config: DenoiseConfig
    family: str
    sites: tuple[Site, ...]
    blocks: tuple[str, ...]
    places: tuple[Place, ...]
    holders: tuple[tuple[str, Holder], ...]
    semantic: bool
    steps: Steps
    whole: dict[str, str] = field(default_factory=dict)
    removed: bool = False

    @property
    def beside(self) -> tuple[Any, ...]:
        """The pipeline's scheduler, where it is patched."""
        scheduler = self.steps.scheduler
        return () if scheduler is None else (scheduler,)

    def patches(self, model: nn.Module) -> list[Patch]:
        """The forwards of the denoiser, its holders, its blocks and their parts; and the scheduler's methods."""
        found = [
            Patch(model.get_submodule(name), "forward", denoiser_forward, self, what) for name, what in self.holders
        ]
        if self.places:
            blocks = [(model.get_submodule(place.name), place) for place in self.places]
            found += [Patch(block, block_slot(block), block_forward, self, place) for block, place in blocks]
        else:
            found += [Patch(model.get_submodule(name), "forward", parts_forward, self) for name in self.blocks]
        for site in self.sites:
            if not self.places or block_slot(model.get_submodule(site.block)) == "forward":
                found.append(Patch(model.get_submodule(site.name), "forward", self.part_function, self, site))
        return [*found, *self.steps.patches(self)]

    @property
    def part_function(self) -> Callable[..., Any]:
        """What runs in place of the forward of a part."""
        return attention_forward if self.places else part_forward

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What merges, in the order of the denoiser."""
        if not self.places:
            return tuple(
                Unit(
                    site.name,
                    site.block,
                    site.part.component,
                    site.part.path,
                    site.group,
                    site.key,
                )
                for site in self.sites
            )
        return tuple(
            Unit(
                place.name,
                place.name,
                WHOLE_BLOCK,
                "blocks",
                place.stack.site.key if self.config.where == "block" else place.stack.site.name,
                place.stack.site.key,
            )
            for place in self.places
        )

    def describe(self) -> list[str]:
        """The blocks that merge, by the groups that merge alike, and how many tokens they read in the last forward."""
        config, groups = self.config, dict[str, list[str]]()
        for unit in self.units:
            groups.setdefault(unit.group, []).append(unit.block)
        often = "" if config.refresh == 1 else f", chosen in every {_nth(config.refresh)} step"
        lines = [f"  {self.family}: {in_words(config.keep)} in {self._where()}{often}"]
        for group, blocks in groups.items():
            named = list(dict.fromkeys(blocks))
            together = "in a stack" if config.where == "stack" else "merge alike"
            alike = "" if len(named) == 1 else f" … {named[-1]}: {len(named)} blocks {together}"
            lines.append(f"    {named[0]}{alike}{self._tokens_of(group)}")
        return lines + self._whole()

    def _where(self) -> str:
        if self.places:
            where = "blocks" if self.config.where == "block" else f"stacks of up to {self.config.longest} blocks"
            whole = len(self.blocks) - len(self.places)
            return f"{where}, behind the first {whole}, which are left whole" if whole else where
        there = {site.part.component for site in self.sites}
        parts = ", ".join(name for name in self.config.parts if name in there)
        return f"the queries of {parts}" if self.config.queries_only else parts

    def _whole(self) -> list[str]:
        """What reads all tokens, that of one kind and reason in one line."""
        kinds = {unit.name: unit.kind for unit in self.units}
        alike: dict[tuple[str, str], list[str]] = {}
        for name, reason in self.whole.items():
            alike.setdefault((kinds[name], reason), []).append(name)
        return [
            f"    left whole: {names[0]}{'' if len(names) == 1 else f' and {len(names) - 1} more {path}'}: {reason}"
            for (path, reason), names in alike.items()
        ]

    def _tokens_of(self, group: str) -> str:
        units = [unit for unit in self.units if unit.group == group]
        if all(unit.name in self.whole for unit in units):
            return ""
        keys = {unit.key for unit in units}
        choice = next((choice for key, choice in (self.last or {}).items() if key in keys), None)
        if choice is None:
            return ""
        fewest = least_tokens(self.config)
        if choice.largest < fewest:
            of = "" if len(choice.grids) == 1 else f" of {len(choice.grids)} images"
            return f", {choice.tokens} tokens{of}: {'images of ' if of else ''}fewer than {fewest} are left as they are"
        said = f", {choice.tokens} → {choice.left} tokens{' in the last step' if self.config.over_steps else ''}"
        if len(choice.grids) == 1:
            return said
        each = ", ".join(f"{tokens} → {left}" for tokens, left in choice.left_of_first())
        return f"{said} of {len(choice.grids)} images, in the first sequence {each}"


def _nth(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
