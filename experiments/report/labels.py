"""Names beside the points of a plot, where they cover nothing: freely around them, or in a comb where many have one height."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke

from experiments.report.theme import Theme
from experiments.report.verdict import Level

Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""


def label_points(
    axes: Axes, points: Sequence[Point], lines: Iterable[float], canvas: FigureCanvasAgg, theme: Theme, *,
    size: float = 9.0, others: Sequence[Point] = (),
) -> None:  # fmt: skip
    """Write each arm's name beside its point, at the nearest place where it covers nothing; a thin line leads to it when that is far.

    Args:
        axes: the panel, with its limits set.
        points: to be named.
        lines: heights of horizontal lines that a name should not cover.
        canvas: on which the figure has been laid out.
        theme: of the page.
        size: of the letters in points; distances follow it.
        others: points without a name here, which a name should not cover either.
    """
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    unit = renderer.points_to_pixels(1.0)
    near = unit * size / 9
    frame = axes.get_window_extent(renderer).extents
    written: list[Box] = [text.get_window_extent(renderer).extents for text in axes.texts if text.get_text()]
    drawn = [_around(frame[0], height, frame[2], height, unit) for height in (axes.transData.transform((0, y))[1] for y in lines)]
    for point in (*points, *others):
        low, middle, high = (axes.transData.transform((point.x, y)) for y in (point.low, point.y, point.high))
        drawn += [_around(low[0], low[1], high[0], high[1], 4 * near), _around(middle[0], middle[1], middle[0], middle[1], 5 * near)]
    for point in sorted(points, key=lambda each: (-each.y, each.x)):
        text = axes.annotate(
            point.arm, (point.x, point.y), xytext=(0, 0), textcoords="offset points", va="center", fontsize=size, color=theme.ink,
            fontweight="bold" if point.bold else "normal", zorder=6, parse_math=False,
            path_effects=[withStroke(linewidth=0.29 * size, foreground=theme.paper)],
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        x, y = axes.transData.transform((point.x, point.y))
        boxes = {(dx, dy): _box(x + dx * near, y + dy * near, extent.width, extent.height, dx) for dx, dy in OFFSETS}
        dx, dy = min(boxes, key=lambda at: _cost(boxes[at], written, drawn, frame) + near * math.hypot(*at))
        left, bottom, right, top = boxes[dx, dy]
        written.append((left - SPACE * near, bottom, right + SPACE * near, top))  # two names on a line are not read as one
        offset = (dx * near / unit, dy * near / unit)
        text.set_position(offset)
        text.set_horizontalalignment(_side(dx))
        if math.hypot(dx, dy) > FAR:
            _leader(axes, point, offset, theme)


def comb(axes: Axes, points: Sequence[Point], canvas: FigureCanvasAgg, theme: Theme, *, above: bool, size: float) -> None:
    """Write the names of points of one height side by side above or below them, each with a thin line to its point.

    They keep the order of their points; neighbours stand in different rows, and each line rises between the names of the lower ones.
    """
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    unit = renderer.points_to_pixels(1.0)
    frame, sign = axes.get_window_extent(renderer).extents / unit, 1 if above else -1
    ordered = sorted(points, key=lambda each: each.x)
    width, rows = widest(ordered, size), comb_rows(ordered, size, frame[2] - frame[0])
    places = [axes.transData.transform((point.x, point.y)) / unit for point in ordered]
    knee = max(sign * place[1] for place in places) + COMB_GAP - size
    centers = spread([place[0] for place in places], width / rows, frame[0] + width / 2, frame[2] - width / 2)
    for number, (point, place, center) in enumerate(zip(ordered, places, centers, strict=True)):
        text = axes.annotate(
            point.arm, (point.x, point.y), xytext=(0, 0), textcoords="offset points", ha="center", va="center",
            fontsize=size, fontweight="bold" if point.bold else "normal", color=theme.ink, zorder=6, parse_math=False,
        )  # fmt: skip
        high = sign * (knee + size + number % rows * ROW * size)
        text.set_position((center - place[0], high - place[1]))
        path = [place, (center, sign * knee), (center, high - sign * 0.6 * size)]
        across, up = zip(*(axes.transData.inverted().transform((x * unit, y * unit)) for x, y in path), strict=True)
        axes.plot(across, up, color=theme.rule, linewidth=0.6, zorder=2)


def comb_height(points: Sequence[Point], size: float, width: float) -> float:
    """Return the height in points of a comb with its gap, on a panel that is ``width`` points wide."""
    return COMB_GAP + comb_rows(points, size, width) * ROW * size


def comb_rows(points: Sequence[Point], size: float, width: float) -> int:
    """Return how many rows of names a comb needs on a panel that is ``width`` points wide: two, so that it spreads less, or more."""
    return max(2, math.ceil(len(points) * widest(points, size) / width))


def widest(points: Sequence[Point], size: float) -> float:
    """Return the width in points that the longest name takes, with a gap: a digit of DejaVu Sans is 0.64 of the letters' size, bold 0.7."""
    return max(len(point.arm) for point in points) * 0.7 * size + 0.3 * size


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Return places in [low, high] in the order of ``wanted``, which is sorted, at least ``apart`` from each other, and least moved.

    Least in the sum of squares: places that would touch are moved as one block about their mean. What does not fit lies closer.
    """
    apart = min(apart, (high - low) / max(1, len(wanted) - 1))
    blocks: list[tuple[float, int]] = []  # where a block starts, and how many places it holds
    for value in wanted:
        start, count = min(max(value, low), high), 1
        while blocks and start < blocks[-1][0] + blocks[-1][1] * apart:
            before, members = blocks.pop()
            start = (members * before + count * (start - members * apart)) / (members + count)
            count += members
            start = min(max(start, low), high - (count - 1) * apart)
        blocks.append((start, count))
    return [start + place * apart for start, count in blocks for place in range(count)]


COMB_GAP = 34.0  # points from the point to the first row of its comb
ROW = 1.15  # height of a row, as a multiple of the letters' size
OFFSETS = [
    (round(far * math.cos(angle * math.pi / 8), 1), round(far * math.sin(angle * math.pi / 8), 1))
    for far in (9, 13, 18, 24, 32, 42, 54, 68, 84)
    for angle in range(16)
]
SPACE = 6  # points between names on one line, for letters of 9
FAR = 17  # points, for letters of 9; from here on a name needs a line to its point


def _leader(axes: Axes, point: Point, offset: tuple[float, float], theme: Theme) -> None:
    arrow = {"arrowstyle": "-", "color": theme.rule, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    axes.annotate("", (point.x, point.y), xytext=offset, textcoords="offset points", arrowprops=arrow, zorder=2)


def _cost(box: Box, written: Iterable[Box], drawn: Iterable[Box], frame: Box) -> float:
    """Return how bad a place for a name is: pixels that it covers, of other names above all, and by which it leaves the panel."""
    x0, y0, x1, y1 = box
    outside = sum(max(0.0, beyond) for beyond in (frame[0] - x0, x1 - frame[2], frame[1] - y0, y1 - frame[3]))
    return float(5 * _covered(box, written) + 0.5 * _covered(box, drawn) + 100 * outside)


def _covered(box: Box, others: Iterable[Box]) -> float:
    x0, y0, x1, y1 = box
    return sum((min(x1, c) - max(x0, a)) * (min(y1, d) - max(y0, b)) for a, b, c, d in others if a < x1 and c > x0 and b < y1 and d > y0)


def _side(dx: float) -> Literal["left", "right", "center"]:
    return "left" if dx > 2 else "right" if dx < -2 else "center"


def _box(x: float, y: float, width: float, height: float, side: float) -> Box:
    left = x - {"left": 0.0, "right": width, "center": width / 2}[_side(side)]
    return left, y - height / 2, left + width, y - height / 2 + height


def _around(x0: float, y0: float, x1: float, y1: float, margin: float) -> Box:
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm in one panel, in the axes' units; ``arm`` is what is written there, in bold letters for a baseline."""

    arm: str
    view: str
    level: Level
    x: float
    y: float
    low: float
    high: float
    bold: bool = False
