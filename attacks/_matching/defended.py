"""A distance in defense space: what a client's known defenses do to an update, applied to the simulated one before the two are compared.

Where a defense draws at random, the distance is the negative log-likelihood of what was observed, in nats; where nothing is random,
the angle between the two. Everything that the upload itself shows is read off it: which coordinates were left out, the grid, the signs.

Source: Balunović et al., 2022, arXiv:2111.04706, sections 3 and 4 (the Bayes-optimal objective: the likelihood that the defense's noise
    implies, restricted to the coordinates that the defense left; Gaussian noise gives L2, Laplace noise L1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log, log1p

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._matching.distances import TINY, Flat, Span, angle, l2
from simulator.mechanisms.qsgd import in_buckets
from simulator.mechanisms.top_k import kept, largest
from simulator.types import Tensors

EDGE = 0.3
"""Distance from the end of a rounding's support, in steps of the grid, from which on its likelihood falls linearly instead of to 0."""

STRUCK = 0.15
"""Share of zeros among coordinates of live units from which on Outpost is taken to have acted."""

RANK = 1e-3
"""Singular value, relative to the largest, from which on it is not rounding."""

SOFT = 0.5
"""Magnitude, relative to its tensor's mean, at which a coordinate's sign counts half in the smooth stand-in for the sign."""


@dataclass(frozen=True)
class Defended:
    """What a stack of known defenses leaves of an update, as a distance from what was observed.

    Attributes:
        clip_norm: to which the whole update is scaled down first.
        pruned: share of each tensor that is dropped for being small, where noise then hides which; 0 where the zeros show it.
        dropped: probability with which a coordinate was left out, where Gaussian noise then hides which; 0 where the zeros show it.
        sigma: deviations of Gaussian noise on each coordinate: none, one for all, or one for each tensor.
        laplace: scale of Laplace noise on each coordinate.
        masked: whether coordinates that are 0 in the observed update were left out of it.
        levels: of stochastic rounding, from 0 to the norm of a bucket; 0 for none.
        bucket: coordinates that share a norm; 0 for a whole tensor.
        signs: whether signs are all that is left.
        orthogonal: whether each tensor was replaced by one of equal norm and orthogonal to it.
        weights: of the tensors, one for each, where some are not compared: 0 leaves one out; empty compares all.
        squared: whether angles are taken squared, as second-order optimizers want them.
    """

    clip_norm: float = float("inf")
    pruned: float = 0.0
    dropped: float = 0.0
    sigma: tuple[float, ...] = ()
    laplace: float = 0.0
    masked: bool = False
    levels: int = 0
    bucket: int = 0
    signs: bool = False
    orthogonal: bool = False
    weights: tuple[float, ...] = ()
    squared: bool = False

    @property
    def random(self) -> bool:
        """Whether the distance is a likelihood in nats, against which a prior has an absolute weight."""
        return bool(self.sigma or self.laplace or self.levels) and not (self.signs or self.orthogonal)

    @property
    def exact(self) -> bool:
        """Whether what is compared is neither noise nor signs, so that a perfect match can be had."""
        return not (self.random or self.signs or self.orthogonal)

    def __call__(self, trial: Flat, target: Flat, spans: Sequence[Span]) -> Float[Tensor, ""]:
        """The distance of what the defenses would make of ``trial`` from ``target``."""
        if self.orthogonal:
            return avoided(trial, target, spans)
        if self.exact or self.signs:
            pair = self.compared(trial, target, spans)
            return l2(*pair) if self.squared and self.exact else angle(*pair)
        seen = self.seen(target, spans)
        trial = self.left(trial, spans)
        if self.levels and not self.sigma and not self.laplace:
            steps = torch.cat([grid(target[a:b], self.bucket) for a, b in spans])
            return (seen * rounding((trial - target) / steps)).sum()
        if self.laplace and not self.sigma:
            return (seen * (trial - target).abs()).sum() / self.laplace
        off = (trial - target).square() / (2 * self.variances(target, spans))
        if self.dropped:
            out = target.square() / (2 * self.variances(target, spans))
            off = -torch.logaddexp(log1p(-self.dropped) - off, log(self.dropped) - out)
        return (seen * off).sum()

    def seen(self, target: Flat, spans: Sequence[Span]) -> Flat:
        """The weight of each coordinate: 0 where it is no observation."""
        seen = (target != 0).to(target.dtype) if self.masked else torch.ones_like(target)
        if not self.weights:
            return seen
        return seen * torch.cat([torch.full_like(target[a:b], w) for (a, b), w in zip(spans, self.weights, strict=True)])

    def compared(self, trial: Flat, target: Flat, spans: Sequence[Span]) -> tuple[Flat, Flat]:
        """Both updates as far as they can be compared, as angles see them: without scale and without noise."""
        seen = self.seen(target, spans)
        trial = self.left(trial, spans) if self.pruned else trial
        if self.signs:
            trial = softened(trial, target, spans)
        return trial * seen, target * seen

    def left(self, trial: Flat, spans: Sequence[Span]) -> Flat:
        """The update after what is done to it before noise."""
        if isfinite(self.clip_norm):
            trial = trial * (self.clip_norm / (trial.square().sum() + TINY).sqrt()).clamp(max=1)
        if self.pruned:
            parts = [trial[a:b] for a, b in spans]
            trial = torch.cat([part * largest(part, kept(len(part), self.pruned)).to(part.dtype) for part in parts])
        return trial

    def variances(self, target: Flat, spans: Sequence[Span]) -> Flat:
        """Of the noise on each coordinate: that of independent sources adds up."""
        whole = torch.full_like(target, 2 * self.laplace**2)
        if len(self.sigma) == 1:
            whole = whole + self.sigma[0] ** 2
        elif self.sigma:
            whole = whole + torch.cat([torch.full_like(target[a:b], s**2) for (a, b), s in zip(spans, self.sigma, strict=True)])
        if self.levels:
            whole = whole + torch.cat([grid(target[a:b], self.bucket) for a, b in spans]).square() / 6
        return whole


