"""What each layer of a stack is worth: the leakage that it takes away and what it costs, alone, on average, and on top of all others.

A layer's marginal benefit depends on what is already there: noise behind secure aggregation buys less than noise alone. So it is
measured on every subset of the other layers, each time as the difference of two arms that differ by this layer alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from rich.table import Table

from experiments.ladder import BEST
from experiments.spec import UNDEFENDED, Arm

MEASURES: Mapping[str, tuple[str, ...]] = {
    "identified": ("identified", "rate"),
    "psnr_db": ("scores", "psnr_db", "mean"),
    "accuracy": ("accuracy",),
    "upload_bytes": ("cost", "upload_bytes"),
    "client_seconds": ("cost", "client_seconds"),
}
"""What is compared, and where a row of the summary has it."""

HEADINGS = ("identified", "PSNR dB", "accuracy", "upload", "client time")

RATIOS = ("upload_bytes", "client_seconds")
"""Costs, which are compared as ratios."""


def marginals(layers: Sequence[Arm], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each layer: its effect on each measure, alone, on top of all others, and on average over all subsets of the others.

    Differences for leakage and accuracy, ratios for costs; None where either arm lacks the measure. Leakage is that of the strongest
    attack: its own row where several attacks ran.
    """
    by_arm = {name: _strongest([row for row in rows if row["defense"] == name]) for name in {row["defense"] for row in rows}}
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
    result = Table(title="What each layer adds: alone / on average / on top of all others", title_justify="left", box=None, pad_edge=False)
    result.add_column("layer", overflow="fold")
    for heading in HEADINGS:
        result.add_column(heading, justify="right")
    for row in found:
        result.add_row(row["layer"], *cells(row))
    return result


def cells(row: Mapping[str, Any]) -> list[str]:
    """One layer's effect on each measure as text: alone / on average / on top of all others."""
    return [" / ".join(_text(measure, row[where][measure]) for where in ("alone", "mean", "on_top_of_all")) for measure in MEASURES]


def _strongest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the strongest attack on one arm, with the identification of the attack that names candidates, if it ran."""
    pictured = [row for row in rows if row.get("answered", "inputs") == "inputs"] or list(rows)
    found = next((row for row in pictured if row["attack"] == BEST), pictured[0])
    named = next((row for row in rows if row.get("answered") == "candidates"), None)
    return found if named is None else {**found, "identified": named["identified"]}


def _effect(by_arm: Mapping[str, Mapping[str, Any]], order: Sequence[str], subset: Sequence[str], layer: str) -> dict[str, float | None]:
    before, after = (
        by_arm.get(" + ".join(name for name in order if name in chosen) or UNDEFENDED, {}) for chosen in (subset, (*subset, layer))
    )
    return {measure: _change(measure, _value(before, path), _value(after, path)) for measure, path in MEASURES.items()}


def _change(measure: str, before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    if measure in RATIOS:
        return after / before if before else None
    return after - before


def _value(row: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _mean(effects: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {
        measure: fmean(known) if (known := [value for effect in effects if (value := effect[measure]) is not None]) else None
        for measure in MEASURES
    }


def _text(measure: str, value: float | None) -> str:
    if value is None:
        return "—"
    if measure in RATIOS:
        return f"×{value:.2f}"
    return f"{value:+.1f}" if measure == "psnr_db" else f"{100 * value:+.1f} %"
