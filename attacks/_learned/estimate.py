"""The estimator: the conditional mean of the records given the features of an update.

First the best affine map, in closed form, with the noise of the defense as what it is: a known addition to the covariance. Then
kernel regression of what it leaves, on its own answer: it pulls an answer toward the records that look like it, which an affine
map cannot. Every choice is made on pairs of held-out public records; no victim is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

Features = Float[Tensor, "pairs features"]
Targets = Float[Tensor, "pairs pixels"]

PURE, ALTERED, FOREIGN = 0, 1, 2
"""Kinds of pairs: untouched records of the class of their label, altered ones of it, and records of any class."""

WEIGHTS = ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 1.0, 0.1), (1.0, 1.0, 1.0))
"""Weights of the kinds that are tried."""

PENALTIES = (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties that are tried, relative to the largest variance of a feature."""

SMALLEST = 1e-10
"""Penalty that is always there, for what float32 leaves of directions without spread."""

WIDTHS = (0.35, 0.7, 1.4)
"""Widths of the kernel that are tried, relative to the median distance."""

SHRINKAGE = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridge penalties of the kernel regression that are tried."""

KERNELS = 1024
"""Pairs behind the kernel regression, at most: its cost grows with their cube."""

FAR = 3.0
"""How many times farther than any held-out update, in units of the features' spread, another is before it is pulled back."""


@dataclass(frozen=True)
class Pairs:
    """Simulated pairs: features without the noise that is known, records, and the kind of each pair."""

    features: Features
    targets: Targets
    kind: Int[Tensor, " pairs"]

    def __len__(self) -> int:
        return len(self.features)

    def only(self, rows: Tensor | slice) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.features[rows], self.targets[rows], self.kind[rows])


@dataclass(frozen=True)
class Affine:
    """records = mean + (features − center)·weight."""

    center: Float[Tensor, " features"]
    mean: Float[Tensor, " pixels"]
    weight: Float[Tensor, "features pixels"]

    def __call__(self, features: Features) -> Targets:
        """The best affine guess."""
        return self.mean + (features - self.center) @ self.weight


@dataclass(frozen=True)
class Kernel:
    """Gaussian kernel regression of what the affine map leaves, as a function of its answer."""

    at: Float[Tensor, "kernels pixels"]
    weight: Float[Tensor, "kernels pixels"]
    width: float

    def __call__(self, answer: Targets) -> Targets:
        """What to add to an answer."""
        return torch.exp(-torch.cdist(answer, self.at).square() / (2 * self.width**2)) @ self.weight


