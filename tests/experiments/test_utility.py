"""Accuracy is that of the models after the last rounds, in the mean."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from torch.nn.utils import vector_to_parameters

from clients.private import splits
from experiments.directory import read_facts
from experiments.run import run
from experiments.spec import Experiment
from simulator import config
from simulator.network import network
from simulator.transcript import read

SPEC = {
    "data": "digits", "model": "linear", "attacks": ["random_guess"], "arms": [{"name": "none"}], "secret": "tested",
    "federation": {"clients": 4, "rounds": 6}, "training": {"learning_rate": 2.0, "batch_size": 1}, "evaluation": {"victims": 1, "tested_rounds": 3},
}  # fmt: skip


def test_accuracy_is_the_mean_over_the_models_after_the_last_rounds(tmp_path: Path) -> None:
    experiment = config.build(Experiment, SPEC)
    assert run(experiment, tmp_path / "out", workers=1) == []
    (facts,), world = read_facts(tmp_path / "out"), experiment.world(experiment.arms[0], 0)
    models = read(tmp_path / "out" / "transcript" / "none-seed0").models
    assert sorted(models) == [0, 4, 5, 6]  # the attacked round's, and the tested ones
    held_out, expected = splits(world).test, []
    for number in (4, 5, 6):
        model = network(world.architecture, splits(world).schema, world.training, world.seed).eval()
        parameters = dict(models[number][0])
        for name, parameter in model.named_parameters():
            vector_to_parameters(parameters[name].flatten(), [parameter])
        expected.append(sum(int(model(x[None]).argmax()) == int(y) for x, y in zip(held_out.inputs, held_out.labels, strict=True)))
    assert len(set(expected)) > 1, "models that differ"
    assert facts.accuracy_per_round == pytest.approx([hits / len(held_out) for hits in expected])
    assert facts.accuracy == pytest.approx(fmean(expected) / len(held_out))


def test_more_tested_models_than_rounds_are_all_that_were_trained(tmp_path: Path) -> None:
    """Under a guarantee, too, whose views end in an earlier round than the federation."""
    arms = [{"name": "dp_sgd", "defenses": ["dp_sgd"]}]
    experiment = config.build(Experiment, {**SPEC, "arms": arms, "evaluation": {"victims": 1, "tested_rounds": 10}})
    assert run(experiment, tmp_path / "out", workers=1) == []
    (facts,) = read_facts(tmp_path / "out")
    assert len(facts.accuracy_per_round) == 6
    assert facts.ceiling < 1
