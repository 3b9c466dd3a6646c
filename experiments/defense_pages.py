"""Writes docs/defenses from the defenses' documentation and, where there are any, measurements: python -m experiments.defense_pages.

``docs/defenses.json`` holds what was measured: rows of a ``summary.json``, each with the names of its arm's defenses in ``stack``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.directory import HOW, SPEC, changes, read_facts
from experiments.listing import settings
from experiments.report import measured, values
from experiments.report.headline import name, rows_of
from experiments.report.values import number
from simulator import lookup as registry
from simulator.defense import Defense
from simulator.errors import SpecError

DOCS = Path(__file__).parents[1] / "docs"
PAGES, MEASURED = DOCS / "defenses", DOCS / "defenses.json"

KEPT = (
    "defense", "attack", "view", "answered", "control", "against", "rounds", "victims", "seeds", "uploads", "statuses", "stack",
    "identified", "gain", "difference_to_control", "over_prior", "epsilon", "delta", "ceiling", "training_ceiling", "ceilings", "accuracy",
    "accuracy_difference", "accuracy_by_seed", "quantization_error", "quantization_relative", "cost", "solvers", "flags",
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
    said = f"{_shortcomings(_content())}\n\n" if _shortcomings(_content()) else ""
    return {"README.md": intro + said + "\n".join(lines) + "\n", **found}


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
    word = re.match(r"[a-z][a-z]+|a\b", text)  # a symbol such as ε or x keeps its case
    return text[:1].upper() + text[1:] if word else text


def _first_line(cls: type[Any]) -> str:
    """What it is, in one line: a pointer to the module means nothing on a page."""
    first = (cls.__doc__ or "").strip().partition("\n")[0]
    return first.partition("; see the module")[0].rstrip(".") + "."


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


def keep(run: Path, command: str, *, partial: bool = False) -> None:
    """Put what the pages print of a run's summary into :data:`MEASURED`, with the command that gives it again.

    Args:
        run: directory of a run that has ended, with its summary.
        command: what gives it again.
        partial: accept arms with unequal seeds, and rows of several states of the code; the pages then say so.

    Raises:
        SpecError: without ``partial``, it is one of these.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = [{key: row[key] for key in KEPT if key in row} for row in summary["rows"]]
    how, spec = json.loads((run / HOW).read_text(encoding="utf-8")), tomllib.loads((run / SPEC).read_text(encoding="utf-8"))
    done = {(fact.arm, fact.seed) for fact in read_facts(run)}
    planned = [(arm["name"], seed) for arm in spec.get("arms", ()) for seed in spec.get("seeds", ())]
    content = {
        "command": command, "fedpeek": summary["fedpeek"], "environment": summary["environment"],
        "later": [part["environment"] for part in how.get("resumed", ()) if changes(how["environment"], part["environment"])],
        "unfinished": sum(task not in done for task in planned), "rows": rows,
    }  # fmt: skip
    require_whole(content, partial=partial)
    MEASURED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def require_whole(content: Mapping[str, object], *, partial: bool) -> None:
    """Refuse measurements in which arms are not alike, unless that is wanted.

    Raises:
        SpecError: seeds are unequal, or several states of the code made the rows.
    """
    if not partial and (lacks := _lacks(content)):
        raise SpecError(
            f"measurements must be of all arms with the same seeds, made by one state of the code, got {values.join(lacks)}. "
            "Measure the rest with --resume, or all anew; or give --partial, and every page says so."
        )


def _lacks(content: Mapping[str, object]) -> list[str]:
    """Why the arms are not alike; empty if they are."""
    seeds = {name(row, "defense"): _seeds(row) for row in rows_of(content)}
    counts, later, unfinished = sorted(map(len, seeds.values())), content.get("later"), number(content.get("unfinished"))
    lacks = []
    if len(set(seeds.values())) > 1:
        lacks.append(f"arms with {counts[0]} to {counts[-1]} seeds" if counts[0] < counts[-1] else "arms with different seeds")
    if unfinished:
        lacks.append(f"{unfinished:.0f} arms × seeds that are not finished")
    if isinstance(later, Sequence) and later:
        lacks.append(f"rows of {len({json.dumps(each) for each in later}) + 1} states of the code")
    return lacks


def _seeds(row: Mapping[str, object]) -> frozenset[str]:
    by_seed = row.get("accuracy_by_seed")
    return frozenset(by_seed) if isinstance(by_seed, Mapping) else frozenset(map(str, range(int(number(row.get("seeds")) or 0))))


def _shortcomings(content: Mapping[str, object]) -> str:
    """The same as a sentence for a page."""
    lacks = _lacks(content)
    return f"**Not one whole measurement: {values.join(lacks)}. Compare with care.**" if lacks else ""


def _measured() -> list[Mapping[str, object]]:
    return rows_of(_content())


def _content() -> dict[str, object]:
    if not MEASURED.is_file():
        return {}
    content = json.loads(MEASURED.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {"rows": content}


def _table(defense: str, rows: Sequence[Mapping[str, object]]) -> str:
    """What was measured of the arms that this defense is in; empty without any."""
    content = _content()
    table = measured.table(defense, rows)
    if not table:
        return ""
    said = _shortcomings(content)
    return "\n\n".join([*([said] if said else []), table, f"`{content.get('command', 'fedpeek run defenses')}`"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="directory of a run whose figures the pages shall print from now on")
    parser.add_argument("--command", default="fedpeek run defenses", help="what gives them again")
    parser.add_argument("--partial", action="store_true", help="accept unequal seeds and several states of the code; every page says so")
    options = parser.parse_args()
    try:
        if options.run:
            keep(options.run, options.command, partial=options.partial)
        require_whole(_content(), partial=options.partial)
    except SpecError as error:
        sys.exit(str(error))
    PAGES.mkdir(parents=True, exist_ok=True)
    for file, content in pages().items():
        (PAGES / file).write_text(content, encoding="utf-8")
