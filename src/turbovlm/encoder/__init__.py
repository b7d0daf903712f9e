"""Tokens merged in the blocks of an encoder."""

from turbovlm.encoder.cross_attention import rows
from turbovlm.encoder.layout import Layout, variant

__all__ = ["Layout", "rows", "variant"]
