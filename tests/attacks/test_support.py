"""What a single sender of a sum touches: records and classes, and who it is, against the truth of federations under secure aggregation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

from attacks._isolated import as_sum, owner
from attacks.update.label_owners import LabelOwners, named, owned, singled_out
from attacks.update.linear_leak import LinearLeak
from attacks.update.support_leak import SupportLeak
from experiments import spec
from experiments.groups import Scored
from experiments.matching import EXACT_MSE, assign
from experiments.row_scores import attributed
from experiments.trial import attributed_to
from experiments.under_attack import Victim, find_victims
from simulator import config
from simulator.rng import stream
from simulator.types import Batch, LocalTraining
from tests.attacks.victims import attack_surface, digits, records, smooth
from tests.experiments.test_summary import record, trial
from tests.federations import federate

SKEWED = {"clients": 8, "rounds": 4, "cohort": 4, "partition": "dirichlet", "alpha": 0.1, "server_learning_rate": 0.1}


@cache
def victim(batch_size: int = 0, hidden: int = 128, public: float = 0.77, **federation: Any) -> Victim:
    """The first round of digits on an MLP under secure aggregation, in words of 64 bits, and the other rounds."""
    defense = {"name": "secure_aggregation", "mode": "quantized", "max_examples": 32, "bits": 64}
    table = {
        "data": "digits", "model": {"name": "mlp", "hidden": [hidden]}, "federation": {**SKEWED, **federation},
        "training": {"batch_size": batch_size}, "threat": {"rounds": "all"}, "split": {"test": 0.2, "public": public},
        "arms": [{"name": "a", "defenses": [defense]}],
    }  # fmt: skip
    experiment = config.build(spec.Experiment, table)
    of = experiment.world(experiment.arms[0], 0)
    with TemporaryDirectory() as directory:
        (found,) = find_victims(experiment, of, federate(of, Path(directory)))
    return found


def judged(of: Victim, *, history: bool = True) -> tuple[int, int, list[tuple[int, int]]]:
    """Records with a certificate, those of them that are not exact, and (who was named, who it is) of each that has a name."""
    known = of.knowledge if history else replace(of.knowledge, history=())
    answer = SupportLeak()(of.view, known, rng=stream(0, "attack"))
    assert answer.inputs is not None
    assert len(answer.labels) == len(answer.inputs) == len(of.truth)
    assignment = assign(answer.inputs, of.truth.inputs)
    errors = (answer.inputs[assignment] - of.truth.inputs).square().flatten(1).mean(1)
    sure = [place for place, guess in enumerate(assignment.tolist()) if answer.certificate[guess]]
    wrong = sum(float(errors[place]) > EXACT_MSE for place in sure)
    whose = attributed_to(answer, assignment, of)
    return len(sure), wrong, [(who, client) for who, client in zip(whose, of.clients, strict=True) if who is not None]


def test_what_one_record_isolates_is_taken_out_until_nothing_is_left() -> None:
    """Sixteen records of four senders: linear_leak proves a part of them in one look."""
    of = victim(batch_size=4, hidden=256, partition="iid", rounds=2)
    once = sum(map(bool, LinearLeak()(of.view, of.knowledge, rng=stream(0)).certificate))
    proven, wrong, whose = judged(of, history=False)
    assert (once, proven, wrong, whose) == (once, 16, 0, [])
    assert once < 12


def test_who_took_part_where_a_record_is_says_whose_it_is() -> None:
    of = victim(public=0.785)
    proven, wrong, whose = judged(of)
    assert (proven, wrong, len(whose)) == (len(of.truth), 0, len(of.truth))
    assert all(who == client for who, client in whose)


@pytest.mark.slow
def test_other_rounds_prove_more_of_this_one() -> None:
    """Of 25 records 3 in one look and in one round; 15 with three other rounds, all with their sender."""
    of = victim()
    assert judged(of, history=False)[:2] == (3, 0)
    proven, wrong, whose = judged(of)
    assert (proven, wrong, len(whose)) == (15, 0, 15)
    assert all(who == client for who, client in whose)


def test_a_record_is_in_a_sum_at_its_own_weight_and_label_only() -> None:
    batch, model = digits(6), nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    view, knowledge = attack_surface(model, [Batch(batch.inputs[:3], batch.labels[:3]), Batch(batch.inputs[3:5], batch.labels[3:5])])
    found = as_sum(view, knowledge)
    assert found is not None
    each = [Batch(batch.inputs[i : i + 1], batch.labels[i : i + 1]) for i in range(6)]
    assert [found.holds(item) for item in each] == [True] * 5 + [False]
    blurred = [replace(item, inputs=item.inputs + 0.003 * torch.randn(item.inputs.shape, generator=stream(1))) for item in each[:5]]
    assert not any(found.holds(item) for item in blurred)  # 9e-6 of squared error is not exact
    assert found.holds(Batch(each[0].inputs, (each[0].labels + 1) % 10)) is False
    assert found.holds(Batch((each[0].inputs + each[1].inputs) / 2, each[0].labels)) is False
    heavier = as_sum(view, replace(knowledge, num_examples=10))
    assert heavier is not None
    assert heavier.holds(each[0]) is False, "half of what it adds leaves the other half"
    clipped = replace(knowledge, defenses=(("clip", {"clip_norm": 1e-3}),))
    assert as_sum(view, clipped).holds(each[5]) is None  # type: ignore[union-attr]
    full = attack_surface(smooth(), [records(8, (1, 4, 4)), records(8, (1, 4, 4), 1)])
    assert as_sum(*full).holds(records(1, (1, 4, 4), 2)) is None  # type: ignore[union-attr]


def test_absence_names_nobody_where_records_are_drawn_anew() -> None:
    view, knowledge = attack_surface(smooth(), [records(1, (1, 4, 4), seed) for seed in range(2)])
    other = replace(view, uploads=(replace(view.upload, senders=frozenset({1})),))
    sums = [as_sum(seen, knowledge) for seen in (view, other)]
    assert None not in sums
    assert owner([True, False], sums, view.upload.senders) == 0  # type: ignore[arg-type]
    drawn = [replace(each, knowledge=replace(knowledge, training=LocalTraining(batch_size=1))) for each in sums]  # type: ignore[type-var]
    assert owner([True, False], drawn, view.upload.senders) == -1  # type: ignore[arg-type]
    assert owner([True, True], drawn, view.upload.senders) == 1  # type: ignore[arg-type]


def test_the_owners_of_classes_are_named_by_the_label_counts_of_the_rounds() -> None:
    """Chance deals the upload's records at random to their senders."""
    of = victim(hidden=16, rounds=10, clients=6, cohort=3, server_learning_rate=1.0)
    assert LabelOwners().supports(of.view, of.knowledge) is None
    answer = LabelOwners()(of.view, of.knowledge, rng=stream(0))
    whose = attributed_to(answer, None, of)
    right = [who == client for who, client in zip(whose, of.clients, strict=True) if who is not None]
    dealt = trial(answered="labels", senders=of.senders, records=tuple(
        record(client, place, label=int(label), attributed=True, identified=False)
        for place, (client, label) in enumerate(zip(of.clients, of.truth.labels, strict=True))
    ))  # fmt: skip
    row = attributed([Scored(dealt, one) for one in dealt.records])
    assert row is not None
    assert len(right) > 0.8 * len(of.truth)
    assert sum(right) / len(right) > row["chance"] + 0.2


