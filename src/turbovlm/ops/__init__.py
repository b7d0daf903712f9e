"""The mathematics of Turbo on plain tensors, for those who bring their own model."""

from turbovlm.ops.attention import proportional_attention, semantic_value, size_bias
from turbovlm.ops.degree import LayeredDegree, information_degree
from turbovlm.ops.merging import Merge, Ranking, match, merge_ranked, mutual_redundancy, rank_candidates
from turbovlm.ops.partition import Partition, partition_tokens

__all__ = [
    "LayeredDegree",
    "Merge",
    "Partition",
    "Ranking",
    "information_degree",
    "match",
    "merge_ranked",
    "mutual_redundancy",
    "partition_tokens",
    "proportional_attention",
    "rank_candidates",
    "semantic_value",
    "size_bias",
]
