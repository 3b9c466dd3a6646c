"""The guess among candidates: against the success that the bound's own experiment has, and under each mechanism."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binom, multivariate_normal, norm
from torch import Tensor

from attacks._identify.alone import path
from attacks._identify.choice import Evidence, by_candidate, named, surprises
from attacks._identify.mixture import filtered
from attacks._matching.defended import Defended
from attacks._matching.stack import known_stack
from attacks.update import candidate_identification
from attacks.update.candidate_identification import CandidateIdentification, clipping_of
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


def test_several_local_steps() -> None:
    recipe = LocalTraining(algorithm="fedavg", batch_size=1, epochs=3, learning_rate=0.05)
    view, knowledge = attack_surface(build("mlp", SHAPE), [rows(7)], recipe)
    assert hits(view, replace(knowledge, candidates=POOL), rows(7)) == 1


def test_records_of_several_local_steps_are_named_by_their_gradients_along_the_clients_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight steps of one record each, far enough that what a record would have caused by itself says little: 23 records of 24."""
    recipe, counts = LocalTraining(algorithm="fedavg", batch_size=1, steps=8, learning_rate=0.05), []
    for way in (path, lambda *_: ()):
        monkeypatch.setattr(candidate_identification, "path", way)
        found = 0
        for places in ((1, 5, 8, 13, 21, 30, 33, 39), (0, 2, 4, 6, 7, 9, 11, 12), (3, 10, 14, 15, 16, 17, 18, 19)):
            view, knowledge = attack_surface(build("cnn", SHAPE, width=8, hidden=64), [rows(*places)], recipe)
            found += hits(view, replace(knowledge, candidates=POOL), rows(*places))
        counts.append(found)
    print(counts)
    assert counts[0] >= 22
    assert counts[1] < 20


def test_a_delta_that_is_no_way_misleads_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs alone as the client's path: no fewer are named than without it."""
    recipe = LocalTraining(algorithm="fedavg", batch_size=1, steps=4, learning_rate=0.01)
    batch = rows(1, 5, 8, 13)
    view, knowledge = attack_surface(build("cnn", SHAPE, width=8, hidden=64), [batch], recipe)
    update = Update("delta", signs(view.upload.update.tensors))
    seen = replace(view, uploads=(replace(view.upload, update=update),))
    told = replace(knowledge, candidates=POOL, defenses=(("sign_sgd", {"scale": "none"}),))
    led = hits(seen, told, batch)
    monkeypatch.setattr(candidate_identification, "path", lambda *_: ())
    assert led >= hits(seen, told, batch) > 0


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


@pytest.mark.parametrize("defense", ["central_dp", "adaptive_clipping", "distributed_dp", "simulated_enclave", "client_dp"])
def test_a_sum_is_compared_with_clipped_senders_whatever_clipped_them(defense: str) -> None:
    view, knowledge = attack_surface(build("mlp", SHAPE), [rows(1), rows(13)])
    told = replace(knowledge, defenses=((defense, {"clip_norm": 0.01, "noise_multiplier": 0.1}),))
    limited = replace(view, broadcast=replace(view.broadcast, buffers={**view.broadcast.buffers, "adaptive_clip_norm": torch.tensor(0.01)}))
    assert clipping_of(limited, told, known_stack(limited, told).distance.clip_norm) == (2, pytest.approx(0.01))
    assert clipping_of(view, knowledge, math.inf) == (1, math.inf)


