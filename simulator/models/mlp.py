"""Networks of fully connected layers on flattened images."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from simulator.models.activation import ACTIVATIONS, Activation
from simulator.models.dropout import Dropout
from simulator.models.initial import drawn_from
from simulator.models.normalize import Normalize
from simulator.registry import register
from simulator.types import Schema


@register("models", "linear")
@dataclass(frozen=True)
class Linear:
    """Softmax regression on the pixels: the smallest model, whose gradient shows its inputs in closed form."""

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network with weights drawn from ``rng``."""
        return _fully_connected((prod(schema.shape), schema.num_classes), nn.ReLU, rng)


@register("models", "mlp")
@dataclass(frozen=True)
class MLP:
    """Fully connected layers of the widths in ``hidden``.

    Attributes:
        hidden: widths of the hidden layers, from input to output.
        activation: after each hidden layer.
        dropout: probability to drop each hidden unit, in the clients' training alone.
    """

    hidden: tuple[int, ...] = (256,)
    activation: Activation = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths ≥ 1, got {list(self.hidden)}. Use the model 'linear' for none.")
        Dropout(self.dropout)

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network with weights drawn from ``rng``."""
        return _fully_connected((prod(schema.shape), *self.hidden, schema.num_classes), ACTIVATIONS[self.activation], rng, self.dropout)


def _fully_connected(widths: tuple[int, ...], activation: type[nn.Module], rng: torch.Generator, dropout: float = 0.0) -> nn.Module:
    model = nn.Sequential()
    model.add_module("normalize", Normalize())
    model.add_module("flatten", nn.Flatten())
    with drawn_from(rng):
        for i, (wide, narrow) in enumerate(itertools.pairwise(widths[:-1])):
            model.add_module(f"layer{i}", nn.Linear(wide, narrow))
            model.add_module(f"activation{i}", activation())
            if dropout:
                model.add_module(f"dropout{i}", Dropout(dropout))
        model.add_module("head", nn.Linear(widths[-2], widths[-1]))
    return model
