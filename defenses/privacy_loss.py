"""From a privacy event to ε(δ): privacy loss distributions where they are fast, Rényi DP where they are not.

Source: privacy loss distributions (PLD) of google/differential-privacy, Doroshenko et al., 2022, arXiv:2207.04380; Rényi DP (RDP),
Mironov, 2017, arXiv:1702.07476; Gaussian DP, Balle and Wang, 2018, arXiv:1805.06530, theorem 8, and Dong et al., 2019, arXiv:1905.02383.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

DISCRETIZATION = 1e-3  # of the privacy loss; 1e-4 gives the same ε to 0.4 % or better and takes about ten times longer
SMALLEST_PLD_NOISE = 0.1  # noise multiplier of the whole composition below which the grid of privacy losses gets too long
LARGEST_PLD_EPSILON = 2000.0  # RDP bound above which it does; either limit keeps PLD under about three seconds
RDP_ORDERS = (*(1 + i / 1000 for i in range(1, 100)), *(1 + i / 10 for i in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)


def epsilon(event: DpEvent, delta: float) -> tuple[float, Literal["PLD", "RDP"]]:
    """ε(δ) of an event that is not :func:`unknown`, and the accountant that gave it.

    Add/remove is the relation for zero-out too: for Gaussian releases, Poisson-sampled or not, the two have the same dominating pair.
    """
    orders = RDP_ORDERS if gaussian_mu(event) else None  # the many low ones matter for little noise, and are slow for sampled events
    bound = float(RdpAccountant(orders, NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event).get_epsilon(delta))
    if too_long_for_pld(event) or bound > LARGEST_PLD_EPSILON:
        return bound, "RDP"
    return float(pld(event).get_epsilon(delta)), "PLD"


def too_long_for_pld(event: DpEvent) -> bool:
    """Whether so little noise is left that the grid of privacy losses gets too long."""
    mu = gaussian_mu(event)
    smallest = min(noise_multiplier(leaf) for leaf, _ in leaves(event)) if mu is None else 1 / mu
    return smallest < SMALLEST_PLD_NOISE * (1 - 1e-9)


def pld(event: DpEvent) -> PLDAccountant:
    """The privacy loss distribution of an event, under add/remove."""
    return PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, DISCRETIZATION).compose(event)


def unknown(event: DpEvent) -> str | None:
    """What in the event is neither a Gaussian release nor a Poisson-sampled one with noise, or None."""
    found = list(leaves(event))
    for leaf, count in found:
        sampled = type(leaf) is PoissonSampledDpEvent
        if type(leaf.event if sampled else leaf) is not GaussianDpEvent:
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
    """z of a Gaussian release, Poisson-sampled or not."""
    return float((leaf.event if type(leaf) is PoissonSampledDpEvent else leaf).noise_multiplier)


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
