"""Accuracy lost against leakage's upper limit, one bubble an arm: strengths of a defense joined, the baselines always named."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report import key, values
from experiments.report.front import BASELINES, PANELS, Arm, panel
from experiments.report.labels import Point, comb, comb_height, label_points
from experiments.report.plots import axes_style
from experiments.report.theme import LIGHT, Theme

SMALLEST, LARGEST = 24.0, 300.0
"""Areas in square points of the cheapest and of the costliest arm."""

CROWDED = 14
"""From here on arms are numbered, and a key below the panels has their names."""
NUMBERS = 7.5
"""Size of the numbers in points."""
LEVEL, MANY = 0.02, 6
"""From so many arms on whose leaks differ by less than this part of the panel's range, their numbers stand in a comb."""

HUES = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#7b3fa0", "#a6761d", "#1b9e9e", "#e7298a", "#66a61e", "#7570b3",
    "#8c1c13", "#4d7ea8", "#b07d62", "#5f0f40",
)  # fmt: skip


def pareto(rows: Sequence[Mapping[str, object]], theme: Theme | None = None) -> Figure:
    """Draw each arm's accuracy loss against the upper limit of what leaks, by identification and by PSNR gain.

    Dominated arms are hollow, ones that may be are pale. The area of a bubble is the client's CPU time of one round. A few arms are named
    at their points; many are numbered, in panels as wide as the page, with a key below; the baselines then keep their names as well.
    """
    theme = theme or LIGHT
    drawn = {which: panel(rows, which) for which in PANELS}
    families = list(dict.fromkeys(arm.family for arms in drawn.values() for arm in arms if arm.family and not arm.baseline))
    colors = {family: HUES[place % len(HUES)] for place, family in enumerate(families)}
    costs = [arm.cost for arms in drawn.values() for arm in arms if arm.cost]
    numbers = _numbers(drawn)
    figure, panels = _many(numbers, theme) if numbers else _few(len(families), theme)
    canvas = FigureCanvasAgg(figure)
    for which, axes in panels.items():
        axes_style(axes, PANELS[which], theme, across="Accuracy lost against no defense, percentage points")
        _draw(axes, drawn[which], colors, costs, theme)
    _legend(figure, drawn, {} if numbers else colors, costs, theme)
    if numbers:
        key.draw(figure.axes[-1], _entries(drawn, numbers, colors, theme), theme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        canvas.draw()  # type: ignore[no-untyped-call]
        for which, axes in panels.items():
            if numbers:
                _number(axes, drawn[which], numbers, canvas, theme)
            else:
                label_points(axes, [_point(arm, arm.name) for arm in drawn[which]], set(), canvas, theme)
    return figure


def lines(rows: Sequence[Mapping[str, object]]) -> list[key.Line]:
    """Return what the plot shows as a table, with the numbers that arms have in it."""
    drawn = {which: panel(rows, which) for which in PANELS}
    return key.lines(drawn["identified"], drawn["gain"], _numbers(drawn))


def _numbers(drawn: Mapping[str, Sequence[Arm]]) -> dict[str, int]:
    """The number of each arm by its name; none where there are few."""
    return key.numbered(drawn.values()) if max(map(len, drawn.values())) >= CROWDED else {}


def _few(families: int, theme: Theme) -> tuple[Figure, dict[str, Axes]]:
    height = 5.0 + 0.2 * math.ceil((families + 5) / 4)
    figure = Figure(figsize=(10.4, height), dpi=160, facecolor=theme.paper, layout="constrained")
    return figure, dict(zip(PANELS, figure.subplots(1, 2), strict=True))


def _many(names: Collection[str], theme: Theme) -> tuple[Figure, dict[str, Axes]]:
    """One panel below the other, and below them the axes of the key."""
    heights = [4.1, 5.1, key.ROW * key.rows(names)]
    figure = Figure(figsize=(10.4, sum(heights) + 0.6), dpi=160, facecolor=theme.paper, layout="constrained")
    *panels, _ = figure.subplots(3, 1, height_ratios=heights)
    return figure, dict(zip(PANELS, panels, strict=True))


def svg(figure: Figure) -> str:
    """Return a figure as an SVG file whose bytes depend on nothing but the figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "fedpeek", "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="svg", facecolor=figure.get_facecolor(), metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode("utf-8")


def text(rows: Sequence[Mapping[str, object]]) -> str:
    """Say in words what the plot shows, for who cannot see it."""
    parts = []
    for which, unit in (("identified", "%"), ("gain", "dB")):
        arms = [f"{arm.name}: {values.fixed(arm.drop)} points, {values.fixed(arm.leak)} {unit}" for arm in panel(rows, which)]
        parts.append(f"{PANELS[which]}, over accuracy lost: {'; '.join(arms) or 'no arm has both'}.")
    return " ".join(parts)


def _draw(axes: Axes, arms: Sequence[Arm], colors: Mapping[tuple[str, ...], str], costs: Sequence[float], theme: Theme) -> None:
    if not arms:
        axes.text(0.5, 0.5, "no arm has both numbers, or none is undefended", transform=axes.transAxes, ha="center", color=theme.quiet)
        return
    for family in dict.fromkeys(arm.family for arm in arms):
        members = sorted((arm for arm in arms if arm.family == family), key=lambda arm: arm.drop)
        baseline, color = members[0].baseline, _color(family, colors, theme)
        if len(members) > 1:
            style = (0, (5, 2.5)) if baseline else "-"
            axes.plot(
                [arm.drop for arm in members], [arm.leak for arm in members], color=color, linestyle=style,
                linewidth=1.8 if baseline else 0.9, alpha=1.0 if baseline else 0.65, zorder=2,
            )  # fmt: skip
        smallest, height = (52.0, 4) if baseline else (SMALLEST, 3) if family else (150.0, 5)
        for arm in members:
            axes.scatter(
                [arm.drop], [arm.leak], s=_area(arm.cost, costs, smallest), marker=_marker(family), zorder=height,
                facecolor=theme.paper if arm.dominated_by else (*to_rgb(color), 0.4) if _pale(arm) else color, edgecolor=color,
                linewidth=1.3,
            )  # fmt: skip
            if arm.unbounded:
                arrow = {"arrowstyle": "<-", "color": color, "linewidth": 1.3}
                axes.annotate("", (arm.drop, arm.leak), xytext=(0, 26), textcoords="offset points", arrowprops=arrow, zorder=height)
    xs, ys = [0.0, *(arm.drop for arm in arms)], [0.0, *(arm.leak for arm in arms)]
    for limits, ends in ((axes.set_xlim, xs), (axes.set_ylim, ys)):
        margin = 0.09 * (max(ends) - min(ends)) + 0.4
        limits(min(ends) - margin, max(ends) + margin)
    axes.axvline(0, color=theme.rule, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)


def _number(axes: Axes, arms: Sequence[Arm], numbers: Mapping[str, int], canvas: FigureCanvasAgg, theme: Theme) -> None:
    """Write each arm's number: in a comb where many leak as much as the worst or the best does, else beside the point."""
    tight = {above: _level(arms, above=above) for above in (True, False)}
    inside = [arm for arm in arms if arm not in tight[True] and arm not in tight[False]]
    box = axes.get_window_extent()
    wide, high = (72 * pixels / canvas.figure.dpi for pixels in (box.width, box.height))
    points = {above: [_point(arm, str(numbers[arm.name])) for arm in level] for above, level in tight.items()}
    room = {above: comb_height(found, NUMBERS, wide) if found else 0.0 for above, found in points.items()}
    low, top = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= top])
    span = (top - low) / (1 - sum(room.values()) / high)
    axes.set_ylim(low - span * room[False] / high, top + span * room[True] / high)
    for above, found in points.items():
        if found:
            comb(axes, found, canvas, theme, above=above, size=NUMBERS)
    named = [_point(arm, f"{numbers[arm.name]} {arm.name}" if arm.baseline else str(numbers[arm.name])) for arm in inside]
    label_points(axes, named, set(), canvas, theme, size=NUMBERS, others=[*points[True], *points[False]])


