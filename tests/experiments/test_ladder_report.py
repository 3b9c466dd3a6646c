"""With a ladder of attacks an arm is one line, whose identification is that of one attack; and what protection costs is drawn and said."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.ladder import BEST
from experiments.report import costs, front, limits, measured, pareto, values, words
from experiments.report.headline import headlines, laddered, rows_of, strongest
from experiments.report.rows import lines, main_lines
from experiments.report.theme import LIGHT
from experiments.report.verdict import level
from tests.experiments.test_report import Page, difference, no_plot, row, terminal, write  # noqa: F401

NOTHING = {"gain": None, "floor": None, "difference_to_control": None, "scores": {"psnr_db": None, "exact": None}}


def rate(value: float, spread: float = 0.05) -> dict[str, float]:
    return {"rate": value, "low": max(0.0, value - spread), "high": min(1.0, value + spread), "chance": 0.01, "candidates": 100}


def gain(value: float) -> dict[str, object]:
    return {"psnr_db": {"mean": value, "low": value - 1, "high": value + 1}}


def arm(name: str, stack: list[str], *, accuracy: float, named: float, seen: float = 0.0, gained: float = 4.0, **more: object) -> list[dict[str, object]]:
    """The rows of one arm: two attacks that rebuild pictures, the best of them, and the identifier."""
    known = {"stack": stack, "accuracy": accuracy, "control": not stack, **more}
    solvers = {"strongest": {"records": 25, "certified": 3}, "inverting_gradients": {"records": 7, "certified": 0}}
    return [
        row(name, attack="inverting_gradients", identified=rate(seen / 2), gain=gain(gained - 2), **known),
        row(name, attack="strongest", identified=rate(seen), gain=gain(gained), **known),
        row(name, attack=BEST, identified=rate(named), gain=gain(gained), solvers=solvers, **known),
        row(name, attack="candidate_identification", answered="candidates", identified=rate(named), **(NOTHING | known | {"flags": ["candidates_told"]})),
    ]


def ladder() -> dict[str, object]:
    rows = [
        *arm("none", [], accuracy=0.94, named=1.0, seen=0.95, gained=12.0),
        *arm("noise 1", ["gaussian_noise"], accuracy=0.90, named=0.8, seen=0.1),
        *arm("noise 2", ["gaussian_noise"], accuracy=0.80, named=0.5),
        *arm("DP-SGD", ["dp_sgd"], accuracy=0.88, named=0.3, epsilon=8.0, ceiling=0.4),
        *arm("top-k", ["top_k"], accuracy=0.85, named=0.9, seen=0.4, gained=7.0),
        *arm("sign", ["sign_sgd"], accuracy=0.92, named=0.35),
    ]
    return {"schema": 1, "fedpeek": "0.1.0", "environment": {}, "rows": rows}


def test_each_arm_is_one_line_and_each_attack_a_detail() -> None:
    main, details = main_lines(ladder()), lines(ladder())
    assert [line.defense for line in main] == ["none", "noise 1", "noise 2", "DP-SGD", "top-k", "sign"]
    assert len(details) == 24
    assert {line.attack for line in main} == {BEST}
    assert main[0].solved == "strongest 25 · inverting_gradients 7"
    assert {line.identified_by for line in main} == {"candidate_identification"}
    assert all("candidates_told" in line.flags for line in main)
    assert not any(line.strongest for line in details)


def test_one_line_for_an_arm_of_one_attack_and_an_identifier() -> None:
    rows = [each for each in rows_of(ladder()) if each["attack"] in ("strongest", "candidate_identification")]
    (first, *_) = headlines(rows)
    assert (first["attack"], first["identified_by"]) == ("strongest", "candidate_identification")
    assert first["identified"] == rate(1.0)
    assert first["gain"] == gain(12.0)


def test_identification_beside_a_ceiling_is_that_of_one_guess() -> None:
    """All attacks together name more, in more guesses: that says nothing of a ceiling for one."""
    rows = arm("DP-SGD", ["dp_sgd"], accuracy=0.9, named=0.3, seen=0.2, ceiling=0.4)
    rows[2]["identified"] = {**rate(0.5), "chance": 0.03}  # the union of three
    (first, *_) = headlines(rows)
    assert (first["identified"], first["identified_by"]) == (rate(0.3), "candidate_identification")
    rows[3]["identified"] = rate(0.1)  # the identifier does not model every defense
    (first, *_) = headlines(rows)
    assert (first["identified"], first["identified_by"]) == (rate(0.2), "strongest")
    page = measured.table("dp_sgd", rows)
    assert "20 % [15–25 %], 1 % strongest | 50 % [45–55 %], 3 %" in page.replace(values.NBSP, " ")


def test_a_ceiling_of_several_rounds_is_printed_from_the_least_to_the_highest() -> None:
    assert limits.identification({"ceiling": 1.0, "least_ceiling": 0.36, "training_ceiling": 1.0}) == "36–100\u00a0%"
    assert limits.identification({"ceiling": 0.37, "least_ceiling": 0.37, "training_ceiling": 0.95}) == "37\u00a0% (all 95\u00a0%)"
    assert limits.identification({"ceiling": 1.0}) == "100\u00a0%"  # of an older version


def test_without_ladder_every_row_stays() -> None:
    rows = [row("none", attack="a"), row("none", attack="b")]
    assert not laddered(rows)
    assert headlines(rows) == rows


def test_pictures_are_recognizable_by_themselves_and_not_because_an_identifier_named_them() -> None:
    by_name = {str(each["defense"]): each for each in strongest(rows_of(ladder()))}
    assert level(by_name["none"]) == "recognizable"
    assert level(by_name["noise 1"]) == "partial"  # 4 dB and 80 % named, but 10 % by the picture
    assert level({**by_name["noise 1"], "identified_by": ""}) == "recognizable"


def test_an_alarm_of_any_attack_reaches_the_line_of_its_arm() -> None:
    rows = arm("DP-SGD", ["dp_sgd"], accuracy=0.9, named=0.9)
    rows[-1]["flags"] = ["ceiling_exceeded"]
    rows[0]["flags"] = ["certificate_wrong", "not_converged"]
    (line,) = main_lines({"rows": rows})
    assert line.flags == ("ceiling_exceeded", "certificate_wrong")


def test_the_terminal_shows_one_line_an_arm_and_says_who_named() -> None:
    text = terminal(ladder())
    assert len([line for line in text.splitlines() if line.startswith(" DP-SGD ")]) == 1
    assert "Identified by the one attack that named most: candidate_identification." in " ".join(text.split())
    assert "Each victim counts with its strongest attack" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_who_is_dominated_and_by_whom() -> None:
    arms = {each.name: each for each in front.panel(rows_of(ladder()), "identified")}
    assert arms["none"].drop == 0
    assert arms["top-k"].drop == pytest.approx(9.0)
    assert arms["DP-SGD"].leak == pytest.approx(100 * (0.35 - 0.01) / 0.99)
    assert arms["top-k"].dominated_by == ("DP-SGD", "sign")
    assert arms["top-k"].undecided == ("noise 1",)  # 75 to 85 % named, top-k 85 to 95 %
    assert arms["sign"].dominated_by == ()
    assert arms["noise 2"].dominated_by == ("DP-SGD", "sign")
    assert [each.name for each in arms.values() if each.baseline] == ["noise 1", "noise 2", "DP-SGD"]
    first, *_ = front.sentences(rows_of(ladder()))
    assert first == (
        "By identified victims above chance: dominated by a baseline: top-k; not distinguishable from one that did no worse: none; "
        "not dominated by one: sign."
    )


def test_dominated_is_only_who_is_worse_beyond_the_intervals() -> None:
    def panel(accuracy: dict[str, float], named: float) -> front.Arm:
        seeds = {"none": {"0": 0.94, "1": 0.95, "2": 0.93}, "DP-SGD": {"0": 0.90, "1": 0.91, "2": 0.89}, "top-k": accuracy}
        mean = {name: sum(found.values()) / 3 for name, found in seeds.items()}
        rows = [
            *arm("none", [], accuracy=mean["none"], named=1.0, accuracy_by_seed=seeds["none"]),
            *arm("DP-SGD", ["dp_sgd"], accuracy=mean["DP-SGD"], named=0.3, accuracy_by_seed=seeds["DP-SGD"]),
            *arm("top-k", ["top_k"], accuracy=mean["top-k"], named=named, accuracy_by_seed=seeds["top-k"]),
        ]
        return next(each for each in front.panel(rows, "identified") if each.name == "top-k")

    noisy, steady = {"0": 0.94, "1": 0.85, "2": 0.87}, {"0": 0.88, "1": 0.89, "2": 0.87}
    assert (panel(noisy, 0.3).dominated_by, panel(noisy, 0.3).undecided) == ((), ("DP-SGD",))
    assert (panel(steady, 0.3).dominated_by, panel(steady, 0.3).undecided) == (("DP-SGD",), ())  # 2 points on every seed
    assert panel(noisy, 0.5).dominated_by == ("DP-SGD",)  # 45 to 55 % against 25 to 35 %
    assert (panel(noisy, 0.28).dominated_by, panel(noisy, 0.28).undecided) == ((), ())  # leaks less


def test_few_victims_are_no_reason_to_be_dominated() -> None:
    """Noise that names 3 of 150 has the lower upper limit beside an arm that names none of 20, and is no better for it."""
    seeds = {"0": 0.9, "1": 0.9, "2": 0.9}
    none = arm("none", [], accuracy=0.94, named=1.0, accuracy_by_seed=dict.fromkeys(seeds, 0.94))
    few = arm("few", ["top_k"], accuracy=0.88, named=0.0, accuracy_by_seed=dict.fromkeys(seeds, 0.88))
    many = arm("many", ["gaussian_noise"], accuracy=0.9, named=0.02, accuracy_by_seed=seeds)
    for rows, (named, low, high) in ((few, (0.0, 0.0, 0.168)), (many, (0.02, 0.004, 0.057))):
        for each in rows:
            each["identified"] = {**rate(named), "low": low, "high": high}
    found = {each.name: each for each in front.panel([*none, *few, *many], "identified")}
    assert found["many"].leak < found["few"].leak
    assert found["few"].dominated_by == ()


def test_an_arm_that_may_leak_more_than_was_measured_dominates_none() -> None:
    rows = rows_of(ladder())
    assert "DP-SGD" in next(each for each in front.panel(rows, "identified") if each.name == "top-k").dominated_by
    flagged = [{**each, "flags": ["attack_failed"]} if each["defense"] == "DP-SGD" else each for each in rows]
    assert all("DP-SGD" not in each.dominated_by for each in front.panel(flagged, "identified"))


def test_identification_of_a_sum_is_drawn_above_its_own_chance() -> None:
    """One of 50 among 100 is met by chance: 51 % of a sum is 2 % above it, and 51 % of single uploads half the way."""
    summed = {**rate(0.51, 0.0), "chance": 0.5}
    rows = [*arm("none", [], accuracy=0.9, named=1.0), *arm("clip", ["clip"], accuracy=0.9, named=0.51)]
    rows += [{**each, "defense": "sum", "identified": summed} for each in arm("sum", ["secure_aggregation"], accuracy=0.9, named=0.51)]
    leaks = {each.name: each.least for each in front.panel(rows, "identified")}
    assert leaks["sum"] == pytest.approx(2.0)
    assert leaks["clip"] == pytest.approx(100 * (0.46 - 0.01) / 0.99)


def test_a_run_without_baselines_says_so_and_one_without_control_draws_nothing() -> None:
    rows = [each for each in rows_of(ladder()) if each["defense"] in ("none", "top-k")]
    assert front.sentences(rows) == ["No baseline: this run has no arm of plain Gaussian noise and DP-SGD alone, which a heuristic must beat."]
    assert front.panel([each for each in rows if each["defense"] != "none"], "gain") == []


def test_the_plot_marks_baselines_families_and_dominated_arms() -> None:
    figure = pareto.pareto(rows_of(ladder()), LIGHT)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:5] == ["no defense", "baseline: plain Gaussian noise", "baseline: DP-SGD", "top_k", "sign_sgd"]
    assert "hollow: dominated beyond the intervals" in legend
    left = figure.axes[0]
    names = {text.get_text() for text in left.texts}
    assert {"none", "noise 1", "noise 2", "DP-SGD", "top-k", "sign"} <= names
    hollow = sum(tuple(bubble.get_facecolor()[0][:3]) == (1.0, 1.0, 1.0) for bubble in left.collections)
    assert hollow == 3  # top-k and both noises, which signs dominate
    dashed = [line for line in left.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2 and line.get_linewidth() > 1.5]
    assert len(dashed) == 1  # the two strengths of noise
    assert pareto.svg(figure).startswith("<?xml")
    assert "no defense" not in pareto.text(rows_of(ladder()))
    assert "top-k: 9.0 points, 94.9 %" in pareto.text(rows_of(ladder()))


def test_the_page_holds_the_front_the_costs_and_the_ceilings(tmp_path: Path, no_plot: None) -> None:  # noqa: F811
    summary = ladder()
    cost = {"upload_bytes": 4e5, "upload_bytes_formula": 1e4, "download_bytes": 5e5, "client_seconds": 0.012, "server_seconds": 0.003}
    cost |= {"peak_bytes": 2.5e8, "memory_bytes_formula": 7e7}
    ceilings = {"no_prior_psnr_db": 9.5, "mse_floor": 0.02, "sentences": ["PSNR: attacker has no prior."]}
    for each in summary["rows"]:  # type: ignore[union-attr]
        each["cost"] = cost
        if each["defense"] == "DP-SGD":
            each["ceilings"] = ceilings
    source = write(tmp_path, summary=summary, pictures=[], threat={"colluding": 2, "candidates": True})
    page = Page(source)
    text = " ".join(page.text.split())
    assert (tmp_path / "pareto.svg").is_file()
    for words_ in ("12 ms", "3 ms", "10 kB", "500 kB", "250 MB", "70 MB", "9.5 dB", "attacker has no prior", "What the protection costs"):
        assert words_.replace(" ", "\u00a0", 1) in text or words_ in text, words_
    assert "What 2 clients sent, who collude with it" in text
    assert "A list of 100 records with their labels" in text
    assert costs.lines(rows_of(summary))["top-k"].formula == "10\u00a0kB"
    (limit,) = limits.lines(rows_of(summary))
    assert (limit.defense, limit.identification, limit.psnr) == ("DP-SGD", "40\u00a0%", "9.5\u00a0dB, below the floor")


def test_many_arms_are_counted_and_not_all_named() -> None:
    rows = [row(f"arm {number}") for number in range(40)]
    said = "".join(piece for piece, _ in words.answer({"rows": rows}, {}))
    assert said.endswith("arm 8 and 31 more arms.")


def test_an_arm_without_an_upper_limit_dominates_none_and_says_so() -> None:
    rows = rows_of(ladder())
    for each in rows:
        if each["defense"] == "sign" and each["gain"]:
            each["gain"] = {"psnr_db": {"mean": 4.0, "low": None, "high": None}}  # type: ignore[index]
    arms = {each.name: each for each in front.panel(rows, "gain")}
    assert (arms["sign"].unbounded, arms["sign"].leak) == (True, 4.0)
    assert all("sign" not in other.dominated_by for other in arms.values())
    legend = [text.get_text() for text in pareto.pareto(rows).legends[0].get_texts()]
    assert "mean; too few uploads for an upper limit" in legend


def test_a_ceiling_that_differs_from_round_to_round_is_printed_from_the_least_to_the_highest() -> None:
    spread = row("DP-SGD", ceiling=0.4, least_ceiling=0.2, training_ceiling=0.9)
    (line,) = lines({"rows": [spread]})
    assert (line.ceiling, line.over_training) == ("20–40\u00a0%", "(all 90\u00a0%)")
    assert "20–40\u00a0%" in terminal({"rows": [spread]})


def test_dp_sgd_on_another_network_is_no_baseline() -> None:
    """What it loses is lost against that network, which the heuristics are not on."""
    wide = arm("DP-SGD, wide", ["dp_sgd"], accuracy=0.7, named=0.1, against="none, wide")
    both = [*rows_of(ladder()), *arm("none, wide", [], accuracy=0.9, named=1.0), *wide]
    arms = {each.name: each for each in front.panel(both, "identified")}
    assert "none, wide" not in arms
    assert arms["DP-SGD, wide"].drop == pytest.approx(20.0)
    assert [each.name for each in arms.values() if each.baseline] == ["noise 1", "noise 2", "DP-SGD"]
    (dashed,) = [line for line in pareto.pareto(both).axes[0].lines if line.get_linestyle() == "--" and line.get_linewidth() > 1.5 and len(line.get_xdata()) > 1]
    assert list(dashed.get_xdata()) == sorted(dashed.get_xdata())
