"""The reconstruction ceiling against published values, closed forms and simulated attackers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from scipy.stats import norm

from defenses import bounds
from defenses.bounds import reconstruction_ceiling
from simulator.defense import Claim


def claim(event: DpEvent) -> Claim:
    return Claim(event, "server", "record", "zero-out (…)", "…")


def releases(z: float, q: float, count: int) -> Claim:
    return claim(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(z)) if q < 1 else GaussianDpEvent(z), count))


@pytest.mark.parametrize(
    ("z", "q", "count", "candidates", "ceiling"),
    [
        (1, 1, 1, 10, 0.389144),
        (1, 1, 1, 100, 0.092362),
        (1, 1, 1, 1000, 0.018298),
        (0.5, 1, 1, 10, 0.763760),
        (2, 1, 1, 100, 0.033899),
        (4, 1, 50, 1000, 0.093007),
        (1, 1, 10, 100, 0.79840),
        (1, 0.01, 1000, 10, 0.19421),
        (1, 0.01, 1000, 100, 0.02914),
        (0.6, 0.01, 1000, 10, 0.41723),
        (1, 0.1, 100, 10, 0.46919),
        (1, 0.1, 100, 100, 0.14605),
        (2, 0.1, 100, 100, 0.03771),
        (0.5, 0.1, 20, 100, 0.26014),
    ],
)
def test_ceiling_of_the_reference_table(z: float, q: float, count: int, candidates: int, ceiling: float) -> None:
    tolerance = 1e-6 if q == 1 and count == 1 else 1e-4
    assert reconstruction_ceiling(releases(z, q, count), candidates) == pytest.approx(ceiling, abs=tolerance)


@pytest.mark.parametrize(("mu", "baseline", "ceiling"), [(3.0, 0.1, 0.9571), (2.0, 0.5, 0.9772), (1.0, 0.1, 0.389144)])
def test_the_grid_with_negative_epsilon_is_tight_where_the_ceiling_is_high(
    mu: float, baseline: float, ceiling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The general way on a plain Gaussian, whose ceiling is known: the closed form is switched off."""
    monkeypatch.setattr(bounds, "gaussian_mu", lambda event: None)
    found = reconstruction_ceiling(releases(1 / mu, 1, 1), round(1 / baseline))
    assert found == pytest.approx(ceiling, abs=1e-4)
    assert found >= norm.cdf(norm.ppf(baseline) + mu) - 1e-9


def test_nothing_certified_means_no_ceiling() -> None:
    assert reconstruction_ceiling(None, 10) == 1.0
    assert reconstruction_ceiling(claim(NoOpDpEvent()), 10) == 1.0
    assert reconstruction_ceiling(claim(ComposedDpEvent([GaussianDpEvent(1.0), NoOpDpEvent()])), 10) == 1.0
    assert reconstruction_ceiling(releases(0.05, 0.01, 100), 10) == 1.0


def test_one_candidate_is_always_named_and_none_is_refused() -> None:
    assert reconstruction_ceiling(releases(1.0, 1, 1), 1) == pytest.approx(1.0)
    assert reconstruction_ceiling(releases(1.0, 0.1, 1), 1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="candidates must be ≥ 1, got 0"):
        reconstruction_ceiling(None, 0)


@pytest.mark.parametrize("q", [1, 0.1])
def test_the_ceiling_lies_between_chance_and_one_and_falls_with_noise(q: float) -> None:
    ceilings = [reconstruction_ceiling(releases(z, q, 10), 20) for z in (1.0, 3.0, 30.0)]
    assert ceilings == sorted(ceilings, reverse=True)
    assert 1 / 20 < ceilings[-1] < 0.07
    assert ceilings[0] <= 1.0


@pytest.mark.parametrize(("candidates", "mu", "expected"), [(10, 1.0, 0.341), (10, 2.0, 0.674), (100, 2.0, 0.323)])
def test_the_best_attacker_on_orthonormal_candidates_stays_below(candidates: int, mu: float, expected: float) -> None:
    """Simulated: argmax of ⟨release, candidate⟩ is the likeliest candidate; its success nears the ceiling from below."""
    rng, trials = np.random.default_rng(0), 20_000
    scores = rng.standard_normal((trials, candidates))
    scores[:, 0] += mu
    success = float((scores.argmax(1) == 0).mean())
    assert success == pytest.approx(expected, abs=0.015)
    assert success < reconstruction_ceiling(releases(1 / mu, 1, 1), candidates)


def test_releases_of_the_same_total_have_the_same_ceiling() -> None:
    one, many = reconstruction_ceiling(releases(1.0, 1, 1), 10), reconstruction_ceiling(releases(10.0, 1, 100), 10)
    assert one == pytest.approx(many)
    assert one == pytest.approx(float(norm.cdf(norm.ppf(0.1) + 1)))
    assert math.isclose(one, 0.389144, abs_tol=1e-6)
