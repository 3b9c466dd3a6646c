"""The Skellam noise that many clients add together: how it is drawn, and its Rényi DP.

All in units of the grid, on which the clients' vectors and noise are integers: l2 and l1 bound one client's integers, ``variance`` is
that of the noise in the sum.

Source: Skellam, Agarwal, Kairouz and Liu, 2021, arXiv:2110.04995, theorem 3.5; conditional rounding, Kairouz, Liu and Steinke, 2021,
arXiv:2102.06387, proposition 22; both as in google-research/distributed_dp. From RDP to (ε, δ): Canonne, Kamath and
Steinke, 2020, arXiv:2004.00010, proposition 12.
Deviations: none known. Only whole orders from 2 on are used, for which the bound on Skellam holds (google-research/distributed_dp rounds
orders down, too). Where little noise is left the best order lies between 1 and 2, and ε is well above that of a Gaussian at all orders.
What is known at whole orders gives nothing there: (α − 1)·RDP(α) is convex and 0 at α = 1, which bounds RDP between 1 and 2 by RDP(2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from dp_accounting import DpEvent

Curve = npt.NDArray[np.float64]

ORDERS: Curve = np.array([*range(2, 257), 512, 1024, 2048], float)
"""Rényi orders; α of the curves below."""
ALL_ORDERS: Curve = np.union1d(ORDERS, 1 + np.logspace(-4, 3, 701))
"""Orders above 1 so densely that a Gaussian's ε is within 1e-4 of that at all of them: to tell what whole orders cost."""
BETA = math.exp(-0.5)
"""Chance, at most, that a rounding has to be repeated because the rounded vector is too long."""


LARGEST_VARIANCE = 2.0**44
"""Of one client's noise, in squared units of the grid. numpy's Poisson numbers are built from floats: above 2^46 their spread is off, and
above 2^53 all are even, so that the sum's parity is the secret's."""


def skellam(variance: float, shape: tuple[int, ...], rng: torch.Generator) -> npt.NDArray[np.int64]:
    """Independent Skellam integers, symmetric about 0: the difference of two Poisson numbers of mean ``variance``/2."""
    numpy_rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
    return np.asarray(numpy_rng.poisson(variance / 2, shape) - numpy_rng.poisson(variance / 2, shape), np.int64)


@dataclass(frozen=True)
class SkellamDpEvent(DpEvent):  # type: ignore[misc]  # dp-accounting has no types
    """One release of a sum of integer vectors with Skellam noise.

    Attributes:
        l2: the most that one unit changes the sum, in L2, in units of the grid.
        l1: the same in L1.
        variance: of the noise on each coordinate of the sum, in squared units of the grid; only that of honest clients counts.
    """

    l2: float
    l1: float
    variance: float

    @property
    def noise_multiplier(self) -> float:
        """The noise's standard deviation in units of the sensitivity."""
        return math.sqrt(self.variance) / self.l2


def rounded_norm(norm: float, coordinates: int, beta: float = BETA) -> float:
    """The L2 norm, in units of the grid, that conditional stochastic rounding of a vector of ``norm`` keeps to (proposition 22).

    Independent rounding exceeds it with probability ``beta`` at most, so that few repetitions find one that does not; beta = 0 gives
    what no rounding can exceed.
    """
    certain = norm + math.sqrt(coordinates)
    if not beta:
        return certain
    likely = norm**2 + coordinates / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + math.sqrt(coordinates) / 2)
    return min(math.sqrt(likely), certain)


def reach(chance: float) -> float:
    """Standard deviations from 0 beyond which a sub-Gaussian number is with probability ``chance`` at most."""
    return math.sqrt(2 * math.log(2 / chance))


def l1_of(l2: float, coordinates: int) -> float:
    """The largest L1 norm of an integer vector with L2 norm ``l2``: |k| ≤ k² for integers."""
    return min(l2 * math.sqrt(coordinates), l2**2)


def skellam_curve(event: SkellamDpEvent) -> Curve:
    """RDP of one Skellam release at :data:`ORDERS`."""
    squared, mu = event.l2**2, event.variance
    beyond = np.minimum(((2 * ORDERS - 1) * squared + 6 * event.l1) / (4 * mu**2), 3 * event.l1 / (2 * mu))
    return np.asarray(ORDERS * squared / (2 * mu) + beyond)


def gaussian_curve(noise_multiplier: float, orders: Curve = ORDERS) -> Curve:
    """RDP of one Gaussian release: what distributed noise is compared with."""
    return orders / (2 * noise_multiplier**2)


def epsilon_of(curve: Curve, delta: float, orders: Curve = ORDERS) -> float:
    """The least ε(δ) over the orders of the curve; at least 0."""
    return max(0.0, float(np.min(curve + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1))))


def success_of(curve: Curve, baseline: float) -> float:
    """The most that a guess succeeds at, if it succeeds at ``baseline`` without the release: min (κ·e^RDP)^((α−1)/α), Balle et al. 2022."""
    exponents = (ORDERS - 1) / ORDERS * (math.log(baseline) + curve)
    return min(1.0, math.exp(min(0.0, float(exponents.min()))))
