"""Two classes: the one backward signal that all records share takes batches apart that sparsity alone does not."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
import torch
from torch import Tensor, nn

from attacks._layers import first_linear, last_linear
from attacks._sparse.factorize import Factorization, Layer, factorize
from attacks._sparse.parallel import parallel, shared_signal
from attacks._sparse.space import decompose
from attacks.update import hybrid
from attacks.update.hybrid import Hybrid
from attacks.update.sparse_factorization import SparseFactorization
from experiments.victims import Victim, trained, victim
from simulator import config, lookup
from simulator.dataset import take
from simulator.models.normalize import Normalize
from simulator.network import network
from simulator.rng import stream
from simulator.types import LocalTraining

RECIPE = LocalTraining(batch_size=0)


def faces(count: int, hidden: tuple[int, ...], seed: int) -> Victim:
    data = config.build_plugin("data", "faces", "data").load()
    family = config.build_plugin("models", {"name": "mlp", "hidden": list(hidden)}, "model")
    own = torch.randperm(len(data.records), generator=stream(seed, "parallel"))[:count]
    return victim(network(family, data.schema, RECIPE, seed), data.schema, [take(data.records, own)], RECIPE, seed=seed)


def layer_of(target: Victim, dtype: torch.dtype = torch.float32) -> Layer:
    """The first layer with its gradient, and what all backward signals are multiples of."""
    found = first_linear(target.knowledge, target.view.broadcast)
    assert not isinstance(found, str)
    call, parameters = found[0], target.view.broadcast.parameters
    by_weight, by_bias = (target.view.upload.update.tensors[name].to(dtype).float() for name in (call.weight, call.bias))
    signal = shared_signal(target.knowledge, target.view.broadcast, call.name)
    return Layer(by_weight, by_bias, parameters[call.weight], parameters[call.bias], dtype != torch.float32, signal)


def missed(found: Factorization, target: Victim) -> Tensor:
    """For each record the mean squared error of the nearest input that was found."""
    truth = (target.truth.inputs.flatten(1).double() - 0.5) / 0.25
    if found.inputs is None:
        return torch.full((len(truth),), torch.inf)
    return torch.cdist(truth, found.inputs).square().min(1).values / truth.shape[1]


@pytest.mark.parametrize(("count", "width"), [(8, 64), (24, 256), (32, 512)])
def test_faces_come_back_exactly_and_proven(count: int, width: int) -> None:
    """Among them pictures that one neuron tells apart."""
    target = faces(count, (width,), seed=0)
    layer = layer_of(target)
    found = factorize(layer, rng=stream(0, "sparse"), seconds=5, records=count)
    assert float(missed(found, target).max()) < 1e-6
    assert all(found.certified)


def test_the_shared_signal_is_the_difference_of_the_last_layers_rows() -> None:
    """J^T(p − e_0) − J^T(p − e_1) = W_1 − W_0, in closed form, where a ReLU is on."""
    target = faces(1, (256,), seed=3)
    head = last_linear(target.knowledge, target.view.broadcast)
    assert head is not None
    last = target.view.broadcast.parameters[head.weight]
    signal = layer_of(target).signal
    assert signal is not None
    known = signal.isfinite()
    assert int(known.sum()) > 250
    assert torch.allclose(signal[known].abs(), (last[1] - last[0]).double()[known].abs(), rtol=1e-3, atol=1e-5)


def test_no_signal_is_shared_behind_a_second_hidden_layer_or_among_ten_classes() -> None:
    assert layer_of(faces(2, (64, 64), seed=0)).signal is None
    data = config.build_plugin("data", "digits", "data").load()
    model = network(config.build_plugin("models", "mlp", "model"), data.schema, RECIPE, 0)
    digits = victim(model, data.schema, [take(data.records, torch.arange(2))], RECIPE)
    assert layer_of(digits).signal is None


def test_another_signal_proves_nothing() -> None:
    """The test of a difference is no formality: of another network's signal no cut lies in the space."""
    layer = layer_of(faces(16, (512,), seed=1))
    space = decompose(layer, 16)
    assert space is not None
    assert layer.signal is not None
    assert len(parallel(space.live(), stream(0, "pairs"), inf)) == 16
    other = replace(space, signal=layer.signal[torch.randperm(512, generator=stream(0, "other"))])
    assert len(parallel(other.live(), stream(0, "pairs"), inf)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_updates_are_taken_apart_no_worse_and_nothing_wrong_is_certified(dtype: torch.dtype) -> None:
    close = {"with": 0, "without": 0}
    for seed in range(3):
        target = faces(8, (256,), seed)
        layer = layer_of(target, dtype)
        for name, each in (("with", layer), ("without", replace(layer, signal=None))):
            found = factorize(each, rng=stream(0, "sparse"), seconds=3, records=8)
            close[name] += int((missed(found, target) < 1e-3).sum())
            assert not any(found.certified) or float(missed(found, target).max()) < 1e-4
    assert close["with"] >= close["without"] >= 6


@pytest.mark.parametrize("seed", range(3))
def test_records_that_a_trained_model_is_sure_of_come_back(seed: int) -> None:
    """Their forces are below float32's steps at 1, so that the columns are no exact multiples of the signal any more."""
    data = config.build_plugin("data", "faces", "data").load()
    model = network(config.build_plugin("models", {"name": "mlp", "hidden": [256]}, "model"), data.schema, RECIPE, seed)
    state = trained(model, data.records, steps=100, batch_size=16, learning_rate=0.1, seed=seed)
    own = torch.randperm(len(data.records), generator=stream(seed, "x"))[:8]
    target = victim(model, data.schema, [take(data.records, own)], RECIPE, seed=seed, state=state)
    found = factorize(layer_of(target), rng=stream(0, "sparse"), seconds=5, records=8)
    assert float(missed(found, target).max()) < 1e-4


def test_where_the_model_draws_for_each_record_no_signal_is_shared() -> None:
    data = config.build_plugin("data", "faces", "data").load()
    family = config.build_plugin("models", {"name": "mlp", "hidden": [256], "dropout": 0.5}, "model")
    assert shared_signal_of(network(family, data.schema, RECIPE, 0)) is None
    plain = lookup.get("models", "mlp")(hidden=(256,))
    assert shared_signal_of(network(lookup.get("models", "precode")(plain, 16), data.schema, RECIPE, 0)) is None


def shared_signal_of(model: nn.Module) -> Tensor | None:
    data = config.build_plugin("data", "faces", "data").load()
    return layer_of(victim(model, data.schema, [take(data.records, torch.arange(2))], RECIPE)).signal


def test_copies_come_back_as_often_as_they_are_there() -> None:
    target = faces(6, (256,), seed=2)
    twice = take(target.truth, torch.tensor([0, 0, 1, 2, 3, 4]))
    data = config.build_plugin("data", "faces", "data").load()
    again = victim(target.knowledge.model, data.schema, [twice], RECIPE)
    guess = SparseFactorization(seconds=5)(again.view, again.knowledge, rng=stream(0, "attack"))
    assert guess.inputs is not None
    errors = torch.cdist(again.truth.inputs.flatten(1).double(), guess.inputs.flatten(1).double()).square() / twice.inputs[0].numel()
    assert sorted((errors < 1e-6).sum(1).tolist()) == [1, 1, 1, 1, 2, 2]
    assert guess.certificate.count("") == 2  # a column of two records proves neither


def test_the_mean_of_records_with_one_mask_is_not_certified_behind_convolutions() -> None:
    """Their columns are parallel, so that they are one to the factorization, and the mean of both has their mask, too."""
    data = config.build_plugin("data", "faces", "data").load()
    torch.manual_seed(9)
    body = [Normalize(), nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 625, 24)]
    model = nn.Sequential(*body, nn.ReLU(), nn.Linear(24, 2))
    own = torch.randperm(len(data.records), generator=stream(9, "x"))[:8]
    target = victim(model, data.schema, [take(data.records, own)], RECIPE, seed=9)
    masks = nn.Sequential(*body)(target.truth.inputs) > 0
    assert torch.equal(masks[2], masks[7])
    guess = Hybrid(seconds=4)(target.view, target.knowledge, rng=stream(0, "attack"))
    assert guess.inputs is not None
    errors = torch.cdist(guess.inputs.flatten(1).double(), target.truth.inputs.flatten(1).double()).square().min(1).values / 625
    assert not any(proof and error > 1e-6 for proof, error in zip(guess.certificate, errors.tolist(), strict=True))


@pytest.mark.slow
def test_pictures_behind_convolutions_come_back_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden layer's records are features then; each is inverted by itself."""
    data = config.build_plugin("data", "faces", "data").load()
    model = network(config.build_plugin("models", "cnn", "model"), data.schema, RECIPE, 0)
    own = torch.randperm(len(data.records), generator=stream(0, "x"))[:24]
    target = victim(model, data.schema, [take(data.records, own)], RECIPE)
    guess = Hybrid(seconds=20)(target.view, target.knowledge, rng=stream(0, "attack"))
    assert guess.inputs is not None
    errors = torch.cdist(target.truth.inputs.flatten(1).double(), guess.inputs.flatten(1).double()).square().min(1).values
    assert float(errors.max()) / target.truth.inputs[0].numel() < 1e-6
    monkeypatch.setattr(hybrid, "shared_signal", lambda *_: None)
    alone = Hybrid(seconds=2 * guess.seconds)(target.view, target.knowledge, rng=stream(0, "attack"))
    assert not any(alone.certificate)
