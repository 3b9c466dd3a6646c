"""Intervals against scipy, closed forms and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments import statistics
from experiments.statistics import binomial_rate, bootstrap_difference, bootstrap_mean, clustered_rate, holm, sign_flip_p


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 50, 0.0, 0.071), (0, 100, 0.0, 0.036), (0, 200, 0.0, 0.018), (0, 500, 0.0, 0.0074), (20, 200, 0.062, 0.150), (50, 50, 0.929, 1.0)],
)
def test_clopper_pearson_test_vectors(successes: int, trials: int, low: float, high: float) -> None:
    rate = binomial_rate(successes, trials)
    assert rate.rate == successes / trials
    assert rate.low == pytest.approx(low, abs=6e-4)
    assert rate.high == pytest.approx(high, abs=6e-4)


def test_clopper_pearson_is_the_beta_quantile() -> None:
    rate = binomial_rate(7, 32)
    assert (rate.low, rate.high) == pytest.approx((stats.beta.ppf(0.025, 7, 26), stats.beta.ppf(0.975, 8, 25)))


def test_rate_of_single_records_is_clopper_pearson() -> None:
    assert clustered_rate([True] * 7 + [False] * 25, range(32), rng=rng()) == binomial_rate(7, 32)


def test_rate_of_records_that_share_an_upload_is_never_the_narrower_one() -> None:
    hits, clusters = [True] * 20 + [False] * 60, list(np.repeat(np.arange(8), 10))  # two uploads leak whole, six not at all
    rate, records, uploads = clustered_rate(hits, clusters, rng=rng()), binomial_rate(20, 80), bootstrap_mean(hits, clusters, rng=rng())
    assert rate.rate == 0.25
    assert rate.low <= max(0.0, uploads.low)
    assert rate.high >= max(uploads.high, binomial_rate(2, 8).high)
    assert rate.high - rate.low > 1.5 * (records.high - records.low)
    even = clustered_rate([True, False] * 40, clusters, rng=rng())  # uploads without any spread
    counted = 80 * (stats.t.ppf(0.975, 79) / stats.t.ppf(0.975, 7)) ** 2  # Korn and Graubard, 1998, section 2: of 80 records in 8 uploads
    ends = stats.beta.ppf(0.025, counted / 2, counted / 2 + 1), stats.beta.ppf(0.975, counted / 2 + 1, counted / 2)
    assert (even.low, even.high) == pytest.approx(ends)
    assert clustered_rate([True] * 8, ["only"] * 8, rng=rng()).low == 0.0


def test_a_victim_that_is_scored_again_is_no_new_one() -> None:
    of = list(np.repeat(np.arange(18), 4))
    for each in ([True] * 18, [False] * 18, [True] * 5 + [False] * 13):
        again, once = clustered_rate(list(np.repeat(each, 4)), of, rng=rng(), victims=of), binomial_rate(sum(each), 18)
        assert again.rate == once.rate
        assert again.low <= once.low + 1e-12
        assert again.high >= once.high - 1e-12
    assert (again.low, again.high) == pytest.approx((once.low, once.high), abs=0.05)
    assert clustered_rate([True] * 72, of, rng=rng(), victims=of).low == pytest.approx(0.025 ** (1 / 18))  # not the 1/72 of 72 victims
    assert 0.025 ** (1 / 18) < clustered_rate([True] * 72, of, rng=rng()).low < 0.025 ** (1 / 72)


def test_few_uploads_of_many_records_do_not_show_that_a_rate_is_small() -> None:
    """384 records, none identified: two clusters say hardly anything, and more clusters ever more, up to Clopper and Pearson's."""
    highs = [clustered_rate([False] * 384, list(np.arange(384) % groups), rng=rng()).high for groups in (1, 2, 3, 8, 96, 384)]
    assert highs[0] == 1.0
    assert highs[1] == pytest.approx(1 - 0.025 ** (1 / (384 * (1.9662 / 12.7062) ** 2)), abs=1e-3)  # tables of t
    assert highs == sorted(highs, reverse=True)
    assert highs[-1] == binomial_rate(0, 384).high


