"""How far a simulated update is from the observed one; both flat, so that a distance is a few operations for any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from simulator.types import Tensors

Distance = Literal["angle", "cosine", "l2"]


def flat(update: Tensors, names: Sequence[str]) -> Float[Tensor, " coordinates"]:
    """The named tensors of an update as one vector."""
    return torch.cat([update[name].flatten() for name in names])


def cosine(trial: Float[Tensor, " coordinates"], target: Float[Tensor, " coordinates"]) -> Float[Tensor, ""]:
    """1 − cos of the whole updates: one angle over all layers, in [0, 2]; blind to the scale of either."""
    similarity: Tensor = trial @ target / (trial.norm() * target.norm())
    return 1 - similarity


def angle(trial: Float[Tensor, " coordinates"], target: Float[Tensor, " coordinates"]) -> Float[Tensor, ""]:
    """√(2·(1 − cos)): the chord between the directions, for small angles the angle in radians.

    Its slope does not fade as the match improves, so that a prior weighs less and less against it; under 1 − cos a prior that is
    right for the start dominates the end. The constant keeps the root differentiable at a perfect match.
    """
    return (2 * cosine(trial, target) + 1e-9).clamp(min=1e-9).sqrt()


def l2(trial: Float[Tensor, " coordinates"], target: Float[Tensor, " coordinates"]) -> Float[Tensor, ""]:
    """Squared distance of the directions: 0 is parallel, 2 orthogonal; blind to the scale of either, so that clipping changes nothing.

    Equal to 2·(1 − cos), but of differences: near a match it keeps the digits that 1 − cos cancels.
    """
    chord: Tensor = trial / trial.norm() - target / target.norm()
    return chord.square().sum()


DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {"angle": angle, "cosine": cosine, "l2": l2}
