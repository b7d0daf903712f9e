"""A self-test of some seconds: what merging must leave as it is, on small models with random weights."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import turbovlm
from turbovlm.encoder import Layout
from turbovlm.patching import patches_on
from turbovlm.registry import unregister

SIDE, PATCH, WIDTH, HEADS, DEPTH = 64, 8, 64, 4, 4
PATCHES = (SIDE // PATCH) ** 2
CLOSE = 1e-4
"""Of the largest number of an output: what rounding may change in float32."""


@dataclass(frozen=True)
class Check:
    """What was tried and how it went.

    Attributes:
        what: in words.
        subject: the model, or the operation, and the device.
        passed: whether it holds.
        found: the number that says so, or the error.
        seconds: that it took.
    """

    what: str
    subject: str
    passed: bool
    found: str
    seconds: float


class Block(nn.Module):
    """A block of a plain ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PlainViT(nn.Module):
    """A ViT of PyTorch's modules alone; gives its CLS token, `[batch, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 1 + PATCHES, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        """Of images, `[batch, 3, 64, 64]`."""
        patches = self.stem(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls.expand(len(x), -1, -1), patches), dim=1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, 0]


LAYOUT = Layout(
    family="plain ViT",
    block=f"{__name__}.Block",
    towers=(f"{__name__}.PlainViT",),
    norm1="norm1",
    project=("qkv",),
    heads="heads",
    after_attention=("out",),
    mlp=("norm2", "mlp"),
    patch="stem",
    patches=lambda tower: PATCHES,
    inputs=lambda tower: {"x": torch.empty(1, 3, SIDE, SIDE, device="meta")},
    arguments=(),
)


@dataclass(frozen=True)
class Subject:
    """How a model is made, what its position embeddings are, and how its CLS token is had of images."""

    name: str
    make: Callable[[], nn.Module]
    positions: Callable[[Any], Tensor]
    cls: Callable[[Any, Tensor], Tensor]


def subjects() -> Iterator[Subject]:
    """A plain model, which is known while it is looked at, and one of a library where one is installed."""
    turbovlm.register(LAYOUT)
    try:
        yield Subject("plain PyTorch", PlainViT, lambda model: model.positions, lambda model, x: model(x))
    finally:
        unregister(LAYOUT)
    if importlib.util.find_spec("transformers") is not None:
        yield Subject(
            "transformers ViT",
            _transformers,
            lambda model: model.embeddings.position_embeddings,
            lambda model, x: model(pixel_values=x).last_hidden_state[:, 0],
        )
    elif importlib.util.find_spec("timm") is not None:
        yield Subject("timm ViT", _timm, lambda model: model.pos_embed, lambda model, x: model(x))


def _transformers() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        attn_implementation="sdpa",
    )
    model: nn.Module = transformers.ViTModel(config, add_pooling_layer=False)
    return model


def _timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(SIDE, PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0)
    return model


def run(devices: list[str], compile: bool, advance: Callable[[int, str], object]) -> list[Check]:
    """All checks on all devices.

    Args:
        devices: such as `"cpu"` and `"cuda"`.
        compile: whether `torch.compile` is tried too, which takes a minute.
        advance: given 1 and what is tried, before each.
    """
    checks: list[Check] = []

    def check(what: str, subject: str, attempt: Callable[[], tuple[bool, str]]) -> None:
        advance(1, what)
        begun = time.perf_counter()
        try:
            passed, found = attempt()
        except Exception as error:  # whatever is wrong here is what the command is there to say
            passed, found = False, f"{type(error).__name__}: {error}"
        checks.append(Check(what, subject, passed, found, round(time.perf_counter() - begun, 2)))

    for device in devices:
        check("a merge equals the formulas", f"ops on {device}", lambda d=device: _formulas(d))  # type: ignore[misc]
    tried = {
        "r=0 changes nothing": _nothing,
        "equal patches merge unseen": _equal,
        "remove() restores the model": _removed,
        **({"torch.compile agrees": _compiled} if compile else {}),
    }
    with torch.random.fork_rng(), torch.no_grad():
        for subject in subjects():
            for device in devices:
                for what, attempt in tried.items():
                    given = subject, device
                    check(what, f"{subject.name} on {device}", lambda a=attempt, g=given: a(g[0], *_ready(*g)))  # type: ignore[misc]
    return checks


def _ready(subject: Subject, device: str) -> tuple[nn.Module, Tensor]:
    """A subject's model, the same every time, and an image in which every second patch equals the one before."""
    torch.manual_seed(0)
    columns = torch.randn(1, 3, SIDE, SIDE // PATCH // 2, PATCH)
    model = subject.make().eval()
    subject.positions(model).zero_()  # else equal patches differ
    return model.to(device), columns.repeat_interleave(2, dim=3).flatten(3).to(device)


def count(devices: list[str], compile: bool) -> int:
    """How many checks there will be."""
    libraries = any(importlib.util.find_spec(name) is not None for name in ("transformers", "timm"))
    return len(devices) * (1 + (1 + libraries) * (3 + compile))


@contextlib.contextmanager
def _merging(model: nn.Module) -> Iterator[turbovlm.Handle]:
    """Every second patch into its equal, behind the first block's attention."""
    r = [PATCHES // 2, *[0] * (DEPTH - 1)]
    how: Any = {"partition": "alternate", "degree": "redundancy", "reduce": "merge", "trace": True}
    with turbovlm.apply(model, r=r, **how) as handle:
        yield handle


def _nothing(subject: Subject, model: nn.Module, images: Tensor) -> tuple[bool, str]:
    own = subject.cls(model, images)
    with turbovlm.apply(model, r=0):
        same = torch.equal(own, subject.cls(model, images))
    return same, "bit for bit" if same else "the output differs"


def _equal(subject: Subject, model: nn.Module, images: Tensor) -> tuple[bool, str]:
    own = subject.cls(model, images)
    with _merging(model) as handle:
        off = _off(own, subject.cls(model, images))
        sizes = handle.trace[-1].sizes
    left, sources = sizes.shape[1], float(sizes.sum())
    right = left == 1 + PATCHES // 2 and sources == 1 + PATCHES
    return off <= CLOSE and right, f"{left} of {1 + PATCHES} tokens, off by {off:.0e}"


def _removed(subject: Subject, model: nn.Module, images: Tensor) -> tuple[bool, str]:
    own = subject.cls(model, images)
    handle = turbovlm.apply(model, r=8)
    subject.cls(model, images)
    handle.remove()
    same, left = torch.equal(own, subject.cls(model, images)), len(list(patches_on(model)))
    return same and not left, "bit for bit" if same and not left else f"{left} patches left, output equal: {same}"


def _compiled(subject: Subject, model: nn.Module, images: Tensor) -> tuple[bool, str]:
    with turbovlm.apply(model, r=8):
        eager = subject.cls(model, images)
        compiled: Any = torch.compile(model, fullgraph=True)
        off = _off(eager, subject.cls(compiled, images))
    return off <= CLOSE, f"off by {off:.0e}"


def _off(wanted: Tensor, found: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((wanted - found).abs().max() / wanted.abs().max())


def _formulas(device: str) -> tuple[bool, str]:
    """One merge by `turbovlm.ops`, and by loops in float64: R (6), E = −(1 − R)(1 + √(A/Ā)), means by size."""
    generator = torch.Generator().manual_seed(1917)  # A decides here, and nothing by a hair
    x, A = torch.randn(21, 16, generator=generator).double(), torch.rand(21, generator=generator).double()
    unit, candidates, partners, r = x / x.norm(dim=1, keepdim=True), range(2, 21, 2), range(1, 21, 2), 6
    cosines = {i: {j: float(unit[i] @ unit[j]) for j in partners} for i in candidates}
    best = {i: max(cosines[i], key=lambda j: cosines[i][j]) for i in candidates}
    mean = float(A[list(candidates)].mean())
    E = {i: -(1 - cosines[i][best[i]]) * (1 + (float(A[i]) / mean) ** 0.5) for i in candidates}
    merged = sorted(candidates, key=lambda i: E[i])[-r:]
    groups = [[i, *(j for j in merged if best[j] == i)] for i in range(21) if i not in merged]
    wanted = torch.stack([x[group].mean(dim=0) for group in groups])
    how: Any = {"prefix": 1, "degree": "weighted_distance", "order": "spatial"}
    given = x.float().to(device)[None]
    found = turbovlm.ops.match(given, r, A.float().to(device)[None], **how).merge(given)[0].double().cpu()
    off = _off(wanted, found) if found.shape == wanted.shape else float("inf")
    return off <= CLOSE, f"off by {off:.0e}"
