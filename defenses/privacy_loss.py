"""From a privacy event to ε(δ): privacy loss distributions where they are fast, Rényi DP where they are not or where nothing else is known.

Source: privacy loss distributions (PLD) of google/differential-privacy, Doroshenko et al., 2022, arXiv:2207.04380; Rényi DP (RDP),
Mironov, 2017, arXiv:1702.07476; Gaussian DP, Balle and Wang, 2018, arXiv:1805.06530, theorem 8, and Dong et al., 2019, arXiv:1905.02383.

A Laplace release of a vector is accounted as one of a number with the vector's L1 sensitivity, which dominates it: splitting a shift
over two coordinates lowers δ(ε) at every ε.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Literal

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from defenses.distributed import ORDERS, Curve, SkellamDpEvent, epsilon_of, skellam_curve

logging.getLogger("absl").setLevel(logging.ERROR)  # an order at which dp-accounting's series does not converge is left out: still a bound

DISCRETIZATION = 1e-3  # of the privacy loss; 1e-4 gives the same ε to 0.4 % or better and takes about ten times longer
SMALLEST_PLD_NOISE = 0.1  # noise multiplier of the whole composition below which the grid of privacy losses gets too long
LARGEST_PLD_EPSILON = 2000.0  # RDP bound above which it does; either limit keeps PLD under about three seconds


Accountant = Literal["exact", "PLD", "RDP", "pure"]
"""How ε was computed: ``exact`` by the closed form of Gaussian DP, where all releases have plain Gaussian noise; ``PLD`` is tight,
``RDP`` looser, both upper bounds; ``pure`` sums the releases' ε, for any δ."""


def epsilon(event: DpEvent, delta: float) -> tuple[float, Accountant]:
    """ε(δ) of an event that is not :func:`unknown`, and the accountant that gave it.

    Add/remove is the relation for zero-out too: for Gaussian releases, Poisson-sampled or not, the two have the same dominating pair.
    """
    curve = integer_curve(event)
    if curve is not None:
        return epsilon_of(curve, delta), "RDP"
    if (mu := gaussian_mu(event)) is not None:
        return gaussian_dp_epsilon(mu, delta), "exact"
    bound = float(RdpAccountant(None, NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event).get_epsilon(delta))
    if too_long_for_pld(event) or bound > LARGEST_PLD_EPSILON:
        pure = pure_epsilon(event)
        return (bound, "RDP") if bound <= pure else (pure, "pure")
    return float(pld(event).get_epsilon(delta)), "PLD"


def pure_epsilon(event: DpEvent) -> float:
    """The sum of the releases' ε where each has Laplace noise and so needs no δ, else ∞."""
    found = list(leaves(event))
    if any(type(leaf) is not LaplaceDpEvent for leaf, _ in found):
        return math.inf
    return sum(count / noise_multiplier(leaf) for leaf, count in found)


def too_long_for_pld(event: DpEvent) -> bool:
    """Whether so little noise is left that the grid of privacy losses gets too long."""
    mu = gaussian_mu(event)
    smallest = min(noise_multiplier(leaf) for leaf, _ in leaves(event)) if mu is None else 1 / mu
    return smallest < SMALLEST_PLD_NOISE * (1 - 1e-9)


def pld(event: DpEvent) -> PLDAccountant:
    """The privacy loss distribution of an event, under add/remove."""
    return PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, DISCRETIZATION).compose(event)


def unknown(event: DpEvent) -> str | None:
    """What in the event is no release with known noise, or None.

    Known are Gaussian noise, Poisson-sampled or not, Laplace noise, and Skellam noise if all releases have it.
    """
    found = list(leaves(event))
    integers = sum(type(leaf) is SkellamDpEvent for leaf, _ in found)
    if 0 < integers < len(found):
        return "Skellam releases together with others"
    for leaf, count in found:
        sampled = type(leaf) is PoissonSampledDpEvent
        if type(leaf.event if sampled else leaf) is not GaussianDpEvent and type(leaf) not in (LaplaceDpEvent, SkellamDpEvent):
            return f"the event {leaf}"
        if type(leaf) is SkellamDpEvent and not all(0 < number < math.inf for number in (leaf.l2, leaf.l1, leaf.variance)):
            return f"the event {leaf}"
        if not 0 < noise_multiplier(leaf) < math.inf:
            return f"the noise multiplier {noise_multiplier(leaf)}"
        if sampled and not 0 < leaf.sampling_probability <= 1:
            return f"the sampling probability {leaf.sampling_probability}"
        if count < 1:
            return f"{count} releases"
    return None if found else "no release at all"


def leaves(event: DpEvent, count: int = 1) -> Iterator[tuple[DpEvent, int]]:
    """The elementary releases of a composition, each with how often it happens."""
    if type(event) is SelfComposedDpEvent:
        yield from leaves(event.event, count * event.count)
    elif type(event) is ComposedDpEvent:
        for part in event.events:
            yield from leaves(part, count)
    else:
        yield event, count


def noise_multiplier(leaf: DpEvent) -> float:
    """z of a release, Poisson-sampled or not: its noise in units of the sensitivity."""
    return float((leaf.event if type(leaf) is PoissonSampledDpEvent else leaf).noise_multiplier)


def integer_curve(event: DpEvent) -> Curve | None:
    """RDP of all releases together at ``defenses.distributed.ORDERS`` if each has Skellam noise, else None."""
    found = list(leaves(event))
    if any(type(leaf) is not SkellamDpEvent for leaf, _ in found):
        return None
    return sum((count * skellam_curve(leaf) for leaf, count in found), 0 * ORDERS)


def gaussian_mu(event: DpEvent) -> float | None:
    """μ = √(Σ 1/z²) over all releases if each is a plain Gaussian, else None; the composition is exactly μ-Gaussian-DP."""
    found = list(leaves(event))
    if any(type(leaf) is not GaussianDpEvent for leaf, _ in found):
        return None
    return math.sqrt(sum(count / noise_multiplier(leaf) ** 2 for leaf, count in found))


def gaussian_dp_delta(mu: float, epsilon: float) -> float:
    """δ(ε) = Φ(−ε/μ + μ/2) − e^ε·Φ(−ε/μ − μ/2), exact for μ-Gaussian DP."""
    return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2)))


def gaussian_dp_epsilon(mu: float, delta: float) -> float:
    """The smallest ε ≥ 0 with δ(ε) ≤ delta, exact for μ-Gaussian DP."""
    if gaussian_dp_delta(mu, 0.0) <= delta:
        return 0.0
    enough = mu**2 / 2 + mu * float(norm.isf(delta)) + 1.0  # there the first term of δ(ε) alone is below delta
    return float(brentq(lambda epsilon: gaussian_dp_delta(mu, epsilon) - delta, 0.0, enough, xtol=1e-12, rtol=1e-14))
