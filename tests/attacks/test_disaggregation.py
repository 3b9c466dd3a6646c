"""Sums over rounds: who can be told apart, how well, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks import strongest
from attacks._cohorts import combination, covariance, mixed, participation, separate
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


D, PEOPLE = 2000, 20
"""Coordinates and clients of the reference's vectors for differencing over rounds of known participation."""


def drifting(rounds: int, drift: float, seed: int) -> tuple[Observation, Knowledge, Tensor]:
    """Sums of standard normal updates over cohorts by the toss of a coin, each client's with fresh drift in each round; and the updates.

    The model stands still, so that to the attack all drift is rounding: as large in each round as it has senders, like here.
    """
    rng, model, recipe = stream(seed, "known participation", rounds), nn.Sequential(nn.Flatten(), nn.Linear(D // 10 - 1, 10)), LocalTraining(batch_size=0)
    parameters: Tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    updates, seen = torch.randn(PEOPLE, D, generator=rng), list[Observation]()
    for number, there in enumerate(torch.rand(rounds, PEOPLE, generator=rng) < 0.5):
        cohort = there.nonzero().flatten()
        mean = (updates[cohort] + drift * torch.randn(len(cohort), D, generator=rng)).mean(0)
        tensors = {"1.weight": mean[:-10].view(10, -1), "1.bias": mean[-10:]}
        upload = Upload(frozenset(cohort.tolist()), Update("gradient", tensors), {}, len(cohort))
        seen.append(Observation(Broadcast(number, parameters, {}, recipe), (upload,)))
    schema = Schema((1, 1, D // 10 - 1), CLASSES)
    return seen[0], Knowledge(model, schema, recipe, seen[0].upload.num_examples, history=tuple(seen[1:])), updates


def cosines(rounds: int, drift: float, seed: int) -> tuple[float, float]:
    """Mean cosine of the first round's senders to their updates, found and expected: drift·√(Σ_t c_t²·n_t) is the error's norm over theirs."""
    view, knowledge, updates = drifting(rounds, drift, seed)
    found, shown = separate(view, knowledge)
    assert {item.client for item in found} == view.upload.senders
    sizes = torch.tensor([float(len(each.upload.senders)) for each in shown], dtype=torch.float64)
    right, due = list[float](), list[float]()
    for item in found:
        guess = torch.cat([tensor.flatten() for tensor in mixed(item, shown).values()])
        right.append(float(torch.cosine_similarity(guess, updates[item.client], dim=0)))
        due.append(float((1 + drift**2 * (item.weights.square() * sizes).sum()) ** -0.5))
    return sum(right) / len(right), sum(due) / len(due)


@pytest.mark.parametrize(
    ("drift", "rounds", "cosine", "within"),
    [
        (0.0, 20, 1.00, 1e-3), (0.0, 30, 1.00, 1e-4), (0.1, 30, 0.98, 0.01), (0.5, 30, 0.72, 0.03), (1.0, 30, 0.47, 0.03),
        (0.1, 60, 0.995, 0.002), (0.5, 60, 0.90, 0.015), (1.0, 60, 0.72, 0.02), (0.1, 200, 0.999, 0.001), (0.5, 200, 0.97, 0.01), (1.0, 200, 0.91, 0.01),
    ],
)  # fmt: skip
def test_known_participation_gives_updates_back_as_well_as_the_reference_says(drift: float, rounds: int, cosine: float, within: float) -> None:
    """Vectors of 20 clients with 2000 coordinates; rounded to two digits there, of one draw, hence the margins. Measured over five draws."""
    draws = [cosines(rounds, drift, seed) for seed in range(5)]
    found, due = (sum(each) / len(draws) for each in zip(*draws, strict=True))
    assert found == pytest.approx(cosine, abs=within)
    assert found == pytest.approx(due, abs=0.01)


@pytest.mark.parametrize(("drift", "cosine"), [(0.1, 0.50), (0.5, 0.36), (1.0, 0.13)])
def test_as_many_rounds_as_clients_amplify_drift_by_chance(drift: float, cosine: float) -> None:
    """A square P is ill-conditioned, by how much depends on the draw: the vector lies among those of twenty, all below 30 rounds'."""
    draws = [cosines(PEOPLE, drift, seed)[0] for seed in range(20)]
    assert min(draws) < cosine < max(draws)
    assert max(draws) < cosines(30, drift, 0)[0]


def test_fewer_rounds_than_clients_give_blends_which_the_attack_does_not_take() -> None:
    """Of 10 rounds the least-norm solution is half of each update and parts of others': a cosine of √½ = .70, and nobody alone."""
    view, knowledge, updates = drifting(10, 0.0, 0)
    sums = torch.stack([
        torch.cat([tensor.flatten() for tensor in seen.upload.update.tensors.values()]) * seen.upload.num_examples
        for seen in (view, *knowledge.history)
    ])  # fmt: skip
    matrix, clients = participation([view, *knowledge.history])
    blends = torch.linalg.pinv(matrix) @ sums.double()
    assert float(torch.cosine_similarity(blends, updates[clients].double(), dim=1).mean()) == pytest.approx(0.70, abs=0.02)
    assert separate(view, knowledge)[0] == []
    assert "other cohorts" in str(GradientDisaggregation().supports(view, knowledge))


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
