"""Unmixing: independent components of edges against the records, and the exact solution that the network adds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attacks._layers import first_linear
from attacks._sparse.space import Layer, decompose
from attacks._unmixing.contrast import edges, separable, unmix
from attacks._unmixing.span import backward_signal, residuals
from attacks.update.cocktail_party import CocktailParty, pictures
from attacks.update.sparse_factorization import SparseFactorization
from simulator.adversary import Reconstruction
from simulator.rng import stream
from simulator.training import per_example_gradients
from simulator.types import Batch, Update
from tests.attacks.victims import attack_surface, build, digits, photos


def matched(guess: Reconstruction, truth: Batch) -> tuple[Tensor, Tensor]:
    """Squared error of each true record's guess, and which guess that is."""
    assert guess.inputs is not None
    cost = torch.cdist(truth.inputs.flatten(1).double(), guess.inputs.flatten(1).double()).square() / truth.inputs[0].numel()
    rows, places = linear_sum_assignment(cost)
    return cost[rows, places], torch.from_numpy(places)


def test_edges_of_a_ramp_are_its_slope() -> None:
    ramp = torch.arange(12.0).view(1, 12)
    found = edges(ramp, (1, 3, 4))
    assert found[0, :9].tolist() == [1.0] * 9
    assert found[0, 9:].tolist() == [4.0] * 8


def test_edges_of_gray_pictures_have_no_opponent_part() -> None:
    gray = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4).flatten(1)
    found = edges(gray, (3, 4, 4)).view(2, 2, 3, 12)
    assert float(found[:, :, 1:].abs().max()) == 0.0


def test_unmixing_returns_sparse_sources() -> None:
    rng = stream(0, "sources")
    sources = torch.randn(6, 4000, generator=rng, dtype=torch.float64) ** 3
    mixtures = torch.randn(6, 6, generator=rng, dtype=torch.float64) @ sources
    found = unmix(mixtures, rng=rng) @ mixtures
    correlation = torch.corrcoef(torch.cat([sources, found]))[:6, 6:].abs()
    assert float(correlation.max(1).values.min()) > 0.99
    assert sorted(correlation.argmax(1).tolist()) == list(range(6))


def test_edges_unmix_photographs_where_pixels_do_not() -> None:
    truth = photos(32, 32, 3).inputs.flatten(1).double()
    mixtures = torch.randn(32, 32, generator=stream(1, "mix"), dtype=torch.float64) @ truth

    def median(signals: Tensor) -> float:
        found = unmix(signals, rng=stream(2, "start")) @ mixtures
        correlation = torch.corrcoef(torch.cat([truth, found]))[:32, 32:].abs()
        rows, places = linear_sum_assignment(-correlation)
        return float(correlation[rows, places].median())

    assert median(edges(mixtures, (3, 32, 32))) > 0.95
    assert median(mixtures - mixtures.mean(1, keepdim=True)) < 0.7


def test_the_backward_signal_is_that_of_the_client() -> None:
    model, batch = build("mlp", (1, 8, 8), hidden=(24, 12), activation="tanh"), digits(3)
    view, knowledge = attack_surface(model, [batch])
    first = first_linear(knowledge, view.broadcast)
    assert not isinstance(first, str)
    signal = backward_signal(knowledge, view.broadcast, first[0])
    own = per_example_gradients(model, view.broadcast.parameters, {}, batch)[first[0].bias]  # ∂ℓ/∂b is the signal itself
    weight, bias = (view.broadcast.parameters[name].double() for name in (first[0].weight, first[0].bias))
    z = (batch.inputs.flatten(1) * first[1].scale + first[1].offset).double() @ weight.T + bias
    for i in range(3):
        assert torch.allclose(signal(z[i], batch.labels[i]), own[i].double(), atol=1e-6)


