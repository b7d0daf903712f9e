"""Stands in for Forge's module of this name, whose blocks are ComfyUI's."""

from __future__ import annotations

from pathlib import Path

SAME = Path(__file__).parents[2] / "comfy" / "ldm" / "modules" / "attention.py"
exec(compile(SAME.read_text(), str(SAME), "exec"))


class IntegratedUNet2DConditionModel(Row):  # noqa: F821
    pass
