"""Which set of candidates explains what was observed: the likeliest one, or several by least squares and then exchanges of one.

A candidate may have several versions, one for each way in which a defense may have changed it. Of one record their likelihoods are
averaged; of several the likeliest version of each is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor
from torch.func import vmap

from attacks._identify.alone import CHUNK_MB, chunks, clipped
from attacks._matching.distances import Distance, Span

SWEEPS = 5
"""Passes over the named candidates in which each is exchanged for a likelier one, at most."""

Owners = Int[Tensor, " versions"]
"""The candidate that each version is one of."""

Told = tuple[Int[Tensor, " versions"], Int[Tensor, " classes"]]
"""Labels of the versions, and how many records of each class there are."""


@dataclass(frozen=True)
class Evidence:
    """One round: what was observed, what each version alone would have caused, and how likely the one makes the other.

    Attributes:
        target: the observed update, the mean of the senders' updates.
        updates: of each version.
        spans: of the tensors.
        distance: of a mean of updates from the observed one: −log likelihood, or an angle.
        senders: behind the upload; each has equally many of the records, in order.
        limit: norm to which each sender's update was clipped before the mean.
    """

    target: Float[Tensor, " coordinates"]
    updates: Float[Tensor, "versions coordinates"]
    spans: tuple[Span, ...]
    distance: Distance
    senders: int = 1
    limit: float = math.inf

    def surprise(self, chosen: Int[Tensor, "guesses records"]) -> Float[Tensor, " guesses"]:
        """For each set of versions, how unlikely the observed update is."""
        of = chosen.view(len(chosen), self.senders, -1)
        found = []
        for some in chunks(len(of), self.target.numel() * chosen.shape[1]):
            means = clipped(self.updates[of[some]].mean(2), self.limit).mean(1)
            found.append(surprises(means, self.target, self.spans, self.distance))
        return torch.cat(found)

    def exchanged(self, chosen: Int[Tensor, " records"], place: int, others: Int[Tensor, " guesses"]) -> Float[Tensor, " guesses"]:
        """The surprise with each of ``others`` at one place of a set."""
        each = len(chosen) // self.senders
        sums = torch.stack([self.updates[of].sum(0) for of in chosen.view(self.senders, each)])
        own = sums[place // each] - self.updates[chosen[place]]
        sums = clipped(sums / each, self.limit)
        rest = sums.sum(0) - sums[place // each]
        found = []
        for some in chunks(len(others), self.target.numel()):
            means = (rest + clipped((own + self.updates[others[some]]) / each, self.limit)) / self.senders
            found.append(surprises(means, self.target, self.spans, self.distance))
        return torch.cat(found)


def surprises(
    updates: Float[Tensor, "guesses coordinates"], target: Float[Tensor, " coordinates"], spans: Sequence[Span], distance: Distance
) -> Float[Tensor, " guesses"]:
    """The distance of each update from the observed one."""
    found: Tensor = vmap(lambda update: distance(update, target, spans))(updates)
    return torch.nan_to_num(found, nan=torch.inf)


def by_candidate(surprise: Float[Tensor, " versions"], owner: Owners, nats: bool) -> Float[Tensor, " candidates"]:
    """−log of each candidate's mean likelihood over its versions; the least surprise where it is not in nats."""
    candidates = int(owner.max()) + 1
    least = torch.full((candidates,), torch.inf, dtype=surprise.dtype).scatter_reduce(0, owner, surprise, "amin")
    if not nats:
        return least
    there = torch.where(least.isfinite(), least, 0.0)
    total = torch.zeros_like(least).index_add(0, owner, (there[owner] - surprise).exp())
    return least - (total / torch.bincount(owner, minlength=candidates)).log().nan_to_num(neginf=0.0)


def named(
    each: Sequence[Evidence], owner: Owners, records: int, *, deadline: float = math.inf, told: Told | None = None
) -> tuple[Int[Tensor, " records"], float]:
    """The set of versions, of different candidates, that explains all rounds best, and its surprise.

    Args:
        each: the rounds.
        owner: of each version.
        records: how many there are.
        deadline: ``time.process_time()`` after which no more exchanges are tried.
        told: labels of the versions and counts of the classes, which the set then has, if there are enough candidates of each.
    """
    best = start(each, owner, records, told)
    labels = torch.zeros_like(owner) if told is None else told[0]
    lowest = float(sum(float(one.surprise(best[None])[0]) for one in each))
    for _ in range(SWEEPS):
        before = lowest
        for place in range(records):
            if time.process_time() > deadline:
                return best, lowest
            taken = torch.cat([owner[best[:place]], owner[best[place + 1 :]]])
            others = (~torch.isin(owner, taken) & (labels == labels[best[place]])).nonzero().flatten()
            found = torch.stack([one.exchanged(best, place, others) for one in each]).sum(0)
            if float(found.min()) < lowest:
                lowest, best = float(found.min()), best.index_put((torch.tensor([place]),), others[found.argmin()])
        if lowest == before:
            break
    return best, lowest


def start(each: Sequence[Evidence], owner: Owners, records: int, told: Told | None = None) -> Int[Tensor, " records"]:
    """The versions with the largest weights in the nonnegative combination of updates that is nearest to the observed ones.

    Where an update has zeros, all are compared on the rest; the problem is reduced to one of as many equations as versions.
    """
    count = len(owner)
    gram, seen = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for one in each:
        scale = one.target.double().square().sum().clamp(min=1e-300)
        for some in torch.split(torch.arange(one.target.numel()), max(1, CHUNK_MB * 2**20 // (16 * count))):
            target = one.target[some].double()
            own = one.updates[:, some].double() * (target != 0)
            gram, seen = gram + own @ own.T / scale, seen + own @ target / scale
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp(min=1e-12 * float(values.max())).sqrt()
    weights, _ = nnls((root[:, None] * vectors.T).numpy(), ((vectors.T @ seen) / root).numpy(), maxiter=30 * len(gram))
    order, chosen = torch.tensor(weights).argsort(descending=True, stable=True).tolist(), dict[int, int]()
    labels, left = ([0] * count, [records]) if told is None else (told[0].tolist(), told[1].tolist())
    for version in order:
        if int(owner[version]) not in chosen and left[labels[version]] > 0:
            chosen[int(owner[version])] = version
            left[labels[version]] -= 1
    for version in order:  # too few candidates of a class
        chosen.setdefault(int(owner[version]), version)
    return torch.tensor(list(chosen.values())[:records])
