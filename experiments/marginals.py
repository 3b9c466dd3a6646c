"""What each layer of a stack is worth: the leakage that it takes away and what it costs, alone, on average, and on top of all others.

A layer's marginal benefit depends on what is already there: noise behind secure aggregation buys less than noise alone. So it is
measured on every subset of the other layers, each time as the difference of two arms that differ by this layer alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import inf
from statistics import fmean
from typing import Any

from rich.table import Table

from experiments.arms import UNDEFENDED, Arm
from experiments.groups import bounds
from experiments.report import values
from experiments.report.headline import strongest
from experiments.report.values import Estimate, estimate, lookup, number
from experiments.statistics import FEWEST_PAIRS, Interval, above_chance, difference, paired_t

HEADINGS = ("identified above chance", "PSNR dB", "accuracy", "upload", "client time")

LEAKAGE = ("identified", "psnr_db")
"""Measures with an interval of each arm."""

RATIOS = ("upload_bytes", "client_seconds")
"""Costs, which are compared as ratios."""

MEASURES = (*LEAKAGE, "accuracy", *RATIOS)

PLACES = {"alone": "alone", "mean": "on average", "on_top_of_all": "on top of all others"}

Effect = Mapping[str, Any]


def marginals(layers: Sequence[Arm], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each layer: its effect on each measure, alone, on top of all others, and on average over all subsets of the others.

    Differences for leakage and accuracy, with intervals; ratios for costs; None where either arm lacks the measure. Leakage is that of the
    strongest attack, as in the main table. Identification counts above chance, which is higher in a sum.
    """
    by_arm = {str(row["defense"]): row for row in strongest(rows)}
    names = [layer.name for layer in layers]
    found = []
    for layer in names:
        others = [name for name in names if name != layer]
        subsets = [subset for size in range(len(others) + 1) for subset in combinations(others, size)]
        effects = [_effect(by_arm, names, subset, layer) for subset in subsets]
        found.append({"layer": layer, "alone": effects[0], "on_top_of_all": effects[-1], "mean": _mean(effects)})
    return found


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The marginals as the terminal shows them."""
    result = Table(title="What each layer adds, with 95 % intervals", title_justify="left", box=None, pad_edge=False)
    result.add_column("layer", overflow="fold")
    result.add_column("")
    for heading in HEADINGS:
        result.add_column(heading, justify="right")
    for row in found:
        for layer, where, texts in lines(row):
            result.add_row(layer, where, *texts)
    return result


def lines(row: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """One layer's lines as text: its name, on the first of them, among which layers, and the effect on each measure."""
    return [
        (row["layer"] if place == "alone" else "", words, [_text(measure, row[place][measure]) for measure in MEASURES])
        for place, words in PLACES.items()
    ]


def _effect(by_arm: Mapping[str, Mapping[str, Any]], order: Sequence[str], subset: Sequence[str], layer: str) -> Effect:
    before, after = (
        by_arm.get(" + ".join(name for name in order if name in chosen) or UNDEFENDED, {}) for chosen in (subset, (*subset, layer))
    )
    leaks = {measure: _difference(_leak(before, measure), _leak(after, measure)) for measure in LEAKAGE}
    return {**leaks, "accuracy": _accuracy(before, after), **{name: _ratio(before, after, name) for name in RATIOS}}


def _leak(row: Mapping[str, Any], measure: str) -> Interval | None:
    """The leakage of one arm; an end that is missing is open."""
    found = estimate(row, "identified") if measure == "identified" else estimate(row, "scores", measure)
    chance = number(lookup(row, "identified", "chance")) or 0.0 if measure == "identified" else 0.0
    if found.value is None or chance >= 1:
        return None
    ends = (found.value, -inf if found.low is None else found.low, inf if found.high is None else found.high)
    return Interval(*(above_chance(end, chance) for end in ends))


def _difference(before: Interval | None, after: Interval | None) -> dict[str, float | None] | None:
    return None if before is None or after is None else bounds(difference(after, before))


def _accuracy(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float | None] | None:
    """The difference in accuracy; its interval is over the seeds that both have, open where they are too few."""
    old, new = number(before.get("accuracy")), number(after.get("accuracy"))
    if old is None or new is None:
        return None
    pairs = [(number(lookup(before, "accuracy_by_seed", seed)), number(value)) for seed, value in after.get("accuracy_by_seed", {}).items()]
    changes = [now - then for then, now in pairs if then is not None and now is not None]
    return bounds(replace(paired_t(changes), mean=new - old) if len(changes) >= FEWEST_PAIRS else Interval(new - old, -inf, inf))


def _ratio(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float | None:
    old, new = number(lookup(before, "cost", name)), number(lookup(after, "cost", name))
    return new / old if old and new is not None else None


def _mean(effects: Sequence[Effect]) -> Effect:
    """The mean effect; its interval is the mean of theirs, as if all erred together, since they share victims."""
    return {measure: _mean_of([effect[measure] for effect in effects if effect[measure] is not None]) for measure in MEASURES}


def _mean_of(known: Sequence[Any]) -> Any:
    if not known or not isinstance(known[0], Mapping):
        return fmean(known) if known else None
    ends = {end: [entry[end] for entry in known] for end in ("mean", "low", "high")}
    return {end: None if None in values_ else fmean(values_) for end, values_ in ends.items()}


def _text(measure: str, value: Any) -> str:
    if value is None:
        return values.MISSING
    if measure in RATIOS:
        return f"×{value:.2f}"
    found, scale = Estimate(value["mean"], value["low"], value["high"]), 1 if measure == "psnr_db" else 100
    middle, *ends = (None if end is None else values.fixed(scale * end, 1, sign=True) for end in (found.value, found.low, found.high))
    unit = "" if measure == "psnr_db" else f"{values.NBSP}%"
    return f"{middle}{unit}" + ("" if None in ends else f" [{ends[0]}, {ends[1]}]")
