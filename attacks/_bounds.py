"""A first layer's input from too few equations: pixels that end at black or white, and outputs that a ReLU cut off, make up for them.

With A·p = r for the pixels p, 0 ≤ p ≤ 1, and W·x + b ≤ 0 for outputs that were cut off, what explains the update is a polytope. Of its
points the one of least total variation is taken, a linear program. Another one shows whether it is the only point: let Z be the pixels
that are 0 or 1 there and F the others. How far Z can move inwards, in sum, is linear in p; where that is ε, any other point is within
ε + (‖A_Z‖·ε + 3‖tolerance‖)/σ_min(A_F) of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from scipy.optimize import linprog
from torch import Tensor

from attacks._chain import Chain
from attacks._peel import CLEAR, System

LEAST = 1e-6
"""Tolerance of an equation of norm 1, at least: linear programs have their own."""

ROUNDED = 1e-5
"""What a linear program's own tolerances may take from its optimum."""

END = 1e-4
"""How near to black or white a pixel is taken to be there."""

LARGEST = 1024
"""Pixels up to which the programs take seconds."""


Normed = tuple[sp.csr_matrix, np.ndarray, np.ndarray]
Ends = Sequence[tuple[float, float | None]]


class Bounded(NamedTuple):
    """A point of the polytope, and a bound on the Euclidean distance of all others from it; infinite where nothing is proven."""

    pixels: Float[Tensor, " pixels"]
    radius: float


def bounded(model: Chain, system: System, *, deadline: float) -> Bounded | None:
    """The pixels of least total variation that the equations and bounds allow; None where there are none, or no time."""
    scale, offset = model.scale.flatten().numpy(), model.offset.flatten().numpy()
    if len(scale) > LARGEST:
        return None
    rows, right, slack = _normed(system.matrix, system.right, scale, offset)
    below, most, _ = _normed(system.below, system.most, scale, offset)
    differences, around = _differences(model.scale.shape), np.concatenate([right + slack, slack - right, most + LEAST])
    inside = sp.vstack([rows, -rows, below]).tocsr()
    extra = differences.shape[0]  # each at least the absolute difference of two neighbors
    blank, unit = sp.csr_matrix((inside.shape[0], extra)), sp.identity(extra)
    smooth = sp.vstack([sp.hstack([inside, blank]), sp.hstack([differences, -unit]), sp.hstack([-differences, -unit])])
    cost = np.concatenate([np.zeros(len(scale)), np.ones(extra)])
    ends: Ends = [*[(0.0, 1.0)] * len(scale), *[(0.0, None)] * extra]
    found = _program(cost, smooth, np.concatenate([around, np.zeros(2 * extra)]), ends, deadline)
    if found is None:
        return None
    p = found[: len(scale)].clip(0, 1)
    fixed = (p < END) | (p > 1 - END)
    p[fixed] = p[fixed].round()
    free, dense = ~fixed, rows.toarray()
    p[free] = np.linalg.lstsq(dense[:, free], right - dense[:, fixed] @ p[fixed], rcond=None)[0]
    inwards = np.where(fixed, 1 - 2 * p, 0.0)
    other = _program(-inwards, inside, around, [(0.0, 1.0)] * len(scale), deadline)
    if other is None or free.sum() > len(dense) or bool((np.abs(dense @ p - right) > 2 * slack).any()):
        return Bounded(torch.from_numpy(p), math.inf)
    moved = max(0.0, float(inwards @ (other - p))) + ROUNDED
    smallest = float(np.linalg.svd(dense[:, free], compute_uv=False).min(initial=math.inf))
    pulled = float(np.linalg.norm(dense[:, fixed], 2)) if fixed.any() else 0.0
    farther = (pulled * moved + 3 * float(np.linalg.norm(slack))) / max(smallest, 1e-300)
    return Bounded(torch.from_numpy(p), moved + farther)


def _normed(matrix: sp.csr_matrix, right: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> Normed:
    """Equations of x as equations of pixels, each of norm 1, with the tolerance of each: it came in units of its standard error."""
    right, matrix = right - matrix @ offset, (matrix @ sp.diags(scale)).tocsr()
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    alive = (norm > 0) & np.isfinite(norm) & np.isfinite(right)
    matrix, right, norm = matrix[alive], right[alive], norm[alive]
    return sp.diags(1 / norm) @ matrix, right / norm, (CLEAR / norm).clip(min=LEAST)


def _differences(shape: tuple[int, ...]) -> sp.csr_matrix:
    """Rows that subtract neighbors of a picture."""
    places = np.arange(math.prod(shape)).reshape(shape)
    pairs = [(places[:, 1:], places[:, :-1]), (places[:, :, 1:], places[:, :, :-1])]
    one, two = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    eye = sp.identity(places.size, format="csr")
    return eye[one] - eye[two]


def _program(cost: np.ndarray, matrix: sp.spmatrix, most: np.ndarray, ends: Ends, deadline: float) -> np.ndarray | None:
    """argmin cost·v with matrix·v ≤ most and v within its ends; None where there is none in time."""
    left = deadline - time.process_time()
    if left <= 0:
        return None
    options = {"time_limit": left} if math.isfinite(left) else {}
    found = linprog(cost, A_ub=matrix, b_ub=most, bounds=ends, method="highs", options=options)
    return np.asarray(found.x) if found.status == 0 else None
