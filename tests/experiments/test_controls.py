"""Floors guess what they say and nothing of the batch; a shuffled view keeps values and loses their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestCentroid
from torch import nn

from experiments.controls import FLOORS, best_floor, floor_scores, floors, label_floor, shuffled
from experiments.metrics import ImageScores, image_scores
from simulator import lookup
from simulator.adversary import Knowledge
from simulator.dataset import take
from simulator.rng import stream
from simulator.types import Batch, Broadcast, LocalTraining, Observation, Update, Upload
from tests.attacks.test_disaggregation import federation
from tests.attacks.test_multi_round import several
from tests.attacks.victims import attack_surface, build, digits, smooth


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def records(count: int = 12, classes: int = 3) -> Batch:
    return Batch(torch.rand(count, 1, 8, 8, generator=generator()), torch.arange(count) % classes)


def test_mean_image_leaves_the_batch_out() -> None:
    everything, index = records(), torch.tensor([2, 7])
    others = torch.stack([image for i, image in enumerate(everything.inputs) if i not in (2, 7)])
    want = image_scores(others.mean(0).expand(2, -1, -1, -1), everything.inputs[index])
    for got, score in zip(floors(everything.inputs[index], everything, index, rng=generator()), want, strict=True):
        assert got["mean_image"].psnr_db == pytest.approx(score.psnr_db, abs=1e-5)
        assert got["mean_image"].ssim == pytest.approx(score.ssim, abs=1e-5)


def test_class_mean_is_of_the_others_of_the_class() -> None:
    everything, index = records(), torch.tensor([2, 5])  # of class 2, as 8 and 11 are
    mean = everything.inputs[[8, 11]].mean(0).expand(2, -1, -1, -1)
    for got, score in zip(
        floors(everything.inputs[index], everything, index, rng=generator()), image_scores(mean, everything.inputs[index]), strict=True
    ):
        assert got["class_mean"].psnr_db == pytest.approx(score.psnr_db, abs=1e-5)


def test_class_without_others_has_the_mean_of_all() -> None:
    everything = replace(records(), labels=torch.tensor([1, *[0] * 11]))
    got = floors(everything.inputs[:1], everything, torch.tensor([0]), rng=generator())[0]
    assert got["class_mean"] == got["mean_image"]


def test_what_the_class_tells_is_no_leakage_of_the_picture() -> None:
    """Scikit-learn's nearest centroid is the independent reference: its centroids are what a label alone gives."""
    data = digits(300)
    index = torch.arange(40)
    rest = NearestCentroid().fit(data.inputs[40:].flatten(1).numpy(), data.labels[40:].numpy())
    known = torch.tensor(rest.centroids_[data.labels[:40].numpy()]).reshape(40, 1, 8, 8).float()
    ours = [floors(data.inputs[i : i + 1], data, index[i : i + 1], rng=generator())[0] for i in range(40)]
    learned = image_scores(known, data.inputs[:40])
    assert np.mean([score.psnr_db - best_floor(own)[1].psnr_db for score, own in zip(learned, ours, strict=True)]) < 0.05
    assert np.mean([own["class_mean"].psnr_db - own["mean_image"].psnr_db for own in ours]) > 1.5


@pytest.mark.parametrize("seed", range(5))
def test_another_victim_is_never_the_victim(seed: int) -> None:
    everything = records(4)
    for own in range(4):
        index = torch.tensor([own])
        score = floors(everything.inputs[index], everything, index, rng=generator(seed))[0]["another_victim"]
        distances = [
            image_scores(everything.inputs[other : other + 1], everything.inputs[index])[0].mse for other in range(4) if other != own
        ]
        assert any(score.mse == pytest.approx(distance) for distance in distances)
        assert score.mse > 1e-3


def test_floors_have_the_freedom_of_assignment() -> None:
    everything, index = records(60), torch.arange(20)
    batch = floors(everything.inputs[index], everything, index, rng=generator(3))
    alone = [floors(everything.inputs[i : i + 1], everything, torch.tensor([i]), rng=generator(3 + i))[0] for i in range(20)]
    for name in ("another_victim", "random_guess"):
        assert sum(score[name].mse for score in batch) < 0.95 * sum(score[name].mse for score in alone)


def test_uniform_noise_scores_what_its_moments_say() -> None:
    everything = Batch(torch.full((30, 3, 32, 32), 0.5), torch.zeros(30, dtype=torch.int64))
    score = floors(everything.inputs[:1], everything, torch.tensor([0]), rng=generator())[0]["random_guess"]
    assert score.mse == pytest.approx(1 / 12, rel=0.05)  # variance of a uniform number


def test_floors_come_from_the_generator_and_need_somebody_else() -> None:
    everything, index = records(), torch.tensor([1])
    assert floors(everything.inputs[index], everything, index, rng=generator(4)) == floors(
        everything.inputs[index], everything, index, rng=generator(4)
    )
    assert floors(everything.inputs[index], everything, index, rng=generator(4)) != floors(
        everything.inputs[index], everything, index, rng=generator(5)
    )
    assert set(floors(everything.inputs[index], everything, index, rng=generator())[0]) | {"shuffled_gradient"} == set(FLOORS)
    with pytest.raises(ValueError, match="must hold more than the batch of 12"):
        floors(everything.inputs, everything, torch.arange(12), rng=generator())


