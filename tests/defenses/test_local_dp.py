"""Local DP and Laplace noise: what they compute, what they claim, and Laplace accounting against closed forms."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from scipy import stats

from defenses.accounting import guarantee
from defenses.bounds import reconstruction_ceiling, success_ceiling
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.clip import global_norm
from defenses.client.gaussian_noise import GaussianNoise
from defenses.client.laplace_noise import LaplaceNoise, add_laplace
from defenses.client.local_dp import LocalDP, clip_to_l1
from defenses.privacy_loss import epsilon, gaussian_dp_epsilon, unknown
from defenses.server.central_dp import CentralDP
from simulator import lookup
from simulator.defense import Defense
from simulator.rng import stream
from simulator.types import Update
from tests.defenses.tiny import context, world

HELD = (10,) * 4


def zeros(count: int = 50_000) -> Update:
    return Update("delta", {"a": torch.zeros(count), "b": torch.zeros(3)})


@pytest.mark.parametrize("defense", [LocalDP, LaplaceNoise])
def test_is_registered_and_says_what_it_does_not_protect(defense: type) -> None:
    assert lookup.get("defenses", defense.name) is defense
    page = sys.modules[defense.__module__].__doc__ or ""
    for part in ("Source:", "Deviations:", "Hook:", "What it does not protect:", "Broken by:"):
        assert part in page


def test_laplace_noise_is_laplace() -> None:
    seen = LaplaceNoise(0.3).on_update(zeros(), context()).tensors["a"]
    assert stats.kstest(seen.numpy(), stats.laplace(scale=0.3).cdf).pvalue > 1e-3
    assert LaplaceNoise(0.3).noise_std(world()) == pytest.approx(float(seen.std()), rel=0.03)
    assert LaplaceNoise(0.3).claim(world(), HELD) is None
    first, again, other = (add_laplace(zeros().tensors, 1.0, stream(seed, "noise"))["a"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be ≥ 0 and finite"):
            LaplaceNoise(bad)


def test_gaussian_local_dp_is_calibrated_to_twice_the_norm() -> None:
    seen = LocalDP(clip_norm=0.5, noise_multiplier=2.0).on_update(zeros(), context()).tensors["a"]
    assert stats.kstest(seen.numpy(), stats.norm(scale=2.0).cdf).pvalue > 1e-3  # z·2S = 2·2·0.5
    assert LocalDP(0.5, 2.0).noise_std(world()) == 2.0
    bare = LocalDP(0.5, 0.0).on_update(Update("delta", {"a": torch.tensor([3.0, 4.0])}), context()).tensors
    assert float(global_norm(bare)) == pytest.approx(0.5)


def test_laplace_local_dp_clips_in_l1_and_is_calibrated_to_twice_the_norm() -> None:
    seen = LocalDP(0.5, 2.0, "laplace").on_update(zeros(), context()).tensors["a"]
    assert stats.kstest(seen.numpy(), stats.laplace(scale=2.0).cdf).pvalue > 1e-3
    assert LocalDP(0.5, 2.0, "laplace").noise_std(world()) == pytest.approx(2.0 * math.sqrt(2))
    clipped = clip_to_l1({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([[4.0]])}, 2.0)
    assert clipped["a"].tolist() == pytest.approx([0.75, -0.25])
    assert float(clipped["b"]) == pytest.approx(1.0)
    short = {"a": torch.tensor([0.5, -0.25])}
    assert torch.equal(clip_to_l1(short, 2.0)["a"], short["a"])
    assert torch.equal(clip_to_l1({"a": torch.zeros(3)}, 2.0)["a"], torch.zeros(3))
    assert clip_to_l1(short, math.inf) is short


def test_gaussian_claims_replacement_with_its_own_noise() -> None:
    """The same noise z·2S on the same clipped update is client_dp with 2z under zero-out: half the loss, another neighbor."""
    found = guarantee(world(LocalDP(noise_multiplier=10.0), rounds=100), records_held=HELD)
    assert found.epsilon == pytest.approx(gaussian_dp_epsilon(1.0, 1e-5), abs=1e-3)
    assert (found.adversary, found.unit, found.accountant) == ("server", "client", "exact")
    assert found.adjacency.startswith("replace-one")
    claim = LocalDP(noise_multiplier=10.0).claim(world(rounds=100, cohort=2), HELD)
    assert claim is not None
    assert claim.event == SelfComposedDpEvent(GaussianDpEvent(10.0), 100)
    assert LocalDP(noise_multiplier=0.0).claim(world(), HELD) is None
    assert "BatchNorm" in str(LocalDP().refuses(world(LocalDP(), batch_norm=True)))
    assert CentralDP().refuses(world(CentralDP(), LocalDP(), LaplaceNoise())) is None


@pytest.mark.parametrize(
    ("noise", "reach"),
    [(GaussianNoise(0.1), 0.8), (LocalDP(0.1, 0.5), 0.8), (LaplaceNoise(0.1), 0.1 * 34.5), (LocalDP(0.1, 0.5, "laplace"), 0.1 * 34.5)],
)
def test_words_leave_room_for_all_noise_but_1e_15_of_it(noise: Defense, reach: float) -> None:
    """σ = 0.1, or b = 0.1: N(0, 1) is beyond 8 with probability 1e-15, Lap(1) beyond 34.5; eight standard deviations of it are 11.3."""
    assert 2 * stats.norm.sf(8) == pytest.approx(1.2e-15, rel=0.1)
    assert math.exp(-34.5) == pytest.approx(1e-15, rel=0.1)
    for room, refused in ((reach * 0.97, True), (reach * 1.03, False)):
        channel = SecureAggregation(clip_range=room)
        assert ("clip_range must be ≥ " in (channel.refuses(world(noise, channel)) or "")) is refused


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (0.5, 1), (2.0, 8), (0.05, 3)])
def test_laplace_costs_at_most_the_sum_of_its_releases(z: float, rounds: int) -> None:
    """(1/z, 0)-DP each: pure composition is an upper bound, and all there is for one release and a small δ."""
    found = guarantee(world(LocalDP(1.0, z, "laplace"), rounds=rounds), records_held=HELD)
    assert found.epsilon <= rounds / z + 1e-6
    if rounds == 1:
        delta = 1e-5  # δ(ε) = 1 − exp((ε − 1/z)/2), exact
        assert found.epsilon == pytest.approx(1 / z + 2 * math.log(1 - delta), abs=2e-3)


@pytest.mark.parametrize(("pure", "baseline", "ceiling"), [(1, 0.1, 0.27183), (1, 0.3, 0.69343), (1, 0.6, 0.85285), (3, 0.01, 0.20086)])
def test_laplace_ceiling_of_the_reference_table(pure: float, baseline: float, ceiling: float) -> None:
    assert success_ceiling(LaplaceDpEvent(1 / pure), baseline) == pytest.approx(ceiling, abs=1e-4)


def test_one_number_dominates_a_vector_of_the_same_l1_norm() -> None:
    """Why a Laplace vector is accounted as a number: δ(ε) of two coordinates with shifts a + b never exceeds that of one with their sum."""

    def delta(shift: float, at: np.ndarray | float) -> np.ndarray:
        e = np.asarray(at, float)
        return np.where(e >= shift, 0.0, np.where(e <= -shift, 1 - np.exp(np.minimum(e, 0)), 1 - np.exp((e - shift) / 2)))

    for a in (0.05, 0.7, 2.5):
        for b in (0.05, 1.0, 4.0):
            x = (np.arange(4000) + 0.5) / 4000 * a  # the privacy loss of the first coordinate is a − 2x between its two atoms
            for e in np.linspace(-(a + b) - 1, a + b + 1, 61):
                two = 0.5 * delta(b, e - a) + 0.5 * math.exp(-a) * delta(b, e + a) + a * (np.exp(-x) / 2 * delta(b, e - (a - 2 * x))).mean()
                assert two <= delta(a + b, e) + 1e-9


def test_sampled_laplace_stays_unknown() -> None:
    assert unknown(LaplaceDpEvent(1.0)) is None
    assert unknown(LaplaceDpEvent(0.0)) is not None
    assert unknown(PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0))) is not None
    assert epsilon(LaplaceDpEvent(0.01), 1e-5) == (100.0, "pure")


def test_mechanisms_are_two() -> None:
    with pytest.raises(ValueError, match="mechanism must be 'gaussian' or 'laplace', got 'uniform'"):
        LocalDP(mechanism="uniform")  # type: ignore[arg-type]


@pytest.mark.parametrize("candidates", [10, 100])
def test_the_ceiling_of_a_guess_is_met_by_candidates_at_right_angles_and_refutes_half_the_noise(candidates: int) -> None:
    """N orthogonal updates of norm S under noise z·2S, z = ½: whom the loudest coordinate names, in 20,000 draws of the mechanism."""
    defense = LocalDP(clip_norm=1.0, noise_multiplier=0.5)
    claim = defense.claim(world(defense, rounds=1), HELD)
    assert claim is not None
    ceiling = reconstruction_ceiling(claim, candidates)
    rng = np.random.default_rng(0)

    def named(noise: float) -> float:
        seen = noise * rng.normal(size=(20_000, candidates))
        seen[:, 0] += 1.0
        return float((seen.argmax(1) == 0).mean())

    assert 0.8 * ceiling < named(defense.scale) < ceiling
    assert named(defense.scale / 2) > 1.5 * ceiling
