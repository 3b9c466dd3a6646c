"""The curve over the number of senders shows each arm's own figures at its own number, and is left out where there is no curve."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from experiments.report import senders
from tests.experiments.test_report import row
from tests.experiments.test_summary import aggregate, summary, trial
from tests.experiments.test_summary import row as of_arm

GAINS = {1: 40.0, 2: 30.0, 4: 21.0, 8: 12.0}


def arm(label: str, count: int, gain: float, **changes: object) -> dict[str, object]:
    leak = {"psnr_db": {"mean": gain, "low": gain - 1, "high": gain + 2}}
    named = {"rate": 1 / count, "low": 0.5 / count, "high": 1.0, "chance": count / 541}
    return row(label, senders=[count], gain=leak, identified=named, **changes)


def rows() -> list[dict[str, object]]:
    return [*(arm(f"{count} senders", count, gain) for count, gain in GAINS.items()), arm("8 senders, plain", 8, 12.5)]


def along(line: Line2D) -> list[tuple[float, float]]:
    xs, ys = (np.asarray(values, dtype=float).tolist() for values in (line.get_xdata(), line.get_ydata()))
    return list(zip(xs, ys, strict=True))


def test_each_arm_stands_at_its_number_with_its_interval() -> None:
    figure = senders.curve(rows())
    assert figure is not None
    left, right = figure.axes
    joined = next(points for points in map(along, left.lines) if len(points) == len(GAINS))
    assert {int(count): gain for count, gain in joined} == GAINS
    ends = sorted(tuple(np.ravel(bar.get_segments()[0])[[0, 1, 3]]) for bar in left.collections if isinstance(bar, LineCollection))
    assert ends[:4] == [(count, pytest.approx(gain - 1), pytest.approx(gain + 2)) for count, gain in GAINS.items()]
    assert ends[4][0] > 8  # the other arm of eight, beside the first
    dashed = [along(line) for line in right.lines if line.get_linestyle() != "-"]
    chance = next(points for points in dashed if len(points) == len(GAINS))
    assert [rate for _, rate in chance] == pytest.approx([100 * count / 541 for count in GAINS])
    assert "8 senders, plain +12.5" in senders.text(rows())


def test_two_numbers_are_no_curve_nor_uploads_of_several() -> None:
    assert senders.curve([*rows(), *(arm(f"defense {number}", 1, 20.0) for number in range(6))]) is None
    assert senders.curve(rows()[:2]) is None
    assert senders.curve([*rows()[:2], {**rows()[2], "senders": [3, 4]}]) is None
    assert senders.curve([{key: value for key, value in each.items() if key != "senders"} for each in rows()]) is None


def test_a_summary_says_how_many_senders_an_upload_has() -> None:
    found = summary([trial(), *aggregate("sum", 14.0)])
    assert (of_arm(found, "none")["senders"], of_arm(found, "sum")["senders"]) == ([1], [8])
