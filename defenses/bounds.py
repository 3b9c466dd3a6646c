"""How well any attacker can do under noise: the ceilings beside which a measured success is printed, each with what it assumes.

**Reconstruction robustness** (ReRo), against an attacker who knows everything but the unit's data and guesses among known candidates:
Balle, Cherubin and Hayes, 2022, arXiv:2201.04845; through the trade-off function, Hayes, Mahloujifar and Balle, 2023, arXiv:2302.07225.
With P the releases without the unit, Q those with it, and κ the success of the best guess that ignores them:

    γ(κ) = sup{Q(E) : P(E) ≤ κ} = min_ε κ·e^ε + δ(ε)

For T plain Gaussian releases this is γ = Φ(Φ⁻¹(κ) + √T/z), exactly. For the others every ε gives a valid bound and the least over a
grid is taken; the grid includes negative ε, without which the bound is loose where γ is large. Where only Rényi DP is known (Skellam
noise), γ = min_α (κ·e^RDP(α))^((α−1)/α) (Balle et al., 2022), which is looser.
T counts the releases of the unit's data behind what the attacker holds, his view, not those of the whole training, of which an attack on
an early round sees the least part: ``accounting.until`` cuts a claim off after the latest round of a view.
Deviations: δ(ε) is the larger of the two directions of adjacency, so that γ may be larger than the paper's, never smaller.

**No prior**, against an attacker who inverts a linear layer and knows nothing of pictures: Riess et al., 2024, arXiv:2402.12861. The best
unbiased guess from T releases of a clipped gradient row, which is a multiple of the record x, is N(x, (z·‖x‖)²/T·I), so that
P(MSE ≤ η) is a χ² probability. **Fisher information**, against an unbiased attacker: ``defenses.fisher``.
The last two say nothing of an attacker with a prior, who beats them; the first holds for him. They are a corridor, printed together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from dp_accounting import DpEvent, LaplaceDpEvent
from scipy.stats import chi2, norm

from defenses.distributed import success_of
from defenses.fisher import ERRORS
from defenses.privacy_loss import gaussian_mu, integer_curve, leaves, noise_multiplier, pld, too_long_for_pld, unknown
from simulator.defense import Claim

LOWEST_EPSILON = -20.0  # there κ·e^ε + δ(ε) exceeds its infimum by 2e-9 at most
GRID = 2001
VACUOUS = 0.99
"""A ceiling above this says nothing."""

ASSUMPTIONS = {
    "identification": (
        "attacker knows everything but the unit's data, the attacked round held the record for certain, and he picks among candidates that "
        "are equally likely beforehand (over several rounds: whose other candidates nobody holds, or the model tells of them too)"
    ),
    "no_prior_psnr_db": "attacker inverts a linear layer, unbiased, without any prior on records; one with a prior does better",
    "dfil": (
        f"attacker is unbiased; at the most exposed of the first attacked records, {ERRORS:g} standard errors of the estimate added on the "
        "scale of logarithms, at this model and from one release; one with a prior does better"
    ),
}
"""What each ceiling assumes: print it beside the figure."""


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of one arm, each None where it does not apply; :data:`ASSUMPTIONS` says what each one assumes.

    Attributes:
        identification: γ(1/N), the most that naming the true one of N candidates succeeds, in [0, 1]; 1 where nothing is certified.
        candidates: N.
        no_prior_psnr_db: median PSNR, in dB, of the best reconstruction without a prior.
        dfil: diameter-free Fisher information leakage of a release, root of the mean information on a pixel, the largest of the records.
        mse_floor: 1/dfil², the least mean squared error, per pixel in [0, 1]², of an unbiased attacker.
    """

    identification: float
    candidates: int
    no_prior_psnr_db: float | None = None
    dfil: float | None = None

    @property
    def mse_floor(self) -> float | None:
        """1/dfil²: above 1/12, guessing uniformly at random does better."""
        return None if not self.dfil else 1 / self.dfil**2

    def sentences(self) -> tuple[str, ...]:
        """One for each ceiling that applies: the figure and what it assumes."""
        vacuous = " (ceiling vacuous)" if self.identification > VACUOUS else ""
        said = [f"Identification among {self.candidates} ≤ {self.identification:.3g}{vacuous}: {ASSUMPTIONS['identification']}."]
        if self.no_prior_psnr_db is not None:
            said.append(f"Median PSNR without a prior ≤ {self.no_prior_psnr_db:.1f} dB: {ASSUMPTIONS['no_prior_psnr_db']}.")
        if self.dfil is not None:
            said.append(f"Fisher information leakage {self.dfil:.3g}, MSE ≥ {self.mse_floor or math.inf:.3g}: {ASSUMPTIONS['dfil']}.")
        return tuple(said)


