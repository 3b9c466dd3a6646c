"""Names beside the points of a plot, where they cover nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke

from experiments.report.theme import Theme
from experiments.report.verdict import Level

Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""


def label_points(axes: Axes, points: Sequence[Point], lines: Iterable[float], canvas: FigureCanvasAgg, theme: Theme) -> None:
    """Write each arm's name beside its point, at the nearest place where it covers nothing; a thin line leads to it when that is far."""
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    unit = renderer.points_to_pixels(1.0)
    frame = axes.get_window_extent(renderer).extents
    taken: list[Box] = [text.get_window_extent(renderer).extents for text in axes.texts]
    heights = [axes.transData.transform((0, y))[1] for y in lines]
    taken += [_around(frame[0], height, frame[2], height, unit) for height in heights]
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


def _cost(box: Box, taken: Iterable[Box], frame: Box) -> float:
    """Return how bad a place for a label is: pixels that it covers, and far worse, pixels by which it leaves the panel."""
    x0, y0, x1, y1 = box
    outside = sum(max(0.0, beyond) for beyond in (frame[0] - x0, x1 - frame[2], frame[1] - y0, y1 - frame[3]))
    covered = [(min(x1, c) - max(x0, a)) * (min(y1, d) - max(y0, b)) for a, b, c, d in taken if a < x1 and c > x0 and b < y1 and d > y0]
    return float(0.5 * sum(covered) + 100 * outside)


def _box(x: float, y: float, width: float, height: float, side: float) -> Box:
    left = x - (0 if side > 0 else width if side < 0 else width / 2)
    return left, y - height / 2, left + width, y - height / 2 + height


def _around(x0: float, y0: float, x1: float, y1: float, margin: float) -> Box:
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


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
