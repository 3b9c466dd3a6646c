"""Rounding after clipping lets a client move the mean by more than its clip norm: central DP's claim pays for it."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent

from defenses.accounting import guarantee
from defenses.channel.ckks import CKKSAggregation
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.client_dp import ClientDP
from defenses.client.clip import Clip, clip_to_norm
from defenses.client.gaussian_noise import GaussianNoise
from defenses.client.laplace_noise import LaplaceNoise
from defenses.client.local_dp import LocalDP
from defenses.privacy_loss import gaussian_mu
from defenses.server.adaptive_clipping import AdaptiveClipping
from defenses.server.central_dp import CentralDP, rounding, weighted_noise_multiplier
from simulator.defense import Defense
from simulator.errors import ProtocolAbort
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


QUANTIZED: dict[str, Any] = {"mode": "quantized", "bits": 32}


@pytest.mark.parametrize(
    ("stack", "channel", "least"),
    [
        ((CentralDP(100.0, 5.0),), SecureAggregation(clip_range=1.0), 100.0),
        ((CentralDP(8.0, 5.0),), SecureAggregation(**QUANTIZED), 8.0),  # of a word's range itself no rounding of the norm is left
        ((CentralDP(1.0, 5.0), ClientDP(1.0, 0.5)), SecureAggregation(clip_range=4.0), 5.0),  # 8 standard deviations, 1e-15 beyond
        ((CentralDP(1.0, 5.0), LaplaceNoise(0.1)), SecureAggregation(clip_range=4.0), 1.0 + 25 * math.sqrt(2) * 0.1),
        ((CentralDP(1e5, 5.0),), CKKSAggregation(degree=4096, modulus_bits=(60, 49), scale_bits=40, flooding_bits=0), None),
    ],
)
def test_whether_a_client_is_in_the_mean_cannot_tell_of_its_update(
    stack: tuple[Defense, ...], channel: SecureAggregation | CKKSAggregation, least: float | None
) -> None:
    """A client whose coordinate has no room in the sum leaves; then another one's absence would show how long an update was."""
    found = guarantee(world(*stack, channel, clients=CLIENTS), records_held=(5,) * CLIENTS, adversary="outsider")
    assert all(claim.adversary == "server" for claim in found.claims), "noise at the client holds whatever leaves"
    if least is None:
        assert "numbers that ckks_aggregation takes must be ≥ 1e+05" in found.sentence
        return
    assert isinstance(channel, SecureAggregation)
    enough, scant = (replace(channel, clip_range=least * factor) for factor in (1 + 1e-5, 1 - 1e-5))
    for room, refused in ((enough, False), (scant, True), (replace(scant, mode="plain"), False)):
        reason = stack[0].refuses(world(*stack, room, clients=CLIENTS))
        assert (f"clip_range of secure_aggregation must be ≥ {least:.4g} for central_dp" in str(reason)) is refused
        assert (reason is not None) is refused
    loud = replace(stack[0], noise_multiplier=0.0)  # type: ignore[type-var]
    assert loud.refuses(world(loud, *stack[1:], channel, clients=CLIENTS)) is None  # which claims nothing that could be wrong


def test_room_is_asked_for_because_without_it_a_client_leaves() -> None:
    """One coordinate as long as the norm allows: too long by a little for words without room, and not for those with it."""
    update = Update("gradient", clip_to_norm({"a": torch.tensor([3.0, 0.0])}, 1.0))
    for limit, leaves in ((1 - 1e-5, True), (1 + 1e-5, False)):
        channel = SecureAggregation(**QUANTIZED, clip_range=limit)
        with pytest.raises(ProtocolAbort, match="must be at most") if leaves else nullcontext():
            channel.encode(update, {}, 1, cohort=CLIENTS, max_examples=1, rng=stream(0, "rounding"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("noise", [GaussianNoise(0.1), LaplaceNoise(0.1), ClientDP(0.01, 10.0), LocalDP(0.01, 10.0)])
def test_a_narrow_format_after_noise_is_refused(noise: Defense, dtype: str) -> None:
    """Update and noise are rounded together, by a share of both: S(1 + unit) does not bound what the update moves."""
    clipped = CentralDP(0.01)
    for stack, refused in (
        ((clipped, noise), True),
        ((noise, clipped), False),
        ((clipped, Clip(0.005)), False),
        ((clipped, GaussianNoise(0)), False),
    ):
        of = world(*stack, clients=CLIENTS, training={"upload_dtype": dtype})
        reason = clipped.refuses(of)
        assert ("upload_dtype must be float32 for central_dp with noise after it" in str(reason)) is refused
        assert (reason is not None) is refused
    recipe, rng = LocalTraining(upload_dtype=dtype), stream(0, "noise")  # type: ignore[arg-type]
    step = torch.full((10_000,), 0.01 / 100)  # of norm 0.01
    far = torch.randn(10_000, generator=rng)
    with_it, without = (rounded(Update("gradient", {"a": far + part}), recipe).tensors["a"].double() for part in (step, 0 * step))
    assert float((with_it - without).norm()) > 1.2 * 0.01 * (1 + rounding(of, 0.01)[0])


def test_what_rounding_adds_weighs_most_where_weights_are_small() -> None:
    """Clients of 1, 1 and 2 examples, all answer: 2/4 of S and 0.1 S/4 examples in units of S/3."""
    assert weighted_noise_multiplier(1.0, [1, 2, 1], [3], beside=0.1) == pytest.approx(1 / (3 * (2 / 4 + 0.1 / 4)))
    assert weighted_noise_multiplier(1.0, [1, 1], [2], longer=0.5) == pytest.approx(1 / 1.5)
    assert GaussianDpEvent(weighted_noise_multiplier(2.0, [3, 3, 3], [3])) == GaussianDpEvent(pytest.approx(2.0))


def test_a_norm_that_adapts_may_grow_out_of_the_channels_room() -> None:
    """As for central_dp, with the largest norm that so many rounds can reach: C·exp(η·(γ + 8σ/n)·T)."""
    narrow = CKKSAggregation(degree=4096, modulus_bits=(60, 49), scale_bits=40, flooding_bits=0)
    adapting = AdaptiveClipping(clip_norm=1.0, noise_multiplier=1.0, bit_noise=1.0)
    short, long = (world(adapting, narrow, clients=100, rounds=rounds) for rounds in (10, 300))
    assert adapting.highest(short) == pytest.approx(math.exp(0.2 * (0.5 + 0.08) * 10))
    assert adapting.refuses(short) is None
    assert f"must be ≥ {adapting.highest(long):.4g} for adaptive_clipping" in str(adapting.refuses(long))


@pytest.mark.parametrize("clip_norm", [0.1, 1.5, 3.0, 7.7, 123.4])
def test_the_range_that_is_advised_is_enough(clip_norm: float) -> None:
    mechanism = CentralDP(clip_norm=clip_norm, noise_multiplier=1.0)
    words = SecureAggregation(clip_range=clip_norm / 2)
    reason = str(mechanism.refuses(world(mechanism, words, clients=CLIENTS)))
    advised = float(re.findall(r"Set clip_range = ([\d.]+),", reason)[0])
    assert mechanism.refuses(world(mechanism, SecureAggregation(clip_range=advised), clients=CLIENTS)) is None
