"""What an estimator sees of an update: the directions in which simulated ones differ, each known as precisely as the noise allows.

Learning to Invert hashes long gradients into a few numbers. Hashing keeps distances but adds up the noise of all coordinates that
fall together; principal directions of simulated updates keep nearly all of their differences, and of noise only its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._learned.mechanisms import Stack

LONG = 1 << 17
"""Coordinates beyond which weight matrices are brought to fewer rows before anything else is done."""


@dataclass(frozen=True)
class Shortened:
    """A linear map that shortens updates: the rows of a long tensor are combined along orthonormal directions.

    A linear layer's gradient is the sum over records of error times input, so that few combinations of its rows, those along which
    simulated errors lie, hold nearly all of it. Orthonormal combinations of independent noise are independent noise of the same size.
    """

    shapes: tuple[tuple[int, ...], ...]
    directions: tuple[Float[Tensor, "rows kept"] | None, ...]

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each tensor when shortened."""
        directions = zip(self.shapes, self.directions, strict=True)
        return [prod(shape) if kept is None else prod(shape[1:]) * kept.shape[1] for shape, kept in directions]

    def __call__(self, updates: Stack) -> Stack:
        """The shortened updates."""
        if all(direction is None for direction in self.directions):
            return updates
        parts = torch.split(updates, [prod(shape) for shape in self.shapes], dim=1)
        out = []
        for part, shape, direction in zip(parts, self.shapes, self.directions, strict=True):
            whole = part.view(len(part), shape[0], -1) if direction is not None else part
            out.append(part if direction is None else torch.einsum("nrc,rk->nkc", whole, direction).flatten(1))
        return torch.cat(out, 1)


def shortened(updates: Stack, shapes: Sequence[tuple[int, ...]]) -> Shortened:
    """The map for updates like these, to about :data:`LONG` coordinates."""
    sizes = [prod(shape) for shape in shapes]
    if (whole := sum(sizes)) <= LONG:
        return Shortened(tuple(shapes), (None,) * len(sizes))
    directions: list[Tensor | None] = []
    for part, shape in zip(torch.split(updates, sizes, dim=1), shapes, strict=True):
        kept = max(4, round(shape[0] * LONG / whole)) if shape else 1
        if len(shape) < 2 or kept >= shape[0]:
            directions.append(None)
            continue
        rows = part.view(len(part), shape[0], -1)
        gram = torch.einsum("nrc,nsc->rs", rows, rows)
        directions.append(torch.linalg.eigh(gram.double())[1][:, -kept:].float())
    return Shortened(tuple(shapes), tuple(directions))


@dataclass(frozen=True)
class Basis:
    """Principal directions of simulated updates.

    Attributes:
        mean: of the updates.
        scale: of each coordinate, before anything else; all 1 under noise.
        directions: orthonormal, those of the largest spread first.
    """

    mean: Float[Tensor, " coordinates"]
    scale: Float[Tensor, " coordinates"]
    directions: Float[Tensor, "coordinates features"]

    def __call__(self, updates: Stack) -> Float[Tensor, "pairs features"]:
        """The features of these updates."""
        return ((updates - self.mean) * self.scale) @ self.directions


def basis(updates: Stack, sizes: Sequence[int], sigma: float) -> Basis:
    """The directions in which these updates differ by more than noise and rounding.

    Without noise every tensor counts alike. With noise of deviation ``sigma`` on each coordinate all coordinates keep their size: a
    tensor is then known as well as it stands out from the noise.
    """
    mean = updates.mean(0)
    centred = updates - mean
    scale = torch.ones(updates.shape[1])
    if not sigma:
        spread = [float(part.square().sum(1).mean().sqrt()) for part in torch.split(centred, list(sizes), dim=1)]
        scale = torch.cat([torch.full((size,), 1 / wide if wide > 0 else 0.0) for size, wide in zip(sizes, spread, strict=True)])
        centred = centred * scale
    variance, rows = torch.linalg.eigh((centred @ centred.T).double() / len(updates))
    keep = variance > max(1e-10 * float(variance[-1]), 1e-3 * sigma**2, 1e-30)
    if not bool(keep.any()):  # all alike: nothing to tell them apart by
        return Basis(mean, scale, torch.zeros(updates.shape[1], 1))
    variance, rows = variance[keep].flip(0), rows[:, keep].flip(1)
    return Basis(mean, scale, centred.T @ (rows / (variance * len(updates)).sqrt()).float())
