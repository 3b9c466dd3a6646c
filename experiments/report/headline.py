"""Which rows of a summary stand for an arm: with a ladder of attacks, its strongest per victim, and who the identifier named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from experiments.ladder import BEST
from experiments.report import values
from experiments.report.values import lookup, number
from experiments.statistics import above_chance

Row = Mapping[str, object]

ALARMS = ("ceiling_exceeded", "certificate_wrong", "clients_lost")
"""Flags of any attack on an arm that its one line must not hide."""


def rows_of(summary: Mapping[str, object]) -> list[Row]:
    """Return the summary's rows; whatever is not a mapping is not a row."""
    rows = summary.get("rows")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, Sequence) and not isinstance(rows, str) else []


def name(row: Row, key: str) -> str:
    """Return a name from a row; a missing one is an em dash."""
    value = row.get(key)
    return values.MISSING if value is None or value == "" else str(value)


def texts_of(row: Row, key: str) -> list[str]:
    """Return a list of texts from a row; a single text is a list of one, and what is no list is empty."""
    value = row.get(key)
    if isinstance(value, str):
        return [value] if value else []
    return [str(text) for text in value] if isinstance(value, Sequence) else []


def control_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the row that this one is compared with: that of the same attack on the arm which it names, else on any undefended one.

    Of several rows of that arm it is the one of the same rounds; where a row is named, other rounds do as well.
    """
    same = [other for other in rows if other.get("attack") == row.get("attack")]
    at_once = [other for other in same if other.get("rounds") == row.get("rounds")]
    if (against := row.get("against")) is not None:
        return next((other for other in [*at_once, *same] if other.get("defense") == against), None)
    return next((other for other in at_once if other.get("control", not other.get("difference_to_control"))), None)


def rows_by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each arm, in order."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(name(row, "defense"), []).append(row)
    return arms


def laddered(rows: Iterable[Row]) -> bool:
    """Whether several attacks were judged together, or one named candidates, so that an arm is one line and each attack a detail."""
    return any(row.get("attack") == BEST or row.get("answered") == "candidates" for row in rows)


def headlines(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the main table: each one as it is, or with a ladder one for each arm, view and attacked rounds.

    That one is the best per victim, or the strongest attack where fewer than two rebuilt pictures. Its identification is that of the one
    attack that was furthest above chance, ``identified_by``: a ceiling is for one guess, and all attacks together have several.
    ``identified_by_picture`` keeps the best rate that a picture gave.
    """
    rows = list(rows)
    if not laddered(rows):
        return rows
    arms: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        arms.setdefault((row.get("defense"), row.get("view"), tuple(texts_of(row, "rounds"))), []).append(row)
    return [_headline(members) for members in arms.values()]


def strongest(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each arm, in order: that of the attack which identified most, then gained most, then got most labels right."""
    best: dict[str, Row] = {}
    for row in headlines(rows):
        arm = name(row, "defense")
        if arm not in best or _strength(row) > _strength(best[arm]):
            best[arm] = row
    return list(best.values())


def _headline(rows: Sequence[Row]) -> Row:
    identifier = max((row for row in rows if row.get("answered") == "candidates"), key=_strength, default=None)
    drawn = [row for row in rows if row is not identifier and row.get("attack") != BEST]
    best = next((row for row in rows if row.get("attack") == BEST), None) or max(drawn, key=_strength, default=rows[0])
    alarms = [flag for flag in ALARMS if any(flag in texts_of(row, "flags") for row in rows)]
    flags = [*alarms, *(flag for flag in texts_of(best, "flags") if flag not in alarms)]
    seen = max((row for row in drawn if row.get("identified")), key=_above_chance, default=None)
    named = max((row for row in (identifier, seen) if row is not None), key=_above_chance, default=None)
    if named is None or best is identifier:
        return {**best, "flags": flags}
    told = [flag for flag in texts_of(named, "flags") if flag == "candidates_told" and flag not in flags]
    return {
        **best,
        "flags": [*flags, *told],
        "identified": named.get("identified"),
        "identified_by": named.get("attack"),
        "identified_by_picture": seen.get("identified") if seen else None,
    }


def _above_chance(row: Row) -> float:
    rate, chance = number(lookup(row, "identified")), number(lookup(row, "identified", "chance")) or 0.0
    return float("-inf") if rate is None or chance >= 1 else above_chance(rate, chance)


def _strength(row: Row) -> tuple[float, ...]:
    found = (lookup(row, *path) for path in (("identified",), ("gain", "psnr_db"), ("scores", "label_accuracy")))
    return tuple(float("-inf") if (value := number(entry)) is None else value for entry in found)
