"""The reconstruction ceiling against published values, closed forms and simulated attackers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from scipy.stats import chi2, norm
from torch import nn

from defenses import bounds
from defenses.bounds import ASSUMPTIONS, ceilings, no_prior_psnr, reconstruction_ceiling, success_ceiling
from defenses.client.dp_sgd import DPSGD, clipped_sum
from defenses.fisher import Trace, clipped_gradient, trace
from defenses.privacy_loss import unknown
from simulator.defense import Claim
from simulator.rng import stream
from simulator.training import per_example_gradients
from simulator.types import Batch
from tests.defenses.tiny import world


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


def test_a_bound_on_the_attacked_round_alone_would_be_beaten_through_the_model() -> None:
    """FedSGD, one client with the same record in rounds 1 and 2: the second broadcast gives the first release back, to the bit's noise.

    Whoever is shown round 2 alone and knows the initial model sees both releases: 2 count, as ``accounting.until`` says, not 1.
    """
    rng, trials, candidates, z = np.random.default_rng(1), 20_000, 10, 1.0
    releases = z * rng.standard_normal((2, trials, candidates))
    releases[:, :, 0] += 1  # the true candidate's gradient is the first of 10 orthonormal ones
    initial, rate = rng.standard_normal((trials, candidates)), 0.1
    broadcast, upload = initial - rate * releases[0], releases[1]
    view = (initial - broadcast) / rate + upload
    success = float((view.argmax(1) == 0).mean())
    one, two = (reconstruction_ceiling(claim(SelfComposedDpEvent(GaussianDpEvent(z), count)), candidates) for count in (1, 2))
    assert one < success < two
    assert float((upload.argmax(1) == 0).mean()) < one


def test_releases_of_the_same_total_have_the_same_ceiling() -> None:
    one, many = reconstruction_ceiling(releases(1.0, 1, 1), 10), reconstruction_ceiling(releases(10.0, 1, 100), 10)
    assert one == pytest.approx(many)
    assert one == pytest.approx(float(norm.cdf(norm.ppf(0.1) + 1)))
    assert math.isclose(one, 0.389144, abs_tol=1e-6)


# --- no prior ---


def no_prior_success(mse: float, *, mu: float, norm: float, pixels: int) -> float:
    """The probability that the best reconstruction without a prior has a mean squared error of at most ``mse``."""
    return float(chi2.cdf(pixels * mse * mu**2 / norm**2, pixels))


def test_no_prior_psnr_of_the_reference() -> None:
    """Medians for 3072 pixels with ‖x‖ = √(0.3·3072) and one release."""
    for z, psnr in ((1e-3, 30.4), (3e-3, 20.8), (1e-2, 10.4), (3e-2, 0.8)):
        assert no_prior_psnr(mu=1 / z, norm=math.sqrt(0.3 * 3072), pixels=3072) == pytest.approx(psnr, abs=0.05)


def test_the_best_unbiased_inversion_of_a_linear_layer_meets_it() -> None:
    """A gradient row is a multiple of x: clipped to 1 and noised, it is scaled back; MSE quantiles .0967/.1000/.1033 (reference)."""
    rng = np.random.default_rng(0)
    x = rng.random(3072)
    x *= math.sqrt(0.1 * 3072) / 0.01 / np.linalg.norm(x) / math.sqrt(3072)  # (z‖x‖)² = 0.1 with z = 0.01
    row = x / np.linalg.norm(x)
    errors = [float((((row + 0.01 * rng.standard_normal(3072)) * np.linalg.norm(x) - x) ** 2).mean()) for _ in range(2000)]
    for quantile, mse in ((0.1, 0.0968), (0.5, 0.1001), (0.9, 0.1034)):
        assert np.quantile(errors, quantile) == pytest.approx(mse, abs=3e-4)
        found = no_prior_success(mse, mu=100, norm=float(np.linalg.norm(x)), pixels=3072)
        assert found == pytest.approx(quantile, abs=0.06)
        assert no_prior_psnr(1 - found, mu=100, norm=float(np.linalg.norm(x)), pixels=3072) == pytest.approx(
            -10 * math.log10(mse), abs=1e-6
        )


def test_more_releases_average_the_noise_away() -> None:
    assert no_prior_psnr(mu=math.sqrt(100), norm=10, pixels=100) - no_prior_psnr(mu=1, norm=10, pixels=100) == pytest.approx(20)


# --- Fisher information ---


def network(clip_norm: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    x, parameters = torch.rand(64), {name: tensor.detach() for name, tensor in model.named_parameters()}
    of = (model, parameters, {})
    return lambda z: clipped_gradient(*of, z, torch.tensor(3), clip_norm=clip_norm, label_smoothing=0.0), (*of, x, torch.tensor(3))


@pytest.mark.slow
@pytest.mark.parametrize(("clip_norm", "exact"), [(1.0, 0.1758), (math.inf, 1.4771)])
def test_probes_estimate_the_trace_of_the_whole_jacobian(clip_norm: float, exact: float) -> None:
    gradient, of = network(clip_norm)
    whole = float(torch.autograd.functional.jacobian(gradient, of[3]).square().sum())
    assert whole == pytest.approx(exact, abs=5e-5)
    found = trace(*of, clip_norm=clip_norm, probes=200, rng=stream(0, "probes"))
    assert found.value == pytest.approx(whole, abs=4 * found.error)
    assert found.error < 0.01 * whole
    assert found.pixels == 64


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3, 40, 400])
def test_the_upper_end_of_twenty_probes_is_below_the_truth_once_in_600_whatever_the_rank(rank: int) -> None:
    """Squares of a Jacobian of rank r are about χ²_r/r, with mean 1: the lower r, the longer their tail above, which twenty may miss."""
    squares, probes = np.random.default_rng(rank).chisquare(rank, (200_000, 20)) / rank, 20
    values, errors = squares.mean(1), squares.std(1, ddof=1) / math.sqrt(probes)
    below = [Trace(value, error, 1).above().value < 1 for value, error in zip(values, errors, strict=True)]
    assert np.mean(below) < 1 / 600
    assert Trace(1.0, 0.02, 1).above().value == pytest.approx(1.09, abs=0.01)
    assert Trace(0.0, 0.0, 1).above() == Trace(0.0, 0.0, 1)


def test_the_sentence_says_how_many_standard_errors_were_added_and_on_which_scale() -> None:
    (said,) = re.findall(r"([\d.]+) standard errors of the estimate added on the scale of logarithms", ASSUMPTIONS["dfil"])
    assert Trace(2.0, 0.1, 64).above().value == pytest.approx(2.0 * math.exp(float(said) * 0.1 / 2.0))


def test_dfil_of_the_reference_and_least_squares_keeps_to_it() -> None:
    """z = 0.1, C = 1: dFIL² = .27474, MSE ≥ 3.6398; the estimator that attains Cramér–Rao has 4.534 there."""
    gradient, of = network(1.0)
    jacobian = torch.autograd.functional.jacobian(gradient, of[3]).double()
    known = Trace(float(jacobian.square().sum()), 0.0, 64)
    assert known.dfil(0.1) ** 2 == pytest.approx(0.27474, abs=1e-5)
    assert known.mse_floor(0.1) == pytest.approx(3.6398, abs=1e-3)
    attained = float(torch.linalg.pinv(jacobian.T @ jacobian).trace()) * 0.1**2 / 64
    assert attained == pytest.approx(4.534, abs=2e-2)
    assert attained > known.mse_floor(0.1)
    assert known.dfil(0.1, releases=4) == pytest.approx(2 * known.dfil(0.1))
    assert Trace(0.0, 0.0, 64).mse_floor(0.1) == math.inf


def test_the_clipped_gradient_is_dp_sgds() -> None:
    gradient, of = network(0.3)
    model, parameters, buffers, x, label = of
    each = per_example_gradients(model, parameters, buffers, Batch(x[None], label[None]))
    expected = torch.cat([tensor.flatten() for tensor in clipped_sum(each, 0.3).values()])
    torch.testing.assert_close(gradient(x), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="probes must be ≥ 2, got 1"):
        trace(*of, probes=1, rng=stream(0, "probes"))


# --- together ---


def test_ceilings_are_printed_with_what_they_assume() -> None:
    all_of = ceilings([releases(1, 1, 1)], 10, norms=(30.0, 30.4, 31.0), pixels=3072, dfils=(0.5, 0.4, 0.7))
    assert all_of.identification == pytest.approx(0.389144, abs=1e-6)
    assert all_of.no_prior_psnr_db == pytest.approx(no_prior_psnr(mu=1, norm=30.4, pixels=3072))
    assert (all_of.dfil, all_of.mse_floor) == (0.7, pytest.approx(1 / 0.49))  # of the most exposed record
    said = all_of.sentences()
    assert len(said) == 3
    assert [assumption in line for assumption, line in zip(ASSUMPTIONS.values(), said, strict=True)] == [True] * 3
    nothing = ceilings([], 10, norms=(30.0,), pixels=3072)
    assert (nothing.identification, nothing.no_prior_psnr_db, nothing.dfil, nothing.mse_floor) == (1.0, None, None, None)
    assert nothing.sentences()[0].startswith("Identification among 10 ≤ 1 (ceiling vacuous)")
    sampled = ceilings([releases(1, 0.1, 10)], 10, norms=(30.0,), pixels=3072)
    assert sampled.no_prior_psnr_db is None  # the formula is for releases that hold the record
    client = Claim(GaussianDpEvent(1.0), "server", "client", "zero-out (…)", "…")
    assert ceilings([client], 10, norms=(30.0,), pixels=3072).no_prior_psnr_db is None


def test_baselines_must_be_probabilities() -> None:
    with pytest.raises(ValueError, match=r"baseline must be in \(0, 1\], got 0"):
        success_ceiling(GaussianDpEvent(1.0), 0.0)


# --- the game that is measured ---


@pytest.mark.parametrize("z", [0.3, 0.5, 1.0])
def test_the_ceiling_under_sampling_is_for_a_record_that_was_drawn(z: float) -> None:
    """Whoever sees the round knows the best of 10 orthonormal candidates as often as without sampling: q = 0.1 is no part of the game."""
    here = world(DPSGD(1.0, z), clients=3, rounds=1, training={"batch_size": 2, "sampling": "poisson"})
    sampled = DPSGD(1.0, z).claim(here, (20, 20, 20))
    assert sampled is not None
    x = np.linspace(-12, 20, 20_001)
    success = float(np.trapezoid(norm.pdf(x - 1 / z) * norm.cdf(x) ** 9, x))
    ceiling = reconstruction_ceiling(sampled, 10)
    assert ceiling == pytest.approx(float(norm.cdf(norm.ppf(0.1) + 1 / z)))
    assert success_ceiling(sampled.event, 0.1) < success < ceiling
    assert unknown(sampled.event) is None


def test_other_rounds_of_a_drawn_record_stay_sampled() -> None:
    here = world(DPSGD(), clients=3, rounds=4, training={"batch_size": 5, "sampling": "poisson", "algorithm": "fedavg"})
    found = DPSGD().claim(here, (20, 20, 20))
    assert found is not None
    sampled = PoissonSampledDpEvent(0.25, GaussianDpEvent(1.0))
    assert found.event == SelfComposedDpEvent(sampled, 16)
    assert found.attacked == ComposedDpEvent([SelfComposedDpEvent(GaussianDpEvent(1.0), 4), SelfComposedDpEvent(sampled, 12)])
    alone = claim(SelfComposedDpEvent(GaussianDpEvent(1.0), 4))
    assert reconstruction_ceiling(alone, 100) < reconstruction_ceiling(found, 100) < 1
    shuffled = DPSGD().claim(world(DPSGD(), clients=3, rounds=4), (20, 20, 20))
    assert shuffled is not None
    assert shuffled.attacked is None


def test_of_several_guarantees_the_least_ceiling_holds() -> None:
    record, client = releases(1, 1, 1), Claim(GaussianDpEvent(2.0), "server", "client", "zero-out (…)", "…")
    both = ceilings([record, client], 10)
    assert both.identification == min(reconstruction_ceiling(record, 10), reconstruction_ceiling(client, 10)) < 0.39
    assert ceilings([record], 10).identification > both.identification
