"""What people do with a model, each as a check that an accelerated one does it right: `check(case)` returns or raises.

Each compares with a value that was had another way: the accelerated model by itself, a loop by hand, a model whose
weights were changed instead.
"""

from matrix_checks import hooks, adapters, training, programs, outputs, pipelines  # isort: skip  # the table's order
from matrix_checks.check import CHECKS, Check, Flat, close, gradients

__all__ = [
    "CHECKS",
    "Check",
    "Flat",
    "adapters",
    "close",
    "gradients",
    "hooks",
    "outputs",
    "pipelines",
    "programs",
    "training",
]
