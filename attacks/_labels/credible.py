"""How far the moments of public records are to be trusted: as far as serves best on public records that they have not seen."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from attacks._labels.counts import CONCENTRATIONS
from attacks._labels.moments import Belief, likelihood, moments

TRIALS = 24
"""Batches of held-out public records on which each belief is tried."""

BELIEFS = tuple(
    Belief(features, *trust, weight)
    for features in (True, False)
    for trust in ((0.3, 0.1), (0.3, 0.5), (1.0, 0.5))
    for weight in (1.0, 0.2)
)
"""What :func:`most_credible` chooses from."""


def most_credible(statistic: Tensor, labels: Int[Tensor, " records"], classes: int, records: int, noise: Tensor | None = None) -> Belief:
    """The belief whose counts are nearest to the truth on batches of public records that the moments have not seen, under the known noise.

    With too few records for that it is the most cautious one.
    """
    if len(labels) < 4 * classes:
        return BELIEFS[-1]
    rng = torch.Generator().manual_seed(records)
    half = torch.rand(len(labels), generator=rng).argsort() % 2 == 0
    error = dict.fromkeys(BELIEFS, 0.0)
    root = None if noise is None else torch.linalg.cholesky(noise + 1e-9 * noise.diagonal().max() * torch.eye(len(noise)).double())
    for seen in (half, ~half):
        there = torch.bincount(labels[~seen], minlength=classes) > 0
        truth, observed = list[Tensor](), list[Tensor]()
        for trial in range(TRIALS // 2):
            concentration = CONCENTRATIONS[trial % len(CONCENTRATIONS)]
            odds = torch._standard_gamma(torch.full((classes,), concentration, dtype=torch.float64), generator=rng) * there + 1e-30 * there
            label = torch.multinomial(odds, records, replacement=True, generator=rng)
            drawn = torch.multinomial(F.one_hot(labels[~seen], classes).double().T[label], 1, generator=rng).flatten()
            truth.append(torch.bincount(label, minlength=classes))
            seen_sum = statistic[~seen][drawn].sum(0)
            if root is not None:
                seen_sum += (torch.randn(classes, len(root), dtype=torch.float64, generator=rng) @ root.T).flatten()
            observed.append(seen_sum)
        for belief in BELIEFS:
            model = moments(statistic[seen], labels[seen], classes, belief, noise)
            counts = likelihood(torch.stack(observed), model, belief, records).counts
            error[belief] += float((counts - torch.stack(truth)).abs().sum())
    return min(error, key=lambda belief: error[belief])
