"""Which tokens of an image are merged: R from their features, A from the image's own attention or the text's.

One token in every 2×2 cell is a destination, so what is restored is never far from its place. Of several images in one
sequence each merges within itself, and one ranking says of which how many: references, which are no noise, give more
than what is denoised, of which the output is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.config import DenoiseConfig
from turbovlm.diffusion.families import Part
from turbovlm.diffusion.grids import Grids, Unread, count_gone, share_gone, square
from turbovlm.diffusion.positions import split_text
from turbovlm.diffusion.rank import choose, choose_unread, compare
from turbovlm.diffusion.run import Choice, Run
from turbovlm.diffusion.whole import own_call
from turbovlm.errors import StateError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.merging import merge_chosen
from turbovlm.ops.whole import Rules

LEAST_TOKENS = 64
"""Tokens below which an image is left whole, unless `min_tokens` asks for more."""

WHOLE_BLOCK = "block"
"""The component of what is no part, but a block."""


@dataclass(frozen=True)
class Site:
    """One part of one block, and the group of blocks whose tokens are merged alike.

    Attributes:
        name: path of the part in the denoiser.
        part: what it is; of a stack of blocks, `WHOLE_BLOCK`.
        group: names the blocks that compare their tokens once.
        index: of the group in the denoiser, from 0.
        guide: path, from the denoiser, of the self-attention whose queries and keys say what matters.
        key: names the parts that share a merge: those of a group that are guided alike.
        library: `Block.library`.
    """

    name: str
    part: Part
    group: str
    index: int
    guide: str
    key: str
    library: str

    @property
    def block(self) -> str:
        """Path of the block."""
        return self.name.removesuffix(f".{self.part.path}")


def least_tokens(config: DenoiseConfig) -> int:
    """Tokens below which an image is left whole."""
    return max(config.min_tokens, LEAST_TOKENS)


def choice_of(run: Run, site: Site, module: nn.Module | None, x: Tensor, text: Any, kwargs: dict[str, Any]) -> Choice:
    """What the group of a part reads, chosen by the first of its parts that is called.

    Args:
        module: the part's; None of a block.
        x: what it is given, `[batch, tokens, width]`, text in front left out.
        text: what it attends to, `[batch, words, width]`, where it does; the first, where there are several.
        kwargs: what else it is given by name; an `attention_mask` is added to the attention's logits,
            `[batch, 1, words]`: words of −10,000 are padding.

    Raises:
        ConfigError: the tokens fill no grid that is known.
        StateError: some of the latents only, or of the tokens.
    """
    if x.shape[0] != run.latents:
        raise StateError(
            f"{site.name} was given {x.shape[0]} of {run.latents} latents: something cuts the batch into chunks, which "
            f"cannot be merged; stop that, or {_without(site)}"
        )
    choice = run.choices.get(site.key)
    if choice is None or (choice.merge is not None and not _fits(choice, site, x)):
        choice = run.choices[site.key] = _choose(run, site, module, x, text, kwargs.get("attention_mask"))
    return choice


def _without(site: Site) -> str:
    return (
        "remove turbovlm" if site.part.component == WHOLE_BLOCK else f"leave {site.part.component!r} out of components"
    )


def _fits(choice: Choice, site: Site, x: Tensor) -> bool:
    """Whether what an earlier step chose is of as many latents and tokens as `x`."""
    assert choice.merge is not None
    enough = choice.tokens == x.shape[1] if site.part.text is None else choice.tokens <= x.shape[1]
    return enough and choice.merge.weights.shape[0] == x.shape[0]


@torch.no_grad()
def _choose(run: Run, site: Site, part: nn.Module | None, x: Tensor, text: Any, bias: Tensor | None) -> Choice:
    config: DenoiseConfig = run.feature.config
    lie = run.grids or ((1, *square(x.shape[1])),)
    tokens = lie.tokens if isinstance(lie, Unread) else sum(map(math.prod, lie))
    if x.shape[1] != tokens and (site.part.text is None or x.shape[1] < tokens):
        kind = type(run.denoiser.get_submodule(site.guide.rpartition(".")[0]))
        raise StateError(
            f"{site.name}, in a {kind.__qualname__} of {kind.__module__}, was given {x.shape[1]} of {tokens} tokens: "
            f"something cuts them into chunks, or merges them too; stop that, or {_without(site)}"
        )
    least, share = least_tokens(config), _share(run, tokens)
    grids: Grids = ((1, 1, tokens),) if isinstance(lie, Unread) else lie
    if isinstance(lie, Unread):
        gone = share_gone(tokens, share) if tokens >= least else 0
    else:
        gone = count_gone([grid for grid in lie if math.prod(grid) >= least], share)
    if gone == 0:
        return Choice(grids, None)
    features, _ = split_text(x, tokens, site.part.text)
    semantic = None
    if run.feature.semantic:
        semantic = _averaged(run, _semantic(run.denoiser.get_submodule(site.guide), part, features, text, bias))
    rules = Rules(config.degree, config.alpha, config.seed, "spatial", config.reduce)
    if isinstance(lie, Unread):
        averaged = _averaged(run, features)
        chosen = choose_unread(averaged, lie, semantic, least, share, gone, run.path, site.index, rules)
    else:
        images = [(*grid, math.prod(grid) >= least) for grid in lie]
        if site.group not in run.compared:
            run.compared[site.group] = compare(_averaged(run, features), images, run.path)
        chosen = choose(features, *run.compared[site.group], semantic, images, gone, run.path, site.index, rules)
    merge = merge_chosen(chosen, tokens, precise_dtype(features), reduce=config.reduce, path=run.path)
    return Choice(grids, merge)


def _share(run: Run, tokens: int) -> float:
    """Share of `tokens` tokens that is read: where resolutions differ, by how often the image's rows were halved."""
    if not isinstance(run.share, tuple):
        return run.share
    halved = 0
    while halved < len(run.share) - 1 and 2 * 4**halved * tokens <= run.finest:  # nearer to four times fewer
        halved += 1
    return run.share[halved]


