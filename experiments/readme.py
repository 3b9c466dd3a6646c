"""Writes README's tables of attacks, defenses, data and models from the registry, and its figures from the claims:
python -m experiments.readme.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from experiments.listing import first_line, shown
from experiments.readme_figures import blocks
from simulator.registry import Kind

README = Path(__file__).parents[1] / "README.md"


def table(kind: Kind) -> str:
    """One row for each name that a user may give, with the first line of its documentation."""
    rows = [f"| `{name}` | {first_line(cls)} |" for name, cls in shown(kind, print)]
    return "\n".join([f"| {kind} | |", "|---|---|", *rows])


def updated(text: str) -> str:
    """``text`` with each block between its markers written anew.

    Raises:
        ValueError: a block that has no markers, or two.
    """
    for name, body in {**{kind: table(kind) for kind in get_args(Kind)}, **blocks()}.items():
        marked = f"<!-- {name} -->\n{body}\n<!-- /{name} -->".replace("\\", r"\\")  # re.subn reads backslashes
        text, places = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", marked, text, flags=re.DOTALL)
        if places != 1:
            raise ValueError(f"README must hold the markers of {name!r} once, got {places}. Add <!-- {name} --> and <!-- /{name} -->.")
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
