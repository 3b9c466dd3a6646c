"""The key of a plot of many arms: a number for each, beside its name below the panels, and beside its figures on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from experiments.report import values
from experiments.report.front import Arm
from experiments.report.theme import Theme

LETTERS = 7.2
"""Size of the key's letters in points."""
ROW = 0.165
"""Height of one of its rows in inches."""
LONGEST = 58
"""Letters of a name, beyond which it is cut."""
WIDTH = 160
"""Letters that fit side by side, with the numbers and signs of four columns."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One arm in the key; ``joined`` if it is one of several strengths, which a line joins in the panels."""

    number: int
    name: str
    marker: str
    color: str
    joined: str
    bold: bool


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm of the plot as texts: for each panel the upper limit of what leaks, and who dominates it there."""

    number: str
    name: str
    lost: str
    identified: tuple[str, str]
    gain: tuple[str, str]


def numbered(drawn: Iterable[Sequence[Arm]]) -> dict[str, int]:
    """Number the arms of all panels from 1: those without defense, the baselines, then the rest, each in their order."""
    arms = {arm.name: arm for members in drawn for arm in members}
    rank = sorted(arms.values(), key=lambda arm: 0 if not arm.family else 1 if arm.baseline else 2)
    return {arm.name: place for place, arm in enumerate(rank, start=1)}


def lines(identified: Sequence[Arm], gain: Sequence[Arm], numbers: Mapping[str, int]) -> list[Line]:
    """Return the arms of both panels in the order of their numbers, or, without these, in their own."""
    panels = [{arm.name: arm for arm in arms} for arms in (identified, gain)]
    baselines = [arm.name for arms in (identified, gain) for arm in arms if arm.baseline]
    names = numbers or dict.fromkeys([*panels[0], *panels[1]])
    found = []
    for name in names:
        seen = [arms.get(name) for arms in panels]
        cells = [_limit(arm, unit, baselines) for arm, unit in zip(seen, (f"{values.NBSP}%", f"{values.NBSP}dB"), strict=True)]
        lost = next(values.fixed(arm.drop, sign=True) for arm in seen if arm is not None)
        found.append(Line(number=str(numbers.get(name, "")), name=name, lost=lost, identified=cells[0], gain=cells[1]))
    return found


def _limit(arm: Arm | None, unit: str, baselines: Sequence[str]) -> tuple[str, str]:
    if arm is None:
        return values.MISSING, ""
    by = sorted(arm.dominated_by, key=lambda name: name not in baselines)
    more = f" and {len(by) - 1} more" if len(by) > 1 else ""
    undecided = "not distinguishable from one that is no worse" if arm.undecided else "not dominated"
    leak = f"{values.fixed(arm.leak)}{unit}" + (" (mean)" if arm.unbounded else "")
    return leak, f"dominated by {by[0]}{more}" if by else undecided


def rows(names: Iterable[str]) -> int:
    """Return how many rows the key of these arms has."""
    names = list(names)
    return math.ceil(len(names) / _columns(names))


def draw(axes: Axes, entries: Sequence[Entry], theme: Theme) -> None:
    """Write the key on axes that are as wide as the figure, column by column."""
    columns = _columns([entry.name for entry in entries])
    high = math.ceil(len(entries) / columns)
    axes.set_axis_off()
    axes.set(xlim=(0, columns), ylim=(high - 0.5, -0.5))
    for place, entry in enumerate(entries):
        column, row = divmod(place, high)
        sign, number, name = (column + columns * part for part in (0.012, 0.042, 0.05))
        axes.plot([sign - columns * 0.01, sign + columns * 0.01], [row, row], color=entry.color, linestyle=entry.joined, linewidth=1.1)
        axes.plot([sign], [row], color=entry.color, marker=entry.marker, markersize=5.5, linestyle="none")
        weight = "bold" if entry.bold else "normal"
        style: Mapping[str, object] = {"fontsize": LETTERS, "color": theme.ink, "va": "center_baseline", "fontweight": weight}
        axes.text(number, row, str(entry.number), ha="right", **style)  # type: ignore[arg-type]
        axes.text(name, row, _cut(entry.name), parse_math=False, **style)  # type: ignore[arg-type]


def _columns(names: Sequence[str]) -> int:
    """As many columns as the longest name lets stand side by side, between one and four."""
    longest = max(len(_cut(name)) for name in names)
    return min(4, max(1, WIDTH // (longest + 6)))


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
