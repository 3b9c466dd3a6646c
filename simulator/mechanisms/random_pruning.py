"""Random pruning: every coordinate stays with the same probability, whatever its value."""

from __future__ import annotations

import torch
from torch import Tensor

from simulator.types import Tensors


def drawn_masks(update: Tensors, pruned: float, rng: torch.Generator) -> dict[str, Tensor]:
    """Independent Bernoulli masks of the update's shapes: 0 with probability ``pruned`` in [0, 1), else 1; drawn on the CPU."""
    return {name: (torch.rand(tensor.shape, generator=rng) >= pruned).to(tensor) for name, tensor in update.items()}


def masked(update: Tensors, masks: Tensors) -> dict[str, Tensor]:
    """The update where the masks are 1, and 0 elsewhere; linear in the update."""
    return {name: tensor * masks[name] for name, tensor in update.items()}


def rescaled(update: Tensors, pruned: float) -> dict[str, Tensor]:
    """The update times 1/(1 − pruned): after independent pruning its expectation is what was pruned."""
    return {name: tensor / (1 - pruned) for name, tensor in update.items()}
