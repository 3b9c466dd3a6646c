"""What heuristics are worth against gradient matching that does not know them, and that does: figures of the defenses' pages.

Photos in 16×16, ConvNet of width 8 at its initial weights, FedSGD with batches of one, labels disclosed; inverting_gradients for 400
steps, and the same attack with the distance of updates adapted to the defense. ``pytest --slow -s`` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from attacks._matching.distances import Distance, angle
from attacks._matching.objective import Setting
from attacks.update.inverting_gradients import InvertingGradients
from clients.local import local_upload
from clients.private import private_records, splits
from defenses.client.censor import Censor
from defenses.client.outpost import Outpost
from defenses.client.qsgd import QSGD
from defenses.client.random_pruning import RandomPruning
from defenses.client.sign_sgd import SignSGD
from defenses.client.soteria import Soteria
from defenses.client.top_k import TopK
from experiments.disclose import architecture, disclose
from simulator.adversary import Knowledge, ThreatModel
from simulator.aggregate import weighted_mean
from simulator.data.digits import Digits
from simulator.data.photos import Photos
from simulator.defense import Defense
from simulator.mechanisms.outpost import risks
from simulator.mechanisms.qsgd import in_buckets
from simulator.models.conv import ConvNet
from simulator.models.mlp import MLP
from simulator.network import network, tensors
from simulator.rng import stream
from simulator.training import per_example_gradients
from simulator.types import Batch, Broadcast, LocalTraining, Observation
from simulator.world import Federation, World
from tests.attacks.victims import psnr_db

pytestmark = pytest.mark.slow
VICTIMS, STEPS = 8, 400


@dataclass(frozen=True)
class Adapted(InvertingGradients):
    """Inverting gradients with another distance."""

    by: Distance = angle

    def setting(self) -> Setting:
        return replace(super().setting(), distance=self.by)


def on_support(trial: Tensor, target: Tensor, spans: object) -> Tensor:
    """The angle over the coordinates that were uploaded (A1, A3)."""
    return angle(torch.where(target != 0, trial, 0.0), target)


def within_a_step(view: Observation) -> Distance:
    """How far the trial is from the interval that QSGD rounds from, in steps, and a little how far from its middle (A2).

    The step of a bucket is its smallest magnitude that is not 0.
    """
    each = []
    for tensor in view.upload.update.tensors.values():
        rows = in_buckets(tensor, 512).abs()
        least = torch.where(rows > 0, rows, torch.inf).amin(1, keepdim=True).expand_as(rows).flatten()[: tensor.numel()]
        each.append(torch.where(least.isinf(), 1e-6, least))
    step = torch.cat(each)

    def distance(trial: Tensor, target: Tensor, spans: object) -> Tensor:
        away = (trial - target).abs() / step
        return (((away - 1).clamp(min=0).square() + 0.3 * away.square()).mean() + 1e-9).sqrt()

    return distance


def of_soft_signs(trial: Tensor, target: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """The angle between the signs and the trial's, tensor by tensor in units of its spread (A1)."""
    soft = [torch.tanh(trial[a:b] / (trial[a:b].square().mean().sqrt() + 1e-12)) for a, b in spans]
    return angle(torch.cat(soft), target.sign())


