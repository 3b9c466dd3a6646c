"""Writes README's tables of attacks, defenses, data and models from the registry: python -m experiments.readme."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from experiments.listing import first_line, shown
from simulator.registry import Kind

README = Path(__file__).parents[1] / "README.md"


def table(kind: Kind) -> str:
    """One row for each name that a user may give, with the first line of its documentation."""
    rows = [f"| `{name}` | {first_line(cls)} |" for name, cls in shown(kind, print)]
    return "\n".join([f"| {kind} | |", "|---|---|", *rows])


def updated(text: str) -> str:
    """``text`` with each table between its markers written anew."""
    for kind in get_args(Kind):
        block = f"<!-- {kind} -->\n{table(kind)}\n<!-- /{kind} -->"
        text = re.sub(rf"<!-- {kind} -->.*?<!-- /{kind} -->", lambda _, block=block: block, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
