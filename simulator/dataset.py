"""A data set in memory, and how it is divided into what clients hold, what tests the model, and what is public."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from simulator.rng import stream
from simulator.types import Batch, Schema
from simulator.world import Split


@dataclass(frozen=True)
class DataSet:
    """Records with their schema, and where they come from.

    Attributes:
        source: who published the records and which package ships them.
        license: what their license allows, in words.
    """

    records: Batch
    schema: Schema
    source: str
    license: str


class DataSource(Protocol):
    """What registers under ``data``: a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]

    def load(self) -> DataSet:
        """Return the records, always in the same order: the same object each time, which nobody may change in place.

        Raises:
            SpecError: they cannot be had; the message says what to do.
        """


class ModelFamily(Protocol):
    """What registers under ``models``: a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]

    def build(self, schema: Schema, rng: torch.Generator) -> torch.nn.Module:
        """Build the network; all initial weights are drawn from ``rng``, the first layer normalizes inputs in [0, 1]."""


@dataclass(frozen=True)
class Splits:
    """A data set, divided: ``private`` goes to the clients, ``test`` measures utility, ``public`` is everybody's."""

    private: Batch
    test: Batch
    public: Batch
    schema: Schema

    @property
    def all(self) -> list[Batch]:
        """The three parts."""
        return [self.private, self.test, self.public]


def split(data: DataSet, shares: Split, seed: int) -> Splits:
    """Shuffle the records with the seed and cut them into private, test and public parts."""
    count = len(data.records)
    order = torch.randperm(count, generator=stream(seed, "split"))
    tests, publics = int(count * shares.test), int(count * shares.public)
    parts = torch.split(order, [count - tests - publics, tests, publics])
    private, test, public = (take(data.records, part) for part in parts)
    return Splits(private, test, public, data.schema)


def take(batch: Batch, indices: Any) -> Batch:
    """The records at ``indices``, in that order."""
    return Batch(batch.inputs[indices], batch.labels[indices], None if batch.targets is None else batch.targets[indices])
