"""A tiny data set, a tiny model and worlds made of them, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from defenses.client.clip import global_norm
from simulator.dataset import DataSet
from simulator.defense import ClientContext, Defense
from simulator.models.initial import drawn_from
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Schema, Tensors, Update
from simulator.world import Federation, World


@dataclass(frozen=True)
class TinyData:
    name = "tiny"

    def load(self) -> DataSet:
        schema = Schema((1, 4, 4), ("a", "b", "c"))
        records = Batch(torch.rand(60, 1, 4, 4, generator=stream(0, "tiny")), torch.arange(60) % 3)
        return DataSet(records, schema, "made up", "none")


@dataclass(frozen=True)
class TinyModel:
    batch_norm: bool = False

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        with drawn_from(rng):
            norm = [nn.BatchNorm2d(2)] if self.batch_norm else []
            return nn.Sequential(nn.Conv2d(1, 2, 3), *norm, nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))


@dataclass(frozen=True)
class Reporter(Defense):
    """Says in the clear how long the update is."""

    name = "reporter"

    def on_buffers(self, buffers: Tensors, update: Update, context: ClientContext) -> Tensors:
        return {**buffers, "norm": global_norm(update.tensors)}


def world(*defenses: Defense, batch_norm: bool = False, clients: int = 4, training: Any = None, **federation: Any) -> World:
    return World(
        data=TinyData(),
        model=TinyModel(batch_norm),
        federation=Federation(clients=clients, **federation),
        training=LocalTraining(**(training or {})),
        defenses=defenses,
    )


def context(batch_size: int = 1, seed: int = 0) -> ClientContext:
    return ClientContext(client=0, round=1, batch_size=batch_size, rng=stream(seed, "noise"))