@dataclass(frozen=True)
class Estimator:
    """From features to records.

    Attributes:
        affine: the first guess.
        kernel: what corrects it; None where that did not help on held-out pairs.
        spread: of each feature over the simulated updates, noise included.
        reach: largest length of held-out features, in units of their spread.
        error: mean squared error on held-out pairs.
        curve: (pairs, error) for growing parts of the pairs.
    """

    affine: Affine
    kernel: Kernel | None
    spread: Float[Tensor, " features"]
    reach: float
    error: float = float("nan")
    curve: tuple[tuple[int, float], ...] = ()

    def __call__(self, features: Features) -> Targets:
        """The conditional mean. An update unlike any simulated one, which the map would extrapolate to, is pulled back toward them."""
        away = (features - self.affine.center) / self.spread
        factor = (FAR * self.reach / away.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        answer = self.affine(self.affine.center + away * factor * self.spread)
        return (answer if self.kernel is None else answer + self.kernel(answer)).clamp(0, 1)


@dataclass(frozen=True)
class Moments:
    """Weighted means and second moments of pairs about the means of the pure ones, which are what victims are like."""

    center: Float[Tensor, " features"]
    mean: Float[Tensor, " pixels"]
    covariance: Float[Tensor, "features features"]
    cross: Float[Tensor, "features pixels"]

    def added(self, sigma: float, penalty: float) -> float:
        """What is added to each feature's variance: that of the noise, and a penalty."""
        return sigma**2 + (penalty + SMALLEST) * float(self.covariance.diagonal().max()) + 1e-30


def moments(pairs: Pairs, weights: Sequence[float]) -> Moments:
    """The moments with these weights of the kinds."""
    pure, each = pairs.only(pairs.kind == PURE), torch.tensor(weights)[pairs.kind]
    center, mean, root = pure.features.mean(0), pure.targets.mean(0), (each / each.sum()).sqrt()[:, None]
    z, x = (pairs.features - center) * root, (pairs.targets - mean) * root
    return Moments(center, mean, z.T @ z, z.T @ x)


def affine(pairs: Pairs, sigma: float, weights: Sequence[float], penalty: float) -> Affine:
    """Weighted ridge regression; noise of deviation ``sigma`` on every feature is added to their covariance."""
    of = moments(pairs, weights)
    whole = of.covariance.double() + of.added(sigma, penalty) * torch.eye(len(of.covariance))
    return Affine(of.center, of.mean, torch.linalg.solve(whole, of.cross.double()).float())


def tried(pairs: Pairs, sigma: float, weights: Sequence[float], features: Features) -> Iterator[tuple[float, Targets]]:
    """Each penalty, and what :func:`affine` with it makes of some features; one factorization serves all penalties."""
    of = moments(pairs, weights)
    variance, axes = torch.linalg.eigh(of.covariance.double())
    turned, crossed = ((features - of.center).double() @ axes), (axes.T @ of.cross.double()).float()
    for penalty in PENALTIES:
        yield penalty, of.mean + (turned / (variance.clamp(min=0) + of.added(sigma, penalty))).float() @ crossed


def error(guess: Targets, truth: Targets) -> float:
    """Mean squared error of a guess in [0, 1]."""
    return float((guess.clamp(0, 1) - truth).square().mean())


def learn(pairs: Pairs, held_out: Pairs, sigma: float, rng: torch.Generator) -> Estimator:
    """Fit on pairs, choose on held-out ones, and fit again on all with what was chosen."""
    shown = held_out.features + sigma * torch.randn(held_out.features.shape, generator=rng)
    lowest, weights, penalty = min(
        (error(guess, held_out.targets), weights, penalty) for weights in WEIGHTS for penalty, guess in tried(pairs, sigma, weights, shown)
    )
    curve = []
    for part in (4, 2):
        some = pairs.only(torch.arange(len(pairs)) % (4 * part) < 4)
        curve.append((len(some), error(affine(some, sigma, weights, penalty)(shown), held_out.targets)))
    first = affine(pairs, sigma, weights, penalty)
    kernel, best = corrected(first, as_uploaded(pairs, sigma, rng), shown, held_out.targets, lowest)
    every = Pairs(*(torch.cat([getattr(pairs, name), getattr(held_out, name)]) for name in ("features", "targets", "kind")))
    final = affine(every, sigma, weights, penalty)
    spread = (pairs.features.var(0) + sigma**2).sqrt().clamp(min=1e-12)
    reach = float(((shown - final.center) / spread).norm(dim=1).max())
    return Estimator(final, kernel, spread, reach, best, (*curve, (len(pairs), lowest)))


def as_uploaded(pairs: Pairs, sigma: float, rng: torch.Generator) -> Pairs:
    """Pairs of the labels' own classes with noise as an upload has it, as many as the kernel regression takes."""
    own = pairs.only(pairs.kind != FOREIGN)
    copies = max(1, KERNELS // len(own)) if sigma else 1
    chosen = own.only(torch.arange(len(own)).repeat(copies)[:KERNELS])
    return replace(chosen, features=chosen.features + sigma * torch.randn(chosen.features.shape, generator=rng))


def corrected(first: Affine, noisy: Pairs, shown: Features, truth: Targets, lowest: float) -> tuple[Kernel | None, float]:
    """The kernel regression that helps most on held-out pairs, and its error; None if none does."""
    at, answer = first(noisy.features), first(shown)
    left = noisy.targets - at
    squares, across = torch.cdist(at, at).square().double(), torch.cdist(answer, at).square().double()
    median = float(squares[squares > 0].median().sqrt()) if bool((squares > 0).any()) else 1.0
    best: tuple[float, Kernel | None] = lowest, None
    for width in WIDTHS:
        values, axes = torch.linalg.eigh(torch.exp(-squares / (2 * (width * median) ** 2)))
        axes = axes.float()
        rotated, seen = axes.T @ left, torch.exp(-across / (2 * (width * median) ** 2)).float() @ axes
        for penalty in SHRINKAGE:
            solved = rotated / (values.clamp(min=0) + penalty).float()[:, None]
            found = error(answer + seen @ solved, truth)
            if found < best[0]:
                best = found, Kernel(at, axes @ solved, width * median)
    return best[1], best[0]
