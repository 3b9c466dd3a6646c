"""What the numbers of one row say in plain words: a pure function of the numbers, with its thresholds written down here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from experiments.checks import EQUIVALENCE_DB
from experiments.report.values import Estimate, decibel, estimate, lookup, number, percent

Level = Literal["recognizable", "partial", "identifiable", "faint", "labels", "floor", "unmeasured"]

RECOGNIZABLE_RATE = 0.5
"""Fraction of victims that the lower end of the interval must reach: more often identified than not."""
RECOGNIZABLE_GAIN_DB = 3.0
"""Mean gain in dB: half the squared error of the best guess that ignores the upload."""

WORDS: Mapping[Level, str] = {
    "recognizable": "pictures recognizable",
    "partial": "partly recognizable",
    "identifiable": "identifiable only",
    "faint": "traces only",
    "labels": "labels recovered",
    "floor": "floor not beaten",
    "unmeasured": "not measured",
}
MEANING: Mapping[Level, str] = {
    "recognizable": f"at least {percent(RECOGNIZABLE_RATE)} of the victims identified by their pictures (lower end of the interval), and a "
    f"mean PSNR gain of at least {decibel(RECOGNIZABLE_GAIN_DB)} whose interval lies above 0",
    "partial": "identified more often than by chance, and a PSNR gain above 0 (both by their intervals), but not by as much as above",
    "identifiable": "identified more often than by chance, although the pictures are no closer to the truth than the best floor",
    "faint": "closer to the truth than the best floor, but not shown to be identified more often than by chance",
    "labels": "the attack answered labels and no pictures, and got more of them right (lower end of the interval) than a guess that "
    "knows how frequent each class is",
    "floor": "not shown to be identified more often than by chance, nor to be closer to the truth than a guess that ignores the upload; of "
    "an attack that answered labels only: not shown to get more of them right than such a guess. Few uploads show little: the intervals "
    "say how much may be hidden",
    "unmeasured": "no victim was measured, or the numbers that a verdict needs are missing",
}
EQUAL = "not distinguishable from no defense"
UNDECIDED = "difference to no defense undecided"
FAILED = "every attack failed"
LESS = "leaks less than no defense"
MORE = "leaks more than no defense"
SLIGHTLY = f", by less than {EQUIVALENCE_DB:g} dB"
ALONE = ", if taken alone"
"""Said where 0 is outside of the interval of this row, but not once all rows of the run are allowed for."""
SURE = 0.05
"""Of the p-value after Holm's correction."""
NO_CREDIT = "no credit: the undefended attack misses its floor too"


def verdict(row: Mapping[str, object], control: Mapping[str, object] | None = None) -> Verdict:
    """Judge one row by its numbers alone; arm names play no part.

    Args:
        row: a row of ``summary.json``.
        control: the undefended row of the same attack. Where its PSNR does not beat its own floor, no defense gets credit.
    """
    found = level(row)
    if found == "unmeasured":
        return Verdict(found, FAILED if _failures(row) else WORDS[found], "")
    difference = estimate(row, "difference_to_control", "psnr_db")
    pairs, missed = (number(lookup(row, "difference_to_control", key)) for key in ("pairs", "undefended_missed"))
    if pairs is not None and pairs == missed:
        return Verdict(found, WORDS[found], NO_CREDIT)
    if difference.low is None or difference.high is None:
        return Verdict(found, WORDS[found], "")
    if control is not None and level(control) in ("identifiable", "floor", "unmeasured"):
        return Verdict(found, WORDS[found], NO_CREDIT)
    return Verdict(found, WORDS[found], compare(difference, number(lookup(row, "difference_to_control", "p_holm"))))


def level(row: Mapping[str, object]) -> Level:
    """Classify how much a row leaks; an interval that is missing counts as not sure, hence as not above."""
    identified, gain = estimate(row, "identified"), estimate(row, "gain", "psnr_db")
    if number(lookup(row, "statuses", "ok")) == 0:
        return "unmeasured"
    if row.get("answered") == "labels":
        return _label_level(row)
    if identified.value is None and gain.value is None:
        return "unmeasured"
    chance = number(lookup(row, "identified", "chance"))
    named = identified.low is not None and chance is not None and identified.low > chance
    closer = gain.low is not None and gain.low > 0
    seen = estimate(row, "identified_by_picture" if row.get("identified_by") else "identified")
    if closer and (gain.value or 0.0) >= RECOGNIZABLE_GAIN_DB and named and (seen.low or 0.0) >= RECOGNIZABLE_RATE:
        return "recognizable"
    if closer and named:
        return "partial"
    if named:
        return "identifiable"
    return "faint" if closer else "floor"


def compare(difference: Estimate, p_holm: float | None = None) -> str:
    """Say how a defended arm differs from the undefended one, given the paired difference defended − undefended in dB.

    Args:
        difference: with its interval, which is this row's alone.
        p_holm: the p-value after correction for all rows; None if there is none.
    """
    low, high = difference.low, difference.high
    if low is None or high is None:
        return ""
    within = max(-low, high) < EQUIVALENCE_DB
    if low <= 0 <= high:
        return EQUAL if within else UNDECIDED
    alone = p_holm is not None and p_holm >= SURE
    return (LESS if high < 0 else MORE) + (SLIGHTLY if within else "") + (ALONE if alone else "")


def _label_level(row: Mapping[str, object]) -> Level:
    right, floor = estimate(row, "scores", "label_accuracy"), number(lookup(row, "scores", "label_accuracy", "floor"))
    return "labels" if right.low is not None and floor is not None and right.low > floor else "floor"


def _failures(row: Mapping[str, object]) -> bool:
    """Whether any attack failed or diverged; all of them, if none ended well."""
    return any(number(lookup(row, "statuses", status)) for status in ("failed", "diverged"))


@dataclass(frozen=True)
class Verdict:
    """How much a row leaks, in one word and in plain words, and how that compares with no defense (empty where it cannot)."""

    level: Level
    words: str
    against_control: str
