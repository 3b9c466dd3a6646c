"""What a defense buys and what it costs, as numbers: accuracy lost against leakage's upper limit, who is dominated, and by whom.

An arm dominates another if, by what was measured, it loses no more accuracy and leaks no more, and one of the two differences is larger
than its uncertainty: the intervals of the leakages are disjoint, or that of the difference in accuracy, paired by seed (Student's t),
leaves out 0. Where neither is, the two are not distinguishable. Less leakage is less in the mean and at the upper limit, which few
victims alone raise; an arm of which the tool itself says that more may leak (:data:`SHAKY`) dominates none. Plain Gaussian noise and
DP-SGD are the baselines: a heuristic that one of them dominates is not worth its trouble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from experiments.report import beside, values
from experiments.report.headline import name, rows_by_arm, strongest, texts_of
from experiments.report.values import Estimate, estimate, lookup, number
from experiments.statistics import above_chance, paired_t

BASELINES: Mapping[tuple[str, ...], str] = {("gaussian_noise",): "plain Gaussian noise", ("dp_sgd",): "DP-SGD"}
"""Families that a heuristic must beat."""

SHAKY = frozenset({"defense_not_modeled", "attack_failed"})
"""Flags under which what leaks may be more than was measured, for a reason that other arms do not share; a budget of CPU seconds is."""

PANELS = {
    "identified": "Identified victims above chance, upper limit, %",
    "gain": "PSNR gain over the best floor, upper limit, dB",
}
"""Chance differs between arms, since one of k records of a sum is met more easily: 0 is chance, 100 % everybody."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm on one panel.

    Attributes:
        name: of the arm.
        family: names of its defenses; empty for no defense, with the arm's own name where it changes the recipe instead.
        drop: accuracy lost against the arm's undefended control, in percentage points; on the seeds that both have where these are known.
        drops: the same by seed.
        leak: upper limit of the 95 % interval, in the panel's unit; the mean where it is ``unbounded``.
        least: lower limit of the same interval; −∞ where there is none.
        mean: what was measured.
        cost: what its area shows; None where it was not measured.
        unbounded: whether there is no upper limit, as with a single upload; whatever leaks less in the mean may leak more.
        shaky: whether a flag says that more may leak than was measured.
        dominated_by: the arms that are better in one respect beyond its uncertainty, and as good in the other.
        undecided: the arms that are as good in both respects, but not distinguishable in either.
    """

    name: str
    family: tuple[str, ...]
    drop: float
    drops: Mapping[str, float] = field(default_factory=dict)
    leak: float
    least: float = -math.inf
    mean: float
    cost: float | None
    unbounded: bool = False
    shaky: bool = False
    dominated_by: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()

    @property
    def baseline(self) -> bool:
        """Whether a heuristic must beat it."""
        return self.family in BASELINES


def panel(rows: Sequence[Mapping[str, object]], which: str) -> list[Arm]:
    """Return the arms of one panel, in order.

    One without accuracy, without this leakage, or without a control is left out; so is a control of other arms, to which these are
    compared, an arm that shares no attacked round with the first control: the model of another time leaks otherwise (:func:`apart`), and
    one whose own control missed its floor, beside which nothing looks leaky.
    """
    heads = strongest(rows)
    by_name = {name(row, "defense"): row for row in heads}
    first = next((row for row in heads if row.get("control")), None)
    if first is None:
        return []
    elsewhere, found = set(apart(rows)), []
    for row in heads:
        control = by_name.get(str(row.get("against"))) if row.get("against") is not None else first
        if control is None or name(row, "defense") in elsewhere or (row.get("control") and row is not first):
            continue
        if control is not row and beside.control_failed(control, which):
            continue
        undefended, accuracy, leak = number(control.get("accuracy")), number(row.get("accuracy")), _leak(row, which)
        bounded = leak.high is not None and math.isfinite(leak.high)
        high = leak.high if bounded else leak.value
        if high is None or accuracy is None or undefended is None or not all(map(math.isfinite, (high, accuracy, undefended))):
            continue
        cost = number(lookup(row, "cost", "client_seconds"))
        drops = _drops(row, control)
        drop = fmean(drops.values()) if drops else 100 * (undefended - accuracy)
        arm = Arm(
            name=name(row, "defense"), family=_elsewhere(family_of(row), control, first), drop=drop, drops=drops, leak=high,
            least=-math.inf if leak.low is None else leak.low, cost=cost if cost is not None and math.isfinite(cost) else None,
            mean=high if leak.value is None else leak.value, unbounded=not bounded, shaky=not SHAKY.isdisjoint(texts_of(row, "flags")),
        )  # fmt: skip
        found.append(arm)
    return [
        replace(
            arm,
            dominated_by=tuple(other.name for other in found if _no_worse(other, arm) and _better(other, arm)),
            undecided=tuple(other.name for other in found if _no_worse(other, arm) and not _better(other, arm)),
        )
        for arm in found
    ]


def apart(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The arms that share no attacked round with the first control, such as those of the trained model beside the initial one."""
    arms = rows_by_arm(rows)
    first = next((name(row, "defense") for row in rows if row.get("control")), None)
    rounds = {arm: {attacked for row in members for attacked in texts_of(row, "rounds")} for arm, members in arms.items()}
    return [] if first is None else [arm for arm in arms if rounds[arm] and rounds[first] and not rounds[arm] & rounds[first]]


