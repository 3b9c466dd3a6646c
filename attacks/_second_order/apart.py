"""Records of one class that a start has mixed, set apart again: differences that the residual asks for and pixels have room for.

The update holds the mean m of equal-label records to first order and their differences d to second: near m the residual is
r(m) + ½·r''[d, d]. So d is found as in phase retrieval, up to signs that compete, and starts end on a mixture while the mean and all other
records are right. There, lower residuals lie along the eigenvectors of r(m)·r'' with negative eigenvalues, where m leaves room in [0, 1].

Source: the spectral start of Candès, Li and Soltanolkotabi, 2015, arXiv:1407.1065, algorithm 1; several draws from the leading eigenspace
    instead of its first vector, weighed by the room min(m, 1 − m).
Measured: tests/attacks/test_second_order.py.
"""

from __future__ import annotations

import math
import time

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, jvp, vmap

from attacks._second_order.modes import modes
from attacks._second_order.residual import DIRECTIONS, Images, Residual

MODES = 200
"""Smoothest modes in which differences are sought, at most."""
LEADING = 16
"""Directions from which a difference is drawn, at most."""
DRAWS = 256
"""Differences that are tried, each at the price of two updates."""
LEAST_ROOM = 0.03
"""Room that a pixel at the edge of the range still gets: the mean is right to a few percent."""


def leading(residual: Residual, images: Images, pair: tuple[int, int]) -> Float[Tensor, "directions pixels"]:
    """Differences of two merged records along which the squared residual falls fastest, as long as they are likely to be."""
    first, second = pair
    r, shape = residual(images), images.shape[1:]
    slope = grad(lambda x: residual(x) @ r)
    every = modes((shape[0], shape[1], shape[2]))
    cutoff = max(shape[1:])
    while len(every.below(cutoff).basis) > MODES:
        cutoff -= 1
    room = torch.minimum(images[first], 1 - images[first]).clamp(min=LEAST_ROOM).flatten()
    rows = every.below(cutoff).basis * room
    side = torch.zeros(len(images), 1, dtype=rows.dtype)
    side[first], side[second] = 1.0, -1.0

    def curved(v: Tensor) -> Tensor:
        change: Tensor = jvp(slope, (images,), ((side * v).view(images.shape),))[1]
        return (change[first] - change[second]).flatten() / 2

    square = vmap(curved, chunk_size=DIRECTIONS)(rows) @ rows.T
    values, vectors = torch.linalg.eigh((square + square.T) / 2)
    kept = int((values[:LEADING] < 0).sum())
    directions = vectors[:, :kept].T @ rows
    scaled: Tensor = directions / directions.norm(dim=1, keepdim=True) * (values[:kept] / values[:1]).sqrt()[:, None]
    return scaled


def set_apart(
    residual: Residual, images: Images, labels: Int[Tensor, " batch"], rng: torch.Generator, *, deadline: float = math.inf
) -> Images:
    """The same records, but for those that share a class: of many draws around their mean, the one of least residual."""
    start = images.clone()
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            continue
        start[members] = images[members].mean(0).clamp(0, 1)
        start = lowest(residual, start, members, rng, deadline=deadline)
    return start


def lowest(
    residual: Residual, merged: Images, members: Int[Tensor, " members"], rng: torch.Generator, *, deadline: float = math.inf
) -> Images:
    """Of many draws in the leading directions, each as far as the residual's second-order model wants it, the best one."""
    directions = leading(residual, merged, (int(members[0]), int(members[1])))
    if not len(directions):
        return merged
    r, best, value = residual(merged), merged, torch.inf
    for _ in range(DRAWS):
        if time.process_time() > deadline:
            break
        draw = torch.randn(len(members), len(directions), generator=rng, dtype=torch.float64)
        d = (draw - draw.mean(0)) @ directions
        d = 0.05 * (d / d.square().mean().sqrt()).view(len(members), *merged.shape[1:])
        trial = merged.index_add(0, members, d)
        change = residual(trial) - r
        reach = max(float(-(change @ r) / change.square().sum()), 0.04) ** 0.5
        trial = merged.index_add(0, members, reach * d)
        trial[members] = trial[members].clamp(0, 1)
        after = float(residual(trial).norm())
        if after < value:
            best, value = trial, after
    return best
