"""Leakage against accuracy: one point an arm, 95 % intervals, labels beside the points; light and dark."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report.headline import name, strongest
from experiments.report.labels import Point, label_points
from experiments.report.theme import LIGHT, Theme
from experiments.report.values import Estimate, estimate, lookup, number
from experiments.report.verdict import level

MARKERS = {"aggregate": "s"}
VACUOUS = 0.9995  # a ceiling this close to 1 rules nothing out and is not drawn
LONGEST_NAME = 30
LETTER = 8.0  # percentage points that a line of text takes on a panel of 118
CROWDED = 24
"""Of more points than this none is named: the table does, and the Pareto plot names those that matter."""


def leakage_vs_accuracy(rows: Sequence[Mapping[str, object]], theme: Theme | None = None) -> Figure:
    """Draw PSNR gain and identification rate over accuracy; each arm stands for its strongest attack.

    An arm without accuracy or without the leakage in question is left out of that panel.
    """
    theme = theme or LIGHT
    figure = Figure(figsize=(10.4, 4.5), dpi=160, facecolor=theme.paper, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    arms = [(row, estimate(row, "accuracy")) for row in strongest(rows)]
    gains = [_point(row, x, estimate(row, "gain", "psnr_db")) for row, x in arms]
    rates = [_point(row, x, estimate(row, "identified"), scale=100.0) for row, x in arms]
    axes_style(left, "PSNR gain over the best floor, dB", theme)
    axes_style(right, "Identified victims, %", theme)
    for axes, points in ((left, gains), (right, rates)):
        _intervals(axes, [point for point in points if point is not None], theme)
    left.axhline(0, color=theme.rule, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    _beside(left, 0, "floor", theme)
    chances: dict[float, list[str]] = {}
    for row, _ in arms:
        if (chance := number(lookup(row, "identified", "chance"))) is not None:
            chances.setdefault(100 * chance, []).append(name(row, "view"))
    for chance in chances:
        right.axhline(chance, color=theme.rule, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    right.set_ylim(-9, 109)
    for together in _near(chances):
        parts = [f"{chance:.2g} %, {' and '.join(dict.fromkeys(chances[chance]))}" for chance in sorted(together, reverse=True)]
        words = "chance" if len(chances) == 1 else "\n".join(["chance", *parts])
        _beside(right, sum(together) / len(together), words, theme)
    ceilings = _ceilings(right, arms, theme)
    _legend(figure, [point for point in gains + rates if point is not None], ceilings=ceilings, theme=theme)
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes, which is no reason to warn
        warnings.simplefilter("ignore")
        canvas.draw()  # type: ignore[no-untyped-call]
        for axes, points, levels in ((left, gains, {0.0}), (right, rates, set(chances))):
            there = [point for point in points if point is not None]
            label_points(axes, there if len(there) <= CROWDED else [], levels, canvas, theme)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file whose bytes depend on nothing but the figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def _point(row: Mapping[str, object], accuracy: Estimate, leak: Estimate, *, scale: float = 1.0) -> Point | None:
    if accuracy.value is None or leak.value is None or not (math.isfinite(accuracy.value) and math.isfinite(leak.value)):
        return None
    low, high = (leak.value if end is None or not math.isfinite(end) else end for end in (leak.low, leak.high))
    arm = name(row, "defense")
    return Point(
        arm=arm if len(arm) <= LONGEST_NAME else arm[: LONGEST_NAME - 1] + "…",
        view=name(row, "view"),
        level=level(row),
        x=100 * accuracy.value,
        y=scale * leak.value,
        low=scale * min(low, leak.value),
        high=scale * max(high, leak.value),
    )


def axes_style(axes: Axes, title: str, theme: Theme, *, across: str = "Test accuracy of the trained model, %") -> None:
    """Give a panel its title, its grid and its colours; ``across`` names the horizontal axis."""
    axes.set_facecolor(theme.paper)
    axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink, pad=12, fontweight="bold")
    axes.set_xlabel(across, fontsize=9.5, color=theme.quiet)
    axes.tick_params(colors=theme.quiet, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.rule)


def _intervals(axes: Axes, points: Sequence[Point], theme: Theme) -> None:
    for point in points:
        axes.errorbar(
            [point.x],
            [point.y],
            yerr=[[point.y - point.low], [point.high - point.y]],
            fmt=MARKERS.get(point.view, "o"),
            markersize=7.5,
            color=theme.colors[point.level],
            markeredgecolor=theme.paper,
            markeredgewidth=1.0,
            elinewidth=1.4,
            capsize=3,
            zorder=3,
        )
    if not points:
        axes.text(0.5, 0.5, "no arm has both numbers", transform=axes.transAxes, ha="center", color=theme.quiet, fontsize=10)
        return
    xs = [point.x for point in points]
    margin = max(1.0, 0.16 * (max(xs) - min(xs)))
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    ends = [0.0, *(point.low for point in points), *(point.high for point in points)]
    axes.set_ylim(min(ends) - 0.09 * (max(ends) - min(ends)) - 0.2, max(ends) + 0.09 * (max(ends) - min(ends)) + 0.2)


def _beside(axes: Axes, y: float, words: str, theme: Theme) -> None:
    """Name a horizontal line at its right end, outside the panel, where no point can be."""
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": theme.quiet, "va": "center", "parse_math": False}
    axes.annotate(words, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0), annotation_clip=False, **style)


def _near(heights: Iterable[float]) -> list[list[float]]:
    """Heights in percent by groups: names of lines that are closer than a letter is high would lie on each other."""
    groups: list[list[float]] = []
    for height in sorted(heights):
        if groups and height - groups[-1][0] < LETTER:
            groups[-1].append(height)
        else:
            groups.append([height])
    return groups


def _ceilings(axes: Axes, arms: Sequence[tuple[Mapping[str, object], Estimate]], theme: Theme) -> bool:
    """Mark the rate that no attack can exceed, where the guarantee rules anything out; return whether any is drawn."""
    drawn = False
    for row, accuracy in arms:
        ceiling = number(row.get("ceiling"))
        if accuracy.value is None or ceiling is None or not math.isfinite(accuracy.value) or ceiling >= VACUOUS:
            continue
        axes.plot(
            [100 * accuracy.value], [100 * ceiling], marker=7, markersize=7, color=theme.ink, linestyle="none", zorder=4, clip_on=False
        )
        drawn = True
    return drawn


def _legend(figure: Figure, points: Sequence[Point], *, ceilings: bool, theme: Theme) -> None:
    views = [view for view in dict.fromkeys(point.view for point in points) if view]
    entries = [(MARKERS.get(view, "o"), theme.quiet, 7, f"server sees: {view}") for view in views] + [
        ("|", theme.quiet, 11, "95 % interval")
    ]
    entries += [("v", theme.ink, 6, "ceiling that ε proves")] if ceilings else []
    handles = [
        Line2D(
            [], [], marker=marker, linestyle="none", color=color, markersize=size, markeredgewidth=1.4 if marker == "|" else 0, label=label
        )
        for marker, color, size, label in entries
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, handletextpad=0.4)
    for text in legend.get_texts():
        text.set_color(theme.quiet)
        text.set_parse_math(False)
