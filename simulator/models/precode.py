"""Any model with a variational bottleneck in front of its last layer.

Source: Scheliga, Mäder and Seeland, 2022, arXiv:2108.04725 (PRECODE), section 3: an encoder to the mean and the variance of k values, a
sample of them, a decoder back to as many features as there were; k = 256, β = 1e-3.
Deviations: the variance is exp of what the encoder puts out, as in variational autoencoders, and the divergence is in nats; the
authors' code has softplus of it as the standard deviation, and bits, which makes its β 1.44 times ours. Where nobody hands in noise
(:mod:`simulator.models.latent`), as when the model is tested, z is the mean.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from simulator.config import Plugin
from simulator.errors import SpecError
from simulator.models.initial import drawn_from
from simulator.models.latent import Bottleneck
from simulator.models.mlp import MLP
from simulator.models.surgery import first_and_last, replace
from simulator.registry import register
from simulator.types import Schema


def require_bottleneck(k: int, beta: float) -> None:
    """Raise ValueError unless ``k`` counts values and ``beta`` is a weight."""
    if k < 1:
        raise ValueError(f"k must be ≥ 1, got {k}. The paper has 256.")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be ≥ 0 and finite, got {beta}. The paper has 0.001.")


@register("models", "precode")
@dataclass(frozen=True)
class Precode:
    """Another model with PRECODE's variational bottleneck in front of its last layer; the defense ``precode`` puts it there.

    Attributes:
        of: the other model.
        k: values in the bottleneck.
        beta: weight of their divergence from N(0, 1) in the loss.
    """

    of: Annotated[Any, Plugin("models")] = field(default_factory=MLP)
    k: int = 256
    beta: float = 1e-3

    def __post_init__(self) -> None:
        require_bottleneck(self.k, self.beta)

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the other model, with the weights that it has without a bottleneck, and put the bottleneck in."""
        model: nn.Module = self.of.build(schema, rng)
        _, name = first_and_last(model, schema)
        head = model.get_submodule(name)
        if not isinstance(head, nn.Linear):
            raise SpecError(f"the last layer must be nn.Linear for precode, got {type(head).__name__}. Use another model.")
        with drawn_from(rng):
            bottleneck = Bottleneck(head.in_features, self.k, self.beta)
        replace(model, name, nn.Sequential(OrderedDict(bottleneck=bottleneck, linear=head)))
        return model
