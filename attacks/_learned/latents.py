"""What a model's own layers draw, for simulated clients that run side by side under vmap, which forbids drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._dropout import layers
from simulator.adversary import Knowledge
from simulator.models.dropout import Masks, masks_from
from simulator.models.latent import Bottleneck, Noise, noise_from
from simulator.training import local_update
from simulator.types import Batch, Tensors


def drawn_values(
    knowledge: Knowledge, parameters: Tensors, buffers: Tensors, sizes: Sequence[int]
) -> tuple[int, Float[Tensor, " values"]]:
    """Values of noise that bottlenecks draw in one client's run, and for each value that dropout draws the probability to keep it."""
    if not any(isinstance(layer, Bottleneck) for layer in knowledge.model.modules()) and not layers(knowledge.model):
        return 0, torch.empty(0)
    noise, kept = list[int](), [torch.empty(0)]

    def record(like: Tensor) -> Tensor:
        noise.append(like.numel())
        return torch.zeros_like(like)

    def keep(inputs: Tensor, p: float) -> Tensor:
        kept.append(torch.full((inputs.numel(),), 1 - p))
        return torch.ones_like(inputs)

    shape = knowledge.schema.shape
    blank = [Batch(torch.full((size, *shape), 0.5), torch.zeros(size, dtype=torch.long)) for size in sizes]
    with noise_from(record), masks_from(keep):
        local_update(knowledge.model, parameters, buffers, blank, replace(knowledge.training, sampling="shuffled"))
    return sum(noise), torch.cat(kept)


def in_turn(values: Float[Tensor, " values"]) -> Noise:
    """These values, cut in the order of the calls."""
    left = values

    def cut(like: Tensor) -> Tensor:
        nonlocal left
        mine, left = left[: like.numel()].view(like.shape), left[like.numel() :]
        return mine

    return cut


def masks_in_turn(values: Float[Tensor, " values"]) -> Masks:
    """The same for masks."""
    cut = in_turn(values)
    return lambda inputs, _: cut(inputs)
