"""Noise that a model's own layers draw, for simulated clients that run side by side under vmap, which forbids drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from simulator.adversary import Knowledge
from simulator.models.latent import Bottleneck, Noise, noise_from
from simulator.training import local_update
from simulator.types import Batch, Tensors


def latent_values(knowledge: Knowledge, parameters: Tensors, buffers: Tensors, sizes: Sequence[int]) -> int:
    """Values of noise that the model's own layers draw in one client's run."""
    if not any(isinstance(layer, Bottleneck) for layer in knowledge.model.modules()):
        return 0
    seen: list[int] = []

    def record(like: Tensor) -> Tensor:
        seen.append(like.numel())
        return torch.zeros_like(like)

    shape = knowledge.schema.shape
    blank = [Batch(torch.full((size, *shape), 0.5), torch.zeros(size, dtype=torch.long)) for size in sizes]
    with noise_from(record):
        local_update(knowledge.model, parameters, buffers, blank, replace(knowledge.training, sampling="shuffled"))
    return sum(seen)


def in_turn(values: Float[Tensor, " values"]) -> Noise:
    """These values, cut in the order of the calls."""
    left = values

    def cut(like: Tensor) -> Tensor:
        nonlocal left
        mine, left = left[: like.numel()].view(like.shape), left[like.numel() :]
        return mine

    return cut
