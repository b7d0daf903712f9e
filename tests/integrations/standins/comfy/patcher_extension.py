"""Stands in for ComfyUI's module of this name: functions around calls of a model."""

from __future__ import annotations


class WrappersMP:
    APPLY_MODEL = "apply_model"


class Executor:
    """Calls one wrapper after another, and at last the method that they stand around."""

    def __init__(self, method, class_obj, wrappers):
        self.method, self.class_obj, self.wrappers = method, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.method(*args, **kwargs)
        first, *rest = self.wrappers
        return first(Executor(self.method, self.class_obj, rest), *args, **kwargs)