def family_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """The names of the arm's defenses: arms of one family differ in strength only."""
    return tuple(texts_of(row, "stack")) or (() if row.get("control") else (name(row, "defense"),))


def _elsewhere(family: tuple[str, ...], control: Mapping[str, object], first: Mapping[str, object]) -> tuple[str, ...]:
    """A baseline's family, with its control's name where that is another than the first: on another network it is no baseline here."""
    return (*family, f"beside {name(control, 'defense')}") if family in BASELINES and control is not first else family


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
        close = [arm.name for arm in others if arm.name not in beaten and baselines & set(arm.undecided)]
        rest = [arm.name for arm in others if arm.name not in (*beaten, *close)]
        what = title.partition(",")[0].lower().replace("psnr", "PSNR")
        said.append(
            f"By {what}: dominated by a baseline: {', '.join(beaten) or 'none'}; not distinguishable from one that did no worse: "
            f"{', '.join(close) or 'none'}; not dominated by one: {', '.join(rest) or 'none'}."
        )
    if said and (failed := _unjudged(rows)):
        said.append(f"Left out, since their control did not beat its own floor: {', '.join(failed)}.")
    if said and (elsewhere := apart(rows)):
        said.append(f"Attacked in other rounds, and so not compared here: {', '.join(elsewhere)}.")
    return said


def _unjudged(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The arms whose control missed its floor, by PSNR."""
    by_name = {name(row, "defense"): row for row in strongest(rows)}
    controls = {arm: by_name.get(str(row.get("against"))) for arm, row in by_name.items() if str(row.get("against")) != arm}
    return [arm for arm, control in controls.items() if beside.control_failed(control, "gain")]


def _leak(row: Mapping[str, object], which: str) -> Estimate:
    if which != "identified":
        return estimate(row, "gain", "psnr_db")
    found, chance = estimate(row, "identified"), number(lookup(row, "identified", "chance")) or 0.0
    if chance >= 1:  # whoever is named is among the candidates' true ones: the rate says nothing
        return Estimate(None, None, None)
    ends = (None if end is None else 100 * above_chance(end, chance) for end in (found.value, found.low, found.high))
    return Estimate(*ends)


def _drops(row: Mapping[str, object], control: Mapping[str, object]) -> dict[str, float]:
    """Accuracy lost by seed, in percentage points, of the seeds that both have."""
    own, undefended = row.get("accuracy_by_seed"), control.get("accuracy_by_seed")
    if not isinstance(own, Mapping) or not isinstance(undefended, Mapping):
        return {}
    pairs = {str(seed): (number(undefended.get(seed)), number(accuracy)) for seed, accuracy in own.items()}
    return {seed: 100 * (before - after) for seed, (before, after) in pairs.items() if before is not None and after is not None}


def _no_worse(one: Arm, other: Arm) -> bool:
    """Whether one lost no more accuracy and leaks no more by what was measured, and the two are not the same point."""
    if one.shaky:
        return False
    leak, others = ((math.inf if arm.unbounded else arm.leak, arm.mean) for arm in (one, other))
    least = all(mine <= theirs for mine, theirs in zip(leak, others, strict=True))
    return one.drop <= other.drop and least and (one.drop < other.drop or leak != others)


def _better(one: Arm, other: Arm) -> bool:
    """Whether one is better in one of the two respects beyond its uncertainty."""
    if not one.unbounded and one.leak < other.least:
        return True
    shared = [seed for seed in one.drops if seed in other.drops]
    return len(shared) > 1 and paired_t([one.drops[seed] - other.drops[seed] for seed in shared]).high < 0
