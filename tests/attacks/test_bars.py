"""How good the attacks must be; the full bars are slow."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from attacks.update.dlg import DLG
from attacks.update.dlg_paper import DLGPaper
from attacks.update.fedavg_matching import FedAvgMatching
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.labels import LabelRecovery
from attacks.update.linear_leak import LinearLeak, factors, rank_without
from simulator import lookup
from simulator.adversary import Attack, Knowledge
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation, Schema, Update
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
    assert "2 local steps" in str(LinearLeak().supports(view, knowledge))


@pytest.mark.parametrize(
    ("linear", "mlp"), [(range(178, 192), range(6)), pytest.param(range(150, 238), range(12), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_linear_leak_certifies_no_mixture_of_two_classes(linear: range, mlp: range) -> None:
    """With two classes all signals through the last layer are parallel, so that mixtures explain their rows almost as records do.

    Seed 185 of linear with 6 records is one that was certified falsely at a tolerance of 1e-3 without the test of the rank.
    """
    data, model_classes = digits(1700), Schema((1, 8, 8), ("even", "odd"))
    for name, size, seed in [(n, b, s) for n, seeds in (("mlp", mlp), ("linear", linear)) for b in (6, 12) for s in seeds]:
        batch = drawn(data, size, seed)
        batch = Batch(batch.inputs, batch.labels % 2)
        model = lookup.get("models", name)().build(model_classes, stream(seed, "model"))
        view, knowledge = attack_surface(model, [batch])
        guess = LinearLeak()(view, replace(knowledge, schema=model_classes, labels=batch.labels), rng=stream(0))
        assert guess.inputs is not None
        for image, proof in zip(guess.inputs, guess.certificate, strict=True):
            assert not proof or float((image - batch.inputs).square().flatten(1).mean(1).min()) < 1e-8


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_the_rank_without_a_record_is_that_of_the_whole_matrix(shape: tuple[int, int]) -> None:
    """Against numpy's, of the full difference: for a record of the sum, one of another weight, a mixture, and a stranger."""
    rng = stream(0, "rank")
    signals, records = torch.randn(shape[0], 5, generator=rng).double(), torch.rand(shape[1], 5, generator=rng).double()
    weight = (signals @ records.T).float().double()  # as it is sent
    space = factors(weight)
    assert len(space.values) == 5
    assert torch.allclose(space.left * space.values @ space.right, weight, atol=1e-5)
    mixed, strange = signals[:, 0] + signals[:, 1], torch.randn(shape[0], generator=rng).double()
    cases = [
        (signals[:, 2], records[:, 2], 4), (0.5 * signals[:, 2], records[:, 2], 5), (mixed, records[:, 0] + records[:, 1], 5),
        (strange, records[:, 2], 5), (strange, torch.rand(shape[1], generator=rng).double(), 6),
    ]  # fmt: skip
    for signal, x, rank in cases:
        assert rank_without(space, signal, x) == rank
        values = np.linalg.svd((weight - torch.outer(signal, x)).numpy(), compute_uv=False)
        assert int((values > 1e-6 * float(space.values[0])).sum()) == rank


def drawn(data: Batch, size: int, seed: int, *, two_classes: bool = False) -> Batch:
    """A random batch, with repetition, of all classes or of two."""
    rng = stream(seed, "draw")
    pool = torch.arange(len(data))
    if two_classes:
        pool = torch.isin(data.labels, torch.randperm(10, generator=rng)[:2]).nonzero().flatten()
    chosen = pool[torch.randint(len(pool), (size,), generator=rng)]
    return Batch(data.inputs[chosen], data.labels[chosen])


def clipped(surface: tuple[Observation, Knowledge], factor: float) -> tuple[Observation, Knowledge]:
    """The same upload clipped to this fraction of its norm, and an adversary that knows of it."""
    view, knowledge = surface
    update = view.upload.update
    norm = float(torch.stack([tensor.square().sum() for tensor in update.tensors.values()]).sum().sqrt())
    smaller = Update(update.kind, {name: factor * tensor for name, tensor in update.tensors.items()})
    view = replace(view, uploads=(replace(view.upload, update=smaller),))
    return view, replace(knowledge, defenses=(("clip", {"clip_norm": factor * norm}),))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "model", "shape", "size"),
    [
        pytest.param(DLG(evaluations=300), "lenet", (1, 8, 8), 1, marks=pytest.mark.slow),
        (LinearLeak(), "mlp", (1, 8, 8), 4),
        (LabelRecovery(), "convnet", (1, 16, 16), 8),
        (InvertingGradients(steps=10), "convnet", (3, 16, 16), 1),
    ],
    ids=["dlg", "linear_leak", "label_recovery", "inverting_gradients"],
)
def test_clipping_changes_nothing(attack: Attack, model: str, shape: tuple[int, int, int], size: int) -> None:
    data = digits(1000, shape)
    for seed in range(3):
        batch = drawn(data, size, seed)
        surface = attack_surface(build(model, shape, seed=seed), [batch])
        free = attack(*surface, rng=stream(seed, "attack"))
        assert torch.equal(free.labels.sort().values, batch.labels.sort().values)
        for factor in (0.5, 0.1):
            tied = attack(*clipped(surface, factor), rng=stream(seed, "attack"))
            assert torch.equal(tied.labels.sort().values, free.labels.sort().values)
            assert tied.certificate == free.certificate
            if free.inputs is None:
                continue
            assert tied.inputs is not None
            error = (tied.inputs - free.inputs).square().mean()
            assert float(error) < 1e-4


