"""Attacks of an active server: what they read out of the models that server.active plants, and that nobody else gets to use them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.update.imprint import Imprint, alone, kinks
from attacks.update.linear_leak import LinearLeak
from attacks.update.trap_weights import TrapWeights
from server import active
from simulator.adversary import Knowledge, Reconstruction
from simulator.front import front
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation, Schema
from tests.attacks.victims import CLASSES, attack_surface, build, digits, photos

METHODS = {"imprint": Imprint(), "trap_weights": TrapWeights()}
EXACT = 1e-6


def surface(
    data: Batch, method: str, *, seed: int = 0, neurons: int = 256, public: Batch | None = None, recipe: LocalTraining | None = None
) -> tuple[Observation, Knowledge]:
    """What an active server observes of one client's batch."""
    shape = tuple(data.inputs.shape[1:])
    model = build("mlp", shape, seed=seed, hidden=(neurons,))  # type: ignore[arg-type]
    layers = front(model, shape)
    assert not isinstance(layers, str)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    pixels = None if public is None else public.inputs.flatten(1).double()
    rng = stream(seed, "tampering")
    if method == "imprint":
        schema = Schema(shape, CLASSES)  # type: ignore[arg-type]
        model.load_state_dict(active.imprint(layers, schema, before, pixels, rng))
    elif method == "trap_weights":
        model.load_state_dict(active.trap_weights(layers, before, pixels, len(data), rng))
    view, knowledge = attack_surface(model, [data], recipe)
    return view, replace(knowledge, adversary="active")


def errors(guess: Reconstruction, truth: Batch) -> Tensor:
    """Mean squared error of every guess (rows) against every record."""
    assert guess.inputs is not None
    return (guess.inputs.flatten(1).double()[:, None] - truth.inputs.flatten(1).double()[None]).square().mean(2)


def exact(guess: Reconstruction, truth: Batch) -> int:
    """Records that some guess equals up to rounding; every certified guess must."""
    mse = errors(guess, truth)
    assert not [i for i, proof in enumerate(guess.certificate) if proof and mse[i].min() > EXACT], "certified but wrong"
    return int((mse.min(0).values < EXACT).sum())


def attacked(method: str, data: Batch, **settings: Any) -> Reconstruction:
    view, knowledge = surface(data, method, **settings)
    assert METHODS[method].supports(view, knowledge) is None
    return METHODS[method](view, knowledge, rng=stream(0, "attack"))


@pytest.mark.slow
@pytest.mark.parametrize("neurons", [64, 256])
def test_imprint_recovers_most_of_eight_digits_with_public_brightness(neurons: int) -> None:
    public = digits(360, offset=1400)
    batches = [digits(8, offset=130 * seed) for seed in range(10)]
    found = sum(exact(attacked("imprint", data, seed=seed, neurons=neurons, public=public), data) for seed, data in enumerate(batches))
    assert found >= 0.7 * 80, found


def test_imprint_needs_no_public_records_where_the_prior_holds() -> None:
    batches = [photos(8, size=16, seed=seed) for seed in range(5)]
    found = sum(exact(attacked("imprint", data, seed=seed), data) for seed, data in enumerate(batches))
    assert found >= 0.9 * 40, found


def test_imprint_says_when_it_is_all_exact_and_which_labels() -> None:
    data, public = digits(8, offset=360), digits(360, offset=1400)
    guess = attacked("imprint", data, public=public)
    assert exact(guess, data) == 8
    assert all(guess.certificate)
    assert torch.equal(guess.labels, data.labels[errors(guess, data).argmin(1)])


@pytest.mark.parametrize("method", list(METHODS))
def test_told_labels_stay_with_their_records(method: str) -> None:
    """Labels are told in an order of their own; records are found in another."""
    data, public = digits(8, offset=360), digits(360, offset=1400)
    view, knowledge = surface(data, method, public=public)
    told = replace(knowledge, labels=data.labels[torch.randperm(len(data), generator=stream(3, "labels"))])
    guess = METHODS[method](view, told, rng=stream(0, "attack"))
    sure = [i for i, proof in enumerate(guess.certificate) if proof]
    assert len(sure) >= 4
    assert told.labels is not None
    assert torch.equal(guess.labels, told.labels)
    assert torch.equal(guess.labels[sure], data.labels[errors(guess, data)[sure].argmin(1)])


