"""Counts from what each class leaves in the last layer's gradient, as public records show it on the same model.

A record of class c adds the statistic t = (p − target) ⊗ (1, features) to B times the gradient, so that of counts n the update is
Gaussian with mean Σ_c n_c·m_c and covariance Σ_c (n_c + n_c²/N_c)·S_c, where m_c and S_c are moments over the N_c public records of
class c; the second term is the uncertainty of m_c. Features come as their products with the rows of W: what moves the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attacks._gradient import smoothed
from attacks._labels.counts import CONCENTRATIONS, Gaussian
from simulator.types import LocalTraining

STEPS = 4
"""Turns of the counts and of the covariance that they imply."""

DIRECTIONS = 256
"""In which a statistic is read, at most: those in which public records differ most."""

AT_ONCE_MB = 64
"""Memory for the covariances of updates that are fitted at once."""


@dataclass(frozen=True)
class Belief:
    """How far the moments are trusted. Records of a trained model have heavy tails, which a Gaussian of tens of records misjudges.

    Attributes:
        features: whether ∂W is read beside ∂b.
        pulled: how far the covariance of each class is drawn to the mean one; 1 takes one for all.
        shrunk: share of the covariance that is replaced by independent coordinates.
        weight: power of the likelihood, below 1 where it is too sure of itself.
    """

    features: bool
    pulled: float
    shrunk: float
    weight: float


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of one record's statistic, class by class.

    Attributes:
        whiten: what maps statistics to uncorrelated ones of unit variance; directions without variance are dropped.
        mean: of the whitened statistic.
        covariance: of the whitened statistic.
        records: public records behind each class's moments.
        noise: covariance of what defenses add to the whitened statistic of an update.
    """

    whiten: Float[Tensor, "raw white"]
    mean: Float[Tensor, "classes white"]
    covariance: Float[Tensor, "classes white white"]
    records: Float[Tensor, " classes"]
    noise: Float[Tensor, "white white"]


def statistics(
    softmax: Float[Tensor, "records classes"],
    features: Float[Tensor, "records features"],
    labels: Int[Tensor, " records"],
    recipe: LocalTraining,
) -> Float[Tensor, "records statistic"]:
    """What each record adds to B times the gradient of the last layer, flattened."""
    targets = smoothed(F.one_hot(labels, softmax.shape[1]).double(), recipe)
    return ((softmax - targets)[:, :, None] * features[:, None, :]).flatten(1)


def moments(
    statistic: Float[Tensor, "records statistic"],
    labels: Int[Tensor, " records"],
    classes: int,
    belief: Belief,
    noise: Float[Tensor, "columns columns"] | None = None,
) -> Moments:
    """The moments of each class. A class without records has the moments of all, and counts as known from one record.

    Args:
        noise: covariance of what known defenses add to each class's part of an update's statistic, independent of the others' parts.
    """
    if not belief.features:
        statistic = only_bias(statistic, classes)
    size = torch.bincount(labels, minlength=classes).double()
    mean = torch.stack([statistic[labels == c].mean(0) if size[c] else statistic.mean(0) for c in range(classes)])
    away = statistic - mean[labels]
    whole = torch.cat([away, mean - mean.mean(0)])
    scale = whole.square().mean(0).sqrt().clamp(min=1e-30)
    variance, axes = principal(whole / scale)
    whiten = axes / variance.sqrt() / scale[:, None]
    away = away @ whiten
    pooled = away.T @ away / len(away)
    own = torch.stack([away[labels == c].T @ away[labels == c] / size[c] if size[c] else pooled for c in range(classes)])
    covariance = (1 - belief.pulled) * own + belief.pulled * pooled
    covariance = (1 - belief.shrunk) * covariance + belief.shrunk * pooled.diagonal().diag()
    rows, eye = whiten.view(classes, -1, whiten.shape[1]), torch.eye(whiten.shape[1], dtype=torch.float64)
    added = 0 * eye if noise is None else torch.einsum("cka,kl,clb->ab", rows, noise[: rows.shape[1], : rows.shape[1]], rows)
    return Moments(whiten, mean @ whiten, covariance + 1e-6 * eye, size.clamp(min=1), added)


def principal(rows: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " kept"], Float[Tensor, "columns kept"]]:
    """Variances and directions of these centred rows, by the smaller of the two Gram matrices; at most :data:`DIRECTIONS`, the widest."""
    if tall := len(rows) >= rows.shape[1]:
        variance, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    else:
        variance, axes = torch.linalg.eigh(rows @ rows.T / len(rows))
    kept = (variance > 1e-9 * variance.max()).nonzero().flatten()[-DIRECTIONS:]
    return variance[kept], axes[:, kept] if tall else rows.T @ axes[:, kept] / (variance[kept] * len(rows)).sqrt()


def only_bias(statistic: Float[Tensor, "*records statistic"], classes: int) -> Float[Tensor, "*records classes"]:
    """The part of the statistic that ∂b holds: each class's first column."""
    return statistic.reshape(*statistic.shape[:-1], classes, -1)[..., 0]