def test_a_set_of_candidates_has_the_labels_that_were_told() -> None:
    """Far beyond its noise, where the likeliest set of any labels is another one; too few candidates of a class are no reason to stop."""
    batch, seed = rows(1, 5, 8), stream(7)
    view, knowledge = surface(batch, lambda u: {name: tensor + 0.5 * torch.randn(tensor.shape, generator=seed) for name, tensor in u.items()})
    told = replace(knowledge, defenses=(("gaussian_noise", {"sigma": 0.5}),))
    counts = torch.bincount(batch.labels, minlength=10)
    free = CandidateIdentification()(view, told, rng=stream(0))
    assert not torch.equal(torch.bincount(free.labels, minlength=10), counts)
    for known in (replace(told, label_counts=counts), replace(told, labels=batch.labels)):
        found = CandidateIdentification()(view, known, rng=stream(0))
        assert found.inputs is not None
        named_labels = [int(POOL.labels[(POOL.inputs == image).flatten(1).all(1)][0]) for image in found.inputs]
        assert sorted(named_labels) == sorted(batch.labels.tolist())
    few = Batch(POOL.inputs[POOL.labels != int(batch.labels[0])], POOL.labels[POOL.labels != int(batch.labels[0])])
    assert len(CandidateIdentification()(view, replace(told, candidates=few, label_counts=counts), rng=stream(0)).labels) == 3


def test_without_candidates_there_is_nothing_to_name() -> None:
    view, knowledge = surface(rows(1, 2))
    for pool in (None, rows(1)):
        assert "candidates" in str(CandidateIdentification().supports(view, replace(knowledge, candidates=pool)))


def hidden(pruned: str, noise: float, truth: Batch, seed: int) -> tuple[Observation, Knowledge]:
    rng = stream(seed, pruned)
    kept = {"top_k": lambda u: top_k(u, 0.9), "random_pruning": lambda u: masked(u, drawn_masks(u, 0.9, rng))}[pruned]
    settings: dict[str, object] = {"pruned": 0.9, "rescaled": False} if pruned == "random_pruning" else {"pruned": 0.9}
    return surface(
        truth,
        lambda u: {name: tensor + noise * torch.randn(tensor.shape, generator=rng) for name, tensor in kept(u).items()},
        (pruned, settings),
        ("gaussian_noise", {"sigma": noise}),
    )


def test_noise_that_hides_what_was_left_out_is_a_mixture_of_two() -> None:
    """−log Σ over a coordinate's being kept or not of its Gaussian density, up to a constant; and it names more than one that takes it for noise alone."""
    view, knowledge = hidden("random_pruning", 0.3, rows(0), 0)
    distance = known_stack(view, knowledge).distance
    assert (distance.dropped, distance.masked) == (0.9, False)
    rng = stream(2)
    seen, trial = torch.randn(2, 50, generator=rng).double()
    wanted = -sum(math.log(0.1 * norm.pdf(y, u, 0.3) + 0.9 * norm.pdf(y, 0, 0.3)) for y, u in zip(seen, trial, strict=True))
    constant = 50 * math.log(0.3 * math.sqrt(2 * math.pi))
    assert float(distance(trial, seen, ((0, 50),))) + constant == pytest.approx(wanted)
    knowing = ignoring = 0
    for number in range(0, 40, 4):
        view, knowledge = hidden("random_pruning", 0.002, rows(number), number)
        knowing += hits(view, knowledge, rows(number))
        ignoring += hits(view, replace(knowledge, defenses=knowledge.defenses[1:]), rows(number))
    assert knowing >= ignoring + 6


def test_noise_after_top_k_is_compared_with_what_top_k_leaves_of_a_candidate() -> None:
    view, knowledge = hidden("top_k", 0.01, rows(3), 0)
    distance = known_stack(view, knowledge).distance
    assert (distance.pruned, distance.masked) == (0.9, False)
    assert hits(view, knowledge, rows(3)) == 1


