"""Measurements by what a user would run: an example spec, the drivers, a benchmark."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from experiments.claims.claim import MEASURES
from experiments.result import Trial
from simulator.errors import FedpeekError, SpecError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class SpecMeasure:
    """What the summary of an example spec says; claims on the same spec share one run.

    Attributes:
        spec: name of the example.
        set: assignments, as for ``--set``.
        arm, attack: which row of the summary.
        round: the attacked round of that row, where the spec has one row a round.
        read: where in the row each figure stands, as keys joined by dots.
    """

    kind: ClassVar[str] = "spec"

    spec: str
    attack: str
    read: Mapping[str, str]
    arm: str = "none"
    round: int = 0
    set: tuple[str, ...] = ()

    def names(self) -> Sequence[str]:
        """As ``read`` calls them."""
        return list(self.read)

    def __call__(self) -> Mapping[str, float]:
        """Run the spec and read the row."""
        rows = [row for row in ran(self.spec, self.set).rows if (row["defense"], row["attack"]) == (self.arm, self.attack)]
        rows = [row for row in rows if not self.round or row["rounds"] == [self.round]]
        if len(rows) != 1:
            raise SpecError(f"arm, attack and round must name one row of {self.spec}, got {len(rows)} for {self.arm!r}, {self.attack!r}.")
        if not rows[0]["statuses"].get("ok"):
            raise SpecError(f"{self.attack} must answer under {self.arm}, got: {'; '.join(rows[0]['reasons'])}. Change the setting.")
        return {name: _at(rows[0], path) for name, path in self.read.items()}


SECRET = "claims"
"""Of a spec that has none."""


@dataclass(frozen=True)
class Ran:
    """What a run left: the rows of its summary, and the trials that they are of."""

    rows: tuple[Mapping[str, Any], ...]
    trials: tuple[Trial, ...]


@cache
def ran(spec: str, assignments: tuple[str, ...], *, workers: int = 0) -> Ran:
    """Run an example spec, once for all claims that ask for the same.

    Args:
        workers: processes; 0 means one for each core. To start one takes longer than a small federation, and changes no number.

    Raises:
        FedpeekError: a federation of it failed.
    """
    from experiments.conclude import SUMMARY, conclude
    from experiments.directory import read_trials
    from experiments.run import run
    from experiments.spec import load

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        given = load(spec, assignments)
        with_secret = replace(given, secret=given.secret or SECRET)  # a fresh one would give other noise and luck each time
        failures = run(with_secret, out, workers=workers)
        if failures:
            raise FedpeekError(f"spec {spec} must run without failures, got: {failures[0].failure}")
        conclude(out)
        rows = json.loads((out / SUMMARY).read_text(encoding="utf-8"))["rows"]
        return Ran(tuple(rows), tuple(read_trials(out)))


def _at(row: Mapping[str, Any], path: str) -> float:
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            known = value if isinstance(value, Mapping) else ()
            raise SpecError(f"measure.read must lead into the row, got {path!r}. {did_you_mean(key, known)}")
        value = value[key]
    return float("nan") if value is None else float(value)


@dataclass(frozen=True, kw_only=True)
class DriversMeasure:
    """In how many tensors the observations of one world differ between the in-process driver and another."""

    kind: ClassVar[str] = "drivers"

    world: Mapping[str, Any]
    driver: str = "simulation"

    def names(self) -> Sequence[str]:
        """One figure."""
        return ["tensors_that_differ"]

    def __call__(self) -> Mapping[str, float]:
        """Run the world twice and compare all that the server received."""
        from clients.app import app as client_app
        from server.app import app as server_app
        from simulator import config, engine
        from simulator.transcript import read
        from simulator.world import World

        world = config.build(World, self.world)
        drivers: tuple[Any, ...] = ("inprocess", self.driver)
        with tempfile.TemporaryDirectory(prefix="fp-", dir="/tmp") as scratch:  # Ray's sockets need a short path
            for driver in drivers:
                engine.run(world, Path(scratch) / driver, server_app, client_app, driver)
            records = [read(Path(scratch) / driver) for driver in drivers]
            left, right = ([upload for seen in record.observations for upload in seen.uploads] for record in records)
        differ = abs(len(left) - len(right))
        for mine, theirs in zip(left, right, strict=False):
            differ += sum(not torch.equal(tensor, theirs.update.tensors[name]) for name, tensor in mine.update.tensors.items())
        return {"tensors_that_differ": float(differ)}


@dataclass(frozen=True, kw_only=True)
class SecureAggregationMeasure:
    """What one secure aggregation costs, all parties in one process on one thread.

    Attributes:
        clients: in the cohort.
        words: in a vector.
        repeats: the fastest of so many counts.
        dropped: clients that are lost after they shared their keys.
        graph: see :class:`defenses.channel.secure_aggregation.SecureAggregation`.
    """

    kind: ClassVar[str] = "secure_aggregation"

    clients: int
    words: int
    repeats: int = 3
    dropped: int = 0
    graph: Literal["complete", "k-regular"] = "complete"

    def names(self) -> Sequence[str]:
        """Its CPU seconds, a client's upload, how fast masks are beside the cipher alone, and what is certified of the graph."""
        return ["cpu_seconds", "bytes_per_word", "mask_share", "security_bits", "correctness_bits"]

    def __call__(self) -> Mapping[str, float]:
        """The fastest of a few."""
        from experiments.benchmarks.secure_aggregation import aggregate, keystream_rate, masking_rate, setting

        settings = setting(self.clients, self.graph)
        runs = [aggregate(self.clients, self.words, self.dropped, float("inf"), settings) for _ in range(self.repeats)]
        plan = settings.plan_for(self.clients, rounds=1)
        assert plan is not None
        return {
            "cpu_seconds": min(run.cpu_seconds for run in runs),
            "bytes_per_word": runs[0].bytes_per_word,
            "mask_share": masking_rate() / keystream_rate(),
            "security_bits": plan.security_bits,
            "correctness_bits": plan.correctness_bits,
        }


@dataclass(frozen=True, kw_only=True)
class TapMeasure:
    """Share of a round's time that the tap and its transcript cost."""

    kind: ClassVar[str] = "tap"

    pairs: int = 15

    def names(self) -> Sequence[str]:
        """One figure."""
        return ["overhead"]

    def __call__(self) -> Mapping[str, float]:
        """The median of paired rounds."""
        from experiments.benchmarks.tap import measure

        with tempfile.TemporaryDirectory() as scratch:
            return {"overhead": float(measure(self.pairs, Path(scratch))["overhead"])}


MEASURES.update({cls.kind: cls for cls in (SpecMeasure, DriversMeasure, SecureAggregationMeasure, TapMeasure)})