@dataclass(frozen=True)
class Fits:
    """What updates say of their counts.

    Attributes:
        counts: expected ones.
        given: slope and curvature of the log-likelihood of each update near its counts.
        density: log-density of each update.
    """

    counts: Float[Tensor, "updates classes"]
    given: Gaussian
    density: Float[Tensor, " updates"]

    def best(self) -> tuple[Float[Tensor, " classes"], Gaussian]:
        """Counts and likelihood of the update of the largest density."""
        place = int(self.density.argmax())
        return self.counts[place], Gaussian(self.given.slope[place], self.given.curvature[place])


def likelihood(
    observed: Float[Tensor, "updates statistic"],
    model: Moments,
    belief: Belief,
    records: int,
    scales: Float[Tensor, " updates"] | None = None,
) -> Fits:
    """The expected counts behind each update, what it says of the counts near them, and its log-density.

    Each concentration of the prior gives its own expectation, and the covariance of the update depends on it. They are averaged by
    their evidence, Laplace's; the likelihood is that at the most evident one.

    Args:
        observed: statistics of updates, each divided by its scale.
        scales: factors of clipping, 1 if not given, by which the noise grew; the density is that of the update as it was uploaded.
    """
    white = (observed if belief.features else only_bias(observed, len(model.mean))) @ model.whiten
    prior = torch.tensor(CONCENTRATIONS, dtype=torch.float64).repeat(len(white))
    blur = (torch.ones(len(white), dtype=torch.float64) if scales is None else scales**-2).repeat_interleave(len(CONCENTRATIONS))
    rows = white.repeat_interleave(len(CONCENTRATIONS), 0)
    fits = [_fit(*part, model, records, belief.weight) for part in _pieces(rows, prior, blur)]
    counts, slope, curvature, evidence = (_by_update(torch.cat(each), len(white)) for each in zip(*fits, strict=True))
    most = torch.arange(len(white)), evidence.argmax(1)
    density = evidence.logsumexp(1)
    if scales is not None:
        density = density - belief.weight * white.shape[1] * scales.log()
    mean = torch.einsum("uk,ukc->uc", torch.softmax(evidence, 1), counts)
    return Fits(mean, Gaussian(slope[most], curvature[most]), density)


def _by_update(rows: Tensor, updates: int) -> Tensor:
    return rows.view(updates, -1, *rows.shape[1:])


def _pieces(white: Tensor, concentration: Tensor, blur: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows in pieces whose covariances fit into :data:`AT_ONCE_MB`."""
    rows = max(1, AT_ONCE_MB * 2**20 // (8 * white.shape[1] ** 2))
    yield from zip(*(torch.split(each, rows) for each in (white, concentration, blur)), strict=True)


def _fit(
    white: Tensor, concentration: Tensor, blur: Tensor, model: Moments, records: int, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, slope, curvature and evidence for each row: an update under one concentration of the prior, with so much of the noise."""
    classes = len(model.mean)
    prior = (records / classes * (1 - 1 / classes) * (records + classes * concentration) / (1 + classes * concentration))[:, None]
    even, eye = torch.full((classes,), records / classes, dtype=torch.float64), torch.eye(classes, dtype=torch.float64)
    counts = even.expand(len(white), -1)
    for _ in range(STEPS):
        slope, curvature, _ = _given(white, blur, model, counts, weight)
        right = torch.stack([slope + even / prior, torch.ones_like(slope)], 2)
        solved = torch.linalg.solve(curvature + eye / prior[..., None], right)
        free, along = solved[..., 0], solved[..., 1]
        counts = free + along * ((records - free.sum(1)) / along.sum(1))[:, None]
        counts = counts.clamp(min=0.05)
        counts = counts * records / counts.sum(1, keepdim=True)
    slope, curvature, density = _given(white, blur, model, counts, weight)
    spread = torch.logdet(eye + prior[..., None] * curvature)
    return counts, slope, curvature, density - 0.5 * ((counts - even).square().sum(1) / prior[:, 0] + spread)


def _given(white: Tensor, blur: Tensor, model: Moments, counts: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """What each update says of its counts, as slope and curvature, with the covariance of these counts, and its log-density at them."""
    scatter = counts + counts.square() / model.records
    factor = torch.linalg.cholesky(torch.einsum("rc,cij->rij", scatter, model.covariance) + blur[:, None, None] * model.noise)
    both = torch.cat([model.mean.expand(len(white), -1, -1), white[:, None]], 1).mT
    parts = torch.linalg.solve_triangular(factor, both, upper=False)
    mean, seen = parts[..., :-1], parts[..., -1:]
    left = (seen - mean @ counts[..., None]).square().sum((1, 2))
    density = -0.5 * left - factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return weight * (mean.mT @ seen)[..., 0], weight * (mean.mT @ mean), weight * density
