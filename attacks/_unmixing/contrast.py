"""Independent components of mixed pictures, sought where pictures are sparse: in the differences of neighbouring pixels.

Pixels themselves are nearly Gaussian and correlated from picture to picture; differences of neighbours are neither. In luminance and
opponent colors most of them are near zero.
"""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

CORNER = 0.1
"""Where the contrast √(s² + CORNER²) turns from a square into an absolute value, in standard deviations of a component."""

STILL = 1e-5
"""1 − |cos| by which every direction moved less: the end."""


def edges(rows: Float[Tensor, "rank pixels"], shape: tuple[int, int, int]) -> Float[Tensor, "rank differences"]:
    """Differences of horizontal and vertical neighbours of each row as a picture; of three channels, in mean and opponent colors."""
    pictures = rows.view(len(rows), *shape)
    if shape[0] == 3:
        red, green, blue = pictures.unbind(1)
        pictures = torch.stack([(red + green + blue) / 3, red - green, blue - green], 1)
    across, down = pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]
    return torch.cat([across.flatten(1), down.flatten(1)], 1)


def separable(shape: tuple[int, int, int], rank: int) -> bool:
    """Whether a picture of this shape has clearly more differences than ``rank`` components could fit by chance."""
    channels, height, width = shape
    return prod(shape) > 1 and channels * (height * (width - 1) + (height - 1) * width) >= 4 * rank


def unmix(signals: Float[Tensor, "rank samples"], *, rng: torch.Generator, steps: int = 300) -> Float[Tensor, "rank rank"]:
    """Directions c whose components c·signals are uncorrelated and as sparse as can be: symmetric FastICA.

    Hyvärinen, 1999, doi:10.1109/72.761722, with the smooth absolute value as the contrast.
    """
    rank, samples = signals.shape
    values, vectors = torch.linalg.eigh(signals.double() @ signals.double().T / samples)
    whiten = vectors * values.clamp_min(1e-12 * float(values[-1])).rsqrt()
    white = (whiten.T @ signals.double()).float()
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=rng))[0]
    for _ in range(steps):
        components = turn @ white
        size = (components.square() + CORNER**2).sqrt()
        bend = (CORNER**2 / size**3).mean(1, keepdim=True)
        left, _, right = torch.linalg.svd((components / size) @ white.T / samples - bend * turn)
        before, turn = turn, left @ right
        if float((1 - (turn * before).sum(1).abs()).max()) < STILL:
            break
    found: Tensor = turn.double() @ whiten.T
    return found
