"""Triton kernels for CUDA: attention in proportion to sizes, similarity, choices, the merge, and what is restored.

All are operators of their own, opaque to `torch.compile`, or within one. Without Triton they can be imported, not
called.
"""

from turbovlm.ops.kernels.attention import attends, attention_rows, biased_attention
from turbovlm.ops.kernels.books import MOST_BOOKED, merge_books
from turbovlm.ops.kernels.choosing import MOST_RANKED, RANKED, choose
from turbovlm.ops.kernels.common import DTYPES, HAS_TRITON, LEAST_CAPABILITY, usable
from turbovlm.ops.kernels.greedy import MOST_TAKEN_FROM, take_in_turn
from turbovlm.ops.kernels.merging import mean_of_bags, merge_tokens
from turbovlm.ops.kernels.replay import replayed
from turbovlm.ops.kernels.restoring import restore
from turbovlm.ops.kernels.similarity import candidates_at_a_time, most_similar

__all__ = [
    "DTYPES",
    "HAS_TRITON",
    "LEAST_CAPABILITY",
    "MOST_BOOKED",
    "MOST_RANKED",
    "MOST_TAKEN_FROM",
    "RANKED",
    "attends",
    "attention_rows",
    "biased_attention",
    "candidates_at_a_time",
    "choose",
    "mean_of_bags",
    "merge_books",
    "merge_tokens",
    "most_similar",
    "replayed",
    "restore",
    "take_in_turn",
    "usable",
]