def _averaged(run: Run, x: Tensor) -> Tensor:
    """The average over images with the same latent: `[batch, …]`."""
    if run.same_latent is None:
        return x
    finite = x.flatten(1).nan_to_num()  # of one image that is not, nothing gets into the others
    return (run.same_latent.to(x.dtype) @ finite).view_as(x)


def _semantic(guide: Any, part: Any, x: Tensor, text: Any, bias: Tensor | None) -> Tensor:
    """A of every token of `x`, `[batch, tokens]`: by the text in cross-attention, elsewhere by the guide."""
    if part is None:  # a block, which is given its tokens before it norms them
        return mean_attention(guide, F.layer_norm(x, x.shape[-1:]))
    if text is not None and getattr(part, "is_cross_attention", False):
        return text_attention(part, x, text, bias)
    if getattr(guide, "is_cross_attention", False):  # a block without self-attention: nothing says what matters
        return x.new_zeros(x.shape[:2])
    return mean_attention(guide, x)


def mean_attention(attention: Any, x: Tensor) -> Tensor:
    """A: the attention that the mean query pays to each token of `x`, `[batch, tokens]`, sums to 1."""
    query = own_call(attention.to_q)(x.mean(dim=1, keepdim=True)).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    norms = getattr(attention, "norm_q", None), getattr(attention, "norm_k", None)
    return _attention_row(attention.to_k, norms[1], query if norms[0] is None else own_call(norms[0])(query), x)


def text_attention(attention: Any, x: Tensor, text: Any, bias: Tensor | None) -> Tensor:
    """A: the attention that the mean word pays to each token of `x`, `[batch, tokens]`, sums to 1.

    The image's tokens ask and the words answer in cross-attention; here their product is read the other way round.
    """
    words = text[0] if isinstance(text, tuple | list) else text
    if bias is None:
        word = words.mean(dim=1, keepdim=True)
    else:
        word = torch.matmul(bias.reshape(len(words), 1, -1).softmax(dim=-1).to(words.dtype), words)
    key = own_call(attention.to_k)(word).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    norms = getattr(attention, "norm_q", None), getattr(attention, "norm_k", None)
    return _attention_row(attention.to_q, norms[0], key if norms[1] is None else own_call(norms[1])(key), x)


def _attention_row(project: Any, norm: Any, guide: Tensor, x: Tensor) -> Tensor:
    """The attention of `guide`, `[batch, heads, 1, head_dim]`, to the projected tokens of `x`, averaged over heads.

    A projection is linear in the tokens, so it is not made of all of them: its product with the guide is that of the
    token with one vector per head. Unless there is more to it: a norm, LoRA, or weights that are elsewhere, or in
    another dtype, until it is called.
    """
    heads, width = guide.shape[1], guide.shape[-1]
    guide = guide * width**-0.5
    if norm is None and type(project) is nn.Linear and "forward" not in project.__dict__ and _is_plain(project.weight):
        along = torch.einsum("bhqd,hdc->bhc", guide, project.weight.view(heads, width, -1))
        scores = torch.matmul(x, along.transpose(1, 2))
    else:
        made = own_call(project)(x).unflatten(-1, (heads, width))
        made = made if norm is None else own_call(norm)(made.transpose(1, 2)).transpose(1, 2)
        scores = (made * guide.transpose(1, 2)).sum(dim=-1)
    return scores.float().softmax(dim=1).mean(dim=2)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is a tensor of PyTorch's own, not one that a quantiser or FSDP has put there."""
    return type(weight) is nn.Parameter
