"""Records as roots: a record's own backward signal must lie in the column space of the update.

With ∂W = D·X every record is a row X_i = c·R of the row space and its column of D lies in the column space, while the network says
what that column is: d(A·c, label), the backward signal of its preactivations A·c. So (1 − LLᵀ)·d(A·c, label) = 0: as many equations
as neurons for as many unknowns as records, each record by itself, and nothing of the size of a picture in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from attacks._layers import Call, all_buffers
from attacks._matching.simulate import casted
from attacks._sparse.space import Space
from simulator.adversary import Knowledge
from simulator.training import loss
from simulator.types import Batch, Broadcast

Signal = Callable[[Tensor, Tensor], Tensor]
"""(preactivations, label) of one record → the gradient of its own loss with respect to the preactivations."""

STEPS = 40
"""Of Levenberg–Marquardt for each start; from a good start ten do."""

AT_ONCE = 32
"""Starts in one call: their Jacobians stay in the caches."""

ROOT = 1e-6
"""Relative residual at which a root is one to the rounding of float32."""

HOPELESS = 1e4
"""Damping at which a start is given up."""


@dataclass(frozen=True)
class Roots:
    """Where the starts ended.

    Attributes:
        coordinates: c of each start, with unit·c = 1.
        residual: part of the backward signal outside the column space, relative to it.
        error: root mean square error of the record that a residual of this size can stand for, on the scale of the layer's input.
    """

    coordinates: Float[Tensor, "starts rank"]
    residual: Float[Tensor, " starts"]
    error: Float[Tensor, " starts"]


def backward_signal(knowledge: Knowledge, broadcast: Broadcast, first: Call) -> Signal:
    """The part of the model behind its first linear layer, as the gradient of one record's loss; in float64."""
    model, layer = knowledge.model, knowledge.model.get_submodule(first.name)
    parameters = casted(broadcast.parameters, torch.float64)
    buffers = casted(all_buffers(model, broadcast), torch.float64)
    blank = torch.zeros(1, *knowledge.schema.shape, dtype=torch.float64)

    def of_record(preactivations: Tensor, label: Tensor) -> Tensor:
        # 0·label: cross_entropy with label smoothing cannot take labels that are batched by a vmap over logits that are not
        handle = layer.register_forward_hook(lambda *_: (preactivations + 0 * label)[None])
        try:
            return loss(model, parameters, buffers, Batch(blank, label[None]), label_smoothing=knowledge.training.label_smoothing)[0]
        finally:
            handle.remove()

    signal: Signal = grad(of_record)
    return signal


def outside(space: Space, signal: Signal) -> Callable[[Tensor, Tensor], Tensor]:
    """The part of a record's backward signal outside the column space, relative to the signal, from its coordinates and label."""

    def residual(coordinates: Tensor, label: Tensor) -> Tensor:
        column = signal(space.slopes @ coordinates, label)
        return (column - space.left @ (space.left.T @ column)) * column.square().sum().clamp_min(1e-300).rsqrt()

    return residual


def residuals(
    space: Space, signal: Signal, coordinates: Float[Tensor, "starts rank"], labels: Int[Tensor, " classes"]
) -> Float[Tensor, "starts classes"]:
    """Norm of the residual of every start under every label."""
    each = vmap(vmap(outside(space, signal), (None, 0)), (0, None))
    norms = [each(part, labels).norm(dim=2) for part in torch.split(coordinates, AT_ONCE)]
    return torch.cat(norms)


def solve(space: Space, signal: Signal, starts: Float[Tensor, "starts rank"], labels: Int[Tensor, " starts"], *, deadline: float) -> Roots:
    """Levenberg–Marquardt from every start; unit·c = 1 is one more equation."""
    gram = space.right @ space.right.T / space.right.shape[1]
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors * values.clamp_min(1e-14 * float(values[-1])).rsqrt()  # c = basis·w: ‖w‖ is the record's root mean square
    parts = [
        _solve(space, signal, basis, part, label, deadline)
        for part, label in zip(torch.split(starts, AT_ONCE), torch.split(labels, AT_ONCE), strict=True)
    ]
    return Roots(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _solve(space: Space, signal: Signal, basis: Tensor, starts: Tensor, labels: Tensor, deadline: float) -> tuple[Tensor, Tensor, Tensor]:
    residual, rank, along = outside(space, signal), space.rank, space.unit @ basis
    values, slopes = vmap(residual), vmap(jacfwd(residual))

    def equations(c: Tensor, y: Tensor) -> Tensor:
        return torch.cat([values(c, y), (c @ space.unit - 1)[:, None]], 1)

    def jacobian(c: Tensor, y: Tensor) -> Tensor:
        return torch.nan_to_num(torch.cat([slopes(c, y) @ basis, along.expand(len(c), 1, rank)], 1), posinf=0.0, neginf=0.0)

    c, alive = starts.clone(), torch.arange(len(starts))
    now = equations(c, labels)
    best = now.norm(dim=1)
    damping = torch.full((len(c),), 1e-2, dtype=c.dtype)
    for _ in range(STEPS):
        if not len(alive) or time.process_time() > deadline:
            break
        system = jacobian(c[alive], labels[alive])
        normal = system.mT @ system
        downhill = (system.mT @ now[alive, :, None])[..., 0]
        ridge = damping[alive] * normal.diagonal(dim1=1, dim2=2).mean(1)
        step = torch.linalg.solve_ex(normal + ridge[:, None, None] * torch.eye(rank, dtype=c.dtype), downhill)[0]
        trial = c[alive] - step @ basis.T
        there = equations(trial, labels[alive])
        size = torch.nan_to_num(there.norm(dim=1), nan=torch.inf)
        better = size < best[alive]
        gain = torch.where(better, size / best[alive], 1.0)
        moved = alive[better]
        c[moved], now[moved], best[moved] = trial[better], there[better], size[better]
        damping[alive] = torch.where(better, damping[alive] / 4, damping[alive] * 4).clamp_min(1e-14)
        done = (best[alive] < ROOT) & (gain > 0.5)
        alive = alive[~done & (damping[alive] < HOPELESS)]
    smallest = torch.linalg.svdvals(jacobian(c, labels))[:, -1]
    return c, best, best / smallest.clamp_min(1e-300)
