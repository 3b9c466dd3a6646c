"""Colluding clients: what is left of an aggregate is the aggregate of the others, and of one other it is that client's update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clients.local import local_upload
from clients.private import splits
from experiments import spec
from experiments.collude import colluders, reduced
from experiments.disclose import architecture
from experiments.refusals import check
from experiments.under_attack import find_victims
from simulator.aggregate import mean_update
from simulator.errors import SpecError
from tests.federations import federate, world

TABLE = {
    "data": "digits", "model": {"name": "mlp", "hidden": [16]}, "federation": {"clients": 4}, "training": {"batch_size": 2},
    "arms": [{"name": "none"}, {"name": "secagg", "defenses": ["secure_aggregation"]}],
}  # fmt: skip


def test_the_same_clients_collude_in_every_arm_and_more_of_them_include_the_fewer() -> None:
    of = world(federation={"clients": 9})
    assert colluders(of, 3) == colluders(world(federation={"clients": 9}, defenses=["clip"]), 3)
    assert colluders(of, 2) < colluders(of, 5) < colluders(of, 9) == frozenset(range(9))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("partition", ["iid", "quantity"])
def test_what_is_left_of_an_aggregate_is_the_mean_of_the_others(tmp_path: Path, count: int, partition: str) -> None:
    """Against plain calls of the others' local training; rounding to words of 32 bits is all that differs."""
    of = world(
        defenses=["secure_aggregation"], federation={"clients": 4, "rounds": 1, "partition": partition, "alpha": 1.0},
        training={"algorithm": "fedavg", "batch_size": 0, "learning_rate": 0.1},
    )  # fmt: skip
    model, known = architecture(of, splits(of)), colluders(of, count)
    seen = federate(of, tmp_path).observation(1)
    left = reduced(seen, of, model, known).upload
    honest = [local_upload(replace(of, defenses=()), model, seen.broadcast, client) for client in range(4) if client not in known]
    wanted, _ = mean_update(honest)
    assert left.senders == frozenset(range(4)) - known
    assert left.num_examples == sum(upload.num_examples for upload in honest)
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(left.update.tensors[name], tensor, atol=1e-6, rtol=0)


def test_victims_and_truth_are_those_of_the_others(tmp_path: Path) -> None:
    experiment = spec.config.build(spec.Experiment, {**TABLE, "threat": {"colluding": 3}})
    for arm in experiment.arms:
        of = experiment.world(arm, 0)
        known = colluders(of, 3)
        (victim,) = find_victims(experiment, of, federate(of, tmp_path / arm.slug))
        assert set(victim.senders) == set(range(4)) - known
        assert len(victim.truth) == victim.knowledge.num_examples == 2


def test_somebody_must_be_left() -> None:
    with pytest.raises(SpecError, match="colluding must be < the cohort of 4, got 4"):
        check(spec.config.build(spec.Experiment, {**TABLE, "threat": {"colluding": 4}}))
    with pytest.raises(SpecError, match="colluding must be ≥ 0"):
        spec.config.build(spec.Experiment, {**TABLE, "threat": {"colluding": -1}})


@pytest.mark.parametrize(
    ("channel", "clients", "colluding", "reason"),
    [
        ({}, 9, 6, None),
        ({}, 9, 7, r"threat\.colluding must be below 7 or 8 in a cohort of 9 with threshold = 7, got 7"),
        ({}, 9, 8, None),  # one client is left, and the sum is its upload
        ({"mode": "quantized"}, 9, 7, "below 7 or 8"),
        ({"mode": "plain"}, 9, 7, None),  # the party that adds up is trusted
        ({"active": True}, 9, 4, None),
        ({"active": True}, 9, 5, "below 5 or 8 in a cohort of 9 with threshold = 7 against an active server, got 5"),
        ({"graph": "k-regular"}, 70, 14, None),
        ({"graph": "k-regular"}, 70, 15, "below 15 or 69 in a cohort of 70 with the .*-regular graph certified for 14, got 15"),
    ],
)
def test_more_colluders_than_the_protocol_stands_are_no_experiment(channel: dict, clients: int, colluding: int, reason: str | None) -> None:
    """t of them open every other client's secrets: the server sees each upload, of which the report would show the mean."""
    table = {
        **TABLE, "federation": {"clients": clients}, "threat": {"colluding": colluding},
        "arms": [{"name": "none"}, {"name": "secagg", "defenses": [{"name": "secure_aggregation", **channel}]}],
    }  # fmt: skip
    experiment = spec.config.build(spec.Experiment, table)
    if reason is None:
        check(experiment)
        return
    with pytest.raises(SpecError, match=reason):
        check(experiment)


def test_colluders_outside_of_a_cohort_may_be_too_many_inside() -> None:
    """8 of 10 clients collude: 7, 8 or 6 of a cohort of 9 may be among them."""
    table = {**TABLE, "federation": {"clients": 10, "cohort": 9}, "threat": {"colluding": 8}}
    with pytest.raises(SpecError, match="below 7 in a cohort of 9"):
        check(spec.config.build(spec.Experiment, table))


def test_the_order_of_candidates_is_keyed_by_the_secret(tmp_path: Path) -> None:
    """A seed can be guessed, and with it an order that it alone fixes: the true record's place would be known without the update."""
    experiment = spec.config.build(spec.Experiment, {**TABLE, "threat": {"candidates": True}, "evaluation": {"candidates": 40}})
    of = experiment.world(experiment.arms[0], 0)
    record = federate(of, tmp_path)
    shown = []
    for secret in ("one", "two", "one"):
        told = find_victims(experiment, replace(of, secret=secret), record)[0].knowledge.candidates
        assert told is not None
        shown.append(told.inputs)
    first, other, again = shown
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.flatten(1).sum(1).sort().values, other.flatten(1).sum(1).sort().values)