def test_batch_larger_than_the_rest_draws_others_again() -> None:
    everything = records(5)
    assert len(floors(everything.inputs[:4], everything, torch.arange(4), rng=generator())) == 4


def test_best_floor_is_the_highest_psnr() -> None:
    scores = {"a": ImageScores(10.0, 0.9, 0.1), "b": ImageScores(12.0, 0.1, 0.06), "c": ImageScores(11.0, 0.5, 0.08)}
    assert best_floor(scores) == ("b", scores["b"])


def test_failed_floor_scores_as_mid_gray() -> None:
    truth = records(2).inputs
    assert floor_scores(None, truth) == floor_scores(torch.full_like(truth, torch.nan), truth)
    assert floor_scores(None, truth) == image_scores(torch.full_like(truth, 0.5), truth)


def test_shuffled_keeps_values_and_moves_them() -> None:
    tensors = {"weight": torch.randn(5, 7, generator=generator()), "bias": torch.randn(9, generator=generator(1))}
    buffers = {"running_mean": torch.randn(16, generator=generator(3)), "num_batches_tracked": torch.tensor(7)}
    broadcast = Broadcast(1, {"weight": torch.zeros(5, 7), "bias": torch.zeros(9)}, {}, LocalTraining())
    view = Observation(broadcast, (Upload(frozenset({3}), Update("gradient", tensors), buffers, 4),))
    other = shuffled(view, generator(2))
    for name, tensor in tensors.items():
        moved = other.upload.update.tensors[name]
        assert moved.shape == tensor.shape
        assert not torch.equal(moved, tensor)
        assert torch.equal(moved.flatten().sort().values, tensor.flatten().sort().values)
    moved = other.upload.buffers["running_mean"]
    assert not torch.equal(moved, buffers["running_mean"])
    assert torch.equal(moved.sort().values, buffers["running_mean"].sort().values)
    assert other.upload.buffers["num_batches_tracked"] == 7
    assert other.broadcast is view.broadcast
    assert (other.upload.senders, other.upload.num_examples, other.upload.update.kind) == (frozenset({3}), 4, "gradient")
    assert torch.equal(view.upload.update.tensors["weight"], tensors["weight"])
    again = shuffled(view, generator(2)).upload.update.tensors
    assert all(torch.equal(again[name], other.upload.update.tensors[name]) for name in tensors)


def test_shuffle_does_not_depend_on_the_order_of_tensors() -> None:
    tensors = {"a": torch.arange(50.0), "b": torch.arange(50.0)}
    updates = [Update("gradient", tensors), Update("gradient", dict(reversed(tensors.items())))]
    views = [Observation(Broadcast(1, {}, {}, LocalTraining()), (Upload(frozenset({3}), update, {}, 4),)) for update in updates]
    one, other = (shuffled(view, generator(2)).upload.update.tensors for view in views)
    assert all(torch.equal(one[name], other[name]) for name in tensors)


def test_floor_of_single_labels_is_the_most_frequent_class() -> None:
    batches = [[1], [0], [1], [2]]
    assert label_floor(batches, matched=True) == pytest.approx(0.5)
    assert label_floor(batches, matched=False) == pytest.approx(0.5)
    assert label_floor([[3], [3]], matched=True) == pytest.approx(1.0)


def test_floor_of_matched_labels_is_the_best_guess_without_the_upload() -> None:
    batch, rng = [0, 0, 0, 1, 1, 1, 2, 2], np.random.default_rng(0)
    draws = [Counter(rng.choice(batch, size=8).tolist()) for _ in range(4000)]  # uploads of the same class frequencies
    guesses = [Counter({0: a, 1: b, 2: 8 - a - b}) for a in range(9) for b in range(9 - a)]
    best = max(np.mean([(guess & truth).total() for truth in draws]) / 8 for guess in guesses)
    assert label_floor([batch, batch], matched=True) == pytest.approx(best, abs=0.01)
    assert best > 0.7 > label_floor([batch, batch], matched=False) == 3 / 8


QUICK = {
    "steps": 15, "evaluations": 15, "iterations": 5, "latent_steps": 5, "feature_steps": 5, "pixel_steps": 5, "restarts": 1,
    "seconds": 0.15, "learning_seconds": 0.15,
}  # fmt: skip
"""Settings that make every attack short: without information no budget helps."""

VICTIMS = 6


Surface = tuple[Observation, Knowledge]


def informed(number: int) -> Surface:
    """With public records, and candidates whose order says nothing."""
    view, knowledge = attack_surface(smooth((1, 8, 8)), [digits(1, offset=3 * number)])
    candidates = take(digits(80), 3 * number + torch.randperm(50, generator=generator(number)))
    return view, replace(knowledge, public=digits(200, offset=400), candidates=candidates)


