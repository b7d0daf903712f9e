"""What a model costs: multiply-accumulates, measured time and memory, and how far merging changes its pictures."""

from turbovlm.profile.compare import Comparison, Run, compare
from turbovlm.profile.macs import macs
from turbovlm.profile.pictures import Drift, PictureComparison, PictureRun, compare_pictures
from turbovlm.profile.quantize import QUANTIZATIONS, quantize, quantized, weight_bytes
from turbovlm.profile.timing import Quartiles

__all__ = [
    "QUANTIZATIONS",
    "Comparison",
    "Drift",
    "PictureComparison",
    "PictureRun",
    "Quartiles",
    "Run",
    "compare",
    "compare_pictures",
    "macs",
    "quantize",
    "quantized",
    "weight_bytes",
]
