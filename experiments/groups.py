"""The scored records behind one row of the summary, and the numbers that every row takes of them.

Records of one upload share its fate, and a record in several uploads ties theirs together, so that every interval resamples or allows
for whole clusters of uploads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from experiments.controls import best_floor
from experiments.result import RecordResult, Trial
from experiments.statistics import Interval, Rate, bootstrap_mean, clustered_rate

Key = tuple[int, int, int, int]
"""A victim in a round: seed, round, client, record."""

Upload = tuple[int, int, tuple[int, ...]]
"""An upload: seed, round, senders."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """One record's result with the trial that it came from."""

    trial: Trial
    record: RecordResult

    @property
    def key(self) -> Key:
        """The victim in its round, the same under every arm."""
        return self.trial.seed, self.trial.round, self.record.client, self.record.record

    @property
    def victim(self) -> tuple[int, int, int]:
        """Whose record it is, whatever the round: seed, client, record."""
        return self.trial.seed, self.record.client, self.record.record

    @property
    def upload(self) -> Upload:
        """Seed, round and senders of the upload that the record is in."""
        return self.trial.seed, self.trial.round, self.trial.senders

    @cached_property
    def gain_db(self) -> float:
        """PSNR in dB above the record's best floor."""
        return self.record.psnr_db - best_floor(self.record.floors)[1].psnr_db

    @property
    def beats_floor(self) -> bool:
        """Whether a picture was rebuilt that is nearer than any floor; the mid-gray image of a failure never counts as one."""
        return self.trial.status == "ok" and self.trial.answered == "inputs" and self.gain_db > 0

    @property
    def leak_db(self) -> float:
        """The gain where the floor is beaten, else 0: what misses the floor tells nothing, by however much it misses."""
        return self.gain_db if self.beats_floor else 0.0


@dataclass(frozen=True)
class Group:
    """The trials behind one row."""

    arm: str
    attack: str
    view: str
    round: int | None
    trials: tuple[Trial, ...]

    @cached_property
    def scored(self) -> list[Scored]:
        """Every record of every trial; unsupported trials have none."""
        return [Scored(trial, record) for trial in self.trials for record in trial.records]

    @property
    def labels_only(self) -> bool:
        """Whether no trial that ended well guessed inputs; one that did makes the others' mid-gray pictures its failures."""
        return self._answers == {"labels"}

    @property
    def chosen(self) -> bool:
        """Whether the trials that ended well named candidates, which says nothing of pictures."""
        return self._answers == {"candidates"}

    @cached_property
    def _answers(self) -> set[str]:
        return {trial.answered for trial in self.trials if trial.status == "ok"}


def clusters(scored: Sequence[Scored], others: Sequence[Scored] = ()) -> list[int]:
    """What is resampled as a whole, by number: the uploads of a seed that a chain of common records joins.

    A client that sends the same record in four attacked rounds is one victim, not four.

    Args:
        scored: each with its upload and record.
        others: as many, of another arm: their uploads join, too.
    """
    parent: dict[object, object] = {}

    def root(node: object) -> object:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for item in scored:
        parent[root(item.upload)] = root(item.victim)
    for item, other in zip(scored, others or scored, strict=True):
        parent[root(other.upload)] = root(item.upload)
    numbers: dict[object, int] = {}
    return [numbers.setdefault(root(item.upload), len(numbers)) for item in scored]


def interval_of(values: Sequence[float], scored: Sequence[Scored], others: Sequence[Scored] = ()) -> Interval:
    """The mean of one value a record, with its interval over whole clusters; ``others`` as for :func:`clusters`."""
    return bootstrap_mean(values, clusters(scored, others), rng=fixed_rng())


def rate_of(hits: Sequence[bool], scored: Sequence[Scored]) -> Rate:
    """The share of hits; its interval allows for records of one cluster sharing its fate, and for one that is scored twice being one."""
    return clustered_rate(hits, clusters(scored), rng=fixed_rng(), victims=[item.victim for item in scored])


def seed_means(values: Sequence[float], scored: Sequence[Scored]) -> Row:
    """The range of the seeds' means, which no interval over victims tells; empty of one seed.

    All uploads of a seed share its initial model: see :mod:`experiments.statistics`.
    """
    by_seed: dict[int, list[float]] = {}
    for value, item in zip(values, scored, strict=True):
        by_seed.setdefault(item.trial.seed, []).append(float(value))
    means = [math.fsum(own) / len(own) for own in by_seed.values()]
    return {"seeds": {"low": min(means), "high": max(means)}} if len(means) > 1 else {}


def fixed_rng() -> np.random.Generator:
    """The same resamples for each number, so that adding a row changes no other."""
    return np.random.default_rng(0)


def bounds(interval: Interval | Rate) -> Row:
    """The interval as a table; an end that is not finite says nothing and becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in vars(interval).items()}


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None
