"""How good the attacks must be; the full bars are slow."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.update.dlg import DLG
from attacks.update.fedavg_matching import FedAvgMatching
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.labels import LabelRecovery, to_counts
from attacks.update.linear_leak import LinearLeak
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Update
from tests.attacks.victims import attack_surface, build, cifar10, digits, psnr_db, records

ONE_STEP = LocalTraining(algorithm="fedavg", batch_size=0, learning_rate=0.1, weight_decay=0.01)


def run_all(attack: DLG | InvertingGradients | FedAvgMatching, model: nn.Module, data: Batch, count: int) -> tuple[list[float], float]:
    """PSNR in dB of each of ``count`` single-record victims, and CPU seconds for each."""
    victims = [Batch(data.inputs[i : i + 1], data.labels[i : i + 1]) for i in range(count)]
    pairs = [attack_surface(model, [victim]) for victim in victims]
    start = time.process_time()
    guesses = attack.many([v for v, _ in pairs], [k for _, k in pairs], rngs=[stream(0, "victim", i) for i in range(count)])
    seconds = (time.process_time() - start) / count
    assert [int(guess.labels) for guess in guesses] == data.labels[:count].tolist(), "labels are recovered, not given"
    return [psnr_db(guess.inputs, victim.inputs) for guess, victim in zip(guesses, victims, strict=True)], seconds


@pytest.mark.parametrize("recipe", [None, ONE_STEP], ids=["gradient", "delta of one step"])
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_linear_leak_is_exact_for_one_image(name: str, recipe: LocalTraining | None) -> None:
    data = digits(1)
    view, knowledge = attack_surface(build(name, (1, 8, 8)), [data], recipe)
    assert LinearLeak().supports(view, knowledge) is None
    guess = LinearLeak()(view, knowledge, rng=stream(0))
    assert guess.inputs is not None
    assert float((guess.inputs - data.inputs).square().mean()) < 1e-10
    assert guess.certificate == ("rank one",)
    assert torch.equal(guess.labels, data.labels)


def test_linear_leak_certifies_only_exact_records() -> None:
    certified = 0
    for seed in range(30):
        data = records(4, (1, 8, 8), seed) if seed % 2 else digits(4, offset=4 * seed)
        view, knowledge = attack_surface(build("mlp", (1, 8, 8), seed=seed), [data])
        guess = LinearLeak()(view, knowledge, rng=stream(0))
        assert guess.inputs is not None
        for image, proof in zip(guess.inputs, guess.certificate, strict=True):
            if proof:
                certified += 1
                assert float((image - data.inputs).square().flatten(1).mean(1).min()) < 1e-8
    assert certified > 20


def test_linear_leak_refuses_convolutions_and_long_deltas() -> None:
    view, knowledge = attack_surface(build("lenet", (1, 8, 8)), [digits(1)])
    assert "nn.Linear" in str(LinearLeak().supports(view, knowledge))
    recipe = LocalTraining(algorithm="fedavg", batch_size=1)
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), [digits(2)], recipe)
    assert "several local steps" in str(LinearLeak().supports(view, knowledge))


@pytest.mark.parametrize("name", ["lenet", "convnet", "mlp", "linear", "resnet20"])
def test_label_of_one_image_is_always_right(name: str) -> None:
    data = digits(20, (1, 16, 16))
    model = build(name, (1, 16, 16))
    for i in range(20):
        one = Batch(data.inputs[i : i + 1], data.labels[i : i + 1])
        guess = LabelRecovery()(*attack_surface(model, [one]), rng=stream(0))
        assert torch.equal(guess.labels, one.labels)


@pytest.mark.parametrize("size", [8, 32])
def test_counts_of_untrained_models_are_exact(size: int) -> None:
    """IID and two-class batches, labels repeat in both."""
    data, exact = digits(1000, (1, 16, 16)), 0
    for seed in range(20):
        rng = stream(seed, "draw")
        pool = torch.arange(1000) if seed % 2 else torch.isin(data.labels, torch.randperm(10, generator=rng)[:2]).nonzero().flatten()
        chosen = pool[torch.randint(len(pool), (size,), generator=rng)]
        batch = Batch(data.inputs[chosen], data.labels[chosen])
        guess = LabelRecovery()(*attack_surface(build("convnet", (1, 16, 16), seed=seed), [batch]), rng=stream(0))
        exact += bool(torch.equal(guess.labels, batch.labels.sort().values))
    assert exact >= 19


def test_counts_survive_clipping_that_the_adversary_knows_of() -> None:
    """Five records of ten classes, the update clipped to a tenth of its norm: the scale is recovered with the counts."""
    data, exact, blind = digits(1000, (1, 16, 16)), 0, 0
    for seed in range(20):
        chosen = torch.randint(1000, (5,), generator=stream(seed, "draw"))
        batch = Batch(data.inputs[chosen], data.labels[chosen])
        view, knowledge = attack_surface(build("convnet", (1, 16, 16), seed=seed), [batch])
        update = view.upload.update
        norm = float(torch.stack([t.square().sum() for t in update.tensors.values()]).sum().sqrt())
        clipped = Update("gradient", {name: 0.1 * tensor for name, tensor in update.tensors.items()})
        scaled = replace(view, uploads=(replace(view.upload, update=clipped),))
        told = replace(knowledge, defenses=(("clip", {"clip_norm": 0.1 * norm}),))
        truth = batch.labels.sort().values
        exact += bool(torch.equal(LabelRecovery()(scaled, told, rng=stream(0)).labels, truth))
        blind += bool(torch.equal(LabelRecovery()(scaled, knowledge, rng=stream(0)).labels, truth))
    assert exact >= 19
    assert exact >= blind + 5


def test_counts_of_a_fedavg_round() -> None:
    data = digits(16, (1, 16, 16))
    recipe = LocalTraining(algorithm="fedavg", batch_size=4, epochs=2, learning_rate=0.02, momentum=0.5)
    guess = LabelRecovery()(*attack_surface(build("convnet", (1, 16, 16)), [data], recipe), rng=stream(0))
    assert torch.equal(guess.labels, data.labels.sort().values)


def test_rounding_keeps_the_sum() -> None:
    for seed in range(50):
        estimate = torch.randn(10, generator=stream(seed, "estimate")) * 3
        counts = to_counts(estimate, 17)
        assert int(counts.sum()) == 17
        assert int(counts.min()) >= 0
    assert to_counts(torch.full((10,), math.nan), 17).sum() == 17


def test_dlg_on_digits() -> None:
    psnr, _ = run_all(DLG(evaluations=400), build("lenet", (1, 8, 8)), digits(4), 4)
    assert min(psnr) > 30


def test_inverting_gradients_beats_its_floor_fast() -> None:
    data = cifar10()
    psnr, _ = run_all(InvertingGradients(steps=80), build("convnet", (3, 32, 32)), data, 3)
    floor = [psnr_db(x.mean((1, 2), keepdim=True).expand_as(x), x) for x in data.inputs[:3]]
    assert sum(psnr) > sum(floor)


def test_fedavg_matching_inverts_two_steps() -> None:
    data = digits(2, (1, 8, 8))
    recipe = LocalTraining(algorithm="fedavg", batch_size=1, epochs=1, learning_rate=0.01)
    view, knowledge = attack_surface(build("convnet", (1, 8, 8), width=8), [data], recipe)
    guess = FedAvgMatching(steps=200, tv=0.03, tv_final=0.01)(view, knowledge, rng=stream(0))
    assert guess.inputs is not None
    order = [0, 1] if torch.equal(guess.labels, data.labels) else [1, 0]
    assert psnr_db(guess.inputs[order], data.inputs) > 15


@pytest.mark.slow
def test_dlg_bar() -> None:
    """At least 18 of 20 digits above 30 dB."""
    psnr, seconds = run_all(DLG(), build("lenet", (1, 8, 8)), digits(20), 20)
    print(f"dlg: {sum(psnr) / 20:.1f} dB, {seconds:.2f} CPU s each")
    assert sum(value > 30 for value in psnr) >= 18


@pytest.mark.slow
def test_inverting_gradients_bar() -> None:
    """Mean over the 20 pictures of cifar10-sample and three initial models at least 24 dB, at most 10 CPU seconds each.

    One model alone is too few: seeds 0, 1 and 2 measured 23.8, 25.5 and 25.2 dB.
    """
    means = []
    for seed in range(3):
        psnr, seconds = run_all(InvertingGradients(), build("convnet", (3, 32, 32), seed=seed), cifar10(), 20)
        print(f"inverting_gradients, model {seed}: {sum(psnr) / 20:.2f} dB (min {min(psnr):.2f}), {seconds:.2f} CPU s each")
        means.append(sum(psnr) / 20)
        assert seconds <= 10
    assert sum(means) / 3 >= 24