def of_what_censor_leaks(trial: Tensor, target: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """The norms of the tensors, and how far the trial is from orthogonal to what was uploaded (A1)."""
    total = trial.new_zeros(())
    for a, b in spans:
        norm, seen = (trial[a:b].square().sum() + 1e-12).sqrt(), target[a:b].norm()
        safe = torch.where(seen == 0, 1.0, seen)
        total = total + ((norm / safe - 1).square() + (trial[a:b] @ target[a:b] / (norm * safe)).square()) * (seen > 0)
    return (total / len(spans) + 1e-9).sqrt()


def under_noise(view: Observation) -> Distance:
    """The angle over the support, each tensor in units of its size and of Outpost's noise, which the broadcast gives away (A2)."""
    update, risk = view.upload.update.tensors, risks(view.broadcast.parameters)
    each = [torch.full((t.numel(),), 1 / float(t.square().mean().sqrt() + 0.8 * risk[name])) for name, t in update.items()]
    weight = torch.cat(each)
    return lambda trial, target, spans: angle(torch.where(target != 0, trial, 0.0) * weight, target * weight)


@cache
def victims(*defenses: Defense) -> list[tuple[Observation, Knowledge, Batch]]:
    """The uploads of as many clients in round 1, with what is told of them and the truth."""
    of = World(
        data=Photos(size=16),
        model=ConvNet(8),
        federation=Federation(clients=40),
        training=LocalTraining(batch_size=1),
        defenses=defenses,
        seed=1,
        secret="of the defense",
    )
    parts, family = splits(of), network(of.architecture, Photos(size=16).load().schema, of.training, of.seed)
    model, broadcast = architecture(of, parts), Broadcast(1, *tensors(family), of.training)
    found = []
    for client in range(VICTIMS):
        upload, truth = local_upload(of, family, broadcast, client), private_records(of, client, 1)
        found.append((Observation(broadcast, (upload,)), disclose(ThreatModel(labels="exact"), of, parts, truth, upload, model), truth))
    return found


Adapter = Callable[[Observation], Distance]
"""The distance with which one upload is matched."""


def always(distance: Distance) -> Adapter:
    """The same for every upload."""
    return lambda view: distance


def leak(by: Adapter, *defenses: Defense) -> float:
    """Mean PSNR in dB over the victims."""
    scores, groups = [], dict[Distance, list[int]]()
    for place, (view, _, _) in enumerate(victims(*defenses)):
        groups.setdefault(by(view), []).append(place)
    for distance, places in groups.items():
        views, knowledge, truths = zip(*(victims(*defenses)[place] for place in places), strict=True)
        rngs = [stream(0, "attack", place) for place in places]
        guesses = Adapted(steps=STEPS, by=distance).many(views, knowledge, rngs=rngs)
        scores += [psnr_db(guess.inputs, truth.inputs) for guess, truth in zip(guesses, truths, strict=True)]
    return sum(scores) / len(scores)


@cache
def undefended() -> float:
    return leak(always(angle))


@cache
def floor() -> float:
    """Mean PSNR of the mean picture."""
    mean = Photos(size=16).load().records.inputs.mean(0, keepdim=True)
    return sum(psnr_db(mean, truth.inputs) for _, _, truth in victims()) / VICTIMS


def test_the_undefended_attack_beats_the_mean_picture() -> None:
    print(f"\nnone {undefended():.1f} dB, mean picture {floor():.1f} dB")
    assert undefended() > floor() + 5


@pytest.mark.parametrize(
    ("defense", "by", "regained"),
    [
        (TopK(0.9), always(on_support), 0.8),
        (TopK(0.99), always(on_support), 0.4),
        (TopK(0.999), always(on_support), 0.0),
        (RandomPruning(0.9), always(on_support), 0.5),
        (SignSGD(), always(of_soft_signs), -0.5),
        (Soteria(0.1), always(on_support), 0.9),
        (Soteria(0.4), always(on_support), 0.9),
        (Soteria(0.8), always(on_support), 0.9),
        (Outpost(decay=0.0), under_noise, -9.0),
    ],
    ids=lambda value: str(value) if isinstance(value, Defense | float) else "",
)
def test_knowing_the_defense_regains_this_share_of_what_it_took(defense: Defense, by: Adapter, regained: float) -> None:
    """As a share of the undefended attack's lead over the mean picture."""
    blind, adapted = leak(always(angle), defense), leak(by, defense)
    print(f"\n{defense}: {blind:.1f} dB, adapted {adapted:.1f} dB; none {undefended():.1f}, mean picture {floor():.1f}")
    assert adapted > blind
    assert (adapted - floor()) / (undefended() - floor()) > regained


@pytest.mark.parametrize(("levels", "left"), [(15, 0.4), (3, 0.1)])
def test_qsgd_leaves_this_share_of_the_leak(levels: int, left: float) -> None:
    """At many levels plain matching suffices; at few the known size of a step helps."""
    blind, adapted = leak(always(angle), QSGD(levels)), leak(within_a_step, QSGD(levels))
    print(f"\nqsgd {levels}: {blind:.1f} dB, adapted {adapted:.1f} dB; none {undefended():.1f}, mean picture {floor():.1f}")
    assert (max(blind, adapted) - floor()) / (undefended() - floor()) > left
    assert levels > 3 or adapted > blind


def test_censor_hides_what_it_does_not_train_on() -> None:
    blind, adapted = leak(always(angle), Censor()), leak(always(of_what_censor_leaks), Censor())
    print(f"\ncensor: {blind:.1f} dB, adapted {adapted:.1f} dB; none {undefended():.1f}, mean picture {floor():.1f}")
    assert max(blind, adapted) < floor() + 1


def test_censor_tells_which_of_a_hundred_candidates_it_hides() -> None:
    """Every tensor's norm is that of the true gradient: the candidate whose norms agree is the record."""
    hits = 0
    for view, knowledge, truth in victims(Censor()):
        every = Photos(size=16).load().records
        places = torch.arange(7, len(every), len(every) // 99)[:99]
        inputs, labels = torch.cat([every.inputs[places], truth.inputs]), torch.cat([every.labels[places], truth.labels])
        each = per_example_gradients(knowledge.model, view.broadcast.parameters, view.broadcast.buffers, Batch(inputs, labels))
        gaps = sum(
            (each[name].flatten(1).norm(dim=1) / tensor.norm() - 1).abs()
            for name, tensor in view.upload.update.tensors.items()
            if tensor.numel() > 1
        )
        assert isinstance(gaps, torch.Tensor)
        hits += int(gaps.argmin() == 99 or torch.equal(inputs[gaps.argmin()], truth.inputs[0]))
    print(f"\ncensor: {hits} of {VICTIMS} records told from {len(inputs) - 1} others")
    assert hits == VICTIMS


def accuracy(*defenses: Defense, seed: int, rounds: int = 15) -> float:
    """On the test set after a whole training on digits: FedAvg, 8 clients, 2 local epochs."""
    of = World(
        data=Digits(),
        model=MLP((64,)),
        federation=Federation(clients=8, rounds=rounds),
        training=LocalTraining(algorithm="fedavg", batch_size=32, epochs=2, learning_rate=0.1),
        defenses=defenses,
        seed=seed,
    )
    parts = splits(of)
    model = network(of.architecture, parts.schema, of.training, of.seed)
    parameters, buffers = tensors(model)
    for round in range(1, rounds + 1):
        uploads = [local_upload(of, model, Broadcast(round, parameters, buffers, of.training), client) for client in range(8)]
        mean = weighted_mean([upload.update.tensors for upload in uploads], [upload.num_examples for upload in uploads])
        parameters = {name: tensor + mean[name] for name, tensor in parameters.items()}
    logits = torch.func.functional_call(model, {**parameters, **buffers}, (parts.test.inputs,))
    return float((logits.argmax(1) == parts.test.labels).float().mean())


def test_censor_trains_nothing_until_it_stops() -> None:
    for seed in range(3):
        each = accuracy(seed=seed), accuracy(Censor(), seed=seed), accuracy(Censor(rounds=5), seed=seed)
        print(f"\naccuracy without {each[0]:.3f}, with censor {each[1]:.3f}, with censor in 5 of 15 rounds {each[2]:.3f}")
        assert each[0] > 0.9
        assert each[1] < 0.25
        assert each[2] > 0.85
