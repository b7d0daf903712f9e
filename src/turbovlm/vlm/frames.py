"""Which tokens of a video are read: frame by frame, by how far they have changed.

A token's change is D, how far it is from the token at its place in the frame before; all of the first frame is new. D
is a factor of the token's weight, and the weights of a frame's tokens say how many of them it keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.config import ReadConfig
from turbovlm.errors import StateError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.greedy import choose_greedily
from turbovlm.vlm.marks import GRIDS
from turbovlm.vlm.question import ImageText
from turbovlm.vlm.select import ROUNDING, log_weights, with_rest
from turbovlm.vlm.selection import Selection

LEAST_CHANGE = 1e-3
"""D of a token that has not changed."""


def change(frames: Tensor) -> Tensor:
    """D of every token of a video, `[frames, tokens]`, from its features, `[frames, tokens, width]`.

    One less the cosine to the token at the same place in the frame before, in relation to the mean over all pairs of
    the video's tokens, so that D is of no scale; at most 1, which every token of the first frame has.
    """
    x = F.normalize(frames.to(precise_dtype(frames)), dim=-1).nan_to_num()
    apart = 1 - x.mean(dim=(0, 1)).square().sum()
    moved = 1 - (x[1:] * x[:-1]).sum(dim=-1)
    return F.pad((moved / apart.clamp(min=ROUNDING)).clamp(LEAST_CHANGE, 1), (0, 0, 1, 0), value=1.0)


def budgets(shares: Tensor, tokens: int, k: int, left: Tensor | None = None) -> Tensor:
    """How many of a frame's `tokens` are read, `[frames]`, `k` in all, in proportion to `shares`, `[frames]`.

    Of a frame where only some are left, `left`, `[frames]`, no more than these.

    The method of highest averages (Sainte-Laguë): the j-th token goes to a frame at share / (j − ½). Every frame has
    one before any has two, the largest shares first; of equal ones the first.
    """
    scores = (shares / shares.max()).unsqueeze(1) / (torch.arange(tokens, device=shares.device) + 0.5)
    scores[:, 0] += 3  # above all others, which are 2/3 at most
    if left is not None:
        scores[torch.arange(tokens, device=shares.device) >= left.unsqueeze(1)] = -1
    given = scores.flatten().argsort(descending=True, stable=True)[:k] // tokens
    return torch.bincount(given, minlength=len(shares))


def select_frames(
    features: Tensor,
    semantic: Tensor | None,
    k: int,
    frames: int,
    config: ReadConfig,
    text: ImageText,
    left: Tensor | None = None,
) -> Selection:
    """Choose `k` of the n tokens of one video, a number of each frame.

    A token's weight is w = (A/Ā)^α · e^(question · Q) · D^change, Ā the video's mean. The sums of w say how many tokens
    a frame keeps (`budgets`); these are chosen as those of an image are (`ops.greedy.choose_greedily`), by w. What is
    not read is averaged into the most similar token of the whole video, where it is not dropped. A token behind the
    frames, as a newline, stays.

    Args:
        features: `[1, n, width]`, frame after frame.
        semantic: A of every token, `[1, n]`; None where α is 0.
        k: tokens left, 1 ≤ k < n.
        frames: how many there are.
        config: `visual_select`, a greedy one, `reduce`, `alpha`, `question` and `change` are used.
        text: what the video's prompt says.
        left: the tokens that are chosen from, `[m]`, some of each frame, where the others are left out already: they
            count for D alone, and the selection is one of those at `left`.
    """
    assert isinstance(config.visual_select, str)
    n = features.shape[1]
    tokens = n // frames
    behind = torch.arange(frames * tokens, n, device=features.device)
    behind = behind if k > len(behind) else behind[:0]
    by_frame = features[0, : frames * tokens].view(frames, tokens, -1)
    weights = change(by_frame).log() * config.change
    known = log_weights(features, semantic, config, text)
    if known is not None:
        weights = weights + known[0, : frames * tokens].view_as(weights)
    here = None if left is None else torch.zeros_like(features[0, :, 0]).index_fill(0, left, 1)
    here = None if here is None else here[: frames * tokens].view_as(weights)
    if here is not None:
        weights = weights.masked_fill(here == 0, -torch.inf)
    shares = weights.logsumexp(dim=1)
    most_of_each = None if here is None else here.sum(dim=1)
    counts = budgets((shares - shares.max()).exp(), tokens, k - len(behind), most_of_each)
    most = int(counts.max())
    order = choose_greedily(by_frame, most, config.visual_select, weights, here).order
    places = order + torch.arange(0, frames * tokens, tokens, device=order.device).unsqueeze(1)
    read = places[torch.arange(most, device=order.device) < counts.unsqueeze(1)].sort().values
    kept = torch.cat([read, behind])
    if left is not None:
        features, kept = features[:, left], torch.searchsorted(left, kept)
    return with_rest(features, kept.unsqueeze(0), config, None)


def frames_of(config: ReadConfig, outputs: Any, modality: str, counts: list[int]) -> list[int]:
    """How many frames each image or video has, of `counts` tokens each; 1 where they are not chosen from apart.

    Raises:
        StateError: the outputs of the library are without the grids of their videos, or these are of other frames.
    """
    if not config.change or modality != "video":
        return [1] * len(counts)
    said = getattr(outputs, GRIDS, None)
    if said is None:
        raise StateError(
            f"change={config.change:g}: encoded videos come without the number of their frames: encode them with this "
            "model's own get_video_features while it is accelerated, or leave change out"
        )
    found = [int(grid[0, 0]) for grid in said]
    for frames, n in zip(found, counts, strict=True):
        if n < frames or n % frames > 1:
            raise StateError(
                f"change={config.change:g}: {n} visual tokens are not those of {frames} frames of as many tokens, with "
                "or without one behind them: leave change out"
            )
    return found


def join_frames(sizes: list[list[int]], columns: Tensor, width: int) -> tuple[list[list[int]], list[int]]:
    """The images that are frames of one video, where a video's frames are images of the prompt.

    They are those of one prompt that follow one another, have as many tokens, and of which each stands alone: what
    belongs to one image, as its tiles, has no text between.

    Args:
        sizes: tokens of each image, those of each entry of the library's outputs.
        columns: where they stand in the prompts, row after row, `[tokens]`.
        width: columns of a prompt.

    Returns:
        `sizes` with those of a video as one entry, and how many frames each has.
    """
    counts = [n for entry in sizes for n in entry]
    ends = [(int(places[0]), int(places[-1])) for places in torch.split(columns, counts)]
    rows = [first // width for first, _ in ends]
    joined = [rows[i] == rows[i - 1] and ends[i][0] == ends[i - 1][1] + 1 for i in range(1, len(counts))]
    alone = [not (before or behind) for before, behind in zip([False, *joined], [*joined, False])]
    videos: list[list[int]] = []
    for i, n in enumerate(counts):
        if i and alone[i] and alone[i - 1] and rows[i] == rows[i - 1] and n == counts[i - 1]:
            videos[-1].append(n)
        else:
            videos.append([n])
    return [[sum(video)] for video in videos], [len(video) for video in videos]
