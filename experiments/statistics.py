"""Intervals that say how far a number from these victims holds for the next ones.

Records of one upload are attacked together and share its fate, and a record that is sent again is no new victim, so that scores are
resampled by the uploads that share one (a *cluster*), never by the record.

What an interval holds: other victims of the same data under the initial models of the run's seeds. What it does not: other initial models.
All uploads of a seed share one, so that their common luck is in every cluster of the seed and in no resample. Two or three seeds do
not tell its variance (Student's t at one or two degrees of freedom is 13 or 4 standard errors wide), so that the range of the seeds'
means is printed beside the interval instead: see :func:`experiments.groups.seed_means`.

Sources: expanded percentile bootstrap: Hesterberg, 2015 (arXiv:1411.5279). Jackknife of a ratio: Cochran, 1977, section 6.17; as the
variance for few clusters: MacKinnon, Nielsen and Webb, 2023 (arXiv:2205.03285).
Exact binomial interval: Clopper and Pearson, 1934. Step-down correction: Holm, 1979.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
"""Coverage of every interval."""

RESAMPLES = 10_000
"""Bootstrap resamples: the ends of an interval then move by about 1 % of its width between seeds."""


ENUMERATED, GRID = 13, 2**15
"""Clusters of which all sign flips are counted, and into how many steps the sum of more is divided."""

FEW_CLUSTERS = 8
"""Below so many clusters the bootstrap alone is too narrow, as a resample's mean cannot leave the range of the data: it covered 53 % of
the time at 2, 71 % at 3, 90 % at 4 and 93 % at 6."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the ends are ∓∞ where a single cluster says nothing of the spread."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Rate:
    """A share of successes with its 95 % interval."""

    rate: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], clusters: Sequence[Hashable], *, rng: np.random.Generator) -> Interval:
    """Return the mean of ``values`` and its bootstrap interval over whole clusters.

    The quantiles are widened from normal to Student's t and by √(n/(n−1)), which plain percentiles lack for few clusters. Of fewer than
    :data:`FEW_CLUSTERS` clusters, each end is the farther one of the bootstrap's and of Student's t.

    Args:
        values: one score a record.
        clusters: which cluster each record belongs to.

    Raises:
        ValueError: there are no values.
    """
    sums, counts = _by_cluster(values, clusters)
    mean, groups = float(sums.sum() / counts.sum()), len(sums)
    if groups == 1:
        return Interval(mean, -math.inf, math.inf)
    drawn = _resamples(groups, rng)
    means = (drawn @ sums) / (drawn @ counts)
    tail = stats.norm.cdf(stats.t.ppf((1 - CONFIDENCE) / 2, groups - 1) * math.sqrt(groups / (groups - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    margin = _student(groups) * _jackknife(sums, counts) if groups < FEW_CLUSTERS else 0.0
    return Interval(mean, min(float(low), mean - margin), max(float(high), mean + margin))


def bootstrap_difference(
    values: Sequence[float], reference: Sequence[float], clusters: Sequence[Hashable], *, rng: np.random.Generator
) -> Interval:
    """Return the mean of ``values − reference``, paired record by record, and its bootstrap interval over whole clusters."""
    return bootstrap_mean([value - other for value, other in zip(values, reference, strict=True)], clusters, rng=rng)


def sign_flip_p(differences: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Return the two-sided p-value of paired differences under the hypothesis that they are symmetric about zero.

    The share of all ways to flip the signs of whole clusters whose sum is as far from 0 as the observed one: counted for up to 13
    clusters; of more the distribution of the sum is convolved cluster by cluster on a grid (Pagano and Tritchler, 1983), and what the
    rounding to the grid may hide is counted as farther.
    """
    signed, _ = _by_cluster(differences, clusters)
    sums, observed = np.abs(signed), abs(signed.sum())
    if not sums.any():
        return 1.0
    if len(sums) <= ENUMERATED:
        signs = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
        return float(np.mean(np.abs(signs @ sums) >= observed * (1 - 1e-12)))  # a flip that equals the observation is not lost to rounding
    steps = np.rint(sums / sums.sum() * GRID).astype(int)
    odds = np.zeros(2 * steps.sum() + 1)  # of a sum of flipped steps, from the lowest to the highest
    odds[steps.sum()] = 1.0
    for step in steps:
        odds = (np.roll(odds, step) + np.roll(odds, -step)) / 2
    within = observed / sums.sum() * GRID - 0.5 * len(sums)
    return float(min(1.0, odds[np.abs(np.arange(len(odds)) - steps.sum()) >= within].sum()))


@cache
def binomial_rate(successes: int, trials: int) -> Rate:
    """Return the share of successes and its exact (Clopper–Pearson) two-sided interval.

    Trials are taken as independent; for records that share an upload see :func:`clustered_rate`.
    """
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="exact")
    return Rate(successes / trials, float(interval.low), float(interval.high))


def clustered_rate(
    hits: Sequence[bool], clusters: Sequence[Hashable], *, rng: np.random.Generator, victims: Sequence[Hashable] | None = None
) -> Rate:
    """Return the share of hits and an interval that allows for records of one upload sharing its fate.

    With one record a cluster it is Clopper–Pearson's. Otherwise each end is the farther one of Clopper–Pearson over victims
    and of the bootstrap over whole clusters: the first takes victims for independent, the second sees no spread at 0 or 100 %.
    Victims of one cluster who share its fate are not as many as they are: the n of the first count as the effective number p(1 − p) over
    the jackknife's variance, n at most, times (t of n − 1 degrees of freedom over t of those of the clusters)² (Korn and Graubard, 1998).
    A single cluster says nothing of the spread: its interval is [0, 1]. Neither does one rate of 0 or 100 % over several clusters:
    there victims are taken for independent within their cluster. Of beta-binomial rates it covers 91 % (8 clusters of 50, rate 5 %,
    intraclass correlation .1) and 84 % (3 of 50, 20 %, .6), but 77 % where rare hits share their fate (8 of 50, 5 %, .3).

    Args:
        hits: one for each score.
        clusters: which cluster each belongs to.
        victims: whose score each is: as many trials as there are of these, however often they were scored. None: all are different.
    """
    groups = len(set(clusters))
    if groups == len(hits):
        return binomial_rate(sum(hits), len(hits))
    if groups == 1:
        return Rate(sum(hits) / len(hits), 0.0, 1.0)
    distinct = len(hits) if victims is None else len(set(victims))
    freedom = min(1.0, _student(distinct) / _student(groups)) if distinct > 1 else 1.0
    share, error = sum(hits) / len(hits), _jackknife(*_by_cluster([float(hit) for hit in hits], clusters))
    effective = min(distinct, share * (1 - share) / error**2) if error else distinct
    rate = _share(share, effective * freedom**2)
    between = bootstrap_mean([float(hit) for hit in hits], clusters, rng=rng)
    return Rate(rate.rate, max(0.0, min(rate.low, between.low)), min(1.0, max(rate.high, between.high)))


FEWEST_PAIRS = 3
"""Below so many pairs Student's interval is not printed: with one degree of freedom it is 13 standard errors wide to each side, which of
a few points between two seeds makes more than there are."""


def paired_t(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences and Student's interval: for a few seeds, each of which is one number."""
    count, mean = len(differences), math.fsum(differences) / len(differences)
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1) / count)
    margin = _student(count) * spread
    return Interval(mean, mean - margin, mean + margin)


def difference(one: Interval, other: Interval) -> Interval:
    """Return the interval of ``one − other`` from the intervals of both, as if they were independent.

    Method of variance estimates recovery (Zou and Donner, 2008; for rates Newcombe, 1998). Too wide for two arms of the same
    victims, which go up and down together.
    """
    mean = one.mean - other.mean
    low = math.hypot(one.mean - one.low, other.high - other.mean)
    high = math.hypot(one.high - one.mean, other.mean - other.low)
    return Interval(mean, mean - low, mean + high)


def above_chance(rate: float, chance: float) -> float:
    """A rate on the scale on which chance is 0 and certainty 1, so that rates with different chances may be compared."""
    return (rate - chance) / (1 - chance)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for having looked at all of them: below α, each one holds at family-wise error α."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _share(rate: float, trials: float) -> Rate:
    """Clopper–Pearson's interval of a share of so many trials, neither of which need be whole (Korn and Graubard, 1998)."""
    hits, tail = rate * trials, (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, hits, trials - hits + 1)) if rate > 0 else 0.0
    return Rate(rate, low, float(stats.beta.ppf(1 - tail, hits + 1, trials - hits)) if rate < 1 else 1.0)


def _jackknife(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """Standard error of the mean over all records, from leaving out each cluster in turn; of equal clusters, that of their means."""
    groups, records = len(sums), counts.sum()
    without = (sums.sum() - sums) / (records - counts)
    return math.sqrt((groups - 1) / groups * float(((without - sums.sum() / records) ** 2).sum()))


@cache
def _student(count: int) -> float:
    """The quantile of Student's t for so many numbers."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))


def _resamples(groups: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each resample holds each of ``groups`` clusters: drawn, or looked up if ``rng`` drew it in this state before."""
    drawn, after = _from_state(groups, type(rng.bit_generator), json.dumps(rng.bit_generator.state))
    rng.bit_generator.state = json.loads(after)
    return drawn


@lru_cache(maxsize=8)
def _from_state(groups: int, generator: type[Any], state: str) -> tuple[NDArray[np.float64], str]:
    """What a generator in this state draws, as float64 so that no product converts it again, and the state that this leaves."""
    bits = generator()
    bits.state = json.loads(state)
    drawn = np.random.Generator(bits).multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    return drawn.astype(np.float64), json.dumps(bits.state)


def _by_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sum and the number of values of each cluster."""
    if not len(values):
        raise ValueError("values must hold at least one score, got none. Report rows without trials as such.")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    of = np.array([number[cluster] for _, cluster in zip(values, clusters, strict=True)])
    sums = np.bincount(of, weights=np.asarray(values, dtype=np.float64))
    return sums.astype(np.float64), np.bincount(of).astype(np.float64)
