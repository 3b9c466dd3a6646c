"""Of many arms each has its own number in the plot, also where dozens leak as much as the worst or as little as the best."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report import key, labels, pareto
from experiments.report.front import PANELS
from experiments.report.theme import LIGHT
from tests.experiments.test_ladder_report import gain, ladder, rate
from tests.experiments.test_report import Page, row, write

NAMED = {"Gaussian noise 0.1, tuned": "gaussian_noise", "DP-SGD z = 0.5, tuned": "dp_sgd", "DP-SGD z = 1.5, tuned": "dp_sgd"}


def crowd(arms: int = 95) -> list[dict[str, object]]:
    """The undefended arm, three baselines, half of the others at the top, a third at the floor, the rest in a cloud just above that."""
    rng = np.random.default_rng(0)
    rows = [row("none", control=True, stack=[], accuracy=0.95, identified=rate(1.0), gain=gain(48.0))]
    for place, (name, family) in enumerate(NAMED.items()):
        rows.append(row(name, stack=[family], accuracy=0.9 - 0.3 * place, identified=rate(0.6 - 0.2 * place), gain=gain(20.0 - 6 * place)))
    for place in range(arms - len(rows)):
        high = place % 6 < 3
        share, height = (1.0, 48.0) if high else (0.0, rng.uniform(-1, 0)) if place % 6 < 5 else (rng.uniform(0.1, 0.25), rng.uniform(3, 9))
        accuracy = 0.95 - rng.exponential(0.05 if high else 0.2) % 0.9 if place % 6 < 5 else rng.uniform(0.8, 0.9)
        arm = f"defense number {place // 3} of strength {place % 3}"
        rows.append(row(arm, stack=[f"family {place // 3}"], accuracy=accuracy, identified=rate(share, 0.01), gain=gain(height)))
    return rows


def drawn(figure: Figure) -> tuple[FigureCanvasAgg, Any]:
    """As a file is written: laid out once more, with the panels' final limits."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # type: ignore[no-untyped-call]
    return canvas, canvas.get_renderer()  # type: ignore[no-untyped-call]


Box = tuple[float, float, float, float]


def boxes(axes: Axes, renderer: Any) -> dict[str, Box]:
    """Left, bottom, right and top of each text in pixels."""
    return {text.get_text(): tuple(text.get_window_extent(renderer).extents) for text in axes.texts if text.get_text()}


def covering(there: dict[str, Box], *, by: float = 1.0) -> list[tuple[str, str]]:
    """The pairs of which one reaches into the other by more than ``by`` pixels both ways."""
    pairs = combinations(there.items(), 2)
    return [
        (one, other) for (one, a), (other, b) in pairs if min(a[2], b[2]) - max(a[0], b[0]) > by and min(a[3], b[3]) - max(a[1], b[1]) > by
    ]


@pytest.mark.parametrize("arms", [15, 95])
def test_no_label_of_a_crowd_covers_another_and_every_arm_has_one(arms: int) -> None:
    rows = crowd(arms)
    figure = pareto.pareto(rows)
    _, renderer = drawn(figure)
    *panels, below = figure.axes
    numbers = {line.name: line.number for line in pareto.lines(rows)}
    assert sorted(numbers.values(), key=int) == [str(place) for place in range(1, arms + 1)]
    for axes in panels:
        there, frame = boxes(axes, renderer), axes.get_window_extent(renderer)
        assert sorted(text.partition(" ")[0] for text in there) == sorted(numbers.values())
        assert covering(there) == []
        for left, bottom, right, top in there.values():
            assert frame.x0 - 1 <= left <= right <= frame.x1 + 1
            assert frame.y0 - 1 <= bottom <= top <= frame.y1 + 1
        assert {f"{numbers[name]} {name}" for name in NAMED} <= set(there)
    assert [text.get_text() for text in below.texts] == [part for name, number in numbers.items() for part in (number, name)]
    there = boxes(below, renderer)
    assert covering(there) == []
    assert max(right for _, _, right, _ in there.values()) <= below.get_window_extent(renderer).x1


def test_two_names_on_a_line_are_not_read_as_one() -> None:
    """In the demo's plot one name began where another ended: each on its point's free side, with just the room for both between them."""
    figure = Figure(figsize=(4, 2), dpi=72)
    axes, canvas = figure.add_axes((0, 0, 1, 1)), FigureCanvasAgg(figure)
    axes.set(xlim=(0, 288), ylim=(0, 144))  # a unit is a point
    name, other = "DP-SGD, z = 1.5", "DP-SGD, z = 0.3"
    width = axes.text(0, 0, name, fontsize=9).get_window_extent(canvas.get_renderer()).width  # type: ignore[no-untyped-call]
    axes.texts[0].remove()
    right = 280.0
    at = {name: right - 2 * width - 19, other: right}
    points = [labels.Point(arm=arm, view="", level="floor", x=x, y=72.0, low=72.0, high=72.0) for arm, x in at.items()]
    labels.label_points(axes, points, [], canvas, LIGHT)
    _, renderer = drawn(figure)
    there = boxes(axes, renderer)
    assert set(there) == set(at)
    wider = {arm: (x0 - 2, y0, x1 + 2, y1) for arm, (x0, y0, x1, y1) in there.items()}
    assert covering(wider) == []


