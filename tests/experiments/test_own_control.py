"""An arm may have a control of its own, and be attacked in rounds of its own: sums are one upload a round, and few senders cost accuracy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.arms import lattice
from experiments.conclude import stacks
from experiments.directory import read_trials
from experiments.estimate import plan
from experiments.refusals import check
from experiments.report import front
from experiments.report.headline import control_of
from experiments.report.verdict import NO_CREDIT, verdict
from experiments.result import ArmFacts
from experiments.run import run
from experiments.spec import Experiment
from experiments.summary import summarize
from simulator import config
from simulator.errors import SpecError
from tests.experiments.test_ladder_report import arm, gain
from tests.experiments.test_report import row
from tests.experiments.test_summary import record, trial

PAIR = {"name": "none, 2 senders", "federation": {"cohort": 2}, "evaluation": {"rounds": [1, 2], "victims": 1}}
SUM = {
    "name": "sum", "defenses": [{"name": "secure_aggregation", "mode": "plain"}], "federation": {"cohort": 2},
    "evaluation": {"rounds": [1, 2]}, "control": "none, 2 senders",
}  # fmt: skip


def experiment(*arms: dict[str, Any], **changes: Any) -> Experiment:
    table = {"data": "digits", "model": "linear", "federation": {"clients": 4, "rounds": 3}, "arms": [{"name": "none"}, *arms]}
    return config.build(Experiment, table | changes)


def test_each_arm_has_its_control_and_its_rounds() -> None:
    found = experiment(PAIR, SUM, {"name": "clip", "defenses": ["clip"]}, {"name": "large", "training": {"batch_size": 4}})
    check(found)
    assert config.build(Experiment, config.dump(found)) == found
    assert found.controls == {"none": "none", "none, 2 senders": "none, 2 senders", "sum": "none, 2 senders", "clip": "none", "large": "none"}
    none, pair, together, *_ = found.arms
    assert [found.judged(each).rounds for each in (none, pair, together)] == [(1,), (1, 2), (1, 2)]
    assert found.world(together, 0).federation.record_rounds == (1, 2)
    assert plan(found).uploads == 4 + 1 * 2 + 1 * 2 + 4 + 4
    assert stacks(found) == {
        "none": (), "none, 2 senders": (), "sum": ("secure_aggregation",), "clip": ("clip",), "large": ("training: batch_size",),
    }  # fmt: skip


def test_an_arm_may_have_another_model() -> None:
    none, other, wider = experiment({"name": "other", "model": {"name": "mlp"}}, {"name": "wider", "model": {"hidden": [8]}}, model="mlp").arms
    found = experiment(model="mlp")
    assert found.world(none, 0).model == found.world(other, 0).model
    assert found.world(wider, 0).model == replace(found.model, hidden=(8,))


@pytest.mark.parametrize(
    ("arms", "reason"),
    [
        ([PAIR, SUM | {"control": "none, 2 sender"}], r"control must be the name of another arm, .* Did you mean 'none, 2 senders'"),
        ([PAIR, SUM | {"control": "sum"}], "control must be the name of another arm"),
        ([PAIR, SUM, {"name": "clip", "defenses": ["clip"], "control": "sum"}], "control must be an arm without defenses and control"),
        ([PAIR, SUM | {"federation": {"cohort": 3}}], r"must be changed alike, got other \['federation.cohort'\]"),
        ([PAIR, SUM | {"evaluation": {"rounds": [3]}}], r"rounds must be shared with its control .*, got \[3\] and \[1, 2\]"),
        ([PAIR | {"evaluation": {"rounds": [4]}}], r"arm 'none, 2 senders', evaluation.rounds must be ≤ federation.rounds = 3, got \[4\]"),
        ([PAIR | {"evaluation": {"rounds": [0]}}], "arm 'none, 2 senders', evaluation: rounds must be numbers ≥ 1"),
        ([PAIR | {"evaluation": {"rounds": [1, 1]}}], "rounds must differ"),
        ([PAIR | {"evaluation": {"victims": -1}}], "victims must be ≥ 0"),
        ([PAIR | {"evaluation": {"delta": 0.1}}], r"own settings must be among rounds, victims, candidates, got \['delta'\]"),
        ([PAIR | {"federation": {"rounds": 1}}], r"arm 'none, 2 senders', evaluation.rounds must be ≤ federation.rounds = 1, got \[1, 2\]"),
        ([{"name": "typo", "model": {"name": "mpl"}}], "Did you mean 'mlp'"),
    ],
)
def test_refused(arms: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        check(experiment(*arms))


def test_recorded_rounds_must_hold_those_of_every_arm() -> None:
    kept = {"clients": 4, "rounds": 3, "record_rounds": [1]}
    with pytest.raises(SpecError, match=r"arm 'none, 2 senders', federation.record_rounds must hold the attacked rounds, got none of \[2\]"):
        check(experiment(PAIR, federation=kept))


def test_layers_are_judged_alike() -> None:
    layers = config.build(Experiment, {"data": "digits", "model": "linear", "arms": [PAIR]}).arms
    with pytest.raises(ValueError, match="no control, evaluation and attacks of their own"):
        lattice(layers)


def test_each_arm_is_attacked_in_its_rounds(tmp_path: Path) -> None:
    found = experiment(PAIR, SUM, attacks=["random_guess"], evaluation={"shuffled_control": False})
    assert run(found, tmp_path / "run", workers=1) == []
    seen = {name: sorted((each.round, len(each.senders)) for each in read_trials(tmp_path / "run") if each.arm == name) for name in found.controls}
    assert seen == {"none": [(1, 1)] * 4, "none, 2 senders": [(1, 1), (2, 1)], "sum": [(1, 2), (2, 2)]}


def summary(*names: str, controls: dict[str, str]) -> list[dict[str, Any]]:
    """Undefended pictures of 30 dB, sums of 12 dB; the accuracy of two senders is 20 points lower, with or without a defense."""
    gone = {"none": (30.0, (1,)), "none, 2 senders": (30.0, (1, 2)), "sum": (12.0, (1, 2))}
    trials = [
        trial(arm=name, seed=seed, round=round, senders=(client,), records=(record(client, client, psnr_db=gone[name][0] + 0.1 * client),))
        for name in names for seed in (0, 1) for round in gone[name][1] for client in range(4)
    ]  # fmt: skip
    accuracies = {name: 0.9 if name == "none" else 0.7 for name in names}
    known = [ArmFacts(arm=name, seed=seed, accuracy=accuracies[name]) for name in names for seed in (0, 1)]
    table = summarize(
        trials, known, candidates=100, control_arm="none", controls=controls, environment={}, version="0",
        stacks={"sum": ("secure_aggregation",)},
    )  # fmt: skip
    rows: list[dict[str, Any]] = table["rows"]
    return rows


def test_difference_and_accuracy_are_those_to_the_own_control() -> None:
    own = {"none": "none", "none, 2 senders": "none, 2 senders", "sum": "none, 2 senders"}
    rows = {each["defense"]: each for each in summary(*own, controls=own)}
    assert [rows[name]["control"] for name in own] == [True, True, False]
    assert rows["sum"]["against"] == "none, 2 senders"
    assert rows["sum"]["difference_to_control"]["pairs"] == 2 * 2 * 4  # both rounds
    assert rows["sum"]["difference_to_control"]["psnr_db"]["mean"] == pytest.approx(-18)
    drawn = {each.name: each for each in front.panel(list(rows.values()), "gain")}
    assert list(drawn) == ["none", "sum"]  # a control of others is what they are compared with, and no defense
    assert drawn["sum"].drop == pytest.approx(0)
    usual = {each["defense"]: each for each in summary(*own, controls={})}
    assert usual["sum"]["difference_to_control"]["pairs"] == 2 * 4
    drops = {each.name: each.drop for each in front.panel(list(usual.values()), "gain")}
    assert drops["sum"] == pytest.approx(20)  # without it, the sum would pay for its few senders


def test_a_row_is_judged_beside_its_own_control() -> None:
    rows = [
        row("none", control=True, against="none", gain=gain(-5.0)),
        row("none, 2 senders", control=True, against="none, 2 senders", rounds=[1, 2]),
        row("sum", against="none, 2 senders", rounds=[1, 2], control=False),
    ]
    assert control_of(rows[2], rows) is rows[1]
    assert verdict(rows[2], control_of(rows[2], rows)).against_control != NO_CREDIT
    assert control_of({**rows[2], "rounds": [1]}, rows) is rows[1]  # other rounds do, where the arm is named
    assert control_of({**rows[2], "against": "gone"}, rows) is None


def test_the_trained_model_is_not_compared_with_the_initial_one() -> None:
    rows = [
        *arm("none", [], accuracy=0.9, named=1.0, rounds=[1]),
        *arm("noise", ["gaussian_noise"], accuracy=0.8, named=0.5, rounds=[1]),
        *arm("top-k", ["top_k"], accuracy=0.7, named=0.8, rounds=[1, 2]),
        *arm("top-k, trained", ["top_k"], accuracy=0.7, named=0.1, rounds=[40]),
    ]
    assert [each.name for each in front.panel(rows, "identified")] == ["none", "noise", "top-k"]
    assert front.sentences(rows)[-1] == "Attacked in other rounds, and so not compared here: top-k, trained."
