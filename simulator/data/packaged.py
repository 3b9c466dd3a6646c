"""Files inside installed packages: found by path, so that a package is a container and none of its code runs."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from simulator.errors import SpecError


def packaged(distribution: str, member: str) -> Path:
    """Return the path of ``member`` (a file or folder) in an installed distribution; nothing is imported or downloaded.

    Raises:
        SpecError: the distribution is not installed, or this version of it does not ship the member.
    """
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(member)))
    except importlib.metadata.PackageNotFoundError as error:
        raise SpecError(f"package {distribution} must be installed for its {member}, got none. Run: pip install {distribution}") from error
    if not path.exists():
        raise SpecError(f"package {distribution} must ship {member}, got a version without it. Use the data set 'synthetic' instead.")
    return path
