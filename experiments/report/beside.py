"""What stands beside a figure so that it is not read alone: its control, the rounding in it, what the attack knew before, its flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from string import ascii_lowercase

from experiments.ladder import BEST
from experiments.report import values
from experiments.report.headline import Row, name
from experiments.report.values import estimate, lookup, number
from experiments.statistics import FEWEST_PAIRS

MOST_SOLVERS = 2
"""Solvers of one attack that are named beside it."""

CONTROL_FAILED = "control failed: says nothing"
"""In place of a figure whose undefended counterpart did not beat its own floor or chance."""


def accuracy(row: Row) -> str:
    """Accuracy minus that of the arm's control in percentage points, from three seeds on with half of its interval; empty for a control."""
    found, seeds = estimate(row, "accuracy_difference"), number(lookup(row, "accuracy_difference", "seeds")) or 0
    if found.value is None:
        return ""
    half = "" if found.high is None or seeds < FEWEST_PAIRS else f" ± {values.fixed(100 * (found.high - found.value))}"
    return values.fixed(100 * found.value, sign=True) + half


def paired_seeds(row: Row) -> str:
    """How many seeds that difference is over; empty without one."""
    count = number(lookup(row, "accuracy_difference", "seeds"))
    return "" if count is None else f"{count:.0f} seed{'' if count == 1 else 's'}"


def rounding(row: Row) -> str:
    """Rms error of the released mean against the plain one, over the mean's rms; a run of an older version has it in the update's unit."""
    relative, absolute = number(row.get("quantization_relative")), number(row.get("quantization_error"))
    if relative is not None:
        return f"{values.significant(100 * relative, 2)}{values.NBSP}%"
    return "" if absolute is None else f"{values.significant(absolute, 2)}{values.NBSP}rms"


def prior(row: Row) -> str:
    """PSNR above that of the same attack on shuffled updates, with its interval and on how many records; empty where none were shuffled."""
    found, records = estimate(row, "over_prior", "psnr_db"), number(lookup(row, "over_prior", "records"))
    if found.value is None:
        return ""
    ends = values.fixed_range(found.low, found.high)
    return f"{values.decibel(found.value, sign=True)}{f' [{ends}]' if ends else ''}, {records or 0:.0f} records"


def sender(row: Row) -> str:
    """Of how many records the attack names the sender rightly, with interval and chance; empty where it names none.

    A row of each victim's strongest attack says nothing: that attack was not chosen for whom it names.
    """
    found, records = estimate(row, "attributed"), number(lookup(row, "attributed", "records"))
    if found.value is None or row.get("attack") == BEST:
        return ""
    ends = values.percent_range(found.low, found.high)
    chance = values.percent(number(lookup(row, "attributed", "chance")))
    return f"{values.percent(found.value)}{f' [{ends}]' if ends else ''} of {records or 0:.0f} records, chance {chance}"


def senders(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """Return arm, attack and :func:`sender` of each row whose attack names senders."""
    return [(name(row, "defense"), name(row, "attack"), said) for row in rows if (said := sender(row))]


def who(row: Row, members: Iterable[Row] = ()) -> str:
    """The attack behind a row, or, where each victim counts with its strongest, which of them that was how often.

    Args:
        row: of the summary.
        members: all rows of its arm; of an attack that asks several solvers, the two that answered most often are named.
    """
    attack, solvers = name(row, "attack"), row.get("solvers")
    named = solvers.items() if isinstance(solvers, Mapping) else ()
    counts = {str(each): int(number(lookup(entry, "records")) or 0) for each, entry in named}
    asked = {name(member, "attack"): member.get("solvers") for member in members if member.get("attack") != BEST}
    found = sorted(counts.items(), key=lambda item: -item[1])
    said = " · ".join(f"{each} {count}{_by(asked.get(each))}" for each, count in found)
    if attack == BEST:
        return said
    return f"{attack} ({said})" if said else attack


def _by(solvers: object) -> str:
    if not isinstance(solvers, Mapping) or not solvers:
        return ""
    often = sorted(map(str, solvers), key=lambda solver: -(number(lookup(solvers[solver], "records")) or 0.0))
    return f" ({', '.join(often[:MOST_SOLVERS])}{', …' if len(often) > MOST_SOLVERS else ''})"


def control_failed(control: Row | None, which: str) -> bool:
    """Whether the undefended arm missed its own floor (``gain``) or chance (``identified``): no defense can be judged against it."""
    if control is None:
        return False
    found, least = (estimate(control, "gain", "psnr_db"), 0.0)
    if which == "identified":
        found, least = estimate(control, "identified"), number(lookup(control, "identified", "chance")) or 0.0
    worst = found.value if found.low is None else found.low
    return worst is not None and worst <= least


def letters(flags: Iterable[str]) -> dict[str, str]:
    """A letter for each flag, in the order in which they first appear; beyond z two of them."""
    named = dict.fromkeys(flags)
    return {flag: ascii_lowercase[place % 26] * (1 + place // 26) for place, flag in enumerate(named)}
