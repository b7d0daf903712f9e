"""What a model costs: multiply-accumulates of one forward, and measured time and memory."""

from turbovlm.profile.compare import Comparison, Run, compare
from turbovlm.profile.macs import macs
from turbovlm.profile.timing import Quartiles

__all__ = ["Comparison", "Quartiles", "Run", "compare", "macs"]