def test_dlg_on_digits() -> None:
    psnr, _ = run_all(DLG(evaluations=400), build("lenet", (1, 8, 8)), digits(4), 4)
    assert min(psnr) > 30


def test_inverting_gradients_beats_its_floor_fast() -> None:
    data = cifar10()
    psnr, _ = run_all(InvertingGradients(steps=80), build("convnet", (3, 32, 32)), data, 3)
    floor = [psnr_db(x.mean((1, 2), keepdim=True).expand_as(x), x) for x in data.inputs[:3]]
    assert sum(psnr) > sum(floor)


@pytest.mark.slow
def test_fedavg_matching_beats_one_gradient() -> None:
    """Four records in eight local steps: unrolling them is worth at least 3 dB over the same engine that takes them for one step."""
    data = digits(4, (1, 16, 16))
    recipe = LocalTraining(algorithm="fedavg", batch_size=2, epochs=4, learning_rate=0.1)
    view, knowledge = attack_surface(build("convnet", (1, 16, 16), width=8), [data], recipe)
    knowledge = replace(knowledge, labels=data.labels)
    naive = replace(knowledge, training=LocalTraining(algorithm="fedavg", batch_size=0, learning_rate=0.1))
    unrolled, one = (psnr_db(FedAvgMatching(steps=300)(view, k, rng=stream(0)).inputs, data.inputs) for k in (knowledge, naive))
    print(f"fedavg_matching: {unrolled:.1f} dB, one gradient {one:.1f} dB")
    assert unrolled >= one + 3
    assert unrolled > 17


@pytest.mark.slow
def test_dlg_bar() -> None:
    """At least 18 of 20 digits above 30 dB."""
    psnr, seconds = run_all(DLG(), build("lenet", (1, 8, 8)), digits(20), 20)
    print(f"dlg: {sum(psnr) / 20:.1f} dB, {seconds:.2f} CPU s each")
    assert sum(value > 30 for value in psnr) >= 18


@pytest.mark.nightly
def test_dlg_bar_on_photos() -> None:
    """Colour pictures on the sigmoid LeNet: at least 30 dB in 40 CPU s, and 8 dB above the published settings in the same time."""
    model, data = build("lenet", (3, 32, 32)), cifar10()
    ours, seconds = run_all(DLG(seconds=40), model, data, 5)
    views = [attack_surface(model, [Batch(data.inputs[i : i + 1], data.labels[i : i + 1])]) for i in range(5)]
    guesses = DLGPaper(seconds=40).many([v for v, _ in views], [k for _, k in views], rngs=[stream(0, "victim", i) for i in range(5)])
    published = [psnr_db(guess.inputs, data.inputs[i : i + 1]) for i, guess in enumerate(guesses)]
    print(f"dlg: {sum(ours) / 5:.1f} dB (min {min(ours):.1f}), {seconds:.1f} CPU s each; dlg-paper: {sum(published) / 5:.1f} dB")
    assert sum(ours) / 5 >= 30
    assert sum(ours) >= sum(published) + 5 * 8
    assert seconds <= 45


@pytest.mark.nightly
def test_inverting_gradients_bar_on_a_cnn() -> None:
    """Claims B15, B15b. The convolutional network with a hidden layer: one record, and eight with their labels given."""
    model, data = build("cnn", (3, 32, 32)), cifar10()
    psnr, seconds = run_all(InvertingGradients(seconds=30), model, data, 3)
    print(f"inverting_gradients, cnn: {sum(psnr) / 3:.1f} dB, {seconds:.1f} CPU s each")
    assert sum(psnr) / 3 >= 28
    assert seconds <= 31
    view, knowledge = attack_surface(model, [Batch(data.inputs[:8], data.labels[:8])])
    began = time.process_time()
    guess = InvertingGradients(seconds=90)(view, replace(knowledge, labels=data.labels[:8]), rng=stream(0))
    seconds = time.process_time() - began
    assert guess.inputs is not None
    table = torch.tensor([[psnr_db(one, other) for other in data.inputs[:8]] for one in guess.inputs])
    mean = float(table[linear_sum_assignment(table, maximize=True)].mean())  # records of equal labels come in any order
    print(f"inverting_gradients, cnn, 8 records: {mean:.1f} dB, {seconds:.1f} CPU s")
    assert mean >= 30
    assert seconds <= 93


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3))
def test_inverting_gradients_bar(seed: int) -> None:
    """Claim B14. Mean over the 20 pictures of cifar10-sample at least 24 dB for each initial model, at most 10 CPU seconds each.

    Not a held-out test: the schedule of the weight was chosen after these 20 pictures had been seen, and the variation of channel
    differences was suggested by a reviewer who had measured it on them with model seed 0. The weights were chosen on other photos.
    """
    psnr, seconds = run_all(InvertingGradients(), build("convnet", (3, 32, 32), seed=seed), cifar10(), 20)
    print(f"inverting_gradients, model {seed}: {sum(psnr) / 20:.2f} dB (min {min(psnr):.2f}), {seconds:.2f} CPU s each")
    assert sum(psnr) / 20 >= 24
    assert seconds <= 10
