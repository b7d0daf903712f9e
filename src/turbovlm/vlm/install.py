"""The feature that shortens what a language model reads, found in a model by its family."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn as nn

from turbovlm.config import READINGS, ReadConfig
from turbovlm.encoder.cross_attention import CrossAttention, check_cross_attention
from turbovlm.encoder.layout import Layout, fetch, library_version, path_of
from turbovlm.encoder.towers import find_towers, layout_of
from turbovlm.errors import ConfigError, TurboError, UnsupportedModelError
from turbovlm.patching import Feature, Patch, check_forwards
from turbovlm.registry import family_of
from turbovlm.threads import Remembering
from turbovlm.vlm.around import encode_apart, fills_itself
from turbovlm.vlm.cross import cross_attention_to, find_cross
from turbovlm.vlm.families import PIXELS, VlmFamily, blocks_of
from turbovlm.vlm.families.refused import fills_placeholders, refusal
from turbovlm.vlm.pixels import tower_to_shorten
from turbovlm.vlm.reading import prefill, prepare_inputs, prepare_positions, read_forward
from turbovlm.vlm.select import needs_attention, reads_attention
from turbovlm.vlm.selection import Selection
from turbovlm.vlm.tower import encode, guide_forward, rearrange, repeat_for_beams, tower_forward

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature


@dataclass(eq=False)
class ReadFeature(Remembering[tuple[Selection, ...]]):
    """How one model's language model reads fewer visual tokens (`visual_keep`, `pixel_tolerance`).

    Attributes:
        config: the settings.
        family: the model's.
        part: path of the part that reads visual tokens; empty where it is the model itself.
        guide: path, from there, of the tower's block whose attention is A; `block`: its index, as its family has it,
            of `depth` blocks. Empty where its family has none.
        layout: that block's, resolved; None for a packed tower.
        prefix, suffix: tokens at the front and at the end of the tower's, which no visual token is made of.
        guidance: `"cls"` or `"mean"`: whose attention row is A.
        cross_attention: what cross-attends to the tower's tokens by their sizes; None where nothing does.
        encoder: what runs the tower's blocks on the patches that `pixel_tolerance` leaves; None without it.
        removed, last: as in `turbovlm.patching.Feature`; `last` is a `Selection` per image of the last prompt of this
            thread.
    """

    setting: ClassVar[str] = "visual_keep"

    config: ReadConfig
    family: VlmFamily
    part: str
    guide: str
    block: int
    depth: int
    layout: Layout | None
    prefix: int
    guidance: str
    suffix: int = 0
    cross_attention: CrossAttention | None = None
    encoder: EncoderFeature | None = None
    removed: bool = False

    def patches(self, model: nn.Module) -> list[Patch]:
        """What the tower, the part that reads, and `generate` around it run instead of their own."""
        part = model.get_submodule(self.part)
        # readers by cross-attention learn the sizes of merged tokens from it, too
        guided = self.guide and (self.family.cross_attention or reads_attention(self.config))
        found = [Patch(part.get_submodule(self.guide), "forward", guide_forward, self)] if guided else []
        if self.family.cross_attention:
            return [*found, Patch(fetch(part, self.family.tower), "forward", tower_forward, self)]
        found.append(Patch(part, "forward", read_forward, self, by_name=True))
        for modality in PIXELS:
            if hasattr(type(part), f"get_{modality}_features"):
                found.append(Patch(part, f"get_{modality}_features", encode, self, modality, by_name=True))
        found += [Patch(part, name, rearrange, self) for name in self.family.rearrange]
        around = {"prepare_inputs_for_generation": prepare_inputs, "_prefill": prefill}
        around["_expand_multimodal_outputs"] = repeat_for_beams
        if hasattr(type(part), "compute_3d_position_ids"):
            around["_prepare_position_ids_for_generation"] = prepare_positions
        for owner in owners_of(model, part):
            if hasattr(type(owner), "generate"):
                found += [  # what only wraps a model that generates, as peft does, has not all of them
                    Patch(owner, name, function, self, by_name=True)
                    for name, function in around.items()
                    if hasattr(type(owner), name)
                ]
            if fills_itself(owner):
                found.append(Patch(owner, "forward", encode_apart, self, by_name=True))
        return found

    def describe(self) -> list[str]:
        """What the language model reads of each image."""
        config = self.config
        reader = f"{self.part or 'model'} ({self.family.family})"
        if config.visual_keep is None:
            return [f"  {reader}: reads the visual tokens that are left", *self._last_prompt()]
        keep = config.visual_keep
        amount = f"{keep} visual tokens" if isinstance(keep, int) else f"{keep:.0%} of the visual tokens"
        amount = f"{amount} of each image" if self.encoder is None else f"{amount} of each image, of those left,"
        if config.visual_tolerance is not None:
            amount = f"at most {amount}, as few as leave none farther than {config.visual_tolerance:g} from one read"
        if config.min_visual_tokens:
            amount = f"{amount}, at least {config.min_visual_tokens}"
        place = ".".join(filter(None, (self.part, self.guide)))
        guided = f", guided by {self.guidance} in {place}" if needs_attention(config) else ""
        asked = " and by the prompt's text" if config.question else ""
        asked += ", frame by frame in videos" if config.change else ""
        sized = ""
        if self.cross_attention is not None and config.reduce == "merge":
            sized = ", in proportion to their sizes" if config.proportional else ", all alike"
        found = [f"  {reader}: reads {amount} ({config.selection}){guided}{asked}{sized}"]
        by_content = config.visual_tolerance is not None or self.encoder is not None
        return [*found, *self._last_prompt()] if by_content else found

    def _last_prompt(self) -> list[str]:
        """How many tokens of each image of the last prompt were read."""
        if not self.last:
            return []
        counts = [f"{each.kept.shape[1]} of {each.destination.shape[1]}" for each in self.last]
        return [f"  in the last prompt: {', '.join(counts)} tokens"]


def owners_of(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The modules of a model that have that part in them, itself included, outermost first."""
    return [owner for owner in model.modules() if any(module is part for module in owner.modules())]


