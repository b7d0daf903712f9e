"""Stands in for ComfyUI's module of this name."""

from __future__ import annotations

from comfy.ldm.modules.attention import Row


class UNetModel(Row):
    pass
