"""Censor: a random direction orthogonal to the gradient, tensor by tensor, with the gradient's own norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from simulator.types import Tensors


def orthogonal(draw: Float[Tensor, "*shape"], tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The draw r without its part along g, r − (r·g/‖g‖²)·g, scaled to ‖g‖; 0 where g is 0 or has one coordinate.

    In float64: what is left of the part along g is then rounding alone, and the cosine with it below 1e-6 in float32, too.
    """
    g, r = tensor.double().flatten(), draw.double().flatten()
    square = g.dot(g)
    rest = r - r.dot(g) / torch.where(square == 0, 1.0, square) * g
    length = torch.linalg.vector_norm(rest)
    # with one coordinate nothing is orthogonal to g: the rest is rounding, and must not be blown up to ‖g‖
    gone = length <= 1e-9 * torch.linalg.vector_norm(r)
    scaled = torch.where(gone, 0.0, rest * square.sqrt() / torch.where(gone, 1.0, length))
    return scaled.to(tensor.dtype).view_as(tensor)


def orthogonal_update(draws: Tensors, update: Tensors) -> dict[str, Tensor]:
    """Each tensor replaced by its draw, made :func:`orthogonal` to it."""
    return {name: orthogonal(draws[name], tensor) for name, tensor in update.items()}
