"""Measurements by the benchmarks: run where that takes a minute, else read from the data that their last run left in docs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments.claims.claim import MEASURES
from simulator.errors import SpecError

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True, kw_only=True)
class PeerMeasure:
    """Ours less the peer's, both tuned on public pictures, on the same pictures: from the committed trials of the benchmark.

    To measure them again takes hours.

    Attributes:
        network: as the benchmark calls it.
        budget: CPU seconds of one attack.
        side: our attack.
    """

    kind: ClassVar[str] = "peer"
    reads: ClassVar[str] = "docs/breaching.jsonl"
    again: ClassVar[str] = "python -m experiments.benchmarks.breaching"

    network: str
    budget: float
    side: str = "inverting_gradients"

    def names(self) -> Sequence[str]:
        """The mean of the pairs, the ends of its interval, how many there are, and each side's mean."""
        return ["difference_db", "difference_db_low", "difference_db_high", "pictures", "psnr_db", "peer_psnr_db"]

    def __call__(self) -> Mapping[str, float]:
        """Read the trials."""
        from experiments.benchmarks.curves import flat, parties
        from experiments.groups import fixed_rng
        from experiments.statistics import bootstrap_mean

        rows = flat([json.loads(line) for line in _text("breaching.jsonl", "breaching").splitlines()])
        of = parties([row for row in rows if row["network"] == self.network])
        ours, peers = (
            {row["picture"]: row["psnr_db"] for row in of.get((side, "tuned"), []) if row["budget"] == self.budget}
            for side in (self.side, "breaching")
        )
        pairs = [(ours[picture], peers[picture]) for picture in sorted(ours) if picture in peers]
        if not pairs:
            raise SpecError(f"network and budget must be ones of {self.reads}, got {self.network!r}, {self.budget}. Run the benchmark.")
        found = bootstrap_mean([one - other for one, other in pairs], range(len(pairs)), rng=fixed_rng())
        return {
            "difference_db": found.mean, "difference_db_low": found.low, "difference_db_high": found.high, "pictures": float(len(pairs)),
            "psnr_db": sum(one for one, _ in pairs) / len(pairs), "peer_psnr_db": sum(other for _, other in pairs) / len(pairs),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StrongestMeasure:
    """How often ``strongest`` is at most 0.5 dB below the best single solver: from the committed rows of the benchmark.

    To measure them again takes hours: move the file away first. Rows that were not measured alike, with the same budget on as many
    victims by one source, are refused.
    """

    kind: ClassVar[str] = "strongest"
    reads: ClassVar[str] = "docs/strongest.json"
    again: ClassVar[str] = (
        "OMP_NUM_THREADS=1 python -m experiments.benchmarks.strongest --seconds 15 --victims 2 --json docs/strongest.json --write"
    )

    def names(self) -> Sequence[str]:
        """The share of all victims, of those on which anything beat the floor, and how broad the table is."""
        return ["matched", "matched_above_floor", "settings", "victims_least"]

    def __call__(self) -> Mapping[str, float]:
        """Read the rows."""
        from experiments.benchmarks.strongest_page import TIE, shared

        rows: list[dict[str, Any]] = json.loads(_text("strongest.json", "strongest --json docs/strongest.json"))
        shared(rows)
        victims = [each for row in rows for each in zip(row["strongest_db"], row["best_db"], row["floor_db"], strict=True)]
        matched = [ours >= best - TIE for ours, best, _ in victims]
        live = [ours >= best - TIE for ours, best, floor in victims if max(ours, best) > floor]
        return {
            "matched": sum(matched) / len(matched), "matched_above_floor": sum(live) / max(1, len(live)),
            "settings": float(len(rows)), "victims_least": float(min(row["victims"] for row in rows)),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BatchingMeasure:
    """What evaluating many victims at once gains over one by one; runs the benchmark for one model.

    Attributes:
        model: its name.
        settings: of the model.
        pairs: alternating rounds, whose median counts.
    """

    kind: ClassVar[str] = "batching"

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    pairs: int = 5

    def names(self) -> Sequence[str]:
        """Victims a second over those one by one, how many it takes at once, and how far the results differ."""
        return ["gain", "rows_at_once", "difference"]

    def __call__(self) -> Mapping[str, float]:
        """Measure 32 victims."""
        from experiments.benchmarks.batching import measure

        found = measure(self.model, dict(self.settings), 0.0, self.pairs)
        return {name: float(found[name]) for name in self.names()}


@dataclass(frozen=True, kw_only=True)
class LabelsMeasure:
    """Label counts of models trained to a stated accuracy, public records given; runs the benchmark for one model.

    Attributes:
        model: its name.
        records: in a batch.
        accuracy: at which training stops.
        repeats: batches.
        first: seed of the first.
    """

    kind: ClassVar[str] = "labels"

    model: str
    records: int
    accuracy: float
    repeats: int = 10
    first: int = 100

    def names(self) -> Sequence[str]:
        """The share of labels right on batches of all classes and of two, beside the guess of equal counts."""
        return ["labels_right", "labels_right_skewed", "counts_exact", "equal_counts", "equal_counts_skewed"]

    def __call__(self) -> Mapping[str, float]:
        """Measure both kinds of batches."""
        from experiments.benchmarks.labels import measure

        rows = measure(self.model, self.records, self.accuracy, self.repeats, self.first)
        found = {(row["estimate"], row["public"], row["classes"]): row for row in rows}
        ours, skewed = found["auto", True, "all"], found["auto", True, "two"]
        equal = {kind: found["equal counts", False, kind]["accuracy"] for kind in ("all", "two")}
        values = (ours["accuracy"], skewed["accuracy"], ours["exact"], equal["all"], equal["two"])
        return {name: float(str(value)) for name, value in zip(self.names(), values, strict=True)}


def _text(name: str, benchmark: str) -> str:
    path = DOCS / name
    if not path.is_file():
        raise SpecError(f"docs must hold {name}, got none in {DOCS}. Run `python -m experiments.benchmarks.{benchmark}`.")
    return path.read_text(encoding="utf-8")


MEASURES.update({cls.kind: cls for cls in (PeerMeasure, StrongestMeasure, BatchingMeasure, LabelsMeasure)})
