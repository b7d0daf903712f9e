"""The mathematics of Turbo on plain tensors, for those who bring their own model."""

from turbovlm.ops.attention import proportional_attention, size_bias
from turbovlm.ops.degree import LayeredDegree, information_degree
from turbovlm.ops.informativity import mutual_redundancy, semantic_value
from turbovlm.ops.matching import Merge, bipartite_merge, match
from turbovlm.ops.partition import Partition, partition_tokens

__all__ = [
    "LayeredDegree",
    "Merge",
    "Partition",
    "bipartite_merge",
    "information_degree",
    "match",
    "mutual_redundancy",
    "partition_tokens",
    "proportional_attention",
    "semantic_value",
    "size_bias",
]
