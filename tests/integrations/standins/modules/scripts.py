"""Stands in for the module of this name of the web UIs."""

from __future__ import annotations

AlwaysVisible = object()


class Script:
    infotext_fields = None
