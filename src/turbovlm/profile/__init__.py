"""What a model costs: multiply-accumulates, measured time and memory, and how far merging changes its images."""

from turbovlm.profile.compare import compare
from turbovlm.profile.comparison import Comparison, Drift, Generation, Run, Timing
from turbovlm.profile.images import compare_images
from turbovlm.profile.macs import macs
from turbovlm.profile.quantize import QUANTIZATIONS, quantize, quantized, weight_bytes
from turbovlm.profile.timing import Quartiles

__all__ = [
    "QUANTIZATIONS",
    "Comparison",
    "Drift",
    "Generation",
    "Quartiles",
    "Run",
    "Timing",
    "compare",
    "compare_images",
    "macs",
    "quantize",
    "quantized",
    "weight_bytes",
]
