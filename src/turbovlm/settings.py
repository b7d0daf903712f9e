"""What the settings of all three workflows share: how they are checked, said, changed and saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from turbovlm.checks import brief, called, check_choice, check_number
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import DEGREES, DegreeFunction, default_alpha

REDUCTIONS = ("merge", "keep_norm", "prune")
WITHOUT_ALPHA = ("coupled_division", "redundancy", "semantics", "random")
"""Degrees in which alpha has no part."""


class Settings:
    """Base of the three classes of settings, which are frozen dataclasses."""

    degree: str | DegreeFunction
    alpha: float | None
    _amounts: ClassVar[tuple[str, ...]]

    @property
    def amount(self) -> str:
        """What was asked for, as it was written: `"r=16"`, `"keep=0.25"`, `"visual_keep=0.5"`."""
        return self._written(self._amounts)

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON.

        Raises:
            ConfigError: the degree is a callable other than `LayeredDegree`, which JSON has no word for.
        """
        from turbovlm.settings_file import write_settings

        write_settings(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Read what `save`, or `Calibration.save`, has written.

        Raises:
            ConfigError: no such file, another format, a setting that is unknown or wrong, or settings of another class.
        """
        from turbovlm.settings_file import read_settings

        return read_settings(path, cls)

    @property
    def ranking(self) -> str:
        """The degree and its alpha, in words: `"degree=weighted_distance, alpha=1"`."""
        if callable(self.degree):
            return f"degree={called(self.degree)}"
        alpha = default_alpha(self.degree) if self.alpha is None else self.alpha
        return f"degree={self.degree}" + ("" if self.degree in WITHOUT_ALPHA else f", alpha={alpha:g}")

    @classmethod
    def unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """The fields that nothing reads beside those `values`, with the reason; fields that are missing have defaults.

        A seed is none of them, although some settings draw nothing: a program may number its runs by it.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls._unread({**defaults, **values})

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        degree = values["degree"]
        if callable(degree):
            return {"alpha": "a degree that is a callable has its own numbers: put it there"}
        without = isinstance(degree, str) and degree in WITHOUT_ALPHA  # else it is refused by its own check
        return {"alpha": f"degree={brief(degree)} has no alpha"} if without else {}

    def changed(self, **changes: Any) -> Any:
        """The settings with changes, and with the defaults of those fields that nothing reads then.

        Raises:
            ConfigError: as when the settings are made.
        """
        values = {**vars(self), **changes}
        unread = self.unread(values)
        return type(self)(**{name: value for name, value in values.items() if name not in unread})

    def _check_unread(self) -> None:
        """See that every field that is not at its default has an effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name, reason in self.unread(vars(self)).items():
            if (value := getattr(self, name)) != defaults[name]:
                raise ConfigError(f"{name}={brief(value)}: it would have no effect: {reason}")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_degree(self) -> None:
        if not callable(self.degree):
            check_choice("degree", self.degree, DEGREES, extra=" or a callable (R, A, block) -> E")
        if self.alpha is not None:
            self._set(alpha=check_number("alpha", self.alpha, minimum=0))

    def _written(self, names: Sequence[str]) -> str:
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        shown = {name: list(value) if isinstance(value, tuple) else value for name, value in present.items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