@pytest.mark.slow
def test_imprint_certifies_what_is_alone_in_its_gap_and_nothing_else() -> None:
    certified = shared = 0
    for seed in range(20):
        data = digits(8, offset=70 * seed)
        view, knowledge = surface(data, "imprint", seed=seed, neurons=128, public=digits(360, offset=1400))
        guess = Imprint()(view, knowledge, rng=stream(0, "attack"))
        found = exact(guess, data)  # none is wrong
        certified += sum(map(bool, guess.certificate)) * (found < 8)
        shared += found < 8
    assert shared >= 3
    assert certified >= shared, "a batch of which two records share a gap must still have certified ones"


@pytest.mark.parametrize("labels", [(3, 3), (3, 7)])
def test_imprint_does_not_certify_two_records_in_one_gap(labels: tuple[int, int]) -> None:
    base = digits(7, offset=360)
    view, _ = surface(digits(8), "imprint", public=digits(360, offset=1400))
    row = view.broadcast.parameters["layer0.weight"][0]
    twin = base.inputs[0].flatten().clone()
    twin[20], twin[43] = 0.2, 0.9  # another picture, as bright as the first by what the planted row measures
    twin[30] = base.inputs[0].flatten()[30] + (row @ (base.inputs[0].flatten() - twin) + 0) / row[30]
    clear = base.inputs.clone()
    batch = Batch(torch.cat([clear, twin.view(1, 1, 8, 8)]), torch.tensor([labels[0], *base.labels[1:].tolist(), labels[1]]))
    view, knowledge = surface(batch, "imprint", public=digits(360, offset=1400))
    measured = batch.inputs.flatten(1) @ row
    assert abs(float(measured[0] - measured[7])) < 1e-6
    guess = Imprint()(view, knowledge, rng=stream(0, "attack"))
    mse = errors(guess, batch)
    wrong = [proof for proof, error in zip(guess.certificate, mse, strict=True) if proof and error.min() > EXACT]
    assert wrong == []
    assert mse[:, [0, 7]].min() > EXACT, "they are mixed"


def test_trap_weights_recover_all_of_twenty_and_more_than_an_honest_model_gives_away() -> None:
    planted = honest = breaching = 0
    for seed in range(5):
        data = digits(20, offset=130 * seed)
        view, knowledge = surface(data, "trap_weights", seed=seed)
        planted += exact(TrapWeights()(view, knowledge, rng=stream(0, "attack")), data)
        breaching += exact(chosen_by_breaching(view, len(data)), data)
        view, knowledge = surface(data, "none", seed=seed)
        honest += exact(LinearLeak()(view, knowledge, rng=stream(0, "attack")), data)
    assert planted >= 95
    assert planted >= honest + 30
    assert planted >= breaching + 30


def test_kinks_tell_one_record_from_two_and_judge_no_gap_beside_an_occupied_one() -> None:
    thresholds = torch.linspace(0, 1, 21).double()
    residual = torch.full((10, 10), 0.1).double() - torch.eye(10)  # softmax − target, a column for each label

    def columns(measured: float, label: int) -> Tensor:
        return residual[:, label, None] * (measured - thresholds).clamp(min=0)

    def judged(held: list[tuple[float, int]], believed: tuple[float, int]) -> bool:
        gradient = torch.stack([columns(*record) for record in held]).sum(0)
        occupied = torch.tensor(sorted({int(measured * 20) for measured, _ in held}))
        return bool(kinks(gradient, columns(*believed)[None], thresholds, torch.tensor([int(believed[0] * 20)]), occupied)[0])

    others = [(0.33, 2), (0.88, 5)]
    assert judged([(0.52, 3), *others], (0.52, 3))
    assert judged([(0.98, 3), *others], (0.98, 3)), "the last gap"
    assert not judged([(0.52, 3), *others], (0.52, 4)), "another label"
    assert not judged([(0.52, 3), (0.54, 7), *others], (0.53, 3)), "two records"
    assert not judged([(0.52, 3), (0.54, 3), *others], (0.53, 3)), "two of one class"
    assert not judged([(0.52, 3), (0.57, 7), *others], (0.52, 3)), "a neighbor is occupied"
    assert not judged([(0.02, 3), *others], (0.02, 3)), "one column to the left"


