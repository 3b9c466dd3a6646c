"""A claim as data: one file says what is claimed, who says so, how it is measured, and which values keep it true.

A file ``ID.toml`` in this folder is a claim; adding one needs no code::

    claim = "linear_leak gives one record back exactly"
    source = "own"
    cpu_seconds = 2

    [measure]
    kind = "attack"
    data = "digits"
    model = "mlp"
    attack = "linear_leak"

    [figures.mse_max]
    ours = 4e-17
    at_most = 1e-10

A bar that ours misses is filed as well, under its own ID, and says so::

    [figures.difference_db]
    ours = 0.7
    at_least = 1.5
    met = false
    within = 0.8
    reason = "the order of the records is not known, and costs more than the surrogate wins"
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Protocol

from simulator import config
from simulator.errors import SpecError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a claim; its unit belongs to its name (:data:`experiments.claims.measures.UNITS`).

    Attributes:
        ours: the value as filed; the docs print it.
        at_least, at_most: the bar.
        within: how far from ``ours`` it may lie; where the bar is not met, how far the miss may be from the filed one.
        reported: what the source reports; none for our own claims.
        met: whether ours keeps the bar. A bar that is missed is filed like any other.
        reason: why it is missed.
    """

    ours: float
    at_least: float = -math.inf
    at_most: float = math.inf
    within: float = math.inf
    reported: float | None = None
    met: bool = True
    reason: str = ""

    def __post_init__(self) -> None:
        bars = (self.at_least, self.at_most, *((self.within,) if self.met else ()))
        if not any(map(math.isfinite, bars)):
            raise ValueError("a figure must have a bar, got none of at_least, at_most and within. Add one: without it nothing is claimed.")
        if self.met and not self.holds(self.ours):
            raise ValueError(f"ours must keep its own bar {self.bar}, got {self.ours}. Correct it, or say met = false and why.")
        if self.met and self.reason:
            raise ValueError(f"reason must be that of a miss, got {self.reason!r} with met = true. Leave it out.")
        if not self.met and (self.holds(self.ours) or not self.reason or math.isinf(self.within)):
            raise ValueError(
                f"met = false must come with ours outside the bar {self.bar}, a reason, and within (of the miss), got ours = {self.ours}, "
                f"reason = {self.reason!r}, within = {self.within}. Correct them."
            )

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the bar; NaN does not."""
        return self.at_least <= value <= self.at_most and (not self.met or self._near(value))

    def missed_as_filed(self, value: float) -> bool:
        """Whether a measured value misses the bar, by as much as the file says."""
        return not self.met and not self.holds(value) and self._near(value)

    def _near(self, value: float) -> bool:
        return math.isinf(self.within) or abs(value - self.ours) <= self.within

    @property
    def bar(self) -> str:
        """The bar in signs."""
        parts = [f"{sign} {limit:g}" for sign, limit in (("≥", self.at_least), ("≤", self.at_most)) if math.isfinite(limit)]
        return ", ".join(parts + ([f"≈ {self.ours:g} ± {self.within:g}"] if self.met and math.isfinite(self.within) else []))


class Measure(Protocol):
    """How a claim is measured: a frozen dataclass whose fields are the setting, registered in :data:`MEASURES`.

    One that takes hours may read instead what its last run left; it then has ``reads``, the file, and ``again``, the command that
    measures.
    """

    kind: ClassVar[str]

    def names(self) -> Sequence[str]:
        """The figures that it gives."""

    def __call__(self) -> Mapping[str, float]:
        """Measure them."""


MEASURES: dict[str, type[Any]] = {}
"""Kinds of measurement by name; the modules that :func:`read` imports fill it."""


@dataclass(frozen=True)
class Claim:
    """What is claimed, and how to see whether it is so.

    Attributes:
        id: the name of its file.
        claim: in one sentence.
        source: ``own``, or who reports it and where (authors, year, table).
        cpu_seconds: what measuring it is expected to cost.
    """

    id: str
    claim: str
    source: str
    cpu_seconds: float
    measure: Measure
    figures: Mapping[str, Figure]

    @property
    def reads(self) -> str:
        """The file that is read in place of a measurement; empty where ``fedpeek claims`` measures."""
        return getattr(self.measure, "reads", "")

    @property
    def again(self) -> str:
        """The command that writes that file anew; empty where ``fedpeek claims`` measures."""
        return getattr(self.measure, "again", "")

    @property
    def misses(self) -> list[str]:
        """The figures whose bar is filed as not met."""
        return [name for name, figure in self.figures.items() if not figure.met]


@dataclass(frozen=True, kw_only=True)
class _Words:
    """The plain settings of a claim's file."""

    claim: str
    source: str
    cpu_seconds: float


def claims() -> dict[str, Path]:
    """The files of all claims by ID."""
    found = (Path(str(item)) for item in files("experiments.claims").iterdir())
    return {path.stem: path for path in sorted(found, key=_natural) if path.suffix == ".toml"}


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """B2 before B13, and B2 before B2-32."""
    parts = re.findall(r"\d+|\D+", path.stem)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def select(wanted: Iterable[str]) -> list[Claim]:
    """The claims of these IDs, which may hold ``*``; all where none is named.

    Raises:
        SpecError: an ID that no claim has, or a claim that is not as it must be.
    """
    known, chosen = claims(), {}
    for word in wanted:
        hits = [name for name in known if fnmatchcase(name, word)]
        if not hits:
            raise SpecError(f"claim must be the ID of one, got {word!r}. {did_you_mean(word, known)}")
        chosen.update({name: known[name] for name in hits})
    return [read(path) for path in (chosen or known).values()]


def read(path: Path) -> Claim:
    """The claim in a file.

    Raises:
        SpecError: it is not TOML, or a setting is unknown, missing or of the wrong type.
    """
    from experiments.claims import (  # noqa: F401  they register themselves
        benchmarks,
        certificates,
        defended,
        federated,
        foresight,
        measures,
        planted,
        privacy,
        runs,
    )

    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"claim must be TOML, got {path} ({error}). Correct that line.") from error
    try:
        return _build(path.stem, table)
    except SpecError as error:
        raise SpecError(f"claim {path.stem}: {error}") from error


def _build(name: str, table: dict[str, Any]) -> Claim:
    setting, figures = (table.pop(key, None) for key in ("measure", "figures"))
    for key, value in (("measure", setting), ("figures", figures)):
        if not isinstance(value, dict) or not value:
            raise SpecError(f"{key} must be a table, got {value!r}. Add [{key}].")
    words = config.build(_Words, table)
    setting = dict(setting)
    kind = setting.pop("kind", None)
    if kind not in MEASURES:
        raise SpecError(f"measure.kind must be one of ours, got {kind!r}. {did_you_mean(str(kind), MEASURES)}")
    measure = config.build(MEASURES[kind], setting, "measure.")
    for figure in figures:
        if figure not in measure.names():
            raise SpecError(f"figures must be ones that {kind!r} gives, got {figure!r}. {did_you_mean(figure, measure.names())}")
    built = {figure: config.build(Figure, value, f"figures.{figure}.") for figure, value in figures.items()}
    return Claim(id=name, measure=measure, figures=built, **{field.name: getattr(words, field.name) for field in fields(words)})