def find_readings(model: nn.Module, config: ReadConfig, encoders: Sequence[EncoderFeature] = ()) -> list[Feature]:
    """A feature for `visual_keep` and `pixel_tolerance`, and one for `cross_keep`, of those that are set.

    Args:
        encoders: those whose tokens are merged as well.

    Raises:
        ConfigError: `guidance="cls"` for a tower without CLS, or `proportional=False` where no token is merged.
        TurboError: another library has replaced a forward that is to be patched.
        UnsupportedModelError: nothing in the model that turbovlm knows reads images in that way.
    """
    found: list[Feature] = []
    for name in READINGS:
        if type(amount := getattr(config, name)) is int and amount == 1:
            warnings.warn(
                f"{name}=1 is a count: ONE token of each image is read; {name}=1.0 is the share that reads all of them",
                stacklevel=4,
            )
    if config.visual_keep is not None or config.pixel_tolerance is not None:
        reading = find_reading(model, config)
        if config.pixel_tolerance is not None:
            reading.encoder = tower_to_shorten(model, reading.part, reading.family, config, encoders)
            found += [reading.encoder] if reading.encoder.implied else []
        found.append(reading)
        sized = reading.cross_attention is not None and config.reduce == "merge"
        if not (config.proportional or config.cross_keep is not None or encoders or sized):
            raise ConfigError(
                "proportional=False: it would have no effect: the tokens that are read count alike here, and no tower "
                "merges any (r, keep or flops)"
            )
    if config.cross_keep is not None:
        found.append(find_cross(model, config, sized=bool(encoders) or config.visual_keep is not None))
    for feature in found:
        names = {id(module): name for name, module in model.named_modules()}
        forwards = [patch.module for patch in feature.patches(model) if patch.name == "forward"]
        check_forwards([(names[id(module)], module) for module in forwards], one_device=False)
    return found