def test_no_gap_is_judged_where_many_records_may_share_one() -> None:
    data = digits(8, offset=360)
    view, knowledge = surface(data, "imprint", public=digits(360, offset=1400))
    order, gaps = torch.arange(256), (data.inputs.flatten(1) @ view.broadcast.parameters["layer0.weight"][0]).argsort().argsort() * 9 + 5
    judged = []
    for records in (8, 40):
        crowd = replace(knowledge, num_examples=records)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("attacks.update.imprint.kinks", lambda *_: torch.ones(8, dtype=torch.bool))
            judged.append(alone(data.inputs, data.labels, view.upload.update.tensors, order, gaps, gaps, view, crowd).all().item())
    assert judged == [True, False]


def chosen_by_breaching(view: Observation, records: int) -> Reconstruction:
    """The quotients that breaching 0.1.2 keeps: of rows with a signal those with the smallest absolute mean of ∂W."""
    weight, bias = (view.upload.update.tensors[f"layer0.{name}"] for name in ("weight", "bias"))
    weight, bias = weight[bias != 0], bias[bias != 0]
    kept = weight.mean(1).abs().topk(records, largest=False).indices
    images = (weight[kept] / bias[kept, None] * 0.25 + 0.5).clamp(0, 1)
    return Reconstruction(images.view(-1, 1, 8, 8), torch.zeros(records).long())


def test_trap_weights_peel_more_records_than_own_a_neuron() -> None:
    owned = peeled = 0
    for seed in range(3):
        data = digits(64, offset=200 * seed + 100)
        view, knowledge = surface(data, "trap_weights", seed=seed, public=digits(360, offset=1400))
        weight, bias = (view.broadcast.parameters[f"layer0.{name}"].double() for name in ("weight", "bias"))
        fires = (data.inputs.flatten(1).double() - 0.5) / 0.25 @ weight.T + bias > 0
        owned += int(fires[:, fires.sum(0) == 1].any(1).sum())
        peeled += exact(TrapWeights()(view, knowledge, rng=stream(0, "attack")), data)
    assert peeled > owned + 10


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_of_one_step_will_do(method: str) -> None:
    data = digits(8, offset=360)
    recipe = LocalTraining(algorithm="fedavg", batch_size=8, learning_rate=0.5)
    guess = attacked(method, data, public=digits(360, offset=1400), recipe=recipe)
    assert exact(guess, data) >= 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["zeroed", "shuffled", "foreign"])
def test_an_update_of_nothing_gives_no_certificate(method: str, how: str) -> None:
    data, public = digits(8, offset=360), digits(360, offset=1400)
    view, knowledge = surface(data, method, public=public)
    tensors = view.upload.update.tensors
    if how == "zeroed":
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    elif how == "shuffled":
        rng = stream(0, "shuffle")
        tensors = {name: t.flatten()[torch.randperm(t.numel(), generator=rng)].view_as(t) for name, t in tensors.items()}
    else:
        tensors = surface(digits(8, offset=900), "none", seed=3)[0].upload.update.tensors
    view = replace(view, uploads=(replace(view.upload, update=replace(view.upload.update, tensors=tensors)),))
    guess = METHODS[method](view, knowledge, rng=stream(0, "attack"))
    assert not any(guess.certificate)
    assert exact(guess, data) == 0


@pytest.mark.parametrize("method", METHODS)
def test_an_honest_but_curious_server_is_refused(method: str) -> None:
    view, knowledge = surface(digits(8), method)
    reason = METHODS[method].supports(view, replace(knowledge, adversary="honest-but-curious"))
    assert reason is not None
    assert "must be active" in reason
    assert "threat.adversary" in reason


@pytest.mark.parametrize("method", METHODS)
def test_an_honest_model_is_refused(method: str) -> None:
    view, knowledge = surface(digits(8), "none")
    reason = METHODS[method].supports(view, knowledge)
    assert reason is not None
    assert "tampering.method" in reason
