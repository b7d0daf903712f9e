"""The evidence behind `turbovlm`: evaluation, the paper's tables and figures, a demo, and small trained models."""

__version__ = "0.2.0"
