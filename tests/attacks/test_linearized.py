"""The scores of coarse and noisy uploads, each against its own density, integrated and differentiated numerically."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from attacks._matching import coarse, linearized
from attacks._matching.evidence import Kind, Mechanism, of_class
from attacks._matching.mode import polished
from attacks._matching.simulate import prepare
from attacks.update.adaptive_matching import AdaptiveMatching
from simulator.adversary import Knowledge
from simulator.mechanisms.top_k import top_k
from simulator.rng import stream
from simulator.types import Observation, Tensors
from tests.attacks.victims import attack_surface, build, digits, psnr_db

ERROR, NOISE, STEP = 0.4, 0.7, 0.5


def gaussian(seen: float, update: float) -> float:
    return float(norm.pdf(seen, update, NOISE))


def sign_of_noisy(seen: float, update: float) -> float:
    return float(norm.cdf(math.copysign(1, seen) * update / NOISE))


def rounding(seen: float, update: float) -> float:
    return max(0.0, 1 - abs(seen - update) / STEP)


@pytest.mark.parametrize(
    ("kind", "noise", "density", "uploads"),
    [
        ("exact", NOISE, gaussian, (-1.3, 0.2, 2.0)),
        ("signs", NOISE, sign_of_noisy, (-1.0, 1.0)),
        ("rounded", 0.0, rounding, (0.0, 0.5, 1.0)),
    ],
)
def test_a_score_is_the_slope_of_the_smoothed_log_density(
    kind: Kind, noise: float, density: Callable[[float, float], float], uploads: tuple[float, ...]
) -> None:
    """log E p(upload | u + e), e of the error of linearizing: its derivative in u."""
    one = torch.ones(1, dtype=torch.float64)
    mechanism = Mechanism(kind, one, one.bool(), STEP * one, noise * one)

    def log_smoothed(seen: float, update: float) -> float:
        corners = sorted({max(-5.0, min(5.0, (seen + k * STEP - update) / ERROR)) for k in (-1, 0, 1)})
        return math.log(quad(lambda e: density(seen, update + ERROR * e) * norm.pdf(e), -6, 6, points=corners)[0])

    for seen in uploads:
        for update in (-0.3, 0.4):
            slope = (log_smoothed(seen, update + 1e-4) - log_smoothed(seen, update - 1e-4)) / 2e-4
            got = float(mechanism.score(torch.tensor([[seen]], dtype=torch.float64), update * one, ERROR * one))
            assert got == pytest.approx(slope, rel=1e-2, abs=1e-4)  # roundings allow for outliers


def test_clipping_scales_whole_updates() -> None:
    one = torch.ones(3)
    mechanism = Mechanism("exact", one, one.bool(), one, 0 * one, clip_norm=2.0)
    updates = torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4]])
    assert torch.allclose(mechanism.clipped(updates), torch.tensor([[1.2, 0.0, 1.6], [0.3, 0.0, 0.4]]))


def seen(number: int, sigma: float, pruned: float = 0.0) -> tuple[Observation, Knowledge]:
    """One digit behind Gaussian noise or top-k, with other digits as public records."""
    view, knowledge = attack_surface(build("cnn", (1, 8, 8), width=8, hidden=64), [digits(1, offset=50 + number)])
    rng, update = stream(number, "noise"), view.upload.update.tensors
    changed: Tensors = {name: tensor + sigma * torch.randn(tensor.shape, generator=rng) for name, tensor in update.items()}
    changed = top_k(changed, pruned) if pruned else changed
    upload = replace(view.upload, update=replace(view.upload.update, tensors=changed))
    defense = ("top_k", {"pruned": pruned}) if pruned else ("gaussian_noise", {"sigma": sigma})
    return replace(view, uploads=(upload,)), replace(knowledge, public=digits(500, offset=1000), defenses=(defense,))


def found(sigma: float, pruned: float, victims: int) -> tuple[float, float]:
    """Mean PSNR in dB, and CPU seconds of all."""
    began, total = time.process_time(), 0.0
    for number in range(victims):
        guess = AdaptiveMatching()(*seen(number, sigma, pruned), rng=stream(number))
        total += psnr_db(guess.inputs, digits(1, offset=50 + number).inputs)
    return total / victims, time.process_time() - began


@pytest.mark.parametrize(
    ("sigma", "pruned", "victims", "gain"),
    [
        (0.001, 0.0, 2, 1.5),
        pytest.param(0.001, 0.0, 10, 1.5, marks=pytest.mark.slow),
        pytest.param(0.01, 0.0, 10, 0.5, marks=pytest.mark.slow),
        pytest.param(0.1, 0.0, 10, 0.3, marks=pytest.mark.slow),
        pytest.param(0.0, 0.9, 10, 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_mode_near_a_belief_is_nearer_to_the_record(
    sigma: float, pruned: float, victims: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against twelve rounds of sampling alone."""
    found(sigma, pruned, 1)  # compiles
    now, spent = found(sigma, pruned, victims)
    monkeypatch.setattr(linearized, "polished", lambda *_: None)
    before, longer = found(sigma, pruned, victims)
    print(f"noise {sigma}, pruned {pruned}: {before:.1f} dB sampled in {longer:.1f} CPU s, {now:.1f} dB polished in {spent:.1f}")
    assert now > before + gain


def test_a_mode_that_does_not_explain_the_upload_is_not_taken() -> None:
    """Another client's update, clipped to the size of this one's: no record of the belief's pattern gives it."""
    view, knowledge = seen(0, 0.001)
    victim, mechanism = coarse.mechanism(prepare(view, knowledge), "exact", view, knowledge)
    assert knowledge.public is not None
    prior = of_class(knowledge.public, int(victim.labels[0]))
    belief, _ = linearized.rebuilt(victim, mechanism, prior, rounds=5, samples=256, seconds=9, rng=stream(0), task="")
    assert polished(victim, mechanism, prior, belief) is not None
    foreign = replace(mechanism, target=mechanism.target.flip(0))
    assert polished(victim, foreign, prior, belief) is None
    assert polished(victim, replace(mechanism, kind="signs"), prior, belief) is None
