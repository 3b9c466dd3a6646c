"""The scores of coarse and noisy uploads, each against its own density, integrated and differentiated numerically."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from attacks._matching.linearized import Kind, Mechanism

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