def test_only_records_solve_their_equations() -> None:
    batch = photos(8, 16, 0)
    view, knowledge = attack_surface(build("mlp", (3, 16, 16), hidden=(64,), activation="sigmoid"), [batch])
    first = first_linear(knowledge, view.broadcast)
    assert not isinstance(first, str)
    call, affine = first
    gradient, parameters = view.upload.update.tensors, view.broadcast.parameters
    space = decompose(Layer(gradient[call.weight], gradient[call.bias], parameters[call.weight], parameters[call.bias]), 8)
    assert space is not None
    truth = torch.linalg.lstsq(space.right.T, (batch.inputs.flatten(1) * affine.scale + affine.offset).double().T).solution.T
    signal, classes = backward_signal(knowledge, view.broadcast, call), torch.arange(10)
    right = residuals(space, signal, truth, classes)
    assert float(right.gather(1, batch.labels[:, None]).max()) < 1e-5
    assert float(right.scatter(1, batch.labels[:, None], torch.inf).min()) > 1e-3
    assert float(residuals(space, signal, (truth[:4] + truth[4:]) / 2, classes).min()) > 1e-3


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu", "relu"])
def test_a_batch_comes_back_exactly(activation: str) -> None:
    batch = photos(12, 16, 1)
    view, knowledge = attack_surface(build("mlp", (3, 16, 16), hidden=(128,), activation=activation), [batch])
    guess = CocktailParty(seconds=20)(view, knowledge, rng=stream(0, "attack"))
    error, place = matched(guess, batch)
    assert float(error.max()) < 1e-9
    assert all(guess.certificate)
    assert torch.equal(guess.labels[place], batch.labels)


@pytest.mark.slow
def test_relu_batches_that_chance_alone_does_not_finish() -> None:
    batch = photos(48, 32, 1)
    view, knowledge = attack_surface(build("mlp", (3, 32, 32), hidden=(400,), seed=1), [batch])
    error, _ = matched(CocktailParty(seconds=40)(view, knowledge, rng=stream(0, "attack")), batch)
    assert float((error < 1e-6).double().mean()) > 0.9
    alone, _ = matched(SparseFactorization(seconds=3)(view, knowledge, rng=stream(0, "attack")), batch)
    assert float((alone < 1e-6).double().mean()) < 0.8  # chance finds some, more of them on a faster machine


def test_doubled_records_come_back_twice_and_unproven() -> None:
    batch = photos(5, 16, 2)
    double = Batch(torch.cat([batch.inputs, batch.inputs[:1]]), torch.cat([batch.labels, batch.labels[:1]]))
    view, knowledge = attack_surface(build("mlp", (3, 16, 16), hidden=(96,), activation="tanh"), [double])
    guess = CocktailParty(seconds=10)(view, knowledge, rng=stream(0, "attack"))
    error, place = matched(guess, double)
    assert float(error.max()) < 1e-9
    assert [bool(guess.certificate[i]) for i in place.tolist()] == [False, True, True, True, True, False]


def test_nothing_is_proven_of_updates_without_information() -> None:
    batch = photos(6, 16, 3)
    view, knowledge = attack_surface(build("mlp", (3, 16, 16), hidden=(64,), activation="sigmoid"), [batch])
    rng = stream(0, "shuffle")
    tensors = {name: t.flatten()[torch.randperm(t.numel(), generator=rng)].view_as(t) for name, t in view.upload.update.tensors.items()}
    blind = replace(view, uploads=(replace(view.upload, update=Update("gradient", tensors)),))
    guess = CocktailParty(seconds=3)(blind, knowledge, rng=stream(0, "attack"))
    assert not any(guess.certificate)


def test_what_it_refuses_says_why() -> None:
    view, knowledge = attack_surface(build("mlp", (1, 8, 8), hidden=(8,), activation="tanh"), [digits(8)])
    assert "more inputs and outputs" in str(CocktailParty().supports(view, knowledge))
    view, knowledge = attack_surface(build("lenet", (3, 32, 32)), [photos(2)])
    assert "nn.Linear" in str(CocktailParty().supports(view, knowledge))


def test_small_pictures_are_started_by_chance() -> None:
    assert separable((3, 32, 32), 128)
    assert not separable((1, 2, 2), 3)
    view, knowledge = attack_surface(build("mlp", (1, 8, 8), hidden=(64,)), [digits(2)])
    first = first_linear(knowledge, view.broadcast)
    assert not isinstance(first, str)
    assert pictures((1, 8, 8), first[1])(torch.randn(40, 64).double(), stream(0, "start")).shape == (40, 40)
