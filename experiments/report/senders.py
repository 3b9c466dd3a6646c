"""What a sum over clients leaves, against how many of them are in it: both measures of leakage over the number of senders.

The first arm with a number of senders is joined to the others' first; further arms of that number, other ways to make the same sum, stand
beside it, hollow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.headline import name, strongest
from experiments.report.plots import axes_style
from experiments.report.theme import LIGHT, Theme
from experiments.report.values import NBSP, Estimate, estimate, lookup, number
from experiments.report.verdict import Level, level

FEWEST = 3
"""Numbers of senders from which on a curve says more than the table."""

MOST = 6
"""Arms with as many senders from which on something else sets the arms of a run apart."""

BESIDE = 1.07
"""Factor between the places of two arms with as many senders."""

Measure = Literal["gain", "identified"]


@dataclass(frozen=True)
class Sum:
    """One arm on the curve.

    Attributes:
        place: how many arms with as many senders come before it.
        leak: PSNR gain in dB, or the share of identified victims in percent.
        chance: of the latter, in percent; None without.
    """

    arm: str
    level: Level
    senders: int
    place: int
    leak: Estimate
    chance: float | None


def sums(rows: Sequence[Mapping[str, object]], which: Measure) -> list[Sum]:
    """The arms whose uploads all have the same number of senders, by that number; none where that makes no curve."""
    found: list[Sum] = []
    for row in strongest(rows):
        counts = row.get("senders")
        leak = estimate(row, "gain", "psnr_db") if which == "gain" else estimate(row, "identified")
        if not isinstance(counts, list) or len(counts) != 1 or leak.value is None:
            continue
        chance, scale = number(lookup(row, "identified", "chance")), 1.0 if which == "gain" else 100.0
        ends = (None if end is None or not math.isfinite(end) else scale * end for end in (leak.value, leak.low, leak.high))
        place = sum(each.senders == counts[0] for each in found)
        found.append(Sum(name(row, "defense"), level(row), counts[0], place, Estimate(*ends), None if chance is None else 100 * chance))
    found.sort(key=lambda each: (each.senders, each.place))
    crowded = any(each.place >= MOST for each in found)
    return found if len({each.senders for each in found}) >= FEWEST and not crowded else []


def curve(rows: Sequence[Mapping[str, object]], theme: Theme | None = None) -> Figure | None:
    """Draw PSNR gain and identification rate over the number of senders; None where no curve is to be drawn."""
    theme = theme or LIGHT
    if not sums(rows, "gain") and not sums(rows, "identified"):
        return None
    figure = Figure(figsize=(10.4, 4.2), dpi=160, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    across = "Clients behind one sum"
    axes_style(left, "PSNR gain over the best floor, dB", theme, across=across)
    axes_style(right, "Identified victims, %", theme, across=across)
    left.axhline(0, color=theme.rule, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    right.set_ylim(-4, 104)
    _draw(left, sums(rows, "gain"), theme)
    identified = sums(rows, "identified")
    _draw(right, identified, theme)
    known = [each for each in identified if each.chance is not None and not each.place]
    right.plot([each.senders for each in known], [each.chance or 0.0 for each in known], color=theme.rule, linestyle=(0, (4, 3)), zorder=1)
    return figure


def text(rows: Sequence[Mapping[str, object]]) -> str:
    """The curve in words."""
    gains = ", ".join(f"{each.arm} {each.leak.value:+.1f}{NBSP}dB" for each in sums(rows, "gain") if each.leak.value is not None)
    rates = ", ".join(f"{each.arm} {each.leak.value:.0f}{NBSP}%" for each in sums(rows, "identified") if each.leak.value is not None)
    return f"Leakage over the number of senders. PSNR gain: {gains or 'none'}. Identified: {rates or 'none'}."


def _draw(axes: Axes, found: Sequence[Sum], theme: Theme) -> None:
    if not found:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=theme.quiet, fontsize=10)
        return
    first = [each for each in found if not each.place]
    axes.plot([each.senders for each in first], [each.leak.value or 0.0 for each in first], color=theme.rule, linewidth=1.2, zorder=2)
    for each in found:
        value = each.leak.value or 0.0
        low, high = (value if end is None else end for end in (each.leak.low, each.leak.high))
        colour = theme.colors[each.level]
        axes.errorbar(
            [each.senders * BESIDE**each.place], [value], yerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt="o", markersize=7,
            color=colour, markerfacecolor=theme.paper if each.place else colour, elinewidth=1.4, capsize=3, zorder=3,
        )  # fmt: skip
    counts = sorted({each.senders for each in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.5)
