"""The ceilings of each arm, one line an arm, each with what it assumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.facts import FOR_THE_VIEW
from experiments.ladder import BEST
from experiments.report import values
from experiments.report.headline import name, texts_of
from experiments.report.values import estimate, lookup, number

BELOW_FLOOR = ", below the floor"
"""Said of a ceiling on PSNR that a guess without the upload exceeds: whoever has a prior does better than an unbiased attacker may."""


@dataclass(frozen=True)
class Limits:
    """What theory allows under one arm, as text, beside who was named; ``words`` says what each ceiling assumes.

    Nothing measured stands beside the ceilings without a prior: attacks know that pixels are in [0, 1], and more.
    """

    defense: str
    identification: str
    named: str
    psnr: str
    error: str
    words: tuple[str, ...]


def lines(rows: Sequence[Mapping[str, object]]) -> list[Limits]:
    """Return the arms that have any ceiling, in order; measured is what the one attack did that identified most, or came nearest."""
    found = []
    for arm in dict.fromkeys(name(row, "defense") for row in rows):
        members = [row for row in rows if name(row, "defense") == arm]
        words = tuple(texts_of({"words": lookup(members[0], "ceilings", "sentences")}, "words"))
        if not words:
            continue
        single = [row for row in members if row.get("attack") != BEST]  # the best of several attacks has several guesses, the ceiling one
        rates = [rate for row in single if (rate := estimate(row, "identified").value) is not None]
        bound = number(lookup(members[0], "ceilings", "no_prior_psnr_db"))
        floors = [floor for row in members if (floor := number(lookup(row, "floor", "psnr_db"))) is not None]
        vacuous = bound is not None and bound < max(floors, default=-math.inf)
        limit = Limits(
            defense=arm,
            identification=identification(members[0]),
            named=values.percent(max(rates, default=None)),
            psnr=values.decibel(bound) + (BELOW_FLOOR if vacuous else ""),
            error=values.significant(number(lookup(members[0], "ceilings", "mse_floor")), 2),
            words=words,
        )
        found.append(limit)
    return found


def assumptions(row: Mapping[str, object]) -> list[str]:
    """What each ceiling of an arm assumes, without the sentence on what was seen, which :func:`identification` says in figures."""
    said = texts_of({"words": lookup(row, "ceilings", "sentences")}, "words")
    return [words for words in said if not words.startswith(FOR_THE_VIEW)]


def identification(row: Mapping[str, object]) -> str:
    """:func:`of_the_view`, and :func:`over_training` where that is another."""
    return f"{of_the_view(row)} {over_training(row)}".rstrip()


def of_the_view(row: Mapping[str, object]) -> str:
    """The ceiling for what the attack saw, from the least to the highest of its rounds."""
    ends = [end for key in ("least_ceiling", "ceiling") if (end := number(row.get(key))) is not None]
    return values.percent_span(ends) or values.MISSING


def over_training(row: Mapping[str, object]) -> str:
    """The ceiling for whoever has every upload of the whole training, beside that for what the attack saw; empty where it is the same."""
    seen, whole = number(row.get("ceiling")), number(row.get("training_ceiling"))
    if seen is None or whole is None or values.percent(seen) == values.percent(whole):
        return ""
    return f"(all {values.percent(whole)})"
