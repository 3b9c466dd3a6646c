"""How often any attacker can succeed at reconstruction under a claim: the ceiling beside which a measured success is printed.

Source: reconstruction robustness (ReRo), Balle, Cherubin and Hayes, 2022, arXiv:2201.04845; its bound through the trade-off function,
Hayes, Mahloujifar and Balle, 2023, arXiv:2302.07225. With P the releases without the unit, Q those with it, and κ the success of
the best guess that ignores them:

    γ(κ) = sup{Q(E) : P(E) ≤ κ} = min_ε κ·e^ε + δ(ε)

For T plain Gaussian releases this is γ = Φ(Φ⁻¹(κ) + √T/z), exactly. For the others every ε gives a valid bound and the least over a
grid is taken; the grid includes negative ε, without which the bound is loose where γ is large.
Deviations: δ(ε) is the larger of the two directions of adjacency, so that γ may be larger than the paper's, never smaller.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from defenses.privacy_loss import gaussian_mu, pld, too_long_for_pld, unknown
from simulator.defense import Claim

LOWEST_EPSILON = -20.0  # there κ·e^ε + δ(ε) exceeds its infimum by 2e-9 at most
GRID = 2001


def reconstruction_ceiling(claim: Claim | None, candidates: int) -> float:
    """The largest probability with which any attacker names the true one of ``candidates`` equally likely ones.

    Valid against the claim's own adversary, its unit and adjacency, and an attacker who knows everything but the unit's data. Above
    0.99 it says nothing: print "ceiling vacuous".

    Args:
        claim: what was certified (``Guarantee.claim``); None, or what the accountant does not know, gives 1: so does secure
            aggregation alone, which releases the exact sum.
        candidates: N, so that κ = 1/N.

    Raises:
        ValueError: fewer than one candidate.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be ≥ 1, got {candidates}. Use the number that the attacker chooses from.")
    if claim is None or unknown(claim.event):
        return 1.0
    baseline = 1 / candidates
    mu = gaussian_mu(claim.event)
    if mu is not None:
        return float(norm.cdf(norm.ppf(baseline) + mu))
    if too_long_for_pld(claim.event):
        return 1.0  # vacuous anyway with this little noise, and always valid
    grid = np.linspace(LOWEST_EPSILON, np.log(candidates), GRID)  # beyond ln N the first term alone exceeds 1
    deltas = np.asarray(pld(claim.event).get_delta(grid))
    return float(min(1.0, (baseline * np.exp(grid) + deltas).min()))
