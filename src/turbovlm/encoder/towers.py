"""Finding the encoders that can be accelerated inside any model.

Blocks are recognised by the full dotted path of their class or one of its base classes, so no library is imported
for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.cross_attention import CrossAttention, find_cross_attention
from turbovlm.encoder.families import multimodal, text
from turbovlm.encoder.layout import Layout, fetch, path_of
from turbovlm.encoder.parts import ancestors
from turbovlm.encoder.reading import reads_all, unknown_owner
from turbovlm.encoder.refusals import beside_text, instead, nothing_found
from turbovlm.errors import UnsupportedModelError
from turbovlm.registry import class_paths, family_of
from turbovlm.vlm.families import several_layers


@dataclass(frozen=True)
class Tower:
    """An encoder found in a model.

    Attributes:
        name: its path in the model; empty where it is the model itself.
        module: the encoder.
        layout: its family's, with the paths that its blocks have.
        blocks: `(path in the model, block)`, in the order of the forward.
        prefix: CLS, distillation and register tokens at the front.
        suffix: tokens behind the patches that never merge.
        cls: whether token 0 is a CLS token.
        restore: whether what reads its output needs every position back.
        cross_attention: what cross-attends to its tokens; None where nothing does, or every position is restored.
        hands_out: whether its blocks hand out every position where a call asks for it.
        unknown_owner: the class of the module that reads it, where nothing is known of how.
        tokens: its native number of tokens, prefix and suffix included.
        cell: side of the squares of patches that merge as one.
    """

    name: str
    module: nn.Module
    layout: Layout
    blocks: tuple[tuple[str, nn.Module], ...]
    prefix: int
    suffix: int
    cls: bool
    restore: bool
    cross_attention: CrossAttention | None
    hands_out: bool
    unknown_owner: str | None
    tokens: int
    cell: int = 1

    @property
    def title(self) -> str:
        """Its path, or its class where it is the model itself."""
        return self.name or type(self.module).__name__

    def random_inputs(self, batch: int, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
        """Arguments of the tower's forward by name, of native size: seeded noise as images, on `device`.

        On `device="meta"`, tensors without values.
        """
        generator = torch.Generator().manual_seed(0)

        def noise(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            if value.device.type != "meta":  # what must have values, such as words, has them already, and keeps them
                value = value.expand(batch, *value.shape[1:])
                return value if torch.device(device).type == "meta" else value.to(device)
            first = batch * (len(value) if self.layout.packed else 1)
            return torch.randn(first, *value.shape[1:], generator=generator).to(device, dtype)

        return {name: noise(value) for name, value in self.layout.inputs(self.module).items()}

    @property
    def blocks_around(self) -> int:
        """How many blocks it has, those behind what is read of it included."""
        path = self.blocks[0][0][len(self.name) + 1 if self.name else 0 :]
        return len(list(self.module.get_submodule(path.rpartition(".")[0]).children()))

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self._output_shapes[0][0]

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """Heads × head_dim of each block, which differ where heads were pruned."""
        return tuple(width for _, width in self._output_shapes)

    @property
    def _output_shapes(self) -> list[tuple[int, int]]:
        """Of each block's projection behind attention, out × in."""
        found = []
        for name, block in self.blocks:
            steps = [(path, fetch(block, path)) for path in self.layout.after_attention]
            layers = [(path, step) for path, step in steps if isinstance(step, nn.Module)]
            shape = next((shape for _, step in layers if (shape := matrix_shape(step)) is not None), None)
            if shape is None:
                if not layers:
                    raise UnsupportedModelError(
                        f"{name} ({self.layout.family}): after_attention={self.layout.after_attention!r} names no "
                        "module; its first is the projection behind attention"
                    )
                path, step = layers[0]
                raise UnsupportedModelError(f"{name}.{path}: {_PACKED}, {type(step).__name__}")
            found.append(shape)
        return found

    @property
    def patch_weights(self) -> int:
        """Multiply-accumulates for each patch before the blocks: entries of the patch embedding's kernel."""
        if self.layout.patch is None:
            return 0
        if callable(self.layout.patch):
            return self.layout.patch(self.module)
        return sum(parameter.numel() for parameter in self._patch_projection.parameters() if parameter.ndim > 1)

    @property
    def plain_stem(self) -> bool:
        """Whether the cost of what comes before the blocks is known: none, one projection, or what a layout says."""
        if self.layout.patch is None or callable(self.layout.patch):
            return True
        in_blocks = {id(module) for _, block in self.blocks for module in block.modules()}
        convolutions = [m for m in self.module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
        return all(m is self._patch_projection or id(m) in in_blocks for m in convolutions)

    @property
    def _patch_projection(self) -> nn.Module:
        assert isinstance(self.layout.patch, str)
        projection: nn.Module = fetch(self.module, path_of(self.layout.family, self.module, self.layout.patch))
        return projection


_PACKED = "a layer holds its weights in a format that turbovlm does not know"


def find_towers(model: nn.Module) -> list[Tower]:
    """Every vision encoder in `model` whose blocks a layout knows; where there is none, every text encoder.

    Raises:
        UnsupportedModelError: there is none, or one of them cannot lose tokens; the message says which blocks were
            found and why.
    """
    modules = dict(model.named_modules())
    grouped: dict[str, list[tuple[str, nn.Module, Layout]]] = {}
    strays: dict[str, str] = {}
    for name, module in modules.items():
        layout = layout_of(module)
        if layout is None:
            continue
        tower = next((n for n in ancestors(name) if set(class_paths(modules[n])) & set(layout.towers)), None)
        if tower is None:
            wanted = " or ".join(path.rpartition(".")[2] for path in layout.towers)
            causal = any(set(class_paths(modules[n])) & text.CAUSAL_TOWERS for n in ancestors(name))
            reason = text.CAUSAL if causal else f"not inside an encoder turbovlm knows ({wanted})"
            strays[class_paths(module)[0]] = reason
        else:
            grouped.setdefault(tower, []).append((name, module, layout))
    if not grouped:
        raise UnsupportedModelError(nothing_found(model, modules, strays))
    images = {name: blocks for name, blocks in grouped.items() if not blocks[0][2].text}
    if not images and (refusal := beside_text(model, grouped)):
        raise UnsupportedModelError(refusal)
    return [_tower(name, modules, blocks) for name, blocks in (images or grouped).items()]


def layout_of(block: nn.Module) -> Layout | None:
    """The layout that knows a block, or None."""
    layout: Layout | None = family_of("encoder", block)
    return layout


def matrix_shape(step: Any) -> tuple[int, int] | None:
    """Out × in of a linear layer, be its weights packed or not; None of anything else."""
    if not isinstance(step, nn.Module):
        return None
    for weight in step.parameters(recurse=False):
        if weight.ndim == 2 and weight.is_floating_point():
            return weight.shape[0], weight.shape[1]
    for names in (("out_features", "in_features"), ("output_size", "input_size")):
        given, taken = (getattr(step, name, None) for name in names)
        if isinstance(given, int) and isinstance(taken, int):
            return given, taken
    return None


def matrix_entries(step: Any, name: str = "") -> int:
    """Entries of all weight matrices in a module, those of quantised layers as if they were not packed.

    Raises:
        UnsupportedModelError: a layer whose weights are packed, and which does not say what it takes and gives.
    """
    if not isinstance(step, nn.Module):
        return 0
    inside = sum(matrix_entries(child, f"{name}.{path}") for path, child in step.named_children())
    own = [p for p in step.parameters(recurse=False) if p.ndim == 2]
    if own and all(p.is_floating_point() for p in own):
        return inside + sum(p.numel() for p in own)
    shape = matrix_shape(step)
    if shape is None and own:
        raise UnsupportedModelError(f"{name.lstrip('.')}: {_PACKED}, {type(step).__name__}")
    return inside or (0 if shape is None else shape[0] * shape[1])


def check_readable(step: Any, name: str) -> None:
    """Raise `UnsupportedModelError` where a projection's shape cannot be told."""
    if matrix_shape(step) is None:
        raise UnsupportedModelError(f"{name}: {_PACKED}, {type(step).__name__}")


def _tower(name: str, modules: dict[str, nn.Module], found: list[tuple[str, nn.Module, Layout]]) -> Tower:
    module, layout = modules[name], found[0][2]
    around = tuple(modules[n] for n in reversed(ancestors(name)))
    part = next((ancestor for ancestor in around if family_of("vlm", ancestor)), None)
    vlm = None if part is None else family_of("vlm", part)
    if part is not None and vlm is not None and vlm.merges_inside:
        if several_layers(part):
            raise UnsupportedModelError(
                f"{name} cannot lose tokens: {vlm.family} reads several blocks' outputs{instead(modules[''])}"
            )
        found = found[: len(found) + vlm.guide(part) + 1]
        restore, hands_out, unknown = True, False, None
    else:
        for ancestor in around:
            if reason := multimodal.placeholders(ancestor):
                title, other = name or type(module).__name__, instead(modules[""])
                raise UnsupportedModelError(f"{title} cannot lose tokens: {reason}{other}")
        unknown, hands_out = unknown_owner(module, around), True
        pools = layout.pools(module) if callable(layout.pools) else layout.pools
        restore = reads_all(layout, module, around) or (unknown is not None and not pools)
    for path, block, _ in found:
        if layout.refuse is not None and (reason := layout.refuse(module, block, around)):
            other = instead(modules[""])
            raise UnsupportedModelError(f"{path} ({layout.family}) cannot be accelerated: {reason}{other}")
    cell = 1 if layout.cell is None else layout.cell(module)
    if part is not None and vlm is not None and vlm.merges_inside and not layout.packed:
        cell = vlm.cell(part)
    prefix, suffix, cls = (layout.of_tower(field, module) for field in ("prefix", "suffix", "cls"))
    tokens = prefix + layout.patches(module) + suffix
    across = find_cross_attention(name, modules, tokens, layout)
    if across is not None and layout.decoder is not None:
        restore = False
    return Tower(
        name=name,
        module=module,
        layout=layout.resolve(found[0][1]),
        blocks=tuple((path, block) for path, block, _ in found),
        prefix=prefix,
        suffix=suffix,
        cls=cls,
        restore=restore,
        cross_attention=None if restore else across,
        hands_out=hands_out,
        unknown_owner=unknown,
        tokens=tokens,
        cell=cell,
    )
