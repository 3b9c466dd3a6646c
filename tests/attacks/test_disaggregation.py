"""Sums over rounds: who can be told apart, how well, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks import strongest
from attacks._cohorts import combination, covariance, mixed, separate
from attacks._gradient import norm
from attacks.strongest import Strongest
from attacks.update.gradient_disaggregation import GradientDisaggregation
from experiments.matching import assign
from simulator.adversary import Knowledge
from simulator.aggregate import weighted_mean
from simulator.rng import stream
from simulator.training import local_update
from simulator.types import Batch, Broadcast, LocalTraining, Observation, Schema, Tensors, Update, Upload
from tests.attacks.victims import CLASSES, build, digits, psnr_db, records, smooth

SHAPE = (1, 4, 4)
SIZES = (1, 2, 3, 1)


def clients() -> list[Batch]:
    return [records(size, SHAPE, seed) for seed, size in enumerate(SIZES)]


def own(batch: Batch, parameters: Tensors, model: nn.Module | None = None) -> Tensors:
    return local_update(model or smooth(), parameters, {}, [batch], LocalTraining(batch_size=0))[0].tensors


def federation(
    cohorts: Sequence[Sequence[int]], rate: float, model: nn.Module | None = None, everybody: Sequence[Batch] = ()
) -> tuple[Observation, Knowledge]:
    """The first of the rounds with these cohorts under secure aggregation, and the others as history."""
    recipe, seen, model, everybody = LocalTraining(batch_size=0), list[Observation](), model or smooth(), everybody or clients()
    sizes, (channels, height, width) = [len(batch) for batch in everybody], everybody[0].inputs.shape[1:]
    parameters: Tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for number, cohort in enumerate(cohorts):
        mean = weighted_mean([own(everybody[i], parameters, model) for i in cohort], [sizes[i] for i in cohort])
        upload = Upload(frozenset(cohort), Update("gradient", mean), {}, sum(sizes[i] for i in cohort))
        seen.append(Observation(Broadcast(number + 1, parameters, {}, recipe), (upload,)))
        parameters = {name: tensor - rate * mean[name] for name, tensor in parameters.items()}
    knowledge = Knowledge(model, Schema((channels, height, width), CLASSES), recipe, seen[0].upload.num_examples, history=tuple(seen[1:]))
    return seen[0], knowledge


def test_cohorts_that_differ_by_one_client_give_its_update() -> None:
    view, knowledge = federation([(0, 1, 2), (0, 1)], 0.0)
    found, rounds = separate(view, knowledge)
    assert [(item.client, item.examples) for item in found] == [(2, 3)]
    assert found[0].weights.tolist() == pytest.approx([1.0, -1.0])
    truth = own(clients()[2], view.broadcast.parameters)
    tensors = mixed(found[0], rounds)
    assert all(torch.allclose(tensors[name], truth[name], atol=1e-6) for name in truth)


def test_the_number_of_examples_is_solved_from_the_totals() -> None:
    view, knowledge = federation([(0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)], 0.0)
    found, rounds = separate(view, knowledge)
    assert [(item.client, item.examples) for item in found] == [(0, 1), (1, 2), (2, 3)]
    for item in found:
        truth = own(clients()[item.client], view.broadcast.parameters)
        assert all(torch.allclose(mixed(item, rounds)[name], truth[name], atol=1e-5) for name in truth)


def test_cohorts_that_leave_nobody_alone_are_refused() -> None:
    view, knowledge = federation([(0, 1), (0, 1), (0, 1)], 0.0)
    assert separate(view, knowledge)[0] == []
    assert "other cohorts" in str(GradientDisaggregation().supports(view, knowledge))
    assert "history" in str(GradientDisaggregation().supports(view, replace(knowledge, history=())))
    drawn = replace(knowledge, training=LocalTraining(batch_size=1))
    assert "batch_size" in str(GradientDisaggregation().supports(view, drawn))


def test_the_weights_are_those_of_least_expected_error() -> None:
    rng = stream(0, "weights")
    matrix = (torch.rand(12, 4, generator=rng) < 0.5).double()
    path = torch.randn(12, 3, generator=rng, dtype=torch.float64).cumsum(0)
    errors = covariance(matrix, path @ path.T) + 1e-3 * torch.eye(12).double()
    target = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    best = combination(matrix, errors, target)
    assert best is not None
    assert torch.allclose(matrix.T @ best, target, atol=1e-9)
    blue = torch.linalg.solve(errors, matrix @ torch.linalg.solve(matrix.T @ torch.linalg.solve(errors, matrix), target))  # Aitken
    assert float(best @ errors @ best) == pytest.approx(float(blue @ errors @ blue), rel=1e-4)


def test_the_expected_error_is_about_the_real_one() -> None:
    rng = stream(1, "cohorts")
    cohorts = [sorted(torch.randperm(4, generator=rng)[:2].tolist()) for _ in range(16)]
    for rate in (0.02, 0.2):
        view, knowledge = federation(cohorts, rate)
        found, rounds = separate(view, knowledge)
        assert found
        for item in found:
            truth = own(clients()[item.client], view.broadcast.parameters)
            tensors = mixed(item, rounds)
            real = norm({name: tensors[name] - truth[name] for name in truth}) / norm(truth)
            assert real / 5 < item.error < real * 5


def test_models_that_moved_too_far_are_refused() -> None:
    rng = stream(1, "cohorts")
    cohorts = [sorted(torch.randperm(4, generator=rng)[:2].tolist()) for _ in range(16)]
    view, knowledge = federation(cohorts, 20.0)
    assert "moved too far" in str(GradientDisaggregation().supports(view, knowledge))


def test_every_record_is_answered_and_nothing_is_proven() -> None:
    view, knowledge = federation([(0, 1, 2), (0, 1)], 0.0)
    attack = GradientDisaggregation(seconds=0.5)
    assert attack.supports(view, knowledge) is None
    guess = attack(view, knowledge, rng=stream(0, "attack"))
    assert guess.inputs is not None
    assert guess.inputs.shape == (6, *SHAPE)
    assert not any(guess.certificate)
    told = torch.cat([batch.labels for batch in clients()[:3]])
    guess = attack(view, replace(knowledge, labels=told), rng=stream(0, "attack"))
    assert guess.labels.tolist() == told.tolist()


def test_strongest_asks_it_where_nothing_else_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", ())
    view, knowledge = federation([(0, 1, 2), (0, 1)], 0.0)
    assert Strongest().supports(view, knowledge) is None
    assert "at least one solver" in str(Strongest().supports(view, replace(knowledge, history=())))


@pytest.mark.slow
def test_strongest_keeps_what_the_parts_give_where_the_sum_gives_less() -> None:
    """A layer so narrow that no solver is exact of the sum, but of each client."""
    batch, model = digits(4), build("cnn", (1, 8, 8), width=8, hidden=8)
    everybody = [Batch(batch.inputs[i : i + 1], batch.labels[i : i + 1]) for i in range(4)]
    view, knowledge = federation([(0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3)], 1e-4, model, everybody)
    found = Strongest(seconds=1.0)(view, knowledge, rng=stream(0, "attack"))
    alone = Strongest(seconds=1.0)(view, replace(knowledge, history=()), rng=stream(0, "attack"))
    scores = []
    for guess in (found, alone):
        assert guess.inputs is not None
        scores.append(psnr_db(guess.inputs[assign(guess.inputs, batch.inputs)], batch.inputs))
    assert "gradient_disaggregation" in found.solver
    assert scores[0] > scores[1] + 4