@pytest.mark.slow
def test_a_number_in_a_comb_has_a_line_to_its_own_point() -> None:
    """A line begins at the arm's point and ends at its number, above it at the top and below it at the floor, and crosses no other."""
    figure = pareto.pareto(crowd())
    _, renderer = drawn(figure)
    axes = figure.axes[0]
    there, at = boxes(axes, renderer), {text.get_text(): text.xy for text in axes.texts if text.get_text()}  # type: ignore[attr-defined]
    teeth = [line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_linewidth() == 0.6]
    assert len(teeth) > 60
    reached = set()
    for tooth in teeth:
        path = np.asarray(tooth.get_transform().transform(tooth.get_xydata()))
        over = {text: box for text, box in there.items() if abs((box[0] + box[2]) / 2 - path[-1, 0]) < 1}
        (mine,) = (text for text, box in over.items() if abs((box[1] + box[3]) / 2 - path[-1, 1]) < 20)
        assert at[mine] == pytest.approx(tuple(tooth.get_xydata()[0]))
        reached.add(mine)
        low, high = sorted(path[1:, 1])
        crossed = [text for text, (x0, y0, x1, y1) in there.items() if x0 + 1 < path[1, 0] < x1 - 1 and y0 + 2 < high and y1 - 2 > low]
        assert set(crossed) <= {mine}
    assert len(reached) == len(teeth)


def test_places_are_spread_in_order_within_bounds_and_moved_only_where_they_must() -> None:
    assert labels.spread([10.0, 50.0, 90.0], 10, 0, 100) == [10.0, 50.0, 90.0]
    assert labels.spread([50.0, 50.0, 50.0], 10, 0, 100) == pytest.approx([40, 50, 60])  # symmetric about where they want to be
    assert labels.spread([0.0, 0.0, 99.0, 100.0], 10, 0, 100) == pytest.approx([0, 10, 90, 100])
    wanted = sorted(np.random.default_rng(1).exponential(20, 40) % 100)
    found = np.asarray(labels.spread(wanted, 2.4, 0, 100))
    assert np.diff(found).min() >= 2.4 - 1e-9
    assert found.min() >= -1e-9
    assert found.max() <= 100 + 1e-9
    points = [labels.Point(arm="10", view="", level="floor", x=0.0, y=0.0, low=0.0, high=0.0)] * 90
    assert [labels.comb_rows(points[:many], 10.0, 400.0) for many in (1, 40, 90)] == [2, 2, 4]  # 17 points each
    assert np.diff(labels.spread([1.0] * 50, 10, 0, 100)) == pytest.approx(100 / 49)  # what does not fit lies closer


def test_the_baselines_come_first_in_the_key_and_their_signs_are_those_of_the_panels() -> None:
    rows = crowd(30)[::-1]
    names = list(key.numbered([pareto.panel(rows, which) for which in PANELS]))
    assert names[:4] == ["none", *reversed(NAMED)]
    figure = pareto.pareto(rows)
    signs = [line for line in figure.axes[-1].lines if len(line.get_xdata()) == 1]
    assert [line.get_marker() for line in signs[:4]] == ["*", *(pareto._marker((NAMED[name],)) for name in reversed(NAMED))]
    weights = {text.get_text(): text.get_fontweight() for text in figure.axes[-1].texts}
    assert {weights[name] for name in names[:4]} == {"bold"}
    assert {weights[name] for name in names[4:]} == {"normal"}


def test_the_page_lists_the_arms_of_the_plot_with_the_same_numbers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = crowd(20)
    line = {each.name: each for each in pareto.lines(rows)}["DP-SGD z = 1.5, tuned"]
    assert (line.number, line.lost, line.gain[0]) == ("4", "+65.0", "9.0\u00a0dB")
    assert line.identified[0] == f"{100 * (0.25 - 0.01) / 0.99:.1f}\u00a0%"
    assert all(each.number == "" for each in pareto.lines(list(ladder()["rows"])))  # type: ignore[call-overload]
    dominated = next(each for each in pareto.lines(list(ladder()["rows"])) if each.name == "top-k")  # type: ignore[call-overload]
    assert dominated.identified[1] == "dominated by DP-SGD and 1 more"
    monkeypatch.setattr(pareto, "pareto", lambda rows, theme: Figure(figsize=(1, 1)))
    monkeypatch.setattr("experiments.report.plots.leakage_vs_accuracy", lambda rows, theme: Figure(figsize=(1, 1)))
    assert "4DP-SGD z = 1.5, tuned+65.024.2\u00a0%" in Page(write(tmp_path, summary={"rows": rows}, pictures=[])).text