def _level(arms: Sequence[Arm], *, above: bool) -> list[Arm]:
    """The arms that leak as much as the worst, or as little as the best, if these are many."""
    leaks = [arm.leak for arm in arms]
    near = LEVEL * (max(leaks) - min(leaks)) if leaks else 0.0
    found = [arm for arm in arms if (arm.leak >= max(leaks) - near if above else arm.leak <= min(leaks) + near)]
    return found if len(found) >= MANY and near else []


def _entries(
    drawn: Mapping[str, Sequence[Arm]], numbers: Mapping[str, int], colors: Mapping[tuple[str, ...], str], theme: Theme
) -> list[key.Entry]:
    arms = {arm.name: arm for members in drawn.values() for arm in members}
    strengths = Counter(arm.family for arm in arms.values())
    return [
        key.Entry(
            number=number, name=name, marker=_marker(arms[name].family), color=_color(arms[name].family, colors, theme),
            joined="none" if strengths[arms[name].family] < 2 else "--" if arms[name].baseline else "-", bold=_bold(arms[name]),
        )
        for name, number in numbers.items()
    ]  # fmt: skip


def _bold(arm: Arm) -> bool:
    return arm.baseline or not arm.family


def _pale(arm: Arm) -> bool:
    return bool(arm.undecided) and not arm.dominated_by


