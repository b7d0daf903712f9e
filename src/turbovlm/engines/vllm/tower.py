"""The attention A of vLLM's vision towers: the row of the guide, of queries and keys that the tower computes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import ReadConfig
from turbovlm.encoder.attention import attention_of_guide
from turbovlm.encoder.feature import EncoderFeature
from turbovlm.engines.vllm.families import ServedFamily
from turbovlm.errors import StateError


class GuideRows:
    """Collects the guide's rows of the images that a tower encodes."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.lengths: list[int] | None = None

    def start(self, grids: Tensor | None) -> None:
        """Forget what was collected; `grids`, `[images, 3]`, says where images end that are one sequence."""
        self.rows = []
        self.lengths = None if grids is None else grids.prod(dim=-1).tolist()

    def of_images(self, tiles: Sequence[int]) -> list[list[Tensor]]:
        """A of the patches of each of an image's tiles, `[patches]`, those in front included; `tiles` says how many.

        Raises:
            StateError: the tower has not encoded as many.
        """
        if len(self.rows) != sum(tiles):
            raise StateError(
                f"the tower's attention came for {len(self.rows)} of {sum(tiles)} images: which tokens are read goes "
                "by it; visual_select='redundancy' goes by none"
            )
        rows = iter(self.rows)
        return [[next(rows) for _ in range(count)] for count in tiles]


def rows_of_attention(family: ServedFamily, model: Any) -> GuideRows:
    """Those of a tower that merges nothing, by a hook in front of the attention of the block that guides.

    vLLM's towers call it with queries and keys of all their heads in this process, rotated where they rotate.
    """
    found, attention = GuideRows(), family.guide(model)
    heads, scale = int(attention.num_heads), float(attention.scale)
    first = family.cls is not None and family.cls(model.config)

    def collect(module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        query, key = (args[0], args[1]) if args else (kwargs["query"], kwargs["key"])
        rows = guide_rows(query, key, heads, scale, first, found.lengths)
        found.rows += [_mean_over_processes(row) for row in rows]

    attention.register_forward_pre_hook(collect, with_kwargs=True)
    return found


def rows_of_merged(tower: nn.Module, encoder: EncoderFeature, reading: ReadConfig) -> GuideRows:
    """Those of a tower that merges, by a hook in front of its last block: patches of one token share what it gets."""
    found, block = GuideRows(), tower.get_submodule(encoder.names[-1])
    prefix, guidance = encoder.shape.prefix, encoder.guidance

    def collect(module: Any, args: Sequence[Any]) -> None:
        found.rows += attention_of_guide(block, encoder.layout, reading, prefix, guidance, args[0], {})

    block.register_forward_pre_hook(collect)
    return found


@torch.no_grad()
def guide_rows(
    query: Tensor, key: Tensor, heads: int, scale: float, first: bool, lengths: Sequence[int] | None
) -> list[Tensor]:
    """The mean over heads of `softmax(g·Kᵀ·scale)`, for each image, `[patches]`.

    Args:
        query, key: `[images, tokens, heads · width]`, or `[…, heads, width]`; a batch of one where images are one
            sequence.
        first: whether the guide g is the first token, CLS; else it is the mean query.
        lengths: how many patches each image of a sequence has.
    """
    images, tokens = query.shape[:2]
    q, k = (values.reshape(images, tokens, heads, -1).float() for values in (query, key))
    if lengths is None:
        each = list(zip(q, k))
    else:
        each = list(zip(torch.split(q[0], list(lengths)), torch.split(k[0], list(lengths))))
    found = []
    for queries, keys in each:
        guide = queries[0] if first else queries.mean(dim=0)
        scores = torch.einsum("hd,nhd->hn", guide * scale, keys)
        found.append(scores.softmax(dim=-1).mean(dim=0))
    return found


def _mean_over_processes(row: Tensor) -> Tensor:
    """The mean over the processes that share a tower's heads, so that all of them choose the same tokens."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    processes = get_tensor_model_parallel_world_size()
    if processes == 1:
        return row
    mean: Tensor = tensor_model_parallel_all_reduce(row) / processes
    return mean