def test_records_that_share_their_fate_are_not_as_many_as_they_are() -> None:
    """Eight uploads of 50, all or nothing in each: the interval of eight, and not of 400; without a common fate that of about 400."""
    uploads = [True, True, False, False, False, False, False, False]
    of = list(np.repeat(np.arange(8), 50))
    whole = clustered_rate(list(np.repeat(uploads, 50)), of, rng=rng())
    eight, many = binomial_rate(2, 8), binomial_rate(100, 400)
    assert whole.low <= eight.low
    assert whole.high >= eight.high
    assert eight.high - eight.low > 5 * (many.high - many.low)
    spread = clustered_rate([place % 4 == 0 for place in range(400)], of, rng=rng())
    assert spread.high - spread.low < 1.5 * (many.high - many.low)


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "rate", "correlation", "least"), [(8, 0.05, 0.1, 0.89), (3, 0.2, 0.6, 0.8), (12, 0.2, 0.1, 0.94)])
def test_coverage_of_rates_of_records_that_share_their_fate(
    clusters: int, rate: float, correlation: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty records a cluster, beta-binomial. Clopper and Pearson's interval over all records covers .75 of the second."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    draw, covered, runs = rng(4), 0, 400
    for _ in range(runs):
        shares = draw.beta(rate * (1 / correlation - 1), (1 - rate) * (1 / correlation - 1), clusters)
        hits = draw.random((clusters, 50)) < shares[:, None]
        found = clustered_rate(hits.flatten().tolist(), list(np.repeat(np.arange(clusters), 50)), rng=rng())
        covered += found.low <= rate <= found.high
    assert covered / runs >= least


def test_bootstrap_of_many_single_records_is_the_t_interval() -> None:
    values = rng(1).normal(20, 3, size=400)
    interval = bootstrap_mean(list(values), range(400), rng=rng())
    want = stats.t.interval(0.95, 399, loc=values.mean(), scale=stats.sem(values))
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(want, abs=0.02)


def test_records_of_one_upload_are_one_observation() -> None:
    uploads = rng(2).normal(size=20)
    once = bootstrap_mean(list(uploads), range(20), rng=rng())
    copied = bootstrap_mean(list(np.repeat(uploads, 8)), list(np.repeat(np.arange(20), 8)), rng=rng())
    naive = bootstrap_mean(list(np.repeat(uploads, 8)), range(160), rng=rng())
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert copied.high - copied.low > 2.5 * (naive.high - naive.low)  # √8 times wider


def test_clusters_of_unequal_size_weigh_by_their_records() -> None:
    interval = bootstrap_mean([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"], rng=rng())
    error = math.sqrt(1 / 2 * ((5.0 - 2.0) ** 2 + (1.0 - 2.0) ** 2))  # the means without a and without b, beside that of all
    assert interval.mean == 2.0
    assert (interval.low, interval.high) == pytest.approx((2 - 12.706 * error, 2 + 12.706 * error), rel=1e-4)


@pytest.mark.parametrize("clusters", [2, 3, 4, 5])
def test_few_clusters_have_students_interval_of_their_means(clusters: int) -> None:
    means = rng(10).normal(5, 2, size=clusters)
    interval = bootstrap_mean(list(np.repeat(means, 4)), list(np.repeat(np.arange(clusters), 4)), rng=rng())
    want = stats.t.interval(0.95, clusters - 1, loc=means.mean(), scale=stats.sem(means))
    assert interval.low <= want[0] + 1e-9
    assert interval.high >= want[1] - 1e-9
    assert (interval.low, interval.high) == pytest.approx(want, abs=0.3 * (want[1] - want[0]))  # nor much wider


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(3,) * 2, (3,) * 3, (3,) * 4, (3,) * 5, (3,) * 6, (1, 3), (1, 2, 4), (1, 2, 4, 8), (1, 1, 8), (1, 1, 1, 1, 12)], ids=str
)
def test_coverage_of_two_to_six_clusters_of_any_size_is_about_95_percent(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    draw, of, hits, runs = rng(3), np.repeat(np.arange(len(sizes)), sizes), 0, 1000
    for _ in range(runs):
        values = draw.normal(size=len(sizes))[of] + draw.normal(size=len(of))
        interval = bootstrap_mean(list(values), list(of), rng=rng())
        hits += interval.low <= 0 <= interval.high
    one_rules = max(sizes) >= 8 * min(sizes)  # then there are fewer degrees of freedom than clusters
    assert hits / runs == pytest.approx(0.95, abs=0.045 if one_rules else 0.025)  # 3.6 standard errors of the simulation


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("clusters", [8, 16])
def test_coverage_is_about_95_percent(clusters: int, skewed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    draw, hits, runs = rng(3), 0, 600
    for _ in range(runs):
        effect = draw.gamma(2.0, size=clusters) - 2.0 if skewed else draw.normal(size=clusters)
        values = np.repeat(effect, 3) + 0.5 * draw.normal(size=3 * clusters)
        interval = bootstrap_mean(list(values), list(np.repeat(np.arange(clusters), 3)), rng=draw)
        hits += interval.low <= 0 <= interval.high
    assert hits / runs == pytest.approx(0.95, abs=0.06 if skewed else 0.025)


def test_one_cluster_says_nothing_of_the_spread() -> None:
    interval = bootstrap_mean([1.0, 2.0, 3.0], ["a", "a", "a"], rng=rng())
    assert (interval.mean, interval.low, interval.high) == (2.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="must hold at least one score"):
        bootstrap_mean([], [], rng=rng())


def test_pairing_removes_what_the_victims_share() -> None:
    victims = rng(4).normal(20, 5, size=30)
    defended = victims - 1 + rng(5).normal(0, 0.2, size=30)
    paired = bootstrap_difference(list(defended), list(victims), range(30), rng=rng())
    assert paired.mean == pytest.approx((defended - victims).mean())
    assert -1.2 < paired.low < paired.high < -0.8
    same = bootstrap_difference(list(victims), list(victims), range(30), rng=rng())
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="zip"):
        bootstrap_difference([1.0], [1.0, 2.0], ["a"], rng=rng())


def test_the_same_generator_gives_the_same_interval() -> None:
    values = list(rng(6).normal(size=12))
    assert bootstrap_mean(values, range(12), rng=rng(7)) == bootstrap_mean(values, range(12), rng=rng(7))


def test_sign_flips_match_scipy_and_enumeration() -> None:
    values = rng(8).normal(0.5, 1, size=10)
    exact = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(list(values), range(10)) == pytest.approx(exact)
    assert sign_flip_p([1.0] * 8, range(8)) == 2 / 2**8
    assert sign_flip_p([1.0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]) == 2 / 2**2
    assert sign_flip_p([0.0] * 5, range(5)) == 1.0


def test_sign_flips_of_many_clusters_are_counted_and_not_drawn() -> None:
    """However small: of 40 that agree one in 2^39, which no draw of 10,000 tells from one in 10,000."""
    assert sign_flip_p([1.0] * 40, range(40)) == pytest.approx(2 / 2**40)
    assert sign_flip_p([0.0] * 40, range(40)) == 1.0
    heads = [1.0] * 33 + [-1.0] * 17
    assert sign_flip_p(heads, range(50)) == pytest.approx(stats.binomtest(33, 50).pvalue, rel=1e-9)
    ten = list(rng(8).normal(0.5, 1, size=16))
    exact = stats.permutation_test((ten,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert exact <= sign_flip_p(ten, range(16)) <= exact + 0.002
    many = rng(9).normal(0.3, 1, size=40)
    assert sign_flip_p(list(many), range(40)) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    sure = rng(10).normal(3.0, 1, size=150)
    assert sign_flip_p(list(sure), range(150)) < 1e-30


def test_holm_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
