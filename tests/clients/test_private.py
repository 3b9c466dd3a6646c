"""Who holds what: every record once, batches without repetition, the same on every call, and never transmitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.private import held_by, partition, private_batches, private_record_ids, private_records, records_held, round_indices, splits
from tests.federations import world


@pytest.mark.parametrize("federation", [{"clients": 7}, {"clients": 7, "partition": "dirichlet", "alpha": 0.1}])
def test_every_private_record_has_exactly_one_holder(federation: dict) -> None:
    of = world(federation=federation)
    dealt = torch.cat(partition(of)).sort().values
    assert torch.equal(dealt, torch.arange(len(splits(of).private)))
    assert min(records_held(of)) >= 1


def test_split_shares_are_disjoint_and_of_the_stated_size() -> None:
    of = world(split={"test": 0.25, "public": 0.1})
    parts, total = splits(of), len(of.data.load().records)
    assert (len(parts.test), len(parts.public)) == (int(total * 0.25), int(total * 0.1))
    assert len(parts.private) + len(parts.test) + len(parts.public) == total


def test_small_alpha_concentrates_classes_and_large_alpha_does_not() -> None:
    def purity(alpha: float) -> float:
        of = world(federation={"clients": 10, "partition": "dirichlet", "alpha": alpha})
        return float(np.mean([held_by(of, client).labels.bincount().max() / len(held_by(of, client)) for client in range(10)]))

    assert purity(0.05) > 0.6 > 0.25 > purity(1000.0)


def test_fedsgd_visits_each_record_once_an_epoch_and_never_more_than_the_accountant_assumes() -> None:
    of = world(training={"batch_size": 50}, federation={"clients": 4, "rounds": 12})
    held = records_held(of)[0]
    visits = torch.zeros(held, dtype=torch.int64)
    for round in range(1, 13):
        (indices,) = round_indices(of, 0, round)
        assert len(indices.unique()) == 50
        visits[indices] += 1
        if round == held // 50:
            assert int(visits.max()) == 1
    assert int(visits.max()) <= of.participations(held)


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ({"epochs": 2, "batch_size": 100}, [100, 100, 69] * 2),
        ({"steps": 2, "batch_size": 0}, [269, 269]),
        ({"steps": 4, "batch_size": 100}, [100, 100, 69, 100]),
    ],
)
def test_fedavg_batches(recipe: dict, sizes: list[int]) -> None:
    of = world(training={"algorithm": "fedavg", **recipe})
    assert records_held(of)[3] == 269
    assert [len(batch) for batch in private_batches(of, 3, 1)] == sizes


def test_truth_holds_each_record_of_the_batches_once() -> None:
    of = world(training={"algorithm": "fedavg", "epochs": 3, "batch_size": 64})
    ids = private_record_ids(of, 1, 2)
    assert len(ids.unique()) == len(ids) == records_held(of)[1]
    truth = private_records(of, 1, 2)
    assert torch.equal(truth.inputs, splits(of).private.inputs[ids])


def test_defenses_do_not_change_who_is_a_victim() -> None:
    plain, defended = world(), world(defenses=[{"name": "clip", "clip_norm": 1.0}])
    for client in range(4):
        assert torch.equal(private_record_ids(plain, client, 1), private_record_ids(defended, client, 1))


def test_another_seed_deals_otherwise() -> None:
    assert not torch.equal(private_record_ids(world(), 0, 1), private_record_ids(world(seed=1), 0, 1))
