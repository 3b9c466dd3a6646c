"""What the federation was for: the accuracy of the model that it released."""

from __future__ import annotations

import math

import torch
from torch.func import functional_call

from simulator.dataset import Splits
from simulator.network import network
from simulator.types import Tensors
from simulator.world import World


@torch.no_grad()
def accuracy(world: World, splits: Splits, released: tuple[Tensors, Tensors]) -> float:
    """The share of test records that the released model classifies rightly, in [0, 1]; NaN without test records."""
    if not len(splits.test):
        return math.nan
    model = network(world.architecture, splits.schema, world.training, world.seed).eval()
    parameters, buffers = released
    logits = functional_call(model, {**parameters, **buffers}, (splits.test.inputs,))
    return float((logits.argmax(1) == splits.test.labels).float().mean())
