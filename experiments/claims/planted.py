"""Attacks on models that an ACTIVE server planted: the measurement behind what the docs say of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from experiments.claims.claim import MEASURES
from experiments.claims.measures import AttackMeasure
from experiments.victims import Victim
from server import active
from simulator.dataset import Splits, take
from simulator.errors import SpecError
from simulator.front import front
from simulator.rng import stream
from simulator.types import Batch, Tensors


@dataclass(frozen=True, kw_only=True)
class PlantedMeasure(AttackMeasure):
    """As an attack on uploads, from a broadcast whose first layer the server chose.

    Attributes:
        method: what it plants.
        placed_by: public records of the data set, or the prior of photographs.
    """

    kind: ClassVar[str] = "planted"

    method: Literal["imprint", "trap_weights"]
    placed_by: Literal["public", "prior"] = "public"

    def build(self, seed: int) -> list[Victim]:
        """The victims, whose attacker is the server that planted."""
        return [replace(of, knowledge=replace(of.knowledge, adversary="active")) for of in super().build(seed)]

    def state(self, model: nn.Module, parts: Splits, others: Batch, seed: int) -> tuple[Tensors, Tensors]:
        """The planted model."""
        layers = front(model, parts.schema.shape)
        if isinstance(layers, str):
            raise SpecError(f"model must begin with a linear layer and a ReLU, got: {layers}. Use mlp.")
        before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        rng, pixels = stream(seed, "tampering"), None
        if self.placed_by == "public":
            pixels = take(parts.public, slice(self.public_records)).inputs.flatten(1).double()
        if self.method == "imprint":
            planted = active.imprint(layers, parts.schema, before, pixels, rng)
        else:
            planted = active.trap_weights(layers, before, pixels, self.batch, rng)
        return {**before, **planted}, {name: tensor.clone() for name, tensor in model.named_buffers()}


MEASURES[PlantedMeasure.kind] = PlantedMeasure
