"""How one library spells a transformer block, as data.

A block is two halves, `x + attention(norm1(x))` and `x + mlp(norm2(x))`, or, where norms come after the residual,
`norm1(x + attention(x))` and `norm2(x + mlp(x))`. Merging happens between them. A `Layout`
names the sub-modules of both halves by their attribute paths, so that the block's own modules are called and nothing
of them is written again. A new model family is a new `Layout`.
"""

from __future__ import annotations

import functools
import importlib.metadata as metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import UnsupportedModelError
from turbovlm.registry import named

Project = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`(block, normed) -> (q, k, v)`, each `[batch, tokens, heads * head_dim]`; defined in a module, so that it pickles."""
Rotary = Callable[[nn.Module, Tensor, Tensor, Tensor | None, Mapping[str, Any]], tuple[Tensor, Tensor]]
"""`(block, q, k, positions, arguments) -> (q, k)`; defined in a module, so that it pickles."""
BlocksAt = tuple[tuple[float, ...], ...]
"""Sets of blocks, as shares of the depth."""
Around = tuple[nn.Module, ...]
"""The modules around a tower, outermost first."""


IN_THE_MIDDLE = ((4 / 12, 5 / 12, 6 / 12, 7 / 12), (3 / 12, 4 / 12, 5 / 12, 6 / 12, 7 / 12))
"""Where CLIP merges: in four blocks of the middle, and in one more where those have not enough to give. Its first ones
are where merging hurts it most, and late ones are left few tokens (`benchmarks/judges.py`)."""


@dataclass(frozen=True)
class Layout:
    """One way to spell a block, and what must be known about the encoder around it.

    A path is dotted and starts at the block. Several spellings are separated by `|`; the first that exists is used.
    A path that ends in `?` may be missing. `resolve` gives the same layout with the paths that one block has.

    Layouts of registered families pickle, by the block's class and the resolved paths.

    Args:
        family: name for people, such as `"transformers ViT"`.
        block: dotted path of the block's class.
        towers: dotted paths of the classes inside which such blocks form a vision encoder.
        norm1: the norm before attention, or None.
        project: paths of the query, key and value projections, or a function `(block, normed) -> (q, k, v)`,
            each `[batch, tokens, heads * head_dim]`.
        heads: path of the number of heads.
        after_attention: what is applied to attention's `[batch, tokens, heads * head_dim]` before the residual, in
            order: modules are called, and of a tuple they return its first entry counts, tensors and numbers multiply,
            None is skipped.
        mlp: the second half's steps, in the same way; the first is the norm before the MLP.
        patch: path, from the tower, of the patch embedding's projection; where it is more than one projection, a
            function of the tower: multiply-accumulates for each patch before the blocks; None for tokens that are
            looked up.
        patches: native number of patches of a tower, before any are merged.
        prefix: number of CLS, distillation and register tokens at the front, or a function of the tower.
        suffix: number of tokens behind the patches that never merge, such as detection tokens, or a function of the
            tower.
        cls: whether token 0 is a CLS token, or a function of the tower.
        blocks_at: shares of the depth at which blocks merge by default, the first of these sets that has enough to
            give, or a function of the tower; where it is empty, every second block, or six of a deeper encoder. For
            families whose real weights lost less so.
        norm_after_attention: what normalises the sum of attention and the residual.
        norm_after_mlp: the same of the MLP.
        joint: path, from the tower, of the module that puts text tokens in front of an image's; they are never merged,
            and `prefix` counts the longest text.
        returns_tuple: whether the block returns its tokens in a tuple, or how many entries this has, None behind the
            tokens; None to go by its annotation, as where releases differ.
        text: whether it encodes text, and so stays as it is in a model that also encodes images.
        scale: path of what attention multiplies its scores by; 1/√head_dim where it is None, or there is none.
        query_norm: path of the norm of each head's queries.
        key_norm: path of that of its keys.
        dropout: path of attention's dropout, a number or an `nn.Dropout`.
        calls: paths of modules that the function `project`, or `end` where there is none, calls.
        drops: paths among the steps of numbers that are no factors but the share which dropout drops in training.
        weights_only: paths among `after_attention` of linear layers whose weights attention reads itself, so that
            their own forward, an adapter's say, never runs.
        end: `(block, tokens) -> tokens`: what the block does with the sum of its second half at last.
        skips: path, from the tower, of the share of blocks that its training skips at random.
        entries: the tower's methods that run its blocks.
        rotary: `(block, q, k, positions, arguments) -> (q, k)`: rotate by the positions of the patches `positions`,
            `[batch, patches]`; None means all patches, in order.
        arguments: names of what the block takes by position after the tokens.
        understood: names of arguments that `rotary` reads, or that have no effect on these blocks.
        mask: name of the argument that masks keys, if the encoder uses one.
        restore: whether the reader of the tower's output needs every position back, or a function
            `(tower, ancestors)`: the ancestors are the modules around the tower, outermost first.
        decoder: dotted path of the class that holds the encoder and a decoder, and the decoder's path from there: its
            cross-attention counts merged tokens by size, whatever `restore` says of other readers.
        line: whether tokens follow each other in time, and lie on no grid.
        packed: whether the tower runs all images as one sequence, `[tokens, width]`, and tells its blocks by
            `cu_seqlens` which tokens attend to each other; the patches that its merger joins lie together in it.
        cell: `(tower)`: the side of these squares, for such a tower.
        windows: `(tower)`: for each block, how many tokens a window that it attends within has; 0 where it attends to
            whole images or frames, and only there tokens merge. None where all blocks do.
        order: `(tower, grid, arguments)`: for a packed tower that reorders squares before its blocks, which square has
            come to each place; `grid` and `arguments` are those of its call.
        reads: `(tower)`: the blocks before the last whose output the tower itself reads.
        pools: whether the tower reads its tokens itself, by a head or pooling of its own, or a function of the tower.
        example: `(block, patches)`: arguments with which the block can be tried on random tokens.
        inputs: `(tower)`: one input of native size by argument name, of a batch of 1: tensors on the meta device stand
            for noise, others and None are taken as they are.
        refuse: `(tower, block, ancestors)`: the reason why this model cannot be accelerated, or None.
    """

    kind: ClassVar[str] = "encoder"

    family: str
    block: str
    towers: tuple[str, ...]
    norm1: str | None
    project: tuple[str, str, str] | tuple[str] | Project
    heads: str
    after_attention: tuple[str, ...]
    mlp: tuple[str, ...]
    patch: str | Callable[[Any], int] | None
    patches: Callable[[Any], int]
    inputs: Callable[[Any], dict[str, Tensor | None]]
    prefix: int | Callable[[Any], int] = 1
    suffix: int | Callable[[Any], int] = 0
    cls: bool | Callable[[Any], bool] = True
    blocks_at: BlocksAt | Callable[[Any], BlocksAt] = ()
    norm_after_attention: str | None = None
    norm_after_mlp: str | None = None
    joint: str | None = None
    returns_tuple: int | None = None
    text: bool = False
    scale: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    dropout: str | None = None
    calls: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    weights_only: tuple[str, ...] = ()
    end: Callable[[Any, Tensor], Tensor] | None = None
    skips: str | None = None
    entries: tuple[str, ...] = ("forward",)
    rotary: Rotary | None = None
    arguments: tuple[str, ...] = ("attention_mask",)
    understood: tuple[str, ...] = ()
    mask: str | None = None
    restore: bool | Callable[[Any, Around], bool] = False
    decoder: tuple[str, str] | None = None
    line: bool = False
    packed: bool = False
    cell: Callable[[Any], int] | None = None
    windows: Callable[[Any], tuple[int, ...]] | None = None
    order: Callable[[Any, Tensor, dict[str, Any]], Tensor] | None = None
    reads: Callable[[Any], Sequence[int]] | None = None
    pools: bool | Callable[[Any], bool] = False
    example: Callable[[Any, int], dict[str, Any]] | None = None
    refuse: Callable[[Any, Any, Around], str | None] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Dotted path of the class by which a block is recognised."""
        return (self.block,)

    def resolve(self, block: nn.Module) -> Layout:
        """The same layout with the spelling that `block` has of each path.

        Raises:
            UnsupportedModelError: the block has none of a path's spellings, as with a release of its library that this
                layout does not know.
        """

        def one(path: str | None) -> str | None:
            if path is None or (path.endswith("?") and not _has_any(block, path[:-1])):
                return None
            return path_of(self.family, block, path.removesuffix("?"))

        def several(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(found for path in paths if (found := one(path)) is not None)

        found: dict[str, Any] = {name: one(getattr(self, name)) for name in _PATHS}
        found |= {name: several(getattr(self, name)) for name in ("after_attention", "mlp")}
        if not callable(self.project):
            found["project"] = several(self.project)
        if self.returns_tuple is None:
            annotation = inspect.signature(type(block).forward).return_annotation
            found["returns_tuple"] = "tuple" in str(annotation).lower()
        return replace(self, **found)

    def parts(self, block: nn.Module) -> Parts:
        """Fetch what `block`'s forward calls, of a resolved layout."""

        norm1, heads, norm_after_attention, norm_after_mlp, scale, query_norm, key_norm, dropout = _fetch_all(
            block, [getattr(self, name) for name in _PATHS]
        )
        return Parts(
            norm1=norm1,
            project=self.project if callable(self.project) else _fetch_all(block, self.project),
            heads=heads,
            after_attention=self._steps(block, self.after_attention),
            mlp=self._steps(block, self.mlp),
            norm_after_attention=norm_after_attention,
            norm_after_mlp=norm_after_mlp,
            scale=scale,
            query_norm=query_norm,
            key_norm=key_norm,
            dropout=dropout,
        )

    def _steps(self, block: nn.Module, paths: tuple[str, ...]) -> tuple[Any, ...]:
        steps = _fetch_all(block, paths)
        if not self.weights_only and not self.drops:
            return steps
        found = []
        for path, step in zip(paths, steps):
            if path in self.weights_only:
                step = functools.partial(_linear, step)
            elif path in self.drops:
                step = functools.partial(F.dropout, p=step, training=block.training)
            found.append(step)
        return tuple(found)

    @functools.cached_property
    def fetched_paths(self) -> tuple[str, ...]:
        """Paths of all that `parts` fetches, of a resolved layout."""
        single = [getattr(self, name) for name in _PATHS]
        project = () if callable(self.project) else self.project
        return tuple(path for path in (*single, *project, *self.after_attention, *self.mlp) if path is not None)

    @property
    def called_paths(self) -> tuple[str, ...]:
        """Paths of all that the two halves of a block call, of a resolved layout."""
        single = (self.norm1, self.query_norm, self.key_norm, self.norm_after_attention, self.norm_after_mlp)
        project = () if callable(self.project) else self.project
        found = (*single, *project, *self.calls, *self.after_attention, *self.mlp)
        return tuple(path for path in found if path is not None)

    @property
    def attention(self) -> str | None:
        """Path of the attention module, which has the heads; None where it adds the residual, too, or is none."""
        path, inside, _ = self.heads.partition(".")
        return path if inside and not (self.norm_after_attention or "").startswith(f"{path}.") else None

    @property
    def attention_steps(self) -> int:
        """How many of the steps behind attention are part of the attention module, of a resolved layout."""
        inside = f"{self.attention}."
        return sum(path.startswith(inside) for path in self.after_attention) if self.attention else 0

    def of_tower(self, name: str, tower: nn.Module) -> Any:
        """The value of `prefix`, `suffix` or `cls` for one tower."""
        value = getattr(self, name)
        return value(tower) if callable(value) else value

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        names = (*_PATHS, "after_attention", "mlp", "project", "returns_tuple")
        return _layout_of, (self.block, {name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Parts:
    """The modules and values of one block that a layout names; see there."""

    norm1: Any
    project: Any
    heads: int
    after_attention: tuple[Any, ...]
    mlp: tuple[Any, ...]
    norm_after_attention: Any
    norm_after_mlp: Any
    scale: float | None
    query_norm: Any
    key_norm: Any
    dropout: Any


def _linear(layer: Any, x: Tensor) -> Tensor:
    """What a linear layer's weights give, without its forward."""
    return F.linear(x, layer.weight, layer.bias)


def fetch(root: Any, path: str) -> Any:
    """The attribute at a dotted path.

    In eager mode modules are looked up where `nn.Module.__getattr__` would find them, without its detours: every block
    of every forward asks.
    """
    if torch.compiler.is_compiling():
        return functools.reduce(getattr, path.split("."), root)
    for name in _names(path):
        modules = root.__dict__.get("_modules")
        module = None if modules is None else modules.get(name)
        root = getattr(root, name) if module is None else module
    return root


def _fetch_all(root: Any, paths: Sequence[str | None]) -> tuple[Any, ...]:
    """The attributes at several paths, None for None."""
    return tuple([None if path is None else fetch(root, path) for path in paths])


@functools.lru_cache(maxsize=4096)
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def path_of(family: str, module: nn.Module, paths: str) -> str:
    """The first of the `|`-separated `paths` that `module` has.

    Raises:
        UnsupportedModelError: it has none of them, as with a release of its library that is not known.
    """
    for path in paths.split("|"):
        if _exists(module, path):
            return path
    raise UnsupportedModelError(
        f"{family}: {type(module).__module__}.{type(module).__qualname__} has no {paths.replace('|', ' or ')}; "
        f"this release of {library_version(type(module))} spells it in a way turbovlm does not know"
    )


def native_image(tower: nn.Module, size: Any, frames: int | None = None) -> Tensor:
    """An image (or a video) without values, as a `Layout.inputs` gives it.

    Args:
        tower: the encoder, whose first convolution says how many channels an image has.
        size: pixels per side, or height and width.
        frames: of a video; None for an image.

    Returns:
        `[1, channels, height, width]`, or `[1, frames, channels, height, width]`, on the meta device.
    """
    channels = next(m.in_channels for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.empty(1, *(() if frames is None else (frames,)), channels, height, width, device="meta")


def library_version(cls: type) -> str:
    """Name and version of the library that defines `cls`, such as `"timm 1.0.31"`."""
    package = cls.__module__.partition(".")[0]
    distributions = metadata.packages_distributions().get(package, [])
    return f"{package} {metadata.version(distributions[0])}" if distributions else package


_PATHS = (
    *("norm1", "heads", "norm_after_attention", "norm_after_mlp"),
    *("scale", "query_norm", "key_norm", "dropout"),
)
"""Fields of a `Layout` that are one path."""


def _layout_of(block: str, resolved: dict[str, Any]) -> Layout:
    """Unpickle a layout: that of the family which is registered for the class of its blocks, with resolved paths."""
    layout: Layout = named("encoder", block)
    return replace(layout, **resolved)


def variant(layout: Layout, **changes: Any) -> Layout:
    """The same layout but for `changes`."""
    return replace(layout, **changes)


def _has_any(root: Any, paths: str) -> bool:
    return any(_exists(root, path) for path in paths.split("|"))


def _exists(root: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(root, name):
            return False
        root = getattr(root, name)
    return True
