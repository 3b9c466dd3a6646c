"""How likely it is that a candidate is in a mixture: the rest of it must be one, too, of records as others hold them.

Given a candidate x of class c in a mixture z with targets y, its share a is y_c, unless a partner has the same class, and z − a·x is the
sum of its partners. Partners of class j are Gaussian about that class's mean, as public records are, and no pixel of the rest is
below 0 or above 1 − a. Under InstaHide's mask each pixel of z is z or 1 − z: the two are weighed pixel by pixel, each by what the
pixels before it say of the rest, and the rest stays Gaussian by its moments.

Source: arXiv:2201.04845 for the game; Opper, 1998, On-line Learning in Neural Networks, chapter 16 (assumed density filtering). The
    likelihood is our own. Huang et al., 2020, arXiv:2010.02772, for the defense.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lgamma, log

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._identify.encoding import Encoding
from simulator.types import Batch

FAINT = 1e-5
"""Share of a class from which on it counts as one of the mixture's."""

MOST = 12
"""Ways in which classes may share the partners that are tried for each candidate's class."""

OWN = 8
"""Shares of the candidate that are drawn where a partner of its class leaves it open."""

WEIGHED = 320
"""Candidates under one split each that are weighed pixel by pixel: those likeliest by pixels that count as independent."""

DENSE = 256
"""Pixels up to which the covariance of the rest is kept; beyond, pixels count as independent."""

AT_ONCE = 256
"""Candidates under one split each that are weighed at once."""

SELF = 1 / 20
"""Chance that the partner of a record's own class is the record itself: one of those that a client holds of it."""

ANYONE = -1
"""In place of a class: a public record, whose label does not count."""


@dataclass(frozen=True)
class Population:
    """Records as others hold them: the means of the classes, and the covariance about them and about the mean of all."""

    records: Batch
    classes: int

    @cached_property
    def pixels(self) -> Float[Tensor, "records pixels"]:
        return self.records.inputs.flatten(1).double()

    @cached_property
    def means(self) -> Float[Tensor, "classes_and_all pixels"]:
        """Of each class, of all where a class has none, and of all in the last row."""
        every = self.pixels.mean(0)
        of = [self.pixels[self.records.labels == label] for label in range(self.classes)]
        return torch.stack([*(some.mean(0) if len(some) else every for some in of), every])

    @cached_property
    def within(self) -> Tensor:
        """About the mean of the class: a covariance, or the variances of many pixels."""
        return self._covariance(self.pixels - self.means[self.records.labels])

    @cached_property
    def total(self) -> Tensor:
        """About the mean of all."""
        return self._covariance(self.pixels - self.means[-1])

    def _covariance(self, centered: Float[Tensor, "records pixels"]) -> Tensor:
        variances = centered.square().mean(0)
        floor = 1e-4 + 0.02 * variances.mean()
        if centered.shape[1] > DENSE:
            return variances + floor
        return centered.T @ centered / len(centered) + floor * torch.eye(centered.shape[1], dtype=torch.float64)


@dataclass(frozen=True)
class Split:
    """One way to explain the targets: the candidate's share, and the share and class of each partner."""

    weight: float
    own: float
    partners: tuple[tuple[float, int], ...]


def weigh(
    seen: Encoding, pool: Batch, population: Population, *, name: str, settings: Mapping[str, object], rng: torch.Generator
) -> Float[Tensor, " candidates"]:
    """−log likelihood of each candidate, up to a constant: that it is the client's record in this mixture."""
    ways = {label: splits(seen.targets, label, name, settings, rng) for label in range(population.classes)}
    pairs = [(row, split) for row, label in enumerate(pool.labels.tolist()) for split in ways[label]]
    found = torch.full((len(pool),), -torch.inf, dtype=torch.float64)
    if len(pairs) > WEIGHED and population.within.ndim == 2:
        rough = torch.cat([one for _, one in _likelihoods(seen, pool, pairs, population, masked=name == "instahide", dense=False)])
        pairs = [pairs[place] for place in rough.topk(WEIGHED).indices.tolist()]
    for some, likely in _likelihoods(seen, pool, pairs, population, masked=name == "instahide", dense=True):
        for (row, _), value in zip(some, likely, strict=True):
            found[row] = torch.logaddexp(found[row], value)
    return -found


Pair = tuple[int, Split]


def _likelihoods(
    seen: Encoding, pool: Batch, pairs: Sequence[Pair], population: Population, *, masked: bool, dense: bool
) -> Iterator[tuple[Sequence[Pair], Float[Tensor, " pairs"]]]:
    """log likelihood of candidates under splits, with the splits' weights; dense ones with what pixels say of each other."""
    means, image, error = population.means, seen.image.double(), seen.error.double()
    options = torch.stack([image, 1 - image] if masked else [image])
    within, total = population.within, population.total
    if not dense and within.ndim == 2:
        within, total = within.diagonal(), total.diagonal()
    for first in range(0, len(pairs), AT_ONCE):
        some = pairs[first : first + AT_ONCE]
        share, weight = (torch.tensor([getattr(split, of) for _, split in some], dtype=torch.float64) for of in ("own", "weight"))
        mean = torch.stack([sum((part * means[c] for part, c in split.partners), torch.zeros_like(image)) for _, split in some])
        of_class, of_anyone = (
            torch.tensor([sum(part**2 for part, c in split.partners if (c == ANYONE) == public) for _, split in some])
            for public in (False, True)
        )
        spread = torch.tensordot(of_class.double()[:, None], within[None], 1) + torch.tensordot(of_anyone.double()[:, None], total[None], 1)
        own = pool.inputs[[row for row, _ in some]].flatten(1).double() * share[:, None]
        yield some, weight + filtered(options - own[:, None], mean, spread, 1 - share[:, None], error)