def ceilings(
    claims: Sequence[Claim], candidates: int, *, norms: Sequence[float] = (), pixels: int = 0, dfils: Sequence[float] = ()
) -> Ceilings:
    """All ceilings of an arm, for an attacker who has every release that the claims count.

    Args:
        claims: what was certified, each of which bounds every attack, so that the least ceiling holds; may be none. For an attacker who
            sees less than the whole training: of ``accounting.certified`` on the world ``until`` the latest round that he sees.
        candidates: N.
        norms: of each attacked record as the first layer sees it, in units of a pixel: ‖x‖, or ‖x − mean‖ where the model normalizes.
        pixels: that a record has.
        dfils: of each attacked record, ``defenses.fisher.Trace.dfil`` at the upper end of its estimate.
    """
    found = [gaussian_mu(claim.event) for claim in claims if claim.unit == "record" and not unknown(claim.event)]
    mu = min((one for one in found if one is not None), default=None)
    psnrs = [] if mu is None else [no_prior_psnr(mu=mu, norm=one, pixels=pixels) for one in norms]
    return Ceilings(
        identification=min((reconstruction_ceiling(claim, candidates) for claim in claims), default=1.0),
        candidates=candidates,
        no_prior_psnr_db=median(psnrs) if psnrs else None,
        dfil=max(dfils, default=None),
    )


def reconstruction_ceiling(claim: Claim | None, candidates: int) -> float:
    """The largest probability with which any attacker names the true one of ``candidates`` equally likely ones.

    Valid against the claim's own adversary, its unit and adjacency, and an attacker who knows everything but the unit's data. It is for
    a unit that took part in the attacked round, as every victim did: what Poisson sampling amplifies is whether it did, and that is no
    part of this game. Above 0.99 it says nothing: print "ceiling vacuous".

    Args:
        claim: what was certified (``Guarantee.claim``); None, or what the accountant does not know, gives 1: so does secure
            aggregation alone, which releases the exact sum.
        candidates: N, so that κ = 1/N.

    Raises:
        ValueError: fewer than one candidate.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be ≥ 1, got {candidates}. Use the number that the attacker chooses from.")
    return 1.0 if claim is None else success_ceiling(claim.attacked or claim.event, 1 / candidates)


def success_ceiling(event: DpEvent, baseline: float) -> float:
    """γ(κ): the largest success probability of an attacker who succeeds with ``baseline`` = κ > 0 at most without the releases."""
    if not 0 < baseline <= 1:
        raise ValueError(f"baseline must be in (0, 1], got {baseline}. Use the success of the best guess without the update.")
    if unknown(event):
        return 1.0
    if (curve := integer_curve(event)) is not None:
        return success_of(curve, baseline)
    mu = gaussian_mu(event)
    if mu is not None:
        return float(norm.cdf(norm.ppf(baseline) + mu))
    found = list(leaves(event))
    if len(found) == 1 and type(found[0][0]) is LaplaceDpEvent and found[0][1] == 1:
        return laplace_ceiling(1 / noise_multiplier(found[0][0]), baseline)
    if too_long_for_pld(event):
        return 1.0  # vacuous anyway with this little noise, and always valid
    grid = np.linspace(LOWEST_EPSILON, -np.log(baseline), GRID)  # beyond ln 1/κ the first term alone exceeds 1
    deltas = np.asarray(pld(event).get_delta(grid))
    return float(min(1.0, (baseline * np.exp(grid) + deltas).min()))


def laplace_ceiling(pure: float, baseline: float) -> float:
    """γ(κ) of one Laplace release, (``pure``, 0)-DP, exactly."""
    if baseline < math.exp(-pure) / 2:
        return baseline * math.exp(pure)
    return 1 - (math.exp(-pure) / (4 * baseline) if baseline <= 0.5 else math.exp(-pure) * (1 - baseline))


def no_prior_psnr(quantile: float = 0.5, *, mu: float, norm: float, pixels: int) -> float:
    """PSNR, in dB, that the best reconstruction without a prior exceeds with probability 1 − ``quantile``; the median by default.

    Args:
        quantile: in (0, 1).
        mu: √T/z of T releases with noise multiplier z, see ``privacy_loss.gaussian_mu``.
        norm: ‖x‖₂ of the record.
        pixels: that a record has.
    """
    mse = (norm / mu) ** 2 * float(chi2.ppf(1 - quantile, pixels)) / pixels
    return -10 * math.log10(mse)
