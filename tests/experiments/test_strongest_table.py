"""The table of ``strongest`` prints intervals that hold for as few victims as it has."""

from __future__ import annotations

from scipy import stats

from experiments.benchmarks.strongest_page import page, table


def entry(gains: list[float]) -> dict[str, object]:
    return {
        "setting": "s", "victims": len(gains), "records": len(gains), "strongest_db": [14.0 + gain for gain in gains], "proven": 0,
        "seconds": [1.0] * len(gains), "solvers_db": {}, "best_db": [0.0] * len(gains), "matched": 0, "floor_db": [14.0] * len(gains),
        "budget": 15.0, "source": "unknown", "gain": {"mean": 9.0, "low": 8.0, "high": 10.0},
    }  # fmt: skip


def test_two_victims_have_students_interval_and_a_gain_that_they_do_not_show_says_so() -> None:
    low, high = stats.t.interval(0.95, 1, loc=3.8, scale=stats.sem([3.0, 4.6]))
    rows = table([entry([3.0, 4.6]), entry([3.78, 3.82]), entry([-2.0, -1.0])]).splitlines()[2:]
    assert f"| +3.8 [{low:+.1f}, {high:+.1f}] **not significant (2 victims)** |" in rows[0]  # −6.4 to 14.0, not the 3.0 to 4.6 that were seen
    assert "| +3.8 [+3.5, +4.1] |" in rows[1]
    assert "**floor not beaten**" in rows[2]


def test_no_interval_reaches_beyond_the_cap_and_where_all_reached_it_nothing_is_tested() -> None:
    exact, unequal = entry([46.0, 46.0]), entry([10.0, 45.0])
    exact["floor_db"] = [10.0, 18.0]
    exact["strongest_db"] = [60.0, 60.0]
    rows = table([exact, unequal]).splitlines()[2:]
    assert "| +46.0 (cap) |" in rows[0]
    assert "| +27.5 [-60.0, +60.0] **not significant (2 victims)** |" in rows[1]
    said = page([exact])
    assert "measured before versions were recorded." in said
    assert "by source abc." in page([{**exact, "source": "abc"}])