def test_counts_are_solved_exactly_where_the_rounds_determine_them() -> None:
    matrix = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1]], dtype=torch.float64)
    truth = torch.tensor([[3, 0], [0, 2], [1, 1], [4, 0]])
    assert torch.equal(owned(matrix, matrix @ truth.double(), matrix @ truth.sum(1).double()), truth)
    assert singled_out(matrix) == [0, 1, 2, 3]
    assert singled_out(matrix[:2]) == []
    assert singled_out(matrix[[3, 4]]) == [2], "two sums that differ by the one who dropped out"
    assert named([0, 0, 1], [(0, 7), (1, 3)]) == (7, -1, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"history": ()}, "history must hold other rounds"), ({"training": LocalTraining(batch_size=12)}, "batch_size = 12 drawn anew")],
)
def test_rounds_that_tell_no_owner_are_refused(change: dict[str, Any], reason: str) -> None:
    of = victim(hidden=16, rounds=10, clients=6, cohort=3, server_learning_rate=1.0)
    assert reason in str(LabelOwners().supports(of.view, replace(of.knowledge, **change)))


def test_guessed_labels_are_matched_to_owners_within_their_class() -> None:
    of = victim(hidden=16, rounds=10, clients=6, cohort=3, server_learning_rate=1.0)
    told = [(int(label), client) for label, client in zip(of.truth.labels, of.clients, strict=True)]
    answer = LabelOwners()(of.view, of.knowledge, rng=stream(0))
    right = replace(answer, labels=torch.tensor([label for label, _ in told[::-1]]), clients=tuple(client for _, client in told[::-1]))
    assert attributed_to(right, None, of) == [client for _, client in told]
    nobody = replace(right, clients=(-1,) * len(told))
    assert attributed_to(nobody, None, of) == [None] * len(told)
