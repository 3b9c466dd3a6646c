"""The function that is minimized, on many candidates at once: victims and restarts as rows of one stack.

Batching pays where the overhead of operations rules: 2 to 8 times for LeNets and MLPs. For wide networks the memory traffic of one
weight gradient for each row costs more than it saves, so they go row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad_and_value, vmap

from attacks._matching.client import Client, Recipe, Trial
from attacks._matching.distances import Distance, Span
from attacks._matching.normalization import Assumption
from attacks._matching.priors import Weighted
from attacks._matching.simulate import Victim, casted
from attacks._matching.variables import Pixels, Variable
from simulator.types import Tensors

Rows = Int[Tensor, " rows"]
Candidates = Float[Tensor, "rows freedom"]

MOST_ROWS = 32
"""Rows in one call beyond which nothing is gained on a CPU: the stack leaves the caches."""


class Values(NamedTuple):
    """The objective on a stack of rows: with the priors, without them, and its slope."""

    total: Float[Tensor, " rows"]
    match: Float[Tensor, " rows"]
    gradient: Candidates


def mean_image(images: Float[Tensor, "restarts batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
    """The mean over restarts."""
    return images.mean(0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A gradient-matching attack, put together from independent parts.

    Attributes:
        distance: of updates.
        variable: what is optimized and how it becomes images.
        client: how images become an update.
        priors: penalties on the images, with their weights.
        restarts: for each victim; after an eighth, a quarter and a half of the run the better half of them goes on.
        dtype: precision of the simulation.
        seconds: CPU time for each victim, all restarts together.
        memory_mb: budget for victims and restarts that are attacked at once.
        consensus: what the restarts' images of one victim have in common, for priors that are ``grouped``.
        normalization: what normalizes the candidates where the client's BatchNorm is in train mode.
    """

    distance: Distance
    variable: Variable = field(default_factory=Pixels)
    client: Client = field(default_factory=Recipe)
    priors: tuple[Weighted, ...] = ()
    restarts: int = 1
    dtype: torch.dtype = torch.float32
    seconds: float = float("inf")
    memory_mb: int = 1024
    consensus: Callable[[Tensor], Tensor] = mean_image
    normalization: Assumption = "train"