def _point(arm: Arm, words: str) -> Point:
    return Point(
        arm=words, view="", level="floor", x=arm.drop, y=arm.leak, low=arm.leak, high=arm.leak, bold=words != arm.name and _bold(arm)
    )


def _color(family: tuple[str, ...], colors: Mapping[tuple[str, ...], str], theme: Theme) -> str:
    hue = colors.get(family, theme.ink)
    return hue if theme is LIGHT or hue == theme.ink else _lighter(hue)


def _lighter(hue: str) -> str:
    """A hue that stands out from dark paper: mixed with white."""
    red, green, blue = (0.6 * part + 0.4 for part in to_rgb(hue))
    return to_hex((red, green, blue))


def _marker(family: tuple[str, ...]) -> str:
    if not family:
        return "*"
    return dict(zip(BASELINES, ("D", "^"), strict=True)).get(family, "o")


def _area(cost: float | None, costs: Sequence[float], at_least: float) -> float:
    """Areas are proportional to the cost, but for the smallest, which must still be seen."""
    return max(at_least, LARGEST * cost / max(costs)) if cost and costs else max(at_least, 60.0)


def _legend(
    figure: Figure, drawn: Mapping[str, Sequence[Arm]], colors: Mapping[tuple[str, ...], str], costs: Sequence[float], theme: Theme
) -> None:
    present = {arm.family for arms in drawn.values() for arm in arms}
    entries: list[tuple[str, str, str, Literal["none", "--", "-"], str]] = []
    if () in present:
        entries.append(("*", theme.ink, theme.ink, "none", "no defense"))
    for family, words in BASELINES.items():
        if family in present:
            entries.append((_marker(family), theme.ink, theme.ink, "--", f"baseline: {words}"))
    entries += [("o", _color(family, colors, theme), _color(family, colors, theme), "-", " + ".join(family)) for family in colors]
    entries.append(("o", theme.paper, theme.quiet, "none", "hollow: dominated beyond the intervals"))
    if any(_pale(arm) for arms in drawn.values() for arm in arms):
        entries.append(("o", theme.rule, theme.quiet, "none", "pale: no better than another, not distinguishable from it"))
    if any(arm.unbounded for arms in drawn.values() for arm in arms):
        entries.append((r"$\uparrow$", theme.quiet, theme.quiet, "none", "mean; too few uploads for an upper limit"))
    if costs:
        entries.append(("o", theme.quiet, theme.quiet, "none", f"largest area: client {values.duration(max(costs))} a round"))
    handles = [
        Line2D([], [], marker=marker, markerfacecolor=face, markeredgecolor=edge, color=edge, linestyle=line, markersize=7, label=words)
        for marker, face, edge, line, words in entries
    ]
    columns = 4 if colors else 3
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, handletextpad=0.5)
    for label in legend.get_texts():
        label.set_color(theme.quiet)
        label.set_parse_math(False)
