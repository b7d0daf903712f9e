"""What a model costs: multiply-accumulates of one forward, beside the published ones."""

from turbovlm.profile.macs import macs

__all__ = ["macs"]
