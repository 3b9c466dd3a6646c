"""What stands beside a figure: the paired difference in accuracy, the rounding, the control that failed, and pages that say all of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from experiments import defense_pages, measurements
from experiments.facts import accuracy_difference, relative
from experiments.report import beside, front, measured, values
from experiments.result import ArmFacts
from experiments.statistics import bootstrap_mean
from simulator.errors import SpecError
from simulator.types import Update, Upload
from tests.experiments.test_report import row, terminal


def facts(arm: str, *accuracies: float) -> list[ArmFacts]:
    return [ArmFacts(arm=arm, seed=seed, accuracy=accuracy) for seed, accuracy in enumerate(accuracies)]


def test_accuracy_is_paired_by_seed_with_students_interval() -> None:
    found = accuracy_difference(facts("a", 0.7, 0.62, 0.8), facts("none", 0.8, 0.7, 0.84, 0.1))
    assert found is not None
    differences = [-0.1, -0.08, -0.04]
    interval = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(differences), *interval))
    assert found["seeds"] == 3
    assert beside.accuracy({"accuracy_difference": found}) == "−7.3 ± 7.6"
    two = accuracy_difference(facts("a", 0.8, 0.5), facts("none", 0.8, 0.8))
    assert two is not None
    assert two["high"] - two["mean"] == pytest.approx(0.15 * stats.t.ppf(0.975, 1))  # 191 points
    assert beside.accuracy({"accuracy_difference": two}) == "−15.0"
    alone = accuracy_difference(facts("a", 0.7), facts("none", 0.8, 0.7))
    assert alone == {"mean": pytest.approx(-0.1), "low": None, "high": None, "seeds": 1}
    assert beside.accuracy({"accuracy_difference": alone}) == "−10.0"
    assert accuracy_difference(facts("a", math.nan), facts("none", 0.8)) is None


def test_rounding_is_relative_to_the_released_mean() -> None:
    upload = Upload(frozenset({0, 1}), Update("gradient", {"w": torch.tensor([3.0, 4.0])}), {}, 2)

    class Seen:
        uploads = (upload,)

    class Recorded:
        observations = (Seen(),)

    assert relative(0.0035, Recorded()) == pytest.approx(0.0035 / math.sqrt(12.5))  # type: ignore[arg-type]
    assert relative(None, Recorded()) is None  # type: ignore[arg-type]
    assert beside.rounding({"quantization_relative": 1.23e-4}) == "0.012\u00a0%"
    assert beside.rounding({"quantization_error": 1.23e-9}) == "1.2·10⁻⁹\u00a0rms"
    assert beside.rounding({}) == ""


def judged(defense: str, low: float, against: str = "none", **changes: object) -> dict[str, object]:
    gain = {"psnr_db": {"mean": low + 1, "low": low, "high": low + 2}}
    return row(defense, gain=gain, against=against, control=defense == against, stack=[] if defense == against else ["top_k"], **changes)


def test_a_page_prints_no_comparison_where_the_control_failed() -> None:
    rows = [judged("none", -3.0, flags=["floor_not_beaten"]), judged("hidden", -4.0), judged("shown", 2.0)]
    titles, _, none, hidden, shown = (line.split(" | ") for line in measured.table("top_k", rows).splitlines()[:5])
    at = titles.index("PSNR gain, dB")
    assert none[at] == "−2.0 [−3.0 to −1.0]"
    assert (hidden[at], hidden[at + 1]) == (beside.CONTROL_FAILED, beside.CONTROL_FAILED)
    assert (shown[at], shown[at + 1]) == ("+3.0 [2.0 to 4.0]", beside.CONTROL_FAILED)
    assert [arm.name for arm in front.panel(rows, "gain")] == ["none"]
    chance, above = ({"rate": 0.05, "low": low, "high": 0.2, "chance": 0.01, "chance_in_class": 0.1} for low in (0.001, 0.02))
    nobody = [judged("none", 3.0, identified=chance), judged("hidden", 2.0, identified=chance), judged("shown", 2.0, identified=above)]
    titles, _, _, hidden, shown = (line.split(" | ") for line in measured.table("top_k", nobody).splitlines()[:5])
    at = titles.index("named by one attack, chance (knowing the class)")
    assert (hidden[at], shown[at]) == (beside.CONTROL_FAILED, "5\u00a0% [2–20\u00a0%], 1\u00a0% (10\u00a0%)")
    assert front.panel([judged("none", 3.0), judged("seen", -4.0)], "gain")[1].name == "seen"


def test_a_page_names_the_strongest_attack_and_explains_each_flag_by_a_letter() -> None:
    solvers = {"strongest": {"records": 30}, "dlg": {"records": 2}}
    best = judged("top-k", 2.0, attack="best per victim", solvers=solvers, flags=["not_converged", "prior_only"], accuracy_difference={
        "mean": -0.05, "low": -0.07, "high": -0.03, "seeds": 3}, quantization_relative=1e-4)  # fmt: skip
    alone = judged("top-k", 2.0, attack="strongest", solvers={"r_gap": {"records": 32}})
    prior = {"psnr_db": {"mean": 0.4, "low": -0.2, "high": 1.0}, "records": 10}
    learned = judged("top-k", 1.0, attack="learning_to_invert", over_prior=prior)
    text = measured.table("top_k", [judged("none", 3.0), best, alone, learned])
    assert "| strongest 30 (r_gap) · dlg 2 |" in text
    assert "−5.0 ± 2.0" in text
    assert "(3 seeds)" in text
    assert "| 0.01\u00a0% |" in text
    assert "| a b |" in text
    assert "- b: prior only. " in text
    assert "learning_to_invert under top-k: +0.4\u00a0dB [−0.2 to 1.0], 10 records over the same attack on shuffled updates" in text


def test_the_terminal_prints_rounding_accuracy_and_what_shuffled_updates_say() -> None:
    prior = {"psnr_db": {"mean": 0.4, "low": -0.2, "high": 1.0}, "records": 10}
    difference = {"mean": -0.05, "low": -0.07, "high": -0.03, "seeds": 3}
    text = terminal({"rows": [row("none"), row("sum", quantization_relative=1e-4, over_prior=prior, accuracy_difference=difference)]})
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "−5.0",
        "±2.0",
        "paired by seed (3 seeds)",
        "sum 0.01\u00a0%",
        "inverting_gradients, sum: +0.4\u00a0dB [−0.2 to 1.0], 10 records",
    ):
        assert words in " ".join(text.split("\n")) or words in text, words


def test_the_terminal_says_why_there_is_no_interval() -> None:
    difference = {"mean": -0.15, "low": -2.06, "high": 1.76, "seeds": 2}
    text = terminal({"rows": [row("none"), row("sum", accuracy_difference=difference)]})
    assert "±" not in text
    assert "paired by seed (2 seeds), in points; no interval of fewer than 3." in " ".join(text.split())


def test_pages_of_unequal_seeds_or_several_states_are_refused_or_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    equal = [judged("none", 3.0, accuracy_by_seed={"0": 0.8, "1": 0.8}), judged("top-k", 2.0, accuracy_by_seed={"0": 0.7, "1": 0.7})]
    measurements.require_whole({"rows": equal, "later": []}, partial=False)
    fewer = [equal[0], judged("top-k", 2.0, accuracy_by_seed={"0": 0.7})]
    for content, got in (
        ({"rows": fewer}, "some arms have 1 and some 2 seeds"),
        ({"rows": equal, "unfinished": 4, "planned": 9}, "4 of 9 runs (one arm under one seed) are not finished"),
        ({"rows": equal, "later": [{"source": "b"}]}, "2 states of the code made the rows"),
    ):
        with pytest.raises(SpecError, match=f"must be .* got: {re.escape(got)}.* --partial"):
            measurements.require_whole(content, partial=False)
        measurements.require_whole(content, partial=True)
        path = tmp_path / "defenses.json"
        path.write_text(json.dumps(content))
        monkeypatch.setattr(measurements, "MEASURED", path)
        found = defense_pages.pages()
        assert got in found["top_k.md"]
        assert got in found["README.md"]


def test_a_page_says_who_was_named_as_the_sender_beside_chance_and_keeps_it_of_a_run() -> None:
    named = {"rate": 0.75, "low": 0.6, "high": 0.86, "records": 40, "chance": 0.125}
    rows = [judged("none", 3.0), judged("sum", 1.0, attack="support_leak", attributed=named), judged("clip", 1.0, attributed=None)]
    text = measured.table("top_k", rows)
    assert f"{measured.NAMED}:\n\n- support_leak under sum: 75\u00a0% [60–86\u00a0%] of 40 records, chance 12\u00a0%" in text
    assert measured.NAMED not in measured.table("top_k", [rows[0], rows[2]])
    assert "attributed" in measurements.KEPT


def test_symbols_keep_their_case_and_no_line_points_to_a_module() -> None:
    found = defense_pages.sections("What.\n\nSource: ε comes from this.\nDeviations: a batch.\nHook: x is one.")
    assert (found["Source"], found["Deviations from it"], found["Hook"]) == ("ε comes from this.", "A batch.", "x is one.")
    assert "see the module" not in defense_pages.pages()["secure_aggregation.md"]
    assert [values.significant(number) for number in (3366.0, 33_660.0, 3.04e5, 192.0)] == ["3370", "33700", "3.04·10⁵", "192"]


def test_a_second_draw_from_the_same_state_is_the_same_and_the_generator_goes_on() -> None:
    scores, uploads = list(np.linspace(0, 1, 30)), list(range(30))
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    first = [bootstrap_mean(scores, uploads, rng=one) for _ in range(2)]
    assert first == [bootstrap_mean(scores, uploads, rng=other) for _ in range(2)]
    assert first[0] != first[1]
    drawn = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=10_000) @ np.asarray(scores) / 30
    assert first[0].low < np.quantile(drawn, 0.025) < first[0].mean
