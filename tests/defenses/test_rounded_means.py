"""Rounding after clipping lets a client move the mean by more than its clip norm: central DP's claim pays for it."""

from __future__ import annotations

import math

import pytest
import torch
from dp_accounting import GaussianDpEvent

from defenses.accounting import guarantee
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.privacy_loss import gaussian_mu
from defenses.server.central_dp import CentralDP, rounding, weighted_noise_multiplier
from simulator.rng import stream
from simulator.training import rounded
from simulator.types import LocalTraining, Update
from tests.defenses.tiny import world

CLIENTS, COORDINATES = 12, 47  # of the tiny model: 2·9 + 2 and 8·3 + 3


def outside(defense: CentralDP, *more: SecureAggregation, **training: object):
    of = world(defense, *more, clients=CLIENTS, rounds=1, min_clients=CLIENTS, training=training)
    return of, guarantee(of, records_held=(5,) * CLIENTS, adversary="outsider")


@pytest.mark.parametrize("clip_norm", [0.001, 0.03, 1.0])
def test_no_rounding_moves_the_mean_by_more_than_the_claim_counts(clip_norm: float) -> None:
    """Words of 16 bits have steps of 0.003: the longest of 200 roundings is longer than S, and no longer than the claim's sensitivity."""
    defense, channel = CentralDP(clip_norm, 1.0), SecureAggregation(mode="quantized", bits=16)
    of, found = outside(defense, channel)
    assert found.claim is not None
    sensitivity = defense.noise_multiplier * clip_norm * float(gaussian_mu(found.claim.event) or math.nan)
    rng, longest = stream(0, "rounding"), 0.0
    for _ in range(200):
        direction = torch.randn(COORDINATES, generator=rng)
        update = Update("gradient", {"a": direction / direction.norm() * clip_norm})
        words = channel.encode(update, {}, 1, cohort=CLIENTS, max_examples=1, rng=rng)[:-1]
        longest = max(longest, float(torch.from_numpy(words.view("<i2").astype(float)).norm()) * channel.grid(of, COORDINATES))
    assert clip_norm < longest <= sensitivity
    assert sensitivity == pytest.approx(clip_norm + channel.grid(of, COORDINATES) * math.sqrt(COORDINATES))


def test_fine_words_and_plain_sums_cost_nothing() -> None:
    _, exact = outside(CentralDP())
    _, plain = outside(CentralDP(), SecureAggregation(mode="plain"))
    _, fine = outside(CentralDP(), SecureAggregation(mode="quantized", bits=32))
    _, coarse = outside(CentralDP(0.001), SecureAggregation(mode="quantized", bits=16))
    assert exact.epsilon == plain.epsilon
    assert exact.epsilon <= fine.epsilon <= exact.epsilon * (1 + 1e-5)
    assert coarse.epsilon > 10 * exact.epsilon


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_number_format_is_paid_for_too(dtype: str) -> None:
    recipe = LocalTraining(upload_dtype=dtype)  # type: ignore[arg-type]
    of, found = outside(CentralDP(0.01), upload_dtype=dtype)
    longer, beside = rounding(of, 0.01)
    assert beside == 0
    assert found.claim is not None
    assert gaussian_mu(found.claim.event) == pytest.approx(1 + longer)
    rng = stream(0, "rounding")
    for _ in range(200):
        direction = torch.randn(COORDINATES, generator=rng)
        short = rounded(Update("gradient", {"a": direction / direction.norm() * 0.01}), recipe).tensors["a"].double()
        assert float(short.norm()) <= 0.01 * (1 + longer) * (1 + 1e-6)


def test_what_rounding_adds_weighs_most_where_weights_are_small() -> None:
    """Clients of 1, 1 and 2 examples, all answer: 2/4 of S and 0.1 S/4 examples in units of S/3."""
    assert weighted_noise_multiplier(1.0, [1, 2, 1], [3], beside=0.1) == pytest.approx(1 / (3 * (2 / 4 + 0.1 / 4)))
    assert weighted_noise_multiplier(1.0, [1, 1], [2], longer=0.5) == pytest.approx(1 / 1.5)
    assert GaussianDpEvent(weighted_noise_multiplier(2.0, [3, 3, 3], [3])) == GaussianDpEvent(pytest.approx(2.0))
