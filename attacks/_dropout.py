"""Dropout masks that the upload gives away.

Of one record, the head's weight gradient is the outer product of ∂b and the features that entered the head. Where dropout stands right
before it, a feature of 0 was dropped or was 0 anyway, which comes to the same: that mask is known exactly, and the network with it is
deterministic again.
"""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attacks._gradient import mean_gradient, several_steps
from attacks._layers import Call, all_buffers, last_linear, trace
from simulator.adversary import Knowledge
from simulator.models.dropout import Dropout, masks_from
from simulator.types import Observation, Tensors

ZERO = 1e-6
"""Features below this share of the largest are rounding."""

_READABLE: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


class Told(nn.Module):
    """Dropout with a mask that is known: a buffer, so that it is handed in with the others."""

    def __init__(self, p: float, features: int) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("mask", torch.ones(features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop what was dropped."""
        mask: Tensor = self.get_buffer("mask")
        return inputs * mask.view(inputs.shape[1:]) / (1 - self.p)


def layers(model: nn.Module) -> dict[str, Dropout]:
    """The dropout layers that drop anything, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Dropout) and layer.p}


def with_read_mask(view: Observation, knowledge: Knowledge) -> tuple[nn.Module, Tensors]:
    """The model and its buffers, with the mask before the head in place where one record's gradient gives it away."""
    model, buffers = knowledge.model, all_buffers(knowledge.model, view.broadcast)
    if knowledge.num_examples != 1 or not layers(model) or several_steps(view, knowledge) is not None:
        return model, buffers
    head = last_linear(knowledge, view.broadcast)
    if head is None or head.layer.bias is None:
        return model, buffers
    if model not in _READABLE:
        _READABLE[model] = _copy_with_told_mask(knowledge, view, head)
    told = _READABLE[model]
    if told is None:
        return model, buffers
    gradient = mean_gradient(view, knowledge)
    features = (gradient[head.weight].double().T @ gradient[head.bias].double()).abs()
    name = next(name for name, layer in told.named_modules() if isinstance(layer, Told))
    return told, {**buffers, f"{name}.mask": (features > ZERO * features.max()).float()}


def _copy_with_told_mask(knowledge: Knowledge, view: Observation, head: Call) -> nn.Module | None:
    """A copy of the model whose last dropout is :class:`Told`, if its mask acts just as one on the head's inputs."""
    model, (name, layer) = knowledge.model, list(layers(knowledge.model).items())[-1]
    image = torch.rand(1, *knowledge.schema.shape, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []

    def all_kept(inputs: Tensor, _: float) -> Tensor:
        sizes.append(inputs[0].numel())
        return torch.ones_like(inputs)

    parameters, buffers = view.broadcast.parameters, all_buffers(model, view.broadcast)
    with masks_from(all_kept):
        trace(model, parameters, buffers, image)
    if not sizes or sizes[-1] != head.inputs.shape[1]:
        return None
    told = copy.deepcopy(model)
    parent, _, own = name.rpartition(".")
    setattr(told.get_submodule(parent), own, Told(layer.p, sizes[-1]))
    mask = (torch.rand(sizes[-1], generator=torch.Generator().manual_seed(1)) > 0.5).float()
    kept, dropped = (
        next(call.inputs for call in trace(told, parameters, {**buffers, f"{name}.mask": m}, image)[0] if call.name == head.name)
        for m in (torch.ones_like(mask), mask)
    )
    return told if torch.allclose(dropped, kept * mask) and bool(kept.any()) else None
