"""Candidates for columns of D, by turns in the column space and in the row space.

A record's coordinates c split the neurons by the sign of A·c; its column L·q is zero on the negative side. Either gives a better
guess of the other: q is the sparsest vector on the side that c calls off, c is the linear classifier of the rows that q leaves on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._sparse.space import Space

WARM, COLD = 0.3, 0.003
"""Width of the soft side of c at the first and at the last turn, in units of the mean |A·c|."""


def _smallest(gram: Float[Tensor, "many rank rank"], start: Float[Tensor, "many rank"], rounds: int = 3) -> Float[Tensor, "many rank"]:
    """Nearly the eigenvector of the smallest eigenvalue, by inverse iteration."""
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6)
    factor, q = torch.linalg.cholesky_ex(gram)[0], start[:, :, None]
    for _ in range(rounds):
        q = torch.nan_to_num(torch.cholesky_solve(q, factor), posinf=0.0, neginf=0.0)
        q = q / q.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return q[:, :, 0]


def alternate(
    left: Float[Tensor, "neurons rank"],
    sides: Float[Tensor, "neurons free"],
    *,
    starts: int,
    turns: int,
    rng: torch.Generator,
    power: float = 1.0,
    first: Float[Tensor, "starts neurons"] | None = None,
    begin: float = 0.0,
) -> Float[Tensor, "starts rank"]:
    """Directions q from random records, or from the preactivations ``first``; ``sides`` is an orthonormal basis of the possible ones.

    The column is found by one reweighted step towards ‖L·q‖_power on the side that is off; the side by least squares on soft labels.
    ``begin`` is the share of the schedule that is skipped.
    """
    neurons, rank = left.shape
    rows = left * neurons**0.5
    z = torch.randn(starts, sides.shape[1], generator=rng, dtype=left.dtype) @ sides.T if first is None else first
    q = torch.randn(len(z), rank, generator=rng, dtype=left.dtype)
    size: Tensor | None = None
    for turn in range(turns):
        done = begin + (1 - begin) * turn / turns
        if size is not None:
            on = torch.tanh(torch.log(size.clamp_min(1e-6) / (0.5 * 0.1**done)))
            z = (on @ sides) @ sides.T
        width = WARM * (COLD / WARM) ** done
        weights = torch.sigmoid(-z / (width * z.abs().mean(1, keepdim=True)))
        if size is not None:
            weights = weights * (size.square() + max(0.75**turn, 1e-4) ** 2) ** (power / 2 - 1)
            weights = weights / weights.mean(1, keepdim=True) + 1e-6
        q = _smallest((rows.T * weights[:, None, :]) @ rows, q)
        size = (q @ rows.T).abs()
        size = size / size.mean(1, keepdim=True)
    return q


def left_over(space: Space, found: Float[Tensor, "found rank"], best: int = 24) -> Float[Tensor, "masks rank"]:
    """Null vectors of the rows that are off, for every mask that one of the last two records can have.

    The coordinates c of a missing record are orthogonal to all columns found, and unit·c = 1. With one missing that is a
    point; with two, a line, which the neurons cut into intervals of one mask each: the rows that are off change by one from
    interval to interval. Those whose smallest singular value is smallest are returned.
    """
    free = torch.linalg.svd(found)[2][len(found) :]
    along = free @ space.unit
    start = free.T @ along / along.square().sum()
    if len(free) == 1:
        rows = space.left[space.slopes @ start < 0]
        only: Tensor = torch.linalg.eigh(rows.T @ rows)[1][:, :1].T
        return only
    rate = space.slopes @ (free.T @ torch.stack([-along[1], along[0]]))
    order = (-(space.slopes @ start) / rate).argsort()
    outer = space.left[:, :, None] * space.left[:, None, :]
    first = outer[rate > 0].sum(0)[None]  # before all knots the neurons that rise are off
    grams = torch.cat([first, first + (outer[order] * -rate[order].sign()[:, None, None]).cumsum(0)])
    values, vectors = torch.linalg.eigh(grams)
    chosen: Tensor = vectors[values[:, 0].argsort()[:best], :, 0]
    return chosen


def distinct(q: Float[Tensor, "many rank"], tolerance: float = 0.999) -> Float[Tensor, "few rank"]:
    """One of each cluster of directions, largest clusters first: columns of D are hit again and again, accidents are not."""
    near = (q @ q.T).abs() > tolerance
    order = near.sum(1).argsort(descending=True)
    free, chosen = torch.ones(len(q), dtype=torch.bool), list[int]()
    for place in order.tolist():
        if free[place]:
            chosen.append(place)
            free &= ~near[place]
    return q[chosen]
