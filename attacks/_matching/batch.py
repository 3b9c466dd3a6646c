"""Many candidates at once: victims and restarts as rows of one stack, one torch.func call for all of them.

Batching pays where the overhead of operations rules: 2 to 8 times for LeNets and MLPs. For wide networks the memory traffic of one
weight gradient for each row costs more than it saves, so they go row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad_and_value, vmap

from attacks._layers import trace
from attacks._matching.objective import DISTANCES, Distance
from attacks._matching.priors import roughness
from attacks._matching.simulate import Victim, casted, simulate
from simulator.types import Tensors

Rows = Int[Tensor, " rows"]
Candidates = Float[Tensor, "rows batch channel height width"]

BATCHED_BELOW_PARAMETERS = 500_000
MOST_ROWS = 32
"""Rows in one call beyond which nothing is gained on a CPU: the stack leaves the caches."""


def equal(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of named tensors hold the same values."""
    return all(one[name] is other[name] or torch.equal(one[name], other[name]) for name in one)


def first_of(stack: Tensors) -> Tensors:
    """The first row of stacked tensors."""
    return {name: tensor[0] for name, tensor in stack.items()}


@dataclass(frozen=True)
class Objective:
    """distance(simulated, observed) + tv·roughness of the candidate, and its gradient, for rows of candidates.

    Attributes:
        victims: of equal kin; row r of a stack of candidates belongs to victim ``r // restarts``.
        restarts: candidates for each victim.
        distance: of updates.
        tv: weight of the roughness.
        dtype: precision of the simulation.
        at_once: rows in one call.
    """

    victims: Sequence[Victim]
    restarts: int
    distance: Distance
    tv: float = 0.0
    dtype: torch.dtype = torch.float32
    at_once: int = MOST_ROWS

    @cached_property
    def shared(self) -> bool:
        """Whether all victims got the same broadcast."""
        return all(equal(self.victims[0].parameters, victim.parameters) for victim in self.victims)

    @cached_property
    def _parameters(self) -> Tensors:
        first = self.victims[0]
        if self.shared:
            return casted(first.parameters, self.dtype)
        return casted({name: torch.stack([v.parameters[name] for v in self.victims]) for name in first.parameters}, self.dtype)

    @cached_property
    def _buffers(self) -> Tensors:
        return casted({name: torch.stack([v.buffers[name] for v in self.victims]) for name in self.victims[0].buffers}, self.dtype)

    @cached_property
    def _targets(self) -> Tensor:
        return torch.stack([victim.target for victim in self.victims]).to(self.dtype)

    @cached_property
    def _labels(self) -> Tensor:
        return torch.stack([victim.labels for victim in self.victims])

    def value(self, inputs: Tensor, labels: Tensor, target: Tensor, parameters: Tensors, buffers: Tensors, tv: float) -> Tensor:
        """The objective of one candidate under the weight ``tv``."""
        kin = self.victims[0]
        trial = simulate(kin.model, parameters, buffers, inputs, labels, recipe=kin.recipe, order=kin.order, names=kin.names)
        match = DISTANCES[self.distance](trial, target)
        return match + tv * roughness(inputs) if tv else match

    def __call__(self, candidates: Candidates, rows: Rows, prior: float = 1.0) -> tuple[Float[Tensor, " rows"], Candidates]:
        """Values and gradients of the candidates.

        Args:
            candidates: to evaluate.
            rows: where in the full stack they stand.
            prior: factor on the weight of the prior, for attacks that loosen it as they go.
        """
        starts = range(0, len(rows), self.at_once)
        parts = [self._evaluate(candidates[i : i + self.at_once], rows[i : i + self.at_once], prior * self.tv) for i in starts]
        return torch.cat([value for value, _ in parts]), torch.cat([gradient for _, gradient in parts])

    def _evaluate(self, candidates: Candidates, rows: Rows, tv: float) -> tuple[Float[Tensor, " rows"], Candidates]:
        owners = rows // self.restarts
        parameters = self._parameters if self.shared else {name: tensor[owners] for name, tensor in self._parameters.items()}
        buffers = {name: tensor[owners] for name, tensor in self._buffers.items()}
        arguments = (candidates, self._labels[owners], self._targets[owners], parameters, buffers, tv)
        axes = (0, 0, 0, None if self.shared else 0, 0, None)
        if len(rows) > 1:
            gradients, values = vmap(grad_and_value(self.value), in_dims=axes)(*arguments)
            return values.detach(), gradients.detach()
        candidate = candidates[0].clone().requires_grad_(True)  # plain autograd outside: less overhead than torch.func twice
        owner = int(owners)
        alone = parameters if self.shared else first_of(parameters)
        value = self.value(candidate, self._labels[owner], self._targets[owner], alone, first_of(buffers), tv)
        return value[None].detach(), torch.autograd.grad(value, candidate)[0][None]


def bytes_per_row(victim: Victim, dtype: torch.dtype) -> int:
    """Memory of one row: activations of each local step, kept for two backward passes, and the update's own copies."""
    inputs = torch.zeros(max(2, len(victim.labels)), *victim.shape)
    calls, _ = trace(victim.model, victim.parameters, victim.buffers, inputs)
    activations = sum(call.inputs.numel() + 2 * call.outputs.numel() for call in calls) * len(victim.order)
    return (6 * activations + 8 * len(victim.target) * len(victim.order)) * dtype.itemsize


def chunks(victims: Sequence[Victim], restarts: int, *, memory_mb: int, dtype: torch.dtype) -> Iterator[list[int]]:
    """Indices of victims to take at once: of equal kin, and within the memory budget."""
    groups: dict[object, list[int]] = {}
    for index, victim in enumerate(victims):
        groups.setdefault(victim.kin, []).append(index)
    for members in groups.values():
        rows = rows_at_once(victims[members[0]], memory_mb=memory_mb, dtype=dtype)
        size = max(1, rows // restarts)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def rows_at_once(victim: Victim, *, memory_mb: int, dtype: torch.dtype) -> int:
    """How many rows of this kind to evaluate in one call."""
    if sum(prod(tensor.shape) for tensor in victim.parameters.values()) > BATCHED_BELOW_PARAMETERS:
        return 1
    return max(1, min(MOST_ROWS, memory_mb * 2**20 // bytes_per_row(victim, dtype)))
