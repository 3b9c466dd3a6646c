"""Writes docs/defenses from the defenses' documentation and, where there are any, measurements: python -m experiments.defense_pages.

What was measured comes from :mod:`experiments.measurements`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments import measurements
from experiments.listing import first_line, meanings, settings
from experiments.report import measured, pareto
from experiments.report.headline import rows_of
from simulator import lookup as registry
from simulator.errors import SpecError

PAGES = Path(__file__).parents[1] / "docs" / "defenses"

PLOT = "pareto.png"
DRAWN = (
    f"![Accuracy lost against leakage's upper limit, one bubble an arm]({PLOT})\n\nAccuracy lost against the undefended arm, and the upper "
    "limit of what leaks all the same: by identification, and by PSNR above the floor. A bubble's area is the client's CPU time; hollow "
    "arms are dominated, pale ones may be. Tuned DP-SGD and plain Gaussian noise are the baselines that a heuristic must beat.\n\n"
)

SECTIONS = {
    "Source:": "Source",
    "Deviations:": "Deviations from it",
    "Hook:": "Hook",
    "Hooks:": "Hook",
    "What it protects:": "What it protects",
    "What it does not protect:": "What it does not protect",
    "Broken by:": "Broken by",
    "Cost:": "Cost",
    "Measured:": "Measured",
}
"""What a paragraph of a module's documentation may begin with, and the heading that it gets."""

ORDER = (
    "What it does", "What it protects", "What it claims", "What it does not protect", "Broken by", "Measured", "Measured on our data",
    "Settings", "Hook", "How it works", "Cost", "Source", "Deviations from it",
)  # fmt: skip

REQUIRED = ("Source", "Deviations from it", "Hook", "What it protects", "What it does not protect", "Broken by")
"""Headings without which a defense is not documented."""


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    found = measurements.content()
    rows, lacking = rows_of(found), measurements.shortcomings(found)
    names = registry.names("defenses")
    written = {f"{each}.md": page(registry.get("defenses", each), rows) for each in names}
    lines = [f"- [{each}]({each}.md): {first_line(registry.get('defenses', each))}" for each in names]
    intro = (
        "# Defenses\n\nOne page a defense, written from its documentation by `python -m experiments.defense_pages`: where it acts, what it "
        "protects, what it does not, and the attack that breaks it.\n\n"
    )
    said = f"{lacking}\n\n" if lacking else ""
    return {"README.md": intro + said + (DRAWN if rows else "") + "\n".join(lines) + "\n", **written}


def draw() -> None:
    """Draw the Pareto plot of what was measured, if anything was."""
    if rows := rows_of(measurements.content()):
        pareto.pareto(rows).savefig(PAGES / PLOT, dpi=100, metadata={"Software": None})


def page(cls: type[Any], rows: Sequence[Mapping[str, object]] = ()) -> str:
    """The page of one defense."""
    parts = sections(inspect.getmodule(cls).__doc__ or "")
    body = [f"# {cls.name}", first_line(cls)]
    parts |= {"What it does": parts.pop(""), "Settings": _settings(cls)}
    if table := _table(cls.name, rows):
        parts["Measured on our data"] = table
    body += [f"## {heading}\n\n{parts[heading]}" for heading in ORDER if heading in parts]
    return "\n\n".join(body) + "\n"


def sections(doc: str) -> dict[str, str]:
    """The parts of a module's documentation by heading, as Markdown; what comes before the first is under ""."""
    found: dict[str, list[str]] = {"": []}
    heading = ""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.splitlines()
        if not heading and all(line.startswith("    ") for line in lines):
            found[""].append(f"```text\n{inspect.cleandoc(block)}\n```")
            continue
        if heading == "Hook" and not _starts(lines[0]):
            heading = "What it claims" if block.startswith("The claim") else "How it works"
        starts = [place for place, line in enumerate(lines) if _starts(line)]
        for begin, end in pairwise(sorted({0, *starts, len(lines)})):
            start = _starts(lines[begin])
            heading = SECTIONS[start] if start else heading
            found.setdefault(heading, []).append(_prose([lines[begin].removeprefix(start), *lines[begin + 1 : end]]))
    return {heading: "\n\n".join(paragraphs) for heading, paragraphs in found.items()}


def _starts(line: str) -> str:
    return next((words for words in SECTIONS if line.startswith(words)), "")


def _prose(lines: Sequence[str]) -> str:
    """Lines of a docstring as one paragraph or list of Markdown."""
    text = ""
    for line in map(str.strip, lines):
        text += ("\n" if line.startswith("- ") else " ") + line
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.strip()).replace("``", "`")
    word = re.match(r"[a-z][a-z]+|a\b", text)  # a symbol such as ε or x keeps its case
    return text[:1].upper() + text[1:] if word else text


def _settings(cls: type[Any]) -> str:
    """Fields with their defaults and what they mean."""
    explained = meanings(cls)
    defaults = dict(setting.split("=", 1) for setting in settings(cls) if "=" in setting)
    if not dataclasses.fields(cls):
        return "None."
    names = [each.name for each in dataclasses.fields(cls)]
    rows = [f"| `{each}` | `{defaults.get(each, 'required')}` | {_cell(explained.get(each, ''))} |" for each in names]
    return "\n".join(["| setting | default | what it is |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(defense: str, rows: Sequence[Mapping[str, object]]) -> str:
    """What was measured of the arms that this defense is in; empty without any."""
    found = measurements.content()
    table = measured.table(defense, rows)
    if not table:
        return ""
    said = measurements.shortcomings(found)
    return "\n\n".join([*([said] if said else []), table, f"`{found.get('command', 'fedpeek run defenses')}`"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="directory of a run whose figures the pages shall print from now on")
    parser.add_argument("--command", default="fedpeek run defenses", help="what gives them again")
    parser.add_argument("--partial", action="store_true", help="accept unequal seeds and several states of the code; every page says so")
    options = parser.parse_args()
    try:
        if options.run:
            measurements.keep(options.run, options.command, partial=options.partial)
        measurements.require_whole(measurements.content(), partial=options.partial)
    except SpecError as error:
        sys.exit(str(error))
    PAGES.mkdir(parents=True, exist_ok=True)
    for file, content in pages().items():
        (PAGES / file).write_text(content, encoding="utf-8")
    draw()
