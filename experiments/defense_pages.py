"""Writes docs/defenses from the defenses' documentation and, where there are any, measurements: python -m experiments.defense_pages.

``docs/defenses.json`` holds what was measured: rows of a ``summary.json``, each with the names of its arm's defenses in ``stack``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.directory import HOW
from experiments.listing import settings
from experiments.report import values
from experiments.report.headline import name, rows_of, strongest, texts_of
from experiments.report.values import estimate, lookup, number
from simulator import lookup as registry
from simulator.defense import Defense

DOCS = Path(__file__).parents[1] / "docs"
PAGES, MEASURED = DOCS / "defenses", DOCS / "defenses.json"

KEPT = (
    "defense", "attack", "view", "answered", "control", "against", "rounds", "victims", "seeds", "uploads", "statuses", "stack",
    "identified", "gain", "epsilon", "delta", "ceiling", "accuracy", "cost", "solvers", "flags",
)  # fmt: skip
"""What the pages need of a row of a summary."""

SECTIONS = {
    "Source:": "Source",
    "Deviations:": "Deviations from it",
    "Hook:": "Hook",
    "Hooks:": "Hook",
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

REQUIRED = ("Source", "Deviations from it", "Hook", "What it does not protect", "Broken by")
"""Headings without which a defense is not documented."""


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    rows = _measured()
    names = registry.names("defenses")
    found = {f"{each}.md": page(registry.get("defenses", each), rows) for each in names}
    lines = [f"- [{each}]({each}.md): {_first_line(registry.get('defenses', each))}" for each in names]
    intro = (
        "# Defenses\n\nOne page a defense, written from its documentation by `python -m experiments.defense_pages`: where it acts, what it "
        "protects, what it does not, and the attack that breaks it.\n\n"
    )
    return {"README.md": intro + "\n".join(lines) + "\n", **found}


def page(cls: type[Any], rows: Sequence[Mapping[str, object]] = ()) -> str:
    """The page of one defense."""
    parts = sections(inspect.getmodule(cls).__doc__ or "")
    body = [f"# {cls.name}", _first_line(cls)]
    parts |= {"What it does": parts.pop(""), "Settings": _settings(cls), "What it protects": _protects(cls)}
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
    return text[:1].upper() + text[1:]


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _settings(cls: type[Any]) -> str:
    """Fields with their defaults and what they mean."""
    meanings = _attributes(cls)
    defaults = dict(setting.split("=", 1) for setting in settings(cls) if "=" in setting)
    if not dataclasses.fields(cls):
        return "None."
    names = [each.name for each in dataclasses.fields(cls)]
    rows = [f"| `{each}` | `{defaults.get(each, 'required')}` | {meanings.get(each, '')} |" for each in names]
    return "\n".join(["| setting | default | what it is |", "|---|---|---|", *rows])


def _attributes(cls: type[Any]) -> dict[str, str]:
    """What the class's documentation says of each field."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    for names, meaning in re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", text, flags=re.MULTILINE):
        for each in names.split(","):
            found[each.strip()] = " ".join(meaning.split()).replace("|", "\\|").replace("``", "`")
    return found


def _protects(cls: type[Defense]) -> str:
    if cls.channel and cls.claim is not Defense.claim:
        return (
            "It changes who sees what: the server gets one upload for the whole cohort. With noise inside it claims differential privacy: "
            "the report prints ε and δ with the adversary, unit, adjacency and sampling they are for."
        )
    if cls.channel:
        return "It changes who sees what: the server gets one upload for the whole cohort. It makes no claim of differential privacy."
    if cls.claim is not Defense.claim:
        return "It claims differential privacy: the report prints ε and δ with the adversary, unit, adjacency and sampling they are for."
    return "It is a heuristic: it guarantees nothing (ε = ∞). What it achieves is what the attacks on it do not reach."


def keep(run: Path, command: str) -> None:
    """Put what the pages print of a run's summary into :data:`MEASURED`, with the command that gives it again."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = [{key: row[key] for key in KEPT if key in row} for row in summary["rows"]]
    later = [part["environment"] for part in json.loads((run / HOW).read_text(encoding="utf-8")).get("resumed", ())]
    content = {"command": command, "fedpeek": summary["fedpeek"], "environment": summary["environment"], "later": later, "rows": rows}
    MEASURED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _measured() -> list[Mapping[str, object]]:
    return rows_of(_content())


def _content() -> dict[str, object]:
    if not MEASURED.is_file():
        return {}
    content = json.loads(MEASURED.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {"rows": content}


def _table(defense: str, rows: Sequence[Mapping[str, object]]) -> str:
    """The arms that this defense is in, and the undefended ones that they are judged against, as a table; empty without any."""
    heads = strongest(rows)
    mine = [row for row in heads if defense in texts_of(row, "stack")]
    if not mine:
        return ""
    against = {row.get("against") for row in mine}
    shown = [*[row for row in heads if row.get("control") and (row.get("against") in against or None in against)], *mine]
    titles = ("arm", "victims, seeds", "identified, chance", "PSNR gain, dB", "ε", "ceiling", "accuracy", "upload", "client")
    head = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
    note = (
        "Brackets are 95 % intervals; each victim counts with its strongest attack. "
        + ("The run was resumed while the code was worked on: docs/defenses.json names the states. " if _content().get("later") else "")
        + f"`{_content().get('command', 'fedpeek run defenses')}`"
    )
    return "\n".join([head, *map(_line, shown), "", note])


def _line(row: Mapping[str, object]) -> str:
    rate, gain, chance = estimate(row, "identified"), estimate(row, "gain", "psnr_db"), number(lookup(row, "identified", "chance"))
    cells = (
        name(row, "defense"),
        f"{values.significant(number(row.get('victims')))}, {values.significant(number(row.get('seeds')))}",
        f"{values.percent(rate.value)} [{values.percent_range(rate.low, rate.high)}], {values.percent(chance)}",
        f"{values.fixed(gain.value, sign=True)} [{values.fixed_range(gain.low, gain.high)}]",
        values.significant(number(row.get("epsilon"))),
        values.percent(number(row.get("ceiling"))),
        values.percent(number(row.get("accuracy")), 1),
        values.size(number(lookup(row, "cost", "upload_bytes"))),
        values.duration(number(lookup(row, "cost", "client_seconds"))),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="directory of a run whose figures the pages shall print from now on")
    parser.add_argument("--command", default="fedpeek run defenses", help="what gives them again")
    options = parser.parse_args()
    if options.run:
        keep(options.run, options.command)
    PAGES.mkdir(parents=True, exist_ok=True)
    for file, content in pages().items():
        (PAGES / file).write_text(content, encoding="utf-8")