def struck(update: Tensors, records: int = 0) -> bool:
    """Whether Outpost perturbed a single step: zeros in the midst of others show it, where no unit and no input is dead.

    So does the last layer, the one matrix that sees a record only once, if its rank is above the number of ``records`` (0: unknown).
    """
    last = next((tensor for tensor in reversed([*update.values()]) if tensor.ndim == 2), None)
    if last is not None and 0 < records < min(last.shape):
        values = torch.linalg.svdvals(last.double())
        if float(values[records]) > max(RANK, 4 * torch.finfo(last.dtype).eps) * float(values[0]):
            return True
    zeros = live = 0
    for tensor in update.values():
        if tensor.ndim > 1:
            there = (tensor.flatten(2) if tensor.ndim > 2 else tensor[..., None]) != 0
            alive = there.any(2).any(1)[:, None, None] & there.any(2).any(0)[None, :, None]
            alive = alive & there.flatten(0, 1).any(0)  # a kernel's corner may never meet a picture
            live, zeros = live + int(alive.sum()), zeros + int((alive & ~there).sum())
    return zeros > STRUCK * live


def rounding(gap: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−log(1 − |gap|): the surprise at a value that unbiased rounding moved by ``gap`` steps of its grid.

    A value between two levels goes to each with a probability of one minus its distance, which is less than a step; beyond, where
    the likelihood is 0, the surprise goes on linearly, so that a bad start still has a slope.
    """
    size = gap.abs()
    inside = -torch.log1p(-size.clamp(max=1 - EDGE))
    return inside + (size - (1 - EDGE)).clamp(min=0) / EDGE


def grid(target: Float[Tensor, " coordinates"], bucket: int) -> Float[Tensor, " coordinates"]:
    """For each coordinate of a tensor the step of its bucket's grid: the smallest magnitude there, since most values are small.

    In a bucket of zeros the step is not known; the tensor's largest is taken.
    """
    rows = in_buckets(target, bucket).abs()
    least = torch.where(rows > 0, rows, torch.inf).amin(1)
    largest_step = torch.where(least.isinf(), 0.0, least).amax()
    steps = torch.where(least.isinf(), largest_step + TINY, least)[:, None].expand_as(rows)
    return steps.flatten()[: target.numel()]


def softened(trial: Flat, target: Flat, spans: Sequence[Span]) -> Flat:
    """A smooth stand-in for the trial's signs, u/√(u² + (SOFT·mean|u|)²), each tensor with the magnitude of the observed one."""
    parts = []
    for a, b in spans:
        part = trial[a:b]
        soft = (SOFT * part.abs().mean()).square() + TINY
        parts.append(part * (part.square() + soft).rsqrt() * target[a:b].abs().mean())
    return torch.cat(parts)


def avoided(trial: Flat, target: Flat, spans: Sequence[Span]) -> Float[Tensor, ""]:
    """How far each tensor is from being orthogonal to the observed one and of its norm: mean of cos² and of squared log ratios."""
    terms = []
    for a, b in spans:
        own, seen = trial[a:b].square().sum() + TINY, target[a:b].square().sum() + TINY
        there = (target[a:b].square().sum() > 0).to(trial.dtype)
        terms.append(there * ((trial[a:b] @ target[a:b]).square() / (own * seen) + (own / seen).log().square() / 4))
    return torch.stack(terms).mean()
