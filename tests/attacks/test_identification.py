"""The guess among candidates: against the success that the bound's own experiment has, and under each mechanism."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binom, norm
from torch import Tensor

from attacks._identify.choice import Evidence, surprises
from attacks._matching.defended import Defended
from attacks.update.candidate_identification import CandidateIdentification
from simulator import lookup
from simulator.adversary import Knowledge
from simulator.mechanisms.censor import orthogonal_update
from simulator.mechanisms.qsgd import drawn_uniform, qsgd
from simulator.mechanisms.random_pruning import drawn_masks, masked
from simulator.mechanisms.sign import signs
from simulator.mechanisms.top_k import top_k
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation, Schema, Tensors, Update
from tests.attacks.victims import CLASSES, attack_surface, build, digits

SHAPE = (1, 8, 8)
POOL = digits(40)


def orthonormal(candidates: int, mu: float) -> float:
    """∫φ(x − μ)Φ(x)^(N−1)dx: success of the argmax over orthonormal candidates."""
    return float(quad(lambda x: norm.pdf(x - mu) * norm.cdf(x) ** (candidates - 1), -12, 12 + mu, limit=200)[0])


@pytest.mark.parametrize(("candidates", "mu", "expected"), [(10, 1.0, 0.341), (10, 2.0, 0.674), (100, 2.0, 0.323), (100, 4.0, 0.915)])
def test_success_is_that_of_the_likelihood_ratio(candidates: int, mu: float, expected: float) -> None:
    """1000 trials with random unit gradients, which are orthonormal but for 1/√2000: within four standard errors, below the ceiling."""
    assert orthonormal(candidates, mu) == pytest.approx(expected, abs=1e-3)
    rng, trials, hits = stream(0, "rero", candidates, mu), 1000, 0
    updates = torch.randn(candidates, 2000, generator=rng)
    updates = updates / updates.norm(dim=1, keepdim=True)
    for _ in range(trials):
        true = int(torch.randint(candidates, (1,), generator=rng))
        seen = Evidence(updates[true] + torch.randn(2000, generator=rng) / mu, updates, ((0, 2000),), Defended(sigma=(1 / mu,)))
        hits += int(seen.surprise(torch.arange(candidates)[:, None]).argmin()) == true
    error = math.sqrt(expected * (1 - expected) / trials)
    assert abs(hits / trials - expected) < 4 * error
    ceiling = float(norm.cdf(norm.ppf(1 / candidates) + mu))
    assert binom.cdf(hits, trials, ceiling) < 1 - 1e-6


def test_surprise_is_the_log_likelihood_ratio() -> None:
    rng = stream(1)
    updates, seen = torch.randn(5, 50, generator=rng).double(), torch.randn(50, generator=rng).double()
    ratio = (updates @ seen - updates.square().sum(1) / 2) / 0.3**2
    found = surprises(updates, seen, ((0, 50),), Defended(sigma=(0.3,)))
    assert torch.allclose(found - found[0], ratio[0] - ratio)


def surface(batch: Batch, change: object = None, *defenses: tuple[str, dict[str, object]]) -> tuple[Observation, Knowledge]:
    view, knowledge = attack_surface(build("convnet", SHAPE, width=4), [batch])
    if change is not None:
        update = Update("gradient", change(view.upload.update.tensors))  # type: ignore[operator]
        view = replace(view, uploads=(replace(view.upload, update=update),))
    return view, replace(knowledge, candidates=POOL, defenses=defenses)


def hits(view: Observation, knowledge: Knowledge, batch: Batch) -> int:
    found = CandidateIdentification()(view, knowledge, rng=stream(0))
    assert found.inputs is not None
    return int((found.inputs[:, None] == batch.inputs[None]).flatten(2).all(2).any(1).sum())


def rows(*places: int) -> Batch:
    return Batch(POOL.inputs[list(places)], POOL.labels[list(places)])


MECHANISMS = {
    "top_k": (lambda u: top_k(u, 0.99), {"pruned": 0.99}),
    "random_pruning": (lambda u: masked(u, drawn_masks(u, 0.99, stream(5))), {"pruned": 0.99, "masks": "round", "rescaled": False}),
    "sign_sgd": (signs, {"scale": "none"}),
    "qsgd": (lambda u: qsgd(u, drawn_uniform(u, stream(5)), levels=3, bucket=64), {"levels": 3, "bucket": 64}),
    "censor": (
        lambda u: orthogonal_update({n: torch.randn(t.shape, generator=stream(5, n)) for n, t in u.items()}, u),
        {"trials": 1, "probe": 1e-4, "rounds": 0},
    ),
    "clip": (lambda u: {n: 0.01 * t for n, t in u.items()}, {"clip_norm": 0.01}),
}


@pytest.mark.parametrize("name", sorted(MECHANISMS))
def test_what_looks_destroyed_is_still_identified(name: str) -> None:
    change, settings = MECHANISMS[name]
    found = sum(hits(*surface(rows(i), change, (name, settings)), rows(i)) for i in range(0, 40, 5))
    assert found == 8


def test_small_noise_stops_pictures_but_not_identification() -> None:
    """Noise as large as the gradient in norm, one record of 40."""
    found = 0
    for number in range(0, 40, 5):
        rng = stream(number, "noise")
        view, _ = surface(rows(number))
        size = torch.cat([tensor.flatten() for tensor in view.upload.update.tensors.values()])
        sigma = float(size.norm()) / math.sqrt(len(size))

        def noised(update: Tensors, sigma: float = sigma, rng: torch.Generator = rng) -> dict[str, Tensor]:
            return {name: tensor + sigma * torch.randn(tensor.shape, generator=rng) for name, tensor in update.items()}

        found += hits(*surface(rows(number), noised, ("gaussian_noise", {"sigma": sigma})), rows(number))
    assert found >= 7


def test_a_batch_is_named_whole() -> None:
    """Without a defense all eight of eight, of an aggregate over two clients, too."""
    batch = rows(1, 5, 8, 13, 21, 30, 33, 39)
    assert hits(*surface(batch), batch) == 8
    view, knowledge = attack_surface(build("mlp", SHAPE), [rows(1, 5, 8), rows(13, 21, 30)])
    assert hits(view, replace(knowledge, candidates=POOL), rows(1, 5, 8, 13, 21, 30)) == 6


def test_several_local_steps_and_rounds() -> None:
    recipe = LocalTraining(algorithm="fedavg", batch_size=1, epochs=3, learning_rate=0.05)
    view, knowledge = attack_surface(build("mlp", SHAPE), [rows(7)], recipe)
    assert hits(view, replace(knowledge, candidates=POOL), rows(7)) == 1


def test_noise_inside_the_model_is_averaged_over() -> None:
    model = lookup.get("models", "precode")(lookup.get("models", "convnet")(width=4), 16).build(Schema(SHAPE, CLASSES), stream(0, "model"))
    for batch, least in ((rows(3), 1), (rows(3, 17), 1)):  # of one record the noise is read off; of two it is averaged over
        view, knowledge = attack_surface(model, [batch])
        told = replace(knowledge, candidates=POOL, defenses=(("precode", {"k": 16, "beta": 1e-3}),))
        assert hits(view, told, batch) >= least


def test_labels_come_in_the_order_that_was_told() -> None:
    batch = rows(3, 17, 4)
    view, knowledge = surface(batch)
    found = CandidateIdentification()(view, replace(knowledge, labels=batch.labels), rng=stream(0))
    assert torch.equal(found.labels, batch.labels)
    assert found.inputs is not None
    assert torch.equal(found.inputs, batch.inputs)


def test_without_candidates_there_is_nothing_to_name() -> None:
    view, knowledge = surface(rows(1, 2))
    for pool in (None, rows(1)):
        assert "candidates" in str(CandidateIdentification().supports(view, replace(knowledge, candidates=pool)))
