"""One record behind a coarse update, by rounds of statistical linearization: no derivative of the network is taken.

A ReLU network's gradient jumps where a unit turns on, so that descent and Gauss–Newton end at the first jump. Here records are drawn from
the present belief and sent through the client's own recipe and defense, and the update is regressed on them: the slope is that of the mean
over the belief, and what it leaves is the error of linearizing, known for every coordinate. The defense's likelihood, smoothed by that
error, then says how each coordinate pulls (its score); regressing the scores of simulated uploads on their records says what the pull of
the observed one means, however the errors of coordinates go together. The belief shrinks, and with it the error, round after round.

Source: Tronarp, García-Fernández and Särkkä, 2018, arXiv:1708.06160 (iterated posterior linearization, for any conditional moments);
    Wu et al., 2023, arXiv:2210.10880 (simulated pairs from public records); Balunović et al., 2022, arXiv:2111.04706 (the likelihood of
    the defense); Alistarh et al., 2017, arXiv:1610.02132 (the distribution of the rounding). The regression of scores is our own.
Deviations: the belief's variances fall at most to a quarter in a round, and a pull that is larger than simulated ones counts as noisier.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import vmap

from attacks._matching.distances import TINY
from attacks._matching.simulate import Victim, simulate
from simulator.progress import tick
from simulator.types import Batch

Pixels = Float[Tensor, " pixels"]
Uploads = Float[Tensor, "samples coordinates"]
Kind = Literal["exact", "signs", "rounded"]

SHRINK = 4.0
"""Most that a round divides a variance of the belief by: without, beliefs collapse around a wrong pattern of active units."""

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
        noise: standard deviation on each coordinate before the last; 0 is none. Taken to be Gaussian.
        clip_norm: to which the whole update is scaled down first.
    """

    kind: Kind
    target: Pixels
    seen: Bool[Tensor, " coordinates"]
    steps: Pixels
    noise: Pixels
    clip_norm: float = math.inf

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


def updates(victim: Victim, images: Float[Tensor, "samples pixels"], label: int | Tensor) -> Uploads:
    """The updates that the client would make of each of these records alone, all of one label or each of its own."""
    labels = torch.as_tensor(label).expand(len(images))

    def one(image: Tensor, own: Tensor) -> Tensor:
        return simulate(
            victim.model, victim.parameters, victim.buffers, image.view(1, *victim.shape), own[None],
            recipe=victim.recipe, order=victim.order, names=victim.names,
        )  # fmt: skip

    with torch.no_grad():
        return torch.cat([vmap(one)(*part) for part in zip(torch.split(images, 64), torch.split(labels, 64), strict=True)])


def rebuilt(
    victim: Victim, mechanism: Mechanism, prior: Belief, *, rounds: int, samples: int, seconds: float, rng: torch.Generator, task: str
) -> tuple[Belief, bool]:
    """The belief after so many rounds, or when the CPU seconds are over; and whether it was after all rounds."""
    belief, began = prior, time.process_time()
    for number in range(rounds):
        spent = time.process_time() - began
        if number and spent * (number + 1) / number > seconds:
            return belief, False
        belief = updated(victim, mechanism, prior, belief, samples, rng)
        tick(task, number + 1, rounds)
    return belief, True


def updated(victim: Victim, mechanism: Mechanism, prior: Belief, belief: Belief, samples: int, rng: torch.Generator) -> Belief:
    """One round: the prior given the upload, linearized over the present belief."""
    pixels = len(prior.mean)
    eye = torch.eye(pixels, dtype=torch.float64)
    root = torch.linalg.cholesky(belief.covariance + 1e-10 * eye)
    half = torch.randn(samples // 2, pixels, generator=rng, dtype=torch.float64)
    images = (belief.mean + torch.cat([half, -half]) @ root.T).clamp(0, 1)
    made = mechanism.clipped(updates(victim, images.float(), int(victim.labels[0])))
    live = ((made != 0).any(0) & mechanism.seen).nonzero().flatten()
    if not len(live):
        return prior
    made, known, free = made[:, live], mechanism.only(live), max(1, samples - pixels - 1)
    middle, away = images.mean(0), images - images.mean(0)
    spread = away.T @ away / samples
    damped = spread + 1e-4 * spread.diagonal().mean() * eye
    slope = torch.linalg.solve(samples * damped, away.T @ (made - made.mean(0)).double()).float()
    left = (made - made.mean(0) - away.float() @ slope).square().sum(0) / free
    error = (left + 0.01 * left.mean() + 1e-12).sqrt()
    at = made.mean(0) + (belief.mean - middle).float() @ slope
    pulls = (known.score(known.drawn(made, rng), at, error) @ slope.T).double()
    pull = (slope @ known.score(known.target[None], at, error)[0]).double() - pulls.mean(0)
    pulls = pulls - pulls.mean(0)
    response = torch.linalg.solve(samples * damped, away.T @ pulls)
    noise = (pulls - away @ response).T @ (pulls - away @ response) / free
    noise = noise + 1e-6 * noise.diagonal().mean() * eye + 1e-30 * eye
    surprise = float(pull @ torch.linalg.solve(response.T @ spread @ response + noise, pull)) / pixels
    gain = torch.linalg.solve(noise * max(1.0, surprise), response.T)
    precision = torch.linalg.inv(prior.covariance)
    covariance = torch.linalg.inv(precision + (response @ gain + (response @ gain).T) / 2)
    mean = covariance @ (precision @ prior.mean + (pull + middle @ response) @ gain)
    if not bool(torch.isfinite(mean).all()):
        return belief
    whitened = torch.linalg.solve_triangular(root, torch.linalg.solve_triangular(root, covariance, upper=False).T, upper=False)
    values, axes = torch.linalg.eigh((whitened + whitened.T) / 2)
    wide = (root @ axes) * values.clamp(min=1 / SHRINK) @ (root @ axes).T
    return Belief(mean.clamp(0, 1), (wide + wide.T) / 2)
