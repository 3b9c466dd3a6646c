"""What a defense buys and what it costs, as numbers: accuracy lost against leakage's upper limit, who is dominated, and by whom.

An arm dominates another if it loses no more accuracy and leaks no more, and one of the two less. Plain Gaussian noise and DP-SGD are the
baselines: a heuristic that one of them dominates is not worth its trouble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.report import values
from experiments.report.headline import name, strongest, texts_of
from experiments.report.values import estimate, lookup, number

BASELINES: Mapping[tuple[str, ...], str] = {("gaussian_noise",): "plain Gaussian noise", ("dp_sgd",): "DP-SGD"}
"""Families that a heuristic must beat."""

PANELS = {"identified": "Identified victims, upper limit, %", "gain": "PSNR gain over the best floor, upper limit, dB"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm on one panel.

    Attributes:
        name: of the arm.
        family: names of its defenses; empty for no defense, with the arm's own name where it changes the recipe instead.
        drop: accuracy lost against no defense, in percentage points.
        leak: upper limit of the 95 % interval, in the panel's unit; the mean where it is ``unbounded``.
        cost: what its area shows; None where it was not measured.
        unbounded: whether there is no upper limit, as with a single upload; whatever leaks less in the mean may leak more.
        dominated_by: the arms that are better in one respect and as good in the other.
    """

    name: str
    family: tuple[str, ...]
    drop: float
    leak: float
    cost: float | None
    unbounded: bool = False
    dominated_by: tuple[str, ...] = ()

    @property
    def baseline(self) -> bool:
        """Whether a heuristic must beat it."""
        return self.family in BASELINES


def panel(rows: Sequence[Mapping[str, object]], which: str) -> list[Arm]:
    """Return the arms of one panel, in order; one without accuracy, without this leakage, or without a control is left out."""
    heads = strongest(rows)
    control = next((row for row in heads if row.get("control")), None)
    if control is None or not math.isfinite(undefended := number(control.get("accuracy")) or math.nan):
        return []
    found = []
    for row in heads:
        leak = estimate(row, "identified") if which == "identified" else estimate(row, "gain", "psnr_db")
        bounded = leak.high is not None and math.isfinite(leak.high)
        high = leak.high if bounded else leak.value
        accuracy = number(row.get("accuracy"))
        if high is None or accuracy is None or not (math.isfinite(high) and math.isfinite(accuracy)):
            continue
        scale = 100.0 if which == "identified" else 1.0
        cost = number(lookup(row, "cost", "client_seconds"))
        arm = Arm(
            name=name(row, "defense"), family=family_of(row), drop=100 * (undefended - accuracy), leak=scale * high,
            cost=cost if cost is not None and math.isfinite(cost) else None, unbounded=not bounded,
        )  # fmt: skip
        found.append(arm)
    return [replace(arm, dominated_by=tuple(other.name for other in found if _dominates(other, arm))) for arm in found]


def family_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """The names of the arm's defenses: arms of one family differ in strength only."""
    return tuple(texts_of(row, "stack")) or (() if row.get("control") else (name(row, "defense"),))


def sentences(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Say which heuristics a baseline dominates, on each panel; and if there is no baseline, that there is none."""
    said = []
    for which, title in PANELS.items():
        arms = panel(rows, which)
        baselines = {arm.name for arm in arms if arm.baseline}
        others = [arm for arm in arms if arm.family and not arm.baseline]
        if not others:
            continue
        if not baselines:
            return [f"No baseline: this run has no arm of {values.join(list(BASELINES.values()))} alone, which a heuristic must beat."]
        beaten = [arm.name for arm in others if baselines & set(arm.dominated_by)]
        rest = [arm.name for arm in others if not baselines & set(arm.dominated_by)]
        what = title.partition(",")[0].lower().replace("psnr", "PSNR")
        said.append(
            f"By {what}: dominated by a baseline: {', '.join(beaten) or 'none'}; not dominated by one: {', '.join(rest) or 'none'}."
        )
    return said


def _dominates(one: Arm, other: Arm) -> bool:
    leak, others = (math.inf if arm.unbounded else arm.leak for arm in (one, other))
    return one.drop <= other.drop and leak <= others and (one.drop < other.drop or leak < others)