def equal(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of named tensors hold the same values."""
    return all(one[name] is other[name] or torch.equal(one[name], other[name]) for name in one)


@dataclass(frozen=True)
class Objective:
    """distance(simulated, observed) + Σ weight·prior, and its gradient, for rows of candidates.

    Attributes:
        victims: of equal kin; row r of a stack of candidates belongs to victim ``r // restarts``.
        setting: the parts.
        at_once: rows in one call.
        task: what to call the work where progress is shown.
    """

    victims: Sequence[Victim]
    setting: Setting
    at_once: int = MOST_ROWS
    task: str = "matching"

    def __post_init__(self) -> None:
        assert self._extras >= 0  # counted here, since a client may draw random numbers, which vmap forbids

    @property
    def restarts(self) -> int:
        """Rows of each victim."""
        return self.setting.restarts

    @property
    def seconds(self) -> float:
        """CPU time for all rows together."""
        return self.setting.seconds * len(self.victims)

    @property
    def settles(self) -> bool:
        """Whether weights move during the run, so that values of different steps cannot be compared."""
        return any(weighted.moves for weighted in self.setting.priors)

    @cached_property
    def shared(self) -> bool:
        """Whether all victims got the same broadcast."""
        return all(equal(self.victims[0].parameters, victim.parameters) for victim in self.victims)

    @cached_property
    def _parameters(self) -> Tensors:
        first = self.victims[0]
        if self.shared:
            return casted(first.parameters, self.setting.dtype)
        return casted({name: torch.stack([v.parameters[name] for v in self.victims]) for name in first.parameters}, self.setting.dtype)

    @cached_property
    def _buffers(self) -> Tensors:
        names = self.victims[0].buffers
        return casted({name: torch.stack([v.buffers[name] for v in self.victims]) for name in names}, self.setting.dtype)

    @cached_property
    def _uploaded(self) -> Tensors:
        return casted(
            {name: torch.stack([v.uploaded[name] for v in self.victims]) for name in self.victims[0].uploaded}, self.setting.dtype
        )

    @cached_property
    def _targets(self) -> Tensor:
        return torch.stack([victim.target for victim in self.victims]).to(self.setting.dtype)

    @cached_property
    def _labels(self) -> Tensor:
        return torch.stack([victim.labels for victim in self.victims])

    @cached_property
    def _extras(self) -> int:
        """Degrees of freedom of the client: the last ones of a row."""
        return len(self.setting.client.start(self.victims[0], torch.Generator()))

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """First and end of each tensor in the flat update."""
        return self.victims[0].spans

    @cached_property
    def rates(self) -> Float[Tensor, " freedom"] | None:
        """Factors on the step of Adam, None where all are 1."""
        victim, z = self.victims[0], self.start([torch.Generator()] * len(self.victims))
        inputs, extras = self.setting.variable.rates(victim), self.setting.client.rates(victim)
        if inputs is None and extras is None:
            return None
        own = z.shape[1] - self._extras
        parts = (torch.ones(own) if inputs is None else inputs, torch.ones(self._extras) if extras is None else extras)
        return torch.cat(parts).to(z.dtype)

    def start(self, rngs: Sequence[torch.Generator]) -> Candidates:
        """All restarts of all victims, each victim's from its own generator: independent of who else is attacked."""
        rows = []
        for victim, rng in zip(self.victims, rngs, strict=True):
            for _ in range(self.restarts):
                rows.append(torch.cat([self.setting.variable.start(victim, rng), self.setting.client.start(victim, rng)]))
        return torch.stack(rows).to(self.setting.dtype)

    def project(self, z: Candidates) -> Candidates:
        """The nearest rows that are allowed."""
        own = z.shape[1] - self._extras
        if not self._extras:
            return self.setting.variable.project(z)
        return torch.cat([self.setting.variable.project(z[:, :own]), self.setting.client.project(z[:, own:])], 1)

    def decode(self, z: Float[Tensor, " freedom"]) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, " extras"]]:
        """The images of one row, and the client's own degrees of freedom."""
        own = len(z) - self._extras
        return self.setting.variable.decode(z[:own], self.victims[0]), z[own:]

    def __call__(self, z: Candidates, rows: Rows, progress: float = 1.0) -> Values:
        """Evaluate candidates.

        Args:
            z: to evaluate.
            rows: where in the full stack they stand.
            progress: share of the run that is done, for the weights of the priors.
        """
        weights = tuple(weighted.at(progress) for weighted in self.setting.priors)
        consensus = self._consensus(z, rows)
        starts = range(0, len(rows), self.at_once)
        parts = [self._evaluate(z[i : i + self.at_once], rows[i : i + self.at_once], weights, consensus) for i in starts]
        return Values(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _value(
        self,
        z: Tensor,
        labels: Tensor,
        target: Tensor,
        parameters: Tensors,
        buffers: Tensors,
        uploaded: Tensors,
        consensus: Tensor | None,
        weights: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """The objective of one candidate, and its distance alone."""
        inputs, extras = self.decode(z)
        trial = Trial(self.victims[0], inputs, labels, extras, parameters, buffers, target, consensus, uploaded=uploaded)
        update, after = self.setting.client.simulate(trial)
        match = self.setting.distance(update, target, self.spans)
        trial = replace(trial, after=after)
        total = match
        for weighted, weight in zip(self.setting.priors, weights, strict=True):
            total = total + weight * weighted.prior(trial) if weight else total
        return total, match

    @torch.no_grad()
    def _consensus(self, z: Candidates, rows: Rows) -> dict[int, Tensor]:
        """For each victim the mean of its rows' images, where a prior asks for it."""
        if not any(weighted.grouped for weighted in self.setting.priors):
            return {}
        images = torch.stack([self.decode(row)[0] for row in z])
        owners = rows // self.restarts
        return {owner: self.setting.consensus(images[owners == owner]) for owner in sorted(set(owners.tolist()))}

    def _evaluate(self, z: Candidates, rows: Rows, weights: Sequence[float], consensus: dict[int, Tensor]) -> Values:
        owners = rows // self.restarts
        labels, targets = self._labels[owners], self._targets[owners]
        parameters = self._parameters if self.shared else {name: tensor[owners] for name, tensor in self._parameters.items()}
        buffers = {name: tensor[owners] for name, tensor in self._buffers.items()}
        uploaded = {name: tensor[owners] for name, tensor in self._uploaded.items()}
        means = torch.stack([consensus[owner] for owner in owners.tolist()]) if consensus else None
        if len(rows) > 1:
            axes = (0, 0, 0, None if self.shared else 0, 0, 0 if uploaded else None, None if means is None else 0, None)
            slopes, (totals, matches) = vmap(grad_and_value(self._value, has_aux=True), in_dims=axes)(
                z, labels, targets, parameters, buffers, uploaded, means, weights
            )
            return Values(totals.detach(), matches.detach(), slopes.detach())
        row = z[0].detach().clone().requires_grad_(True)  # plain autograd outside: less overhead than torch.func twice
        alone = {name: (tensor if self.shared else tensor[0]).detach().requires_grad_(True) for name, tensor in parameters.items()}
        own = {name: tensor[0] for name, tensor in buffers.items()}
        left = {name: tensor[0] for name, tensor in uploaded.items()}
        total, match = self._value(row, labels[0], targets[0], alone, own, left, None if means is None else means[0], weights)
        return Values(total[None].detach(), match[None].detach(), torch.autograd.grad(total, row)[0][None])
