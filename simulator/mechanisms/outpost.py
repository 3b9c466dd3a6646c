"""Outpost: with a probability that falls from step to step, small coordinates are pruned and those that matter most get noise."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from simulator.mechanisms.top_k import kept, largest, top_k
from simulator.types import Tensors


def probability(iteration: int, decay: float) -> float:
    """How likely step ``iteration``, counted from 1, is to be perturbed: 1/(1 + decay·iteration)."""
    return 1 / (1 + decay * iteration)


def risks(parameters: Tensors) -> dict[str, Tensor]:
    """The leakage risk of each tensor: the variance of its weights, at most 1; 0 where there is only one."""
    return {name: (tensor.var() if tensor.numel() > 1 else tensor.new_zeros(())).clamp(max=1.0) for name, tensor in parameters.items()}


def most_informative(gradient: Tensors, share: float) -> dict[str, Bool[Tensor, "..."]]:
    """Where the ``share`` of coordinates with the largest empirical Fisher information g² lie, over all tensors together."""
    whole = torch.cat([tensor.flatten() for tensor in gradient.values()])
    places = largest(whole, len(whole) - kept(len(whole), share)) if share < 1 else torch.ones_like(whole, dtype=torch.bool)
    parts = torch.split(places, [tensor.numel() for tensor in gradient.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(gradient.items(), parts, strict=True)}


def perturbed(gradient: Tensors, risk: Tensors, normal: Tensors, *, pruned: float, noised: float, scale: float) -> dict[str, Tensor]:
    """The gradient after pruning the share ``pruned`` of each tensor, with noise of deviation scale·risk on the most informative share.

    Args:
        risk: of each tensor, from :func:`risks`.
        normal: independent draws from N(0, 1) of the gradient's shapes.
        noised: share of all coordinates that get noise.
    """
    where = most_informative(gradient, noised)
    return {
        name: tensor + torch.where(where[name], scale * risk[name] * normal[name], 0.0) for name, tensor in top_k(gradient, pruned).items()
    }