def find_reading(model: nn.Module, config: ReadConfig) -> ReadFeature:
    """How `model`'s visual tokens will be chosen.

    Raises:
        ConfigError: `guidance="cls"` for a tower without CLS, or `change` where no frames are known.
        UnsupportedModelError: nothing in the model reads visual tokens, or its library is too old for it.
    """
    found = [(name, part, family) for name, part in model.named_modules() if (family := family_of("vlm", part))]
    if not found:
        raise UnsupportedModelError(f"{config.of_images}: {_nothing_found(model)}{merges_inside(model)}")
    name, part, family = found[0]
    others = [other for other, module, of in found[1:] if fetch(module, of.tower) is not fetch(part, family.tower)]
    if others:
        raise UnsupportedModelError(
            f"{config.of_images}: {type(model).__name__} has several language models that read images "
            f"({', '.join([name, *others])}): apply turbovlm to each of them"
        )
    for owner in owners_of(model, part):
        if reason := refusal(owner):
            told = f"{type(owner).__name__}: {reason}{merges_inside(model)}"
            raise UnsupportedModelError(f"{config.of_images}: {told}")
    if not family.cross_attention and "mm_encoder_outputs" not in inspect.signature(type(part).forward).parameters:
        raise UnsupportedModelError(
            f"{config.of_images}: {family.family} of {library_version(type(part))} does not take encoded "
            "images apart from the prompt; transformers ≥ 5.18 does"
        )
    if family.cross_attention:
        _check_across(family, config)
    if config.change and family.frames is None:
        raise ConfigError(
            f"change={config.change:g}: which visual tokens are of which frame is not known of {family.family}: leave "
            "change out"
        )
    tower = fetch(part, path_of(family.family, part, family.tower))
    if tower is None:
        raise UnsupportedModelError(
            f"{config.of_images}: this {type(part).__name__} reads no images: its {family.tower} is None"
        )
    if family.guide is None:
        if needs_attention(config):
            raise ConfigError(
                f"visual_select={config.visual_select!r}: it goes by attention, and {family.family}'s tower has no row "
                "of it with a number for each visual token: give alpha=0 with 'coverage' or 'dpp', which leaves "
                "attention out, or a visual_select that goes by none, as 'diversity' or 'redundancy'"
            )
        return ReadFeature(config, family, name, "", -1, 0, None, 0, "mean")
    block, blocks = family.guide(part), blocks_of(tower)
    guide = blocks[block]
    path = next(path for path, module in part.named_modules() if module is guide)
    layout, cls, prefix, suffix = None, False, 0, 0
    if family.packed is None:
        layout = layout_of(guide)
        if layout is None:
            raise UnsupportedModelError(
                f"{config.of_images}: {family.family} with a tower of {type(guide).__qualname__}, whose "
                "attention turbovlm cannot read"
            )
        if layout.packed:
            raise UnsupportedModelError(
                f"{config.of_images}: {family.family}'s tower runs all images as one sequence: its VlmFamily needs "
                "packed=Packed(…), and the cell of its visual tokens"
            )
        cls, prefix, suffix = (layout.of_tower(field, tower) for field in ("cls", "prefix", "suffix"))
        layout = layout.resolve(guide)
    else:
        for spelled in family.packed.paths:
            path_of(family.family, guide, spelled)
    if config.guidance == "cls" and not cls:
        raise ConfigError(f"guidance='cls': {family.family}'s tower has no CLS token; use 'mean' or 'auto'")
    guidance = ("cls" if cls else "mean") if config.guidance == "auto" else config.guidance
    across = None if layout is None else cross_attention_to(model, tower, layout)
    if across is not None:
        check_cross_attention(across, model, config.proportional and config.reduce == "merge")
    return ReadFeature(config, family, name, path, block, len(blocks), layout, prefix, guidance, suffix, across)


def _check_across(family: VlmFamily, config: ReadConfig) -> None:
    """See that nothing is asked for that a tower cannot do whose tokens are read by cross-attention."""
    if config.question:
        raise ConfigError(
            f"question={config.question:g}: {family.family}'s tower runs without a prompt; cross_keep goes by the words"
        )
    if config.visual_tolerance is not None:
        raise ConfigError(
            f"visual_tolerance={config.visual_tolerance:g}: {family.family} reads images by cross-attention, all of a "
            "batch with as many tokens: leave it out"
        )


def _nothing_found(model: nn.Module) -> str:
    """Why nothing in a model reads fewer visual tokens."""
    for module in model.modules():
        if reason := refusal(module):
            return f"{type(module).__name__}: {reason}"
    undescribed = [cls.__name__ for cls in map(type, model.modules()) if fills_placeholders(cls)]
    if undescribed:
        return (
            f"no family describes {undescribed[-1]}, which puts what its get_image_features gives in place of "
            "placeholders, as known families do: register a VlmFamily for it (docs/extending.md)"
        )
    return (
        f"{type(model).__name__} has no language model that reads visual tokens, as far as turbovlm knows; "
        "docs/language.md lists what is supported"
    )


def merges_inside(model: nn.Module) -> str:
    """That `r`, `keep` or `flops` work on a model that is refused here, where they do."""
    try:
        towers = find_towers(model)
    except TurboError:
        return ""
    return f"; r, keep or flops merge in {towers[0].title}"
