"""Counts of classes as integers: rounding, and the posterior over all nonnegative counts of a given sum.

What the update says of the counts n is Gaussian in n, log p(update | n) = n·slope − ½·n·curvature·n. What is known before is that
records of one client come from few or many classes: a Dirichlet–multinomial whose concentration is one of :data:`CONCENTRATIONS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

CONCENTRATIONS = (0.1, 1.0, 1000.0)
"""Of the Dirichlet prior, from a few classes a client to evenly many of each; equally likely."""

ENUMERATED = 30_000
"""Up to so many possible counts are all weighed, which is exact; of more, the best is searched and the others are sampled."""

SAMPLES = 10_000
"""Steps of the Metropolis chain: the probability of the best counts has an error of at most 0.005 times √(autocorrelation time)."""

SECOND_MOVES = 24
"""Best single exchanges after each of which a second one is tried, where no single one improves."""


@dataclass(frozen=True)
class Gaussian:
    """What an update says of the counts: log p(update | n) = n·slope − ½·n·curvature·n, up to a constant."""

    slope: Float[Tensor, " classes"]
    curvature: Float[Tensor, "classes classes"]

    def at(self, counts: Float[Tensor, "*many classes"]) -> Float[Tensor, "*many"]:
        """Return the log-likelihood of these counts, up to a constant."""
        return counts @ self.slope - 0.5 * ((counts @ self.curvature) * counts).sum(-1)


@dataclass(frozen=True)
class Posterior:
    """The counts given the update.

    Attributes:
        counts: the most probable ones.
        probability: of ``counts`` being all right, if the model of the update is.
        mean: expected counts.
        deviation: standard deviation of each count.
    """

    counts: Int[Tensor, " classes"]
    probability: float
    mean: Float[Tensor, " classes"]
    deviation: Float[Tensor, " classes"]


def to_counts(estimate: Float[Tensor, " classes"], records: int) -> Int[Tensor, " classes"]:
    """Nonnegative integers that sum to ``records``, by largest remainders of the estimate scaled to that sum."""
    share = torch.nan_to_num(estimate.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    share = share * records / share.sum() if share.sum() > 0 else torch.full_like(share, records / len(share))
    counts = share.floor()
    missing = records - int(counts.sum())
    counts[(share - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts.long()


def log_prior(counts: Float[Tensor, "*many classes"]) -> Float[Tensor, "*many"]:
    """Log-probability of counts before the update is seen: the mixture over :data:`CONCENTRATIONS`."""
    each = torch.stack([_normalizer(counts.shape[-1], concentration, counts.sum(-1)) + _terms(counts, concentration).sum(-1)
                        for concentration in CONCENTRATIONS])  # fmt: skip
    return each.logsumexp(0) - math.log(len(CONCENTRATIONS))


def posterior(likelihood: Gaussian, records: int, start: Float[Tensor, " classes"], *, rng: torch.Generator | None = None) -> Posterior:
    """Return the most probable counts, and how probable they are.

    Args:
        likelihood: what the update says.
        records: the known sum of the counts.
        start: an estimate of the counts, from which the search begins.
        rng: of the samples behind probability, mean and deviation, where there are too many counts to weigh all; None leaves
            those three NaN, which costs nothing.
    """
    classes = len(likelihood.slope)
    if math.comb(records + classes - 1, classes - 1) <= ENUMERATED:
        everything = all_counts(records, classes)
        log_weight = likelihood.at(everything) + log_prior(everything)
        weight = torch.softmax(log_weight, 0)
        mean = weight @ everything
        deviation = (weight @ (everything - mean).square()).sqrt()
        best = int(log_weight.argmax())
        return Posterior(everything[best].long(), float(weight[best]), mean, deviation)
    found = torch.stack([_climb(likelihood, to_counts(start, records).double(), concentration) for concentration in CONCENTRATIONS])
    counts = found[int((likelihood.at(found) + log_prior(found)).argmax())]
    if rng is None:
        nothing = torch.full_like(counts, math.nan)
        return Posterior(counts.long(), math.nan, nothing, nothing)
    return _sampled(likelihood, counts, rng)


def all_counts(records: int, classes: int) -> Float[Tensor, "possible classes"]:
    """All nonnegative counts of so many records, as bars between stars."""
    bars = torch.tensor(list(combinations(range(records + classes - 1), classes - 1))).view(-1, classes - 1)
    ends = torch.cat([torch.full((len(bars), 1), -1), bars, torch.full((len(bars), 1), records + classes - 1)], 1)
    return (ends.diff(dim=1) - 1).double()


def _normalizer(classes: int, concentration: float, records: Tensor) -> Tensor:
    whole = torch.as_tensor(classes * concentration, dtype=torch.float64)
    alone = torch.as_tensor(concentration, dtype=torch.float64)
    return torch.lgamma(whole) + torch.lgamma(records + 1) - torch.lgamma(records + whole) - classes * torch.lgamma(alone)


def _terms(counts: Tensor, concentration: float) -> Tensor:
    return torch.lgamma(counts + concentration) - torch.lgamma(counts + 1)


def _gains(likelihood: Gaussian, counts: Tensor, concentration: float) -> Float[Tensor, "source target"]:
    """By how much the log-posterior rises when one record moves from a class to another."""
    pull = likelihood.slope - likelihood.curvature @ counts
    bend, here = likelihood.curvature.diagonal(), _terms(counts, concentration)
    more = pull - 0.5 * bend + _terms(counts + 1, concentration) - here
    less = -pull - 0.5 * bend + _terms((counts - 1).clamp(min=0), concentration) - here
    gains = less[:, None] + more[None, :] + likelihood.curvature
    gains[counts < 1] = -math.inf
    return gains.fill_diagonal_(-math.inf)


def _climb(likelihood: Gaussian, counts: Tensor, concentration: float) -> Tensor:
    """Exchange records between classes, one or two at a time, as long as the posterior rises."""
    classes = len(counts)
    for _ in range(int(4 * counts.sum()) + 1):
        gains = _gains(likelihood, counts, concentration)
        first = int(gains.argmax())
        if float(gains.flatten()[first]) > 1e-9:
            counts = _moved(counts, first)
            continue
        best, better = 1e-9, None
        for move in gains.flatten().topk(min(SECOND_MOVES, classes * (classes - 1))).indices.tolist():
            if not math.isfinite(gain := float(gains.flatten()[move])):
                continue
            there = _moved(counts, move)
            further = _gains(likelihood, there, concentration).flatten()
            if gain + float(further.max()) > best:
                best, better = gain + float(further.max()), _moved(there, int(further.argmax()))
        if better is None:
            return counts
        counts = better
    return counts


def _moved(counts: Tensor, move: int) -> Tensor:
    source, target = divmod(move, len(counts))
    counts = counts.clone()
    counts[source] -= 1
    counts[target] += 1
    return counts


def _sampled(likelihood: Gaussian, best: Tensor, rng: torch.Generator) -> Posterior:
    """Walk over the counts by single exchanges (Metropolis et al., 1953), starting at the best ones."""
    classes, records = len(best), int(best.sum())
    moves = torch.randint(classes, (SAMPLES, 2), generator=rng).tolist()
    luck: list[float] = torch.rand(SAMPLES, dtype=torch.float64, generator=rng).log().tolist()
    ladder: NDArray[np.float64] = torch.arange(records + 1.0, dtype=torch.float64).numpy()
    weights = [_normalizer(classes, c, best.sum()) + _terms(best, c).sum() for c in CONCENTRATIONS]
    concentration = CONCENTRATIONS[int(torch.stack(weights).argmax())]
    table, slope, curvature = (
        _terms(torch.from_numpy(ladder), concentration).numpy(),
        likelihood.slope.numpy(),
        likelihood.curvature.numpy(),
    )
    counts = best.long().numpy().copy()
    pull, off = slope - curvature @ counts, 0
    home, total, squares = 0, np.zeros(classes), np.zeros(classes)
    start = counts.copy()
    for (source, target), threshold in zip(moves, luck, strict=True):
        if source != target and counts[source] > 0:
            gain = pull[target] - pull[source] - 0.5 * (curvature[source, source] + curvature[target, target]) + curvature[source, target]
            gain += table[counts[target] + 1] - table[counts[target]] + table[counts[source] - 1] - table[counts[source]]
            if gain > threshold:
                for place, change in ((source, -1), (target, 1)):
                    off += abs(counts[place] + change - start[place]) - abs(counts[place] - start[place])
                    counts[place] += change
                pull = pull + curvature[:, source] - curvature[:, target]
        home += off == 0
        total += counts
        squares += counts**2
    mean = total / SAMPLES
    deviation = np.sqrt(np.maximum(squares / SAMPLES - mean**2, 0))
    return Posterior(best.long(), home / SAMPLES, torch.from_numpy(mean), torch.from_numpy(deviation))
