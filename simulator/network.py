"""From a model family to a network in the mode that the recipe states, and its tensors by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from simulator.models.dropout import with_own_masks
from simulator.rng import stream
from simulator.types import LocalTraining, Schema, Tensors


def network(family: Any, schema: Schema, training: LocalTraining, seed: int) -> nn.Module:
    """Build the network with the initial weights of ``seed``; BatchNorm's mode is the recipe's."""
    model: nn.Module = with_own_masks(family.build(schema, stream(seed, "model")))
    return model.train(training.batch_norm == "train")


def tensors(model: nn.Module) -> tuple[Tensors, Tensors]:
    """The network's parameters and buffers, detached, by name."""
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    buffers = {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    return parameters, buffers


def floating(buffers: Tensors) -> Tensors:
    """The buffers that a client uploads: statistics, not counters."""
    return {name: tensor for name, tensor in buffers.items() if tensor.is_floating_point()}
