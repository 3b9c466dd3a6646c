"""Measures claims again and says of each whether it still holds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.claims.claim import Claim, Figure
from simulator.errors import FedpeekError

HEADINGS = ("figure", "reported", "bar", "filed", "measured", "ok")
WIDTHS = (28, 10, 24, 10, 10, 7)
KEPT, READ, MISSED, BROKEN = "yes", "kept", "not met", "NO"
"""What is said of a figure: it keeps its bar; the one that was read does, which no change of the code can alter; it misses its bar as
filed; it is neither."""


@dataclass(frozen=True)
class Outcome:
    """A claim and what was measured.

    Attributes:
        measured: by the name of the figure; empty where the measurement failed. Where the claim reads a file, what it says.
        cpu_seconds: of this process; 0 where nothing was measured.
        failure: why there is no measurement.
    """

    claim: Claim
    measured: Mapping[str, float]
    cpu_seconds: float = 0.0
    failure: str = ""

    @property
    def holds(self) -> bool:
        """Whether every figure was measured and is as filed: it keeps its bar, or misses it as the file says."""
        return not self.failure and all(verdict(figure, self.measured[name]) != BROKEN for name, figure in self.claim.figures.items())

    @property
    def known_misses(self) -> list[str]:
        """The figures that miss their bars as filed; before anything is measured, those that are filed so."""
        if not self.measured:
            return [] if self.failure else self.claim.misses
        return [name for name, figure in self.claim.figures.items() if verdict(figure, self.measured[name]) == MISSED]

    def to_json(self) -> dict[str, Any]:
        """For one line of ``--json``; what is not finite becomes null."""
        claim = self.claim
        figures = {
            name: {
                "reported": figure.reported, "bar": figure.bar, "filed": figure.ours,
                "read" if claim.reads else "measured": _finite(self.measured.get(name)), "verdict": _now(self, name, figure)[1],
                "ok": name in self.measured and figure.holds(self.measured[name]), "met_as_filed": figure.met, "reason": figure.reason,
            }
            for name, figure in claim.figures.items()
        }  # fmt: skip
        about = {"id": claim.id, "claim": claim.claim, "source": claim.source, "ok": self.holds, "failure": self.failure}
        about |= {"known_misses": self.known_misses, "measured_again": bool(self.measured) and not claim.reads}
        about |= {"reads": claim.reads, "measure_with": claim.again or f"fedpeek claims {claim.id}"}
        return {**about, "cpu_seconds": round(self.cpu_seconds, 3), "figures": figures}


def check(claim: Claim) -> Outcome:
    """Measure one claim on one thread; what goes wrong is an outcome, so that the others are still measured."""
    torch.set_num_threads(1)
    started = time.process_time()
    try:
        measured = claim.measure()
    except FedpeekError as error:
        return Outcome(claim, {}, time.process_time() - started, str(error))
    except Exception as error:
        logging.getLogger("fedpeek").exception("claim %s", claim.id)
        return Outcome(claim, {}, time.process_time() - started, f"{type(error).__name__}: {error}")
    return Outcome(claim, measured, time.process_time() - started)


def heading() -> str:
    """The first line of the table."""
    return _row(*HEADINGS)


def lines(outcome: Outcome) -> Iterator[str]:
    """A claim as rows of the table: its sentence, then its figures."""
    claim = outcome.claim
    cost = f"{outcome.cpu_seconds:.0f} CPU s, {claim.cpu_seconds:g} expected" if outcome.cpu_seconds else f"{claim.cpu_seconds:g} CPU s"
    yield f"{claim.id}: {claim.claim} ({cost})"
    for name, figure in claim.figures.items():
        yield _row(f"  {name}", *filed(figure), *_now(outcome, name, figure))
        if not figure.met:
            yield f"    not met: {figure.reason}"
    if claim.reads:
        yield f"    not measured again, read from {claim.reads}: {claim.again}"
    if outcome.failure:
        yield f"  failed: {outcome.failure}"


def filed(figure: Figure) -> tuple[str, str, str]:
    """What the file says: reported, bar and ours."""
    return "–" if figure.reported is None else f"{figure.reported:.4g}", figure.bar, f"{figure.ours:.4g}"


def _now(outcome: Outcome, name: str, figure: Figure) -> tuple[str, str]:
    if name not in outcome.measured:
        return "–", BROKEN if outcome.failure else "–" if figure.met else MISSED
    value = outcome.measured[name]
    found = verdict(figure, value)
    return f"{value:.4g}", READ if found == KEPT and outcome.claim.reads else found


def verdict(figure: Figure, value: float) -> str:
    """:data:`KEPT`, :data:`MISSED` or :data:`BROKEN`."""
    if figure.holds(value):
        return KEPT
    return MISSED if figure.missed_as_filed(value) else BROKEN


def _row(*cells: str) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