def splits(targets: Float[Tensor, " classes"], label: int, name: str, settings: Mapping[str, object], rng: torch.Generator) -> list[Split]:
    """The ways in which a record of this class can be in a mixture with these targets, with log weights.

    Classes of partners are equally likely, and shares uniform among those that add up.
    """
    there = [(c, share) for c, share in enumerate(targets.tolist()) if share > FAINT]
    inter = settings.get("partners") == "inter"
    private = int(str(settings["k"])) if name == "instahide" and not inter else 2
    if label not in dict(there) or len(there) > private:
        return []
    counted = []
    for more in itertools.combinations_with_replacement([c for c, _ in there], private - len(there)):
        counts = {c: 1 + more.count(c) for c, _ in there}
        weight = -sum(lgamma(counts[c] + (c != label)) for c in counts)
        counted.append((weight + sum((counts[c] - 1) * log(share) - lgamma(counts[c]) for c, share in there), counts))
    counted = sorted(counted, key=lambda pair: -pair[0])[:MOST]
    public = int(str(settings["k"])) - 2 if inter else 0
    found = []
    for weight, counts in counted:
        each = OWN if counts[label] > 1 else 1
        for _ in range(each):
            parts = [(part, c) for c, share in there for part in _parts(share, counts[c], name, settings, rng)]
            own = next(place for place, (_, c) in enumerate(parts) if c == label)
            rest = [(part, ANYONE) for part in _parts(max(0.0, 1 - float(targets.sum())), public, name, settings, rng)]
            found.append(Split(weight - log(each), parts[own][0], (*parts[:own], *parts[own + 1 :], *rest)))
    if name == "mixup" and len(there) == 1:
        found.append(Split(found[0].weight + log(OWN) + log(SELF), 1.0, ()))
    return found


def _parts(share: float, count: int, name: str, settings: Mapping[str, object], rng: torch.Generator) -> Iterator[float]:
    """A share split at random into this many."""
    if not count:
        return
    power = 1 / float(str(settings["alpha"])) if name == "mixup" else 1.0
    drawn = -torch.rand(count, generator=rng, dtype=torch.float64).clamp(min=1e-9).log()
    if power != 1 and count == 2:  # Jöhnk's: x^(1/α) and y^(1/α) over their sum are Beta(α, α) where the sum is at most 1
        while True:
            drawn = torch.rand(2, generator=rng, dtype=torch.float64) ** power
            if 0 < float(drawn.sum()) <= 1:
                break
    yield from (share * drawn / drawn.sum()).tolist()


def filtered(
    rest: Float[Tensor, "pairs options pixels"],
    mean: Float[Tensor, "pairs pixels"],
    spread: Tensor,
    most: Float[Tensor, "pairs one"],
    error: Float[Tensor, " pixels"],
) -> Float[Tensor, " pairs"]:
    """log of the density at what each pixel may be, either option alike, under a Gaussian within bounds: pixel by pixel.

    Args:
        rest: what a pixel is under each option.
        mean: of the Gaussian.
        spread: its covariances, or the variances of independent pixels.
        most: the upper bound; the lower one is 0.
        error: with which ``rest`` is known.
    """
    outside = (-rest).clamp(min=0) + (rest - most[:, None]).clamp(min=0)
    fixed = -outside / error - log(rest.shape[1])

    def weights(pixel: int | slice, middle: Tensor, variance: Tensor) -> Tensor:
        gap = (rest[:, :, pixel] - middle[:, None]).square() / variance[:, None]
        found: Tensor = fixed[:, :, pixel] - 0.5 * (gap + (2 * math.pi * variance[:, None]).log())
        return found

    own = spread if spread.ndim == 2 else spread.diagonal(dim1=1, dim2=2)
    first = weights(slice(None), mean, own + error.square())
    if spread.ndim == 2:
        return first.logsumexp(1).sum(1)
    share = first.softmax(1)
    order = -(share * share.clamp(min=1e-30).log()).sum(1).mean(0)
    total, mean, spread = torch.zeros(len(rest), dtype=rest.dtype), mean.clone(), spread.clone()
    for pixel in order.argsort().tolist():
        variance = spread[:, pixel, pixel].clamp(min=1e-9)
        likely = weights(pixel, mean[:, pixel], variance + error[pixel] ** 2)
        total += likely.logsumexp(1)
        share = likely.softmax(1)
        middle = (share * rest[:, :, pixel]).sum(1)
        left = (share * (rest[:, :, pixel] - middle[:, None]).square()).sum(1) + error[pixel] ** 2
        gain = spread[:, :, pixel] / variance[:, None]
        mean += gain * (middle - mean[:, pixel])[:, None]
        spread -= gain[:, :, None] * gain[:, None, :] * (variance - left)[:, None, None]
    return total