def lone(model: Callable[[], nn.Module], records: int, recipe: LocalTraining | None = None) -> tuple[Callable[[int], Surface], int]:
    return lambda number: attack_surface(model(), [digits(records, offset=3 * number)], recipe), records


def sums(model: nn.Module, cohorts: list[tuple[int, ...]]) -> tuple[Callable[[int], Surface], int]:
    """Sums over three clients of one digit each, in several rounds of which the first is attacked."""
    return lambda number: federation(cohorts, 1e-3, model, [digits(1, offset=3 * number + place) for place in range(3)]), 3


WORLDS: dict[str, tuple[Callable[[int], Surface], int]] = {
    "smooth": lone(lambda: smooth((1, 8, 8)), 1),
    "public records and candidates": (informed, 1),
    "kinks": lone(lambda: build("mlp", (1, 8, 8), hidden=(64,)), 2),
    "convolutions": lone(lambda: build("cnn", (1, 8, 8), width=8, hidden=64), 2),
    "tokens": lone(lambda: build("vit", (1, 8, 8)), 1),
    "delta of two steps": lone(lambda: smooth((1, 8, 8)), 2, LocalTraining(algorithm="fedavg", batch_size=1, learning_rate=0.1)),
    "rounds of one record": (lambda number: several(3, digits(1, offset=3 * number), lambda: smooth((1, 8, 8))), 1),
    "sums over rounds": sums(smooth((1, 8, 8)), [(0, 1, 2), (0, 1)]),
    "sums over rounds, kinks": sums(build("mlp", (1, 8, 8), hidden=(64,)), [(0, 1, 2), (0, 1), (0, 2), (1, 2)]),
}
"""A surface by the number of its victim, and how many digits are behind it: each attack is asked in the first one that it takes."""

ACTIVE = ("imprint", "trap_weights")
"""Attacks that need a tampered model: tests/attacks/test_active.py asks them the same."""


@cache
def victims(world: str = "smooth") -> list[tuple[Observation, Knowledge, torch.Tensor]]:
    """Some digits each, under one initial model, with the images behind the update."""
    surface, count = WORLDS[world]
    return [(*surface(number), digits(count, offset=3 * number).inputs) for number in range(VICTIMS)]


@cache
def best_floor_db(number: int, records: int = 1) -> float:
    """What the best guess without the update of this victim gets, the mean over its records."""
    truth, places = digits(records, offset=3 * number).inputs, 3 * number + torch.arange(records)
    return fmean(best_floor(one)[1].psnr_db for one in floors(truth, digits(300), places, rng=generator(number)))


def without_information(kind: str, of: list[tuple[Observation, Knowledge, torch.Tensor]], number: int) -> Surface:
    """The victim's surface with nothing of its own in any round."""
    (view, knowledge, _), (other, theirs, _) = of[number], of[(number + 1) % len(of)]
    if kind == "foreign":
        return other, replace(knowledge, history=theirs.history)

    def emptied(seen: Observation) -> Observation:
        if kind == "shuffled":
            return shuffled(seen, stream(number, "shuffle", seen.broadcast.round))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in seen.upload.update.tensors.items()}
        return replace(seen, uploads=(replace(seen.upload, update=Update(seen.upload.update.kind, zeros)),))

    return emptied(view), replace(knowledge, history=tuple(map(emptied, knowledge.history)))


LONG = ("tuned_inverting_gradients", "gifd")


@pytest.mark.parametrize("kind", ["zeroed", "shuffled", "foreign"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in lookup.names("attacks")])
def test_update_without_information_gives_no_more_than_the_floor_and_a_proof_of_its_own_record_alone(name: str, kind: str) -> None:
    cls = lookup.get("attacks", name)
    attack = cls(**{field.name: QUICK[field.name] for field in fields(cls) if field.name in QUICK})
    of = next((victims(world) for world in WORLDS if attack.supports(*victims(world)[0][:2]) is None), None)
    assert (of is None) == (name in ACTIVE)
    gains, answers = [], 0
    for number, (*_, truth) in enumerate(of or ()):
        view, knowledge = without_information(kind, of or [], number)
        if attack.supports(view, knowledge) is not None:  # such as an update of zeros
            continue
        answers += 1
        guess = attack(view, knowledge, rng=stream(number, "attack"))
        if kind != "foreign":
            assert not any(guess.certificate), "a proof about an update that holds no record"
        elif any(guess.certificate) and guess.inputs is not None:  # a proof about the record that was really behind the update
            proven = guess.inputs[[bool(each) for each in guess.certificate]]
            apart = (proven[:, None] - (of or [])[(number + 1) % VICTIMS][2][None]).square().flatten(2).mean(2)
            assert float(apart.min(1).values.max()) < 1e-6
        if guess.inputs is not None:
            found = [score.psnr_db for score in floor_scores(guess.inputs, truth)]
            gains.append(fmean(found) - best_floor_db(number, len(truth)))
    assert answers or kind == "zeroed" or of is None
    if gains:
        low = np.mean(gains) - stats.t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / np.sqrt(len(gains))
        assert low <= 0, gains