def test_each_senders_update_is_clipped_and_not_their_mean() -> None:
    rng = stream(3)
    updates = torch.randn(12, 40, generator=rng).double() * torch.linspace(0.2, 5, 12, dtype=torch.float64)[:, None]

    def sent(records: list[int]) -> Tensor:
        own = updates[records].mean(0)
        return own * min(1.0, 2.0 / float(own.norm()))

    whole = (sent([1, 8]) + sent([11, 3])) / 2
    seen = Evidence(whole, updates, ((0, 40),), Defended(sigma=(1.0,)), senders=2, limit=2.0)
    chosen = torch.tensor([1, 8, 11, 3])
    assert float(seen.surprise(chosen[None])) == pytest.approx(0, abs=1e-12)
    others = torch.tensor([0, 8, 5])
    whole_sets = chosen.repeat(3, 1).index_put((torch.arange(3), torch.tensor(1)), others)
    assert torch.allclose(seen.exchanged(chosen, 1, others), seen.surprise(whole_sets))
    alone = torch.stack([sent([i]) for i in (1, 8, 11, 3)]).mean(0)
    found, surprise = named([Evidence(alone, updates, ((0, 40),), Defended(sigma=(1.0,)), senders=4, limit=2.0)], torch.arange(12), 4)
    assert sorted(found.tolist()) == [1, 3, 8, 11]
    assert surprise == pytest.approx(0, abs=1e-12)


def test_likelihoods_of_versions_are_averaged_and_angles_are_not() -> None:
    surprise, owner = torch.tensor([1.0, 3.0, 0.5, math.inf]).double(), torch.tensor([0, 0, 1, 1])
    wanted = [-math.log((math.exp(-1) + math.exp(-3)) / 2), 0.5 + math.log(2)]
    assert by_candidate(surprise, owner, True).tolist() == pytest.approx(wanted)
    assert by_candidate(surprise, owner, False).tolist() == [1.0, 0.5]


def test_a_small_budget_names_the_same() -> None:
    batch = rows(1, 5, 8, 13)
    view, knowledge = surface(batch)
    size = sum(tensor.numel() for tensor in view.upload.update.tensors.values())
    assert 40 * size * 4 > 2**20 // 2
    found = CandidateIdentification(memory_mb=1)(view, knowledge, rng=stream(0))
    assert found.inputs is not None
    assert int((found.inputs[:, None] == batch.inputs[None]).flatten(2).all(2).any(1).sum()) == 4


def test_without_a_mask_the_filter_is_the_gaussian_density_and_bounds_count() -> None:
    rng = stream(4)
    root = torch.randn(5, 5, generator=rng).double()
    cover, mean, at = root @ root.T + torch.eye(5), torch.rand(5, generator=rng).double(), torch.rand(5, generator=rng).double()
    error, most = torch.full((5,), 1e-6, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    found = filtered(at.view(1, 1, 5), mean[None], cover[None], most, error)
    assert float(found) == pytest.approx(multivariate_normal(mean.numpy(), cover.numpy()).logpdf(at.numpy()))
    assert float(filtered(at.view(1, 1, 5), mean[None], cover[None], at.max().view(1, 1) - 0.1, error)) < float(found) - 1e4


def test_a_masks_signs_are_summed_over_pixel_by_pixel() -> None:
    """Independent pixels: the product of the mean densities; two dependent ones: near to the sum over the four signs."""
    mean, spread = torch.tensor([0.3, 0.6]).double(), torch.tensor([[0.04, 0.03], [0.03, 0.05]]).double()
    either = torch.tensor([[0.2, 0.45], [0.8, 0.55]]).double()
    error, most = torch.full((2,), 1e-6, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    apart = filtered(either[None], mean[None], spread.diagonal()[None], most, error)
    wanted = sum(math.log(sum(norm.pdf(either[s, p], mean[p], spread[p, p].sqrt()) for s in (0, 1)) / 2) for p in (0, 1))
    assert float(apart) == pytest.approx(wanted)
    density = multivariate_normal(mean.numpy(), spread.numpy())
    exact = math.log(sum(density.pdf([either[a, 0], either[b, 1]]) for a in (0, 1) for b in (0, 1)) / 4)
    assert float(filtered(either[None], mean[None], spread[None], most, error)) == pytest.approx(exact, abs=0.15)
