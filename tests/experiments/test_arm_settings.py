"""What an arm may change beside its defenses: settings of attacks, the number of candidates, and a learning rate, which is no defense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import candidates
from experiments.benchmarks import tune_baselines as tune
from experiments.conclude import stacks
from experiments.directory import read_trials
from experiments.refusals import check
from experiments.run import run
from experiments.spec import Experiment
from experiments.summary import summarize
from simulator import config
from simulator.errors import SpecError
from simulator.types import Batch
from tests.experiments.test_summary import record, trial

LONG = {"name": "long", "attacks": {"strongest": {"seconds": 5}}}


def experiment(*arms: dict[str, Any], **changes: Any) -> Experiment:
    table = {
        "data": "digits", "model": "linear", "federation": {"clients": 4, "rounds": 2}, "arms": [{"name": "none"}, *arms],
        "attacks": [{"name": "strongest", "seconds": 0.5}, "random_guess"],
    }  # fmt: skip
    return config.build(Experiment, table | changes)


def test_an_arm_changes_settings_of_attacks() -> None:
    found = experiment(LONG)
    check(found)
    none, long = found.arms
    assert [attack.name for attack in found.asked(long)] == ["strongest", "random_guess"]
    assert [found.asked(arm)[0].seconds for arm in (none, long)] == [0.5, 5.0]
    assert found.asked(none) == found.rungs
    assert config.build(Experiment, config.dump(found)) == found


@pytest.mark.parametrize(
    ("attacks", "reason"),
    [
        ({"stronges": {"seconds": 5}}, "attacks must be among strongest, random_guess, got 'stronges'. Did you mean 'strongest'"),
        ({"strongest": {"second": 5}}, "arm 'long', attacks.strongest.second must be one of strongest's"),
        ({"strongest": {"seconds": 0}}, "seconds must be > 0"),
    ],
)
def test_other_settings_are_refused(attacks: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        check(experiment(LONG | {"attacks": attacks}))


@pytest.mark.slow
def test_the_changed_settings_run(tmp_path: Path) -> None:
    many = {"name": "many", "attacks": {"inverting_gradients": {"steps": 7}}}
    found = experiment(many, attacks=[{"name": "inverting_gradients", "steps": 3}], evaluation={"shuffled_control": False, "victims": 1})
    assert run(found, tmp_path / "run", workers=1) == []
    steps = {each.arm: each.trace[-1][0] for each in read_trials(tmp_path / "run")}
    assert steps["many"] > steps["none"]


def test_candidates_of_an_arm_set_its_chance() -> None:
    pair = {"name": "none, more", "evaluation": {"candidates": 400}}
    arms = [pair, {"name": "clip", "defenses": ["clip"], "evaluation": {"candidates": 400}, "control": "none, more"}]
    found = experiment(*arms)
    check(found)
    numbers = {arm.name: candidates.number(found, found.judged(arm)) for arm in found.arms}
    assert numbers == {"none": 100, "none, more": 400, "clip": 400}
    trials = [trial(arm=name, seed=0, senders=(client,), records=(record(client, client),)) for name in numbers for client in range(2)]
    table = summarize(trials, [], candidates=100, candidates_of=numbers, control_arm="none", environment={}, version="0")
    assert {row["defense"]: row["identified"]["chance"] for row in table["rows"]} == {"none": 0.01, "none, more": 0.0025, "clip": 0.0025}
    with pytest.raises(SpecError, match="candidates must be as many as of its control 'none, more', got 300 and 400"):
        check(experiment(pair, {**arms[1], "evaluation": {"candidates": 300}}))


def test_a_tuned_baseline_stays_of_its_family() -> None:
    rate = {"training": {"learning_rate": 0.4}}
    found = experiment({"name": "tuned", "defenses": ["dp_sgd"], **rate}, {"name": "faster", **rate})
    assert stacks(found) == {"none": (), "tuned": ("dp_sgd",), "faster": ("training: learning_rate",)}


def test_baselines_are_tuned_on_public_records_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = experiment(seeds=[0, 1])
    seen: list[torch.Tensor] = []

    def halves(public: Batch, rng: torch.Generator) -> tuple[Batch, Batch]:
        seen.append(public.inputs)
        return HALVES(public, rng)

    monkeypatch.setattr(tune, "halves", halves)
    good, noisy = tune.train(found, "dp_sgd", 0.01, 10.0, 0.5), tune.train(found, "dp_sgd", 30.0, 10.0, 0.5)
    assert len(good.accuracies) == 2 * tune.TIMES
    assert good.accuracy > noisy.accuracy
    assert tune.best([noisy, good]) is good
    assert tune.table([noisy, good]).endswith("choice: clip_norm = 10, learning_rate = 0.5")
    assert {len(public) for public in seen} == {int(0.2 * 1797)}


def test_tuning_walks_through_each_clients_records() -> None:
    public = config.build(Experiment, {"data": "digits", "model": "linear", "arms": [{"name": "none"}]}).data.load().records
    shown, held = HALVES(public, torch.Generator().manual_seed(0))
    assert len(held) == int(tune.HELD_OUT * len(public))
    assert len(shown) + len(held) == len(public)
    rounds = list(tune.cohorts(shown, 3, 2 * len(shown) // 3, torch.Generator().manual_seed(0)))
    assert {len(batch) for batch in rounds} == {3}
    first = torch.cat([batch.inputs for batch in rounds[: len(shown) // 3]])
    different = {record.numpy().tobytes() for record in first}
    assert len(different) == len(first)  # no client sees a record again before it has seen all of its own


HALVES = tune.halves
