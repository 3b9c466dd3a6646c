"""Stochastic quantization: magnitudes are rounded at random to a grid of few levels, without bias."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from simulator.types import Tensors


def in_buckets(tensor: Float[Tensor, "*shape"], bucket: int) -> Float[Tensor, "buckets bucket"]:
    """The tensor cut, in order, into rows of ``bucket`` coordinates, the last one filled up with zeros; 0 makes it one row."""
    flat = tensor.flatten()
    size = min(bucket or len(flat), len(flat))
    rows: Tensor = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    return rows


def norms(tensor: Float[Tensor, "*shape"], bucket: int) -> Float[Tensor, "*shape"]:
    """For each coordinate the L2 norm of the bucket that it lies in."""
    rows = in_buckets(tensor, bucket)
    each = torch.linalg.vector_norm(rows, dim=1, keepdim=True).expand_as(rows)
    by_coordinate: Tensor = each.flatten()[: tensor.numel()]
    return by_coordinate.view_as(tensor)


def quantized(
    tensor: Float[Tensor, "*shape"], uniform: Float[Tensor, "*shape"], *, levels: int, bucket: int = 0
) -> Float[Tensor, "*shape"]:
    """Q(v)ᵢ = ‖v‖·sign(vᵢ)·ξᵢ with ξᵢ the neighbor of |vᵢ|/‖v‖ on the grid 0, 1/levels … 1 that ``uniform`` picks; ‖v‖ of the bucket.

    Args:
        uniform: independent draws from [0, 1); then the expectation is the tensor itself.
        levels: steps of the grid from 0 to the norm.
        bucket: coordinates that share a norm; 0 for all of them.
    """
    norm = norms(tensor, bucket)
    zero = norm == 0
    exact = (tensor.abs() / torch.where(zero, 1.0, norm) * levels).clamp(max=levels)
    below = exact.floor()
    level = below + (uniform < exact - below).to(tensor)
    return torch.where(zero, 0.0, norm / levels * tensor.sign() * level)


def qsgd(update: Tensors, uniform: Tensors, *, levels: int, bucket: int = 0) -> dict[str, Tensor]:
    """Every tensor :func:`quantized` with its own draws."""
    return {name: quantized(tensor, uniform[name], levels=levels, bucket=bucket) for name, tensor in update.items()}


def drawn_uniform(update: Tensors, rng: torch.Generator) -> dict[str, Tensor]:
    """Draws from [0, 1) of the update's shapes, on the CPU."""
    return {name: torch.rand(tensor.shape, generator=rng).to(tensor) for name, tensor in update.items()}
