"""Pruning by magnitude: in every tensor the largest coordinates stay, the others become 0."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from simulator.types import Tensors


def kept(numel: int, pruned: float) -> int:
    """Coordinates that stay of ``numel`` when the share ``pruned`` in [0, 1) goes: numel − ⌊pruned·numel⌋, at least 1."""
    return numel - math.floor(pruned * numel + 1e-9)  # 0.29·100 is 28.999999999999996


def largest(tensor: Float[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """Where the ``count`` coordinates with the largest magnitudes are; ties are broken by position."""
    flat = tensor.detach().abs().flatten()
    places = torch.zeros_like(flat).scatter(0, flat.topk(count).indices, 1.0)
    return places.view_as(tensor) > 0


def top_k(update: Tensors, pruned: float) -> dict[str, Tensor]:
    """The update without the share ``pruned`` of smallest coordinates of each tensor; the gradient flows through those that stay."""
    return {name: torch.where(largest(tensor, kept(tensor.numel(), pruned)), tensor, 0.0) for name, tensor in update.items()}
