"""A learned attack knows the mean of each class without any update: on a sample of victims it is asked again of shuffled ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.controls import SAMPLE, best_floor
from experiments.directory import read_trials
from experiments.estimate import plan
from experiments.metrics import ImageScores
from experiments.refusals import check
from experiments.run import run
from experiments.spec import Experiment
from experiments.summary import summarize
from simulator import config
from simulator.errors import SpecError
from tests.experiments.test_summary import record, trial

FLOORS = {"mean_image": ImageScores(10.0, 0.1, 0.1)}


def experiment(**evaluation: Any) -> Experiment:
    table = {"data": "digits", "model": "linear", "federation": {"clients": 4}, "attacks": ["random_guess", "linear_leak"]}
    return config.build(Experiment, table | {"arms": [{"name": "none"}], "evaluation": evaluation})


def row(prior_db: float, *, sampled: int = 6) -> dict[str, Any]:
    """Twenty victims at about 15 dB, 5 above the mean image; some of them were attacked on shuffled updates, too."""
    trials = []
    for client in range(20):
        blind = {SAMPLE: ImageScores(prior_db, 0.1, 0.1)} if client < sampled else {}
        known = replace(record(client, client, psnr_db=15 + 0.1 * (client % 3)), floors=FLOORS | blind)
        trials.append(trial(seed=client % 2, senders=(client,), records=(known,)))
    table = summarize(trials, (), candidates=100, control_arm="none", environment={}, version="0")
    (found,) = table["rows"]
    return dict(found)


def test_what_a_shuffled_update_gives_as_well_is_a_prior() -> None:
    knew, saw = row(15.1), row(11.0)
    assert (knew["over_prior"]["records"], saw["over_prior"]["records"]) == (6, 6)
    assert knew["over_prior"]["psnr_db"]["mean"] == pytest.approx(0.0)
    assert saw["over_prior"]["psnr_db"]["mean"] == pytest.approx(4.1)
    assert ("prior_only" in knew["flags"], "prior_only" in saw["flags"]) == (True, False)
    assert knew["gain"]["psnr_db"] == saw["gain"]["psnr_db"]  # the sample is no floor: the other victims lack it
    assert set(knew["floor"]["by_name"]) == {"mean_image"}
    assert best_floor(FLOORS | {SAMPLE: ImageScores(40.0, 1.0, 0.0)})[0] == "mean_image"
    assert row(15.1, sampled=0)["over_prior"] is None


def test_only_the_asked_attack_runs_on_shuffled_updates_and_only_of_the_sample(tmp_path: Path) -> None:
    found = experiment(shuffled_attacks=["linear_leak"], shuffled_victims=2)
    check(found)
    assert plan(found).shuffled == 2
    assert run(found, tmp_path / "run", workers=1) == []
    floors = {(each.attack, each.senders): set(each.records[0].floors) for each in read_trials(tmp_path / "run")}
    usual = {"mean_image", "class_mean", "another_victim", "random_guess"}
    assert [floors["random_guess", (client,)] for client in range(4)] == [usual] * 4
    assert [floors["linear_leak", (client,)] for client in range(4)] == [usual | {SAMPLE}] * 2 + [usual] * 2


@pytest.mark.parametrize(
    ("evaluation", "reason"),
    [
        ({"shuffled_attacks": ["linear_leek"]}, "Did you mean 'linear_leak'"),
        ({"shuffled_victims": -1}, "shuffled_victims must be ≥ 0"),
        ({"shuffled_control": False, "shuffled_victims": 3}, "shuffled_control must be true"),
    ],
)
def test_refused(evaluation: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        check(experiment(**evaluation))
