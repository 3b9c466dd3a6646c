"""Signs: of every coordinate only whether it is above or below 0 is left."""

from __future__ import annotations

from torch import Tensor

from simulator.types import Tensors


def signs(update: Tensors) -> dict[str, Tensor]:
    """−1, 0 or 1 for each coordinate; its derivative is 0, so gradient-based attacks need a surrogate."""
    return {name: tensor.sign() for name, tensor in update.items()}


def scaled_signs(update: Tensors) -> dict[str, Tensor]:
    """The signs of each tensor times its mean magnitude, ‖u‖₁/d·sign(u); differentiable through the magnitude alone."""
    return {name: tensor.abs().mean() * tensor.sign() for name, tensor in update.items()}
