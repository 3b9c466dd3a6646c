"""What one upload says of one record, by the likelihood of what a defense did to its update; and what public records say beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks._matching.distances import TINY
from simulator.types import Batch

Pixels = Float[Tensor, " pixels"]
Uploads = Float[Tensor, "samples coordinates"]
Kind = Literal["exact", "signs", "rounded"]

NARROW = 0.02
"""Least error of linearizing, in steps of a grid, that smooths the likelihood of a rounding."""

OUTLIERS = 1e-4
"""Share of coordinates that may be anything, so that no score is without bound."""

JITTER = 2e-3
"""Variance that every pixel has besides that of public records."""



@dataclass(frozen=True)
class Mechanism:
    """What is known of how an update became the upload: clipped, then noised, then left, reduced to signs, or rounded at random to a grid.

    Attributes:
        kind: of the three.
        target: the upload, flat.
        seen: its coordinates that are observations.
        steps: of the grid, for each coordinate; unused by the others.
        noise: standard deviation on each coordinate before the last; 0 is none. Sampling takes it to be Gaussian.
        clip_norm: to which the whole update is scaled down first.
        laplace: whether the noise is Laplace's.
    """

    kind: Kind
    target: Pixels
    seen: Bool[Tensor, " coordinates"]
    steps: Pixels
    noise: Pixels
    clip_norm: float = math.inf
    laplace: bool = False

    @property
    def deviation(self) -> Pixels:
        """Of each coordinate of the upload: that of rounding at random to neighbours of a grid is √(1/6) of a step on average."""
        return (self.noise.square() + self.steps.square() / 6).sqrt() if self.kind == "rounded" else self.noise

    def clipped(self, updates: Uploads) -> Uploads:
        """The updates of whole records as clipping leaves them."""
        norms: Tensor = updates.square().sum(1, keepdim=True).sqrt()
        return updates * (self.clip_norm / (norms + TINY)).clamp(max=1)

    def only(self, places: Tensor) -> Mechanism:
        """Some of the coordinates."""
        return replace(self, target=self.target[places], seen=self.seen[places], steps=self.steps[places], noise=self.noise[places])

    def drawn(self, updates: Uploads, rng: torch.Generator) -> Uploads:
        """Uploads of these clipped updates."""
        if bool(self.noise.any()):
            updates = updates + self.noise * torch.randn(updates.shape, generator=rng)
        if self.kind == "exact":
            return updates
        if self.kind == "signs":
            return updates.sign()
        return (updates / self.steps + torch.rand(updates.shape, generator=rng)).floor() * self.steps

    def score(self, uploads: Uploads, at: Pixels, error: Pixels) -> Uploads:
        """d log p(upload | u)/du at u = ``at``, where u is known to ``error``: the likelihood is smoothed by a Gaussian of that width."""
        error = (error.square() + self.noise.square()).sqrt()
        if self.kind == "exact":
            return (uploads - at) / error.square()
        if self.kind == "signs":
            z = (at / error).clamp(-4, 4)
            density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
            up, down = density / torch.special.ndtr(z) / error, -density / torch.special.ndtr(-z) / error
            return torch.where(uploads > 0, up, torch.where(uploads < 0, down, -z / error))
        width, nearest = (error / self.steps).clamp(min=NARROW), (at / self.steps).round()
        table = rounded_score(at / self.steps - nearest - torch.arange(-3.0, 4.0)[:, None], width) / self.steps
        level = ((uploads / self.steps).round() - nearest).clamp(-3, 3).long() + 3
        return table.gather(0, level.view(-1, len(at))).view(uploads.shape)


def rounded_score(gap: Float[Tensor, "levels coordinates"], width: Pixels) -> Float[Tensor, "levels coordinates"]:
    """The derivative of log((1 − |gap|)₊ ∗ N(0, width²) + outliers) in the gap, in steps of the grid."""
    root, scaled = math.sqrt(2), math.sqrt(2 / math.pi)

    def smooth(t: Tensor) -> Tensor:
        return t * torch.erf(t / (root * width)) + width * scaled * torch.exp(-t.square() / (2 * width.square()))

    def slope(t: Tensor) -> Tensor:
        return torch.erf(t / (root * width))

    stray = OUTLIERS * torch.exp(-gap.abs() / 2)
    likely = ((smooth(gap + 1) - 2 * smooth(gap) + smooth(gap - 1)) / 2).clamp(min=0) + stray
    change = (slope(gap + 1) - 2 * slope(gap) + slope(gap - 1)) / 2 - gap.sign() * stray / 2
    return change / likely


@dataclass(frozen=True)
class Belief:
    """A Gaussian over records, in float64."""

    mean: Pixels
    covariance: Float[Tensor, "pixels pixels"]


def of_class(public: Batch, label: int) -> Belief:
    """What public records say of a record of this class: their mean, and half its own covariance, half that of all classes."""
    flat = public.inputs.flatten(1).double()
    classes, place = torch.unique(public.labels, return_inverse=True)  # type: ignore[no-untyped-call]
    means = torch.stack([flat[public.labels == each].mean(0) for each in classes])
    away = flat - means[place]
    mine = public.labels == label
    own = mine if bool(mine.any()) else torch.ones_like(mine)
    covariance = (away.T @ away / len(away) + away[own].T @ away[own] / int(own.sum())) / 2
    return Belief(flat[own].mean(0), covariance + JITTER * torch.eye(flat.shape[1], dtype=torch.float64))
