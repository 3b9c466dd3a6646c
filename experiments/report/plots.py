"""Leakage against accuracy: one point an arm, 95 % intervals, labels beside the points; light and dark.

Longer than our usual by the placing of labels, which nothing else needs.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from experiments.report.headline import name, strongest
from experiments.report.values import Estimate, estimate, lookup, number
from experiments.report.verdict import Level, level

MARKERS = {"aggregate": "s"}
VACUOUS = 0.9995  # a ceiling this close to 1 rules nothing out and is not drawn
LONGEST_NAME = 30
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
    for chance, views in chances.items():
        right.axhline(chance, color=theme.rule, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        _beside(right, chance, "chance" if len(chances) == 1 else f"chance, {', '.join(dict.fromkeys(views))}", theme)
    right.set_ylim(-9, 109)
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


def label_points(axes: Axes, points: Sequence[Point], lines: Iterable[float], canvas: FigureCanvasAgg, theme: Theme) -> None:
    """Write each arm's name beside its point, at the nearest place where it covers nothing; a thin line leads to it when that is far."""
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    unit = renderer.points_to_pixels(1.0)
    frame = axes.get_window_extent(renderer)
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    taken += [_around(frame.x0, axes.transData.transform((0, y))[1], frame.x1, axes.transData.transform((0, y))[1], unit) for y in lines]
    for point in points:
        low, middle, high = (axes.transData.transform((point.x, y)) for y in (point.low, point.y, point.high))
        taken += [_around(low[0], low[1], high[0], high[1], 4 * unit), _around(middle[0], middle[1], middle[0], middle[1], 5 * unit)]
    for point in sorted(points, key=lambda each: (-each.y, each.x)):
        text = axes.annotate(
            point.arm,
            (point.x, point.y),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=theme.ink,
            zorder=5,
            parse_math=False,
            path_effects=[withStroke(linewidth=2.6, foreground=theme.paper)],
        )
        extent = text.get_window_extent(renderer)
        x, y = axes.transData.transform((point.x, point.y))
        boxes = {(dx, dy): _box(x + dx * unit, y + dy * unit, extent.width, extent.height, dx) for dx, dy in OFFSETS}
        dx, dy = min(boxes, key=lambda offset: _cost(boxes[offset], taken, frame) + math.hypot(*offset))
        taken.append(boxes[dx, dy])
        text.set_position((dx, dy))
        text.set_horizontalalignment("left" if dx > 0 else "right" if dx < 0 else "center")
        if math.hypot(dx, dy) > FAR:
            arrow = {"arrowstyle": "-", "color": theme.rule, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5}
            axes.annotate("", (point.x, point.y), xytext=(dx, dy), textcoords="offset points", arrowprops=arrow, zorder=2)


OFFSETS = [
    (dx, dy) for dy in (0, *(sign * far for far in (10, 16, 24, 36, 50, 66, 84) for sign in (1, -1))) for dx in (9, -9, 24, -24, 48, -48)
]
OFFSETS += [(0, 14), (0, -14)]
FAR = 24  # points; from here on a label needs a line to its point


def _cost(box: Bbox, taken: Iterable[Bbox], frame: Bbox) -> float:
    """Return how bad a place for a label is: pixels that it covers, and far worse, pixels by which it leaves the panel."""
    outside = sum(max(0.0, beyond) for beyond in (frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1))
    return float(0.5 * sum(_overlap(box, other) for other in taken) + 100 * outside)


def _box(x: float, y: float, width: float, height: float, side: float) -> Bbox:
    left = x - (0 if side > 0 else width if side < 0 else width / 2)
    return Bbox.from_bounds(left, y - height / 2, width, height)


def _around(x0: float, y0: float, x1: float, y1: float, margin: float) -> Bbox:
    return Bbox.from_extents(x0 - margin, y0 - margin, x1 + margin, y1 + margin)


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm in one panel, in the axes' units."""

    arm: str
    view: str
    level: Level
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of the page that the plot stands on; hues from Okabe and Ito, told apart by the colour-blind."""

    paper: str
    ink: str
    quiet: str
    rule: str
    grid: str
    colors: Mapping[Level, str]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    quiet="#57606a",
    rule="#8c959f",
    grid="#eaeef2",
    colors={
        "recognizable": "#c2410c",
        "partial": "#d99100",
        "identifiable": "#d99100",
        "labels": "#d99100",
        "faint": "#7a8490",
        "floor": "#0072b2",
        "unmeasured": "#7a8490",
    },
)
DARK = Theme(
    paper="#1a1e24",
    ink="#e8ebee",
    quiet="#a5afba",
    rule="#6b7683",
    grid="#2b3139",
    colors={
        "recognizable": "#ff8a57",
        "partial": "#f0b429",
        "identifiable": "#f0b429",
        "labels": "#f0b429",
        "faint": "#a5afba",
        "floor": "#56b4e9",
        "unmeasured": "#a5afba",
    },
)
