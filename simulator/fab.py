"""The Flower App Bundle: what ``flwr run`` ships to every process, staged from the code that runs here.

A checkout has it in place (``flwr run .`` reads ``[tool.flwr.app]`` in pyproject.toml); an installed wheel has no pyproject.toml,
so both are staged alike. A test keeps :func:`manifest` equal to pyproject.toml.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tomli_w

PACKAGES = ("simulator", "clients", "server", "defenses")
"""What the two apps import; neither attacks nor experiments leave this machine."""

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds our packages: the checkout, or site-packages."""


def manifest() -> dict[str, Any]:
    """The table ``[tool.flwr.app]``: what to ship, where the apps are, and the settings that a run may override."""
    return {
        "publisher": "fedpeek",
        "fab-include": [f"{package}/**/*.py" for package in PACKAGES],
        "components": {"serverapp": "server.app:app", "clientapp": "clients.app:app"},
        "config": {"world": "", "out-dir": ""},
    }


def stage(directory: Path) -> Path:
    """Copy our .py files and a pyproject.toml into ``directory``, which must be new; return it.

    No data goes along: clients recompute theirs from the world. The version is of no consequence, Flower tells bundles
    apart by their digest.
    """
    directory.mkdir(parents=True)
    for package in PACKAGES:
        for source in sorted((ROOT / package).rglob("*.py")):
            target = directory / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    project = {"name": "fedpeek", "version": "0.0.0", "license": {"text": "Apache-2.0"}}
    (directory / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": manifest()}}}))
    return directory
