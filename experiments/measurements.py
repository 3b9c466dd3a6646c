"""What was measured of the defenses, for their pages: rows of a summary in docs/defenses.json, with the command that gives them again.

Arms must be alike to be compared on a page: the same seeds, finished, made by one state of the code. What is not is refused, or said.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.directory import HOW, SPEC, changes, read_facts
from experiments.report import values
from experiments.report.headline import name, rows_of
from experiments.report.values import number
from simulator.errors import SpecError

MEASURED = Path(__file__).parents[1] / "docs" / "defenses.json"

KEPT = (
    "defense", "attack", "view", "answered", "control", "against", "rounds", "victims", "scored", "seeds", "uploads", "statuses",
    "stack", "identified", "attributed", "gain", "difference_to_control", "over_prior", "epsilon", "epsilon_for", "delta", "ceiling",
    "least_ceiling", "training_ceiling", "ceilings", "accuracy", "accuracy_difference", "accuracy_by_seed", "tested_models",
    "quantization_error", "quantization_relative", "cost", "solvers", "flags",
)  # fmt: skip
"""What the pages need of a row of a summary."""


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
    found = {
        "command": command, "fedpeek": summary["fedpeek"], "environment": summary["environment"],
        "later": [part["environment"] for part in how.get("resumed", ()) if changes(how["environment"], part["environment"])],
        "planned": len(planned), "unfinished": sum(task not in done for task in planned), "rows": rows,
    }  # fmt: skip
    require_whole(found, partial=partial)
    MEASURED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def require_whole(measurements: Mapping[str, object], *, partial: bool) -> None:
    """Refuse measurements in which arms are not alike, unless that is wanted.

    Raises:
        SpecError: seeds are unequal, or several states of the code made the rows.
    """
    if not partial and (lacks := _lacks(measurements)):
        raise SpecError(
            f"measurements must be of all arms with the same seeds, made by one state of the code, got: {values.join(lacks)}. "
            "Measure the rest with --resume, or all anew; or give --partial, and every page says so."
        )


def shortcomings(measurements: Mapping[str, object]) -> str:
    """Return in what the arms are not alike, as a sentence for a page; empty if they are."""
    lacks = _lacks(measurements)
    return f"**Preliminary: {values.join(lacks)}.**" if lacks else ""


def content() -> dict[str, object]:
    """Return what was kept; empty where nothing was."""
    if not MEASURED.is_file():
        return {}
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {"rows": found}


def _lacks(measurements: Mapping[str, object]) -> list[str]:
    """Why the arms are not alike; empty if they are."""
    seeds = {name(row, "defense"): _seeds(row) for row in rows_of(measurements)}
    counts, later = sorted(map(len, seeds.values())), measurements.get("later")
    unfinished, planned = number(measurements.get("unfinished")), number(measurements.get("planned"))
    lacks = []
    if len(set(seeds.values())) > 1:
        unequal = f"some arms have {counts[0]} and some {counts[-1]} seeds"
        lacks.append(unequal if counts[0] < counts[-1] else "arms have different seeds")
    if unfinished:
        of = f" of {planned:.0f}" if planned else ""
        lacks.append(f"{unfinished:.0f}{of} runs (one arm under one seed) are not finished")
    if isinstance(later, Sequence) and later:
        lacks.append(f"{len({json.dumps(each) for each in later}) + 1} states of the code made the rows")
    return lacks


def _seeds(row: Mapping[str, object]) -> frozenset[str]:
    by_seed = row.get("accuracy_by_seed")
    return frozenset(by_seed) if isinstance(by_seed, Mapping) else frozenset(map(str, range(int(number(row.get("seeds")) or 0))))
