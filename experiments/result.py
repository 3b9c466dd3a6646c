"""What one run leaves behind: one line of JSON a trial, and what each arm cost and claimed.

The lines are standard JSON: an infinite or undefined number is written as ``"inf"``, ``"-inf"`` or ``"nan"``.
Reading is strict: an unknown or missing key, or a value of another type, is refused; only a field that older versions did not
write may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from experiments.metrics import ImageScores
from simulator.errors import FedpeekError

T = TypeVar("T")

Status = Literal["ok", "failed", "unsupported", "diverged"]
"""``unsupported`` says before running why not; ``failed`` raised; ``diverged`` ended in values that are not finite."""

Answered = Literal["inputs", "labels", "candidates"]
"""What the attack gave back: a guess of the private inputs, of their labels alone, or which of the candidates they are that it was
handed. The last two are not to be judged as pictures."""

SINCE = {"optional": True}
"""Metadata of a field that lines of an older version lack; they are read with its default."""


class ResultError(FedpeekError):
    """A line of results that is not one of ours."""


@dataclass(frozen=True, kw_only=True)
class RecordResult:
    """The scores of one private record in one trial.

    Attributes:
        client: who holds it.
        record: its index in the data set's private part.
        psnr_db: in dB on [0, 1], capped at 60; the mid-gray image is scored where the attack failed.
        identified: whether it is the nearest of N candidates to its guess.
        rank: its place among them; 1 is nearest.
        label_correct: whether the matched guess carries its label; None when labels were not compared.
        floors: what guesses without the gradient score on it, by name.
        lpips: perceptual distance; None where no real weights were found.
        label: its true class, from which the floor of label recovery is computed; None in lines of an older version.
        certificate: the attack's own proof that its guess of this record is exact, by name; empty without one.
        solver: the attack that produced the guess, where the trial's attack asked several; empty where it did it all.
        attributed: whether the attack names its sender; None where it names none, or sees one sender alone.
    """

    client: int
    record: int
    psnr_db: float
    ssim: float
    mse: float
    exact: bool
    identified: bool
    rank: int
    label_correct: bool | None
    floors: Mapping[str, ImageScores]
    lpips: float | None = None
    label: int | None = field(default=None, metadata=SINCE)
    certificate: str = field(default="", metadata=SINCE)
    solver: str = field(default="", metadata=SINCE)
    attributed: bool | None = field(default=None, metadata=SINCE)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack on one upload, under one arm and seed.

    Attributes:
        arm: name of the stack of defenses.
        senders: the clients behind the upload, ascending; more than one under secure aggregation.
        reason: why the trial is not ok; empty when it is.
        records: the private records behind the upload; scored as failures unless the trial is ok, empty if unsupported.
        objective: the attack's own, lower is better.
        trace: (step, objective) pairs.
        seconds: wall-clock time of the attack, its share of a batch of victims.
        upload_bytes: size of the attacked upload.
        flags: warnings of this trial, names of :data:`experiments.checks.FLAGS`.
        predicted: records that the identifiability of the view says can be exact, before any attack; None where it was not asked.
        answered: ``labels`` where the attack ended well and guessed no inputs; the records' image scores are then those of the
            mid-gray image and mean nothing. ``candidates`` where every guess is one of those disclosed: only who was named counts.
    """

    arm: str
    attack: str
    seed: int
    round: int
    senders: tuple[int, ...]
    status: Status
    reason: str = ""
    records: tuple[RecordResult, ...] = ()
    objective: float = math.nan
    converged: bool = False
    trace: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    upload_bytes: int = 0
    flags: tuple[str, ...] = ()
    answered: Answered = field(default="inputs", metadata=SINCE)
    predicted: int | None = field(default=None, metadata=SINCE)

    def __post_init__(self) -> None:
        if self.status == "unsupported" and self.records:
            raise ValueError(f"an unsupported trial must have no records, got {len(self.records)}. It was never run.")
        if self.status != "unsupported" and not self.records:
            raise ValueError(f"trial with status {self.status!r} must score its records, got none. A failure scores as mid-gray.")
        if self.status != "ok" and any(record.identified for record in self.records):
            raise ValueError(f"trial with status {self.status!r} must not identify a record. Score its records without a guess.")
        if self.answered == "labels" and any(record.identified for record in self.records):
            raise ValueError("trial that answered labels only must not identify a record. Score its records without a guess.")

    @property
    def view(self) -> Literal["update", "aggregate"]:
        """What the adversary held: one client's update, or the mean over several."""
        return "update" if len(self.senders) == 1 else "aggregate"

    def to_json(self) -> str:
        """Return the trial as one line, ``view`` included for the reader's sake."""
        return json.dumps(plain(self) | {"view": self.view}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Trial:
        """Read a line of :meth:`to_json`; raises ResultError if it is not one."""
        table = _table(line)
        view = table.pop("view", None)
        trial = _record(cls, table, "trial")
        if view != trial.view:
            raise ResultError(f"trial.view must be {trial.view!r} for {len(trial.senders)} senders, got {view!r}. The line was altered.")
        return trial


@dataclass(frozen=True, kw_only=True)
class ArmFacts:
    """What one arm claimed, cost and left over under one seed; nothing here depends on the attack.

    Attributes:
        accuracy: of the final model on the test part, in [0, 1].
        accuracy_per_round: the same after each round; may be empty.
        epsilon: of the arm's claim against this server; ∞ without one.
        delta: of the claim; None without one.
        epsilon_for: adversary, unit, adjacency and sampling of the claim, as a sentence.
        ceiling: the most that identification can reach under (ε, δ), in [0, 1], for what the attacks saw, the highest over the attacked
            rounds; 1 without a claim. Lines of an older version have that of the whole training.
        ceiling_by_round: the same for each attacked round, by its number; None in lines of an older version.
        training_ceiling: the same for whoever has every upload of the whole training; None in lines of an older version.
        latest_seen: the latest round of which any attack was handed something: ``ceiling`` counts the releases up to it.
        psnr_ceiling_db, mse_floor: the most and the least that an attack without a prior reaches, see :class:`defenses.bounds.Ceilings`;
            None where they do not apply.
        client_failures: one sentence for each client that did not answer as it should.
        upload_bytes: mean over clients and rounds; ``download_bytes`` likewise.
        upload_bytes_formula: of one client and round under an efficient coding, see :meth:`simulator.defense.Defense.upload_bytes`.
        client_seconds: CPU seconds that a client works in a round, the median over clients and rounds; None where none were noted.
        server_seconds: CPU seconds that the server works in a round, the mean over rounds; None in lines of an older version.
        peak_bytes: the most memory of the process in which server and clients ran, that of Python and its libraries included.
        quantization_error: rms difference of a coordinate to the exact aggregate, in the update's unit; None without quantization.
        quantization_relative: the same over the rms of the released aggregate; None in lines of an older version, too.
        train_seconds: wall-clock time of the federation.
        seconds: the same of federation and attacks, those before a kill included; None in lines of an older version.
    """

    arm: str
    seed: int
    accuracy: float
    accuracy_per_round: tuple[float, ...] = ()
    epsilon: float = math.inf
    delta: float | None = None
    epsilon_for: str = ""
    ceiling: float = 1.0
    client_failures: tuple[str, ...] = ()
    upload_bytes: float = 0.0
    quantization_error: float | None = None
    train_seconds: float = 0.0
    download_bytes: float | None = field(default=None, metadata=SINCE)
    client_seconds: float | None = field(default=None, metadata=SINCE)
    server_seconds: float | None = field(default=None, metadata=SINCE)
    peak_bytes: int | None = field(default=None, metadata=SINCE)
    upload_bytes_formula: float | None = field(default=None, metadata=SINCE)
    psnr_ceiling_db: float | None = field(default=None, metadata=SINCE)
    mse_floor: float | None = field(default=None, metadata=SINCE)
    seconds: float | None = field(default=None, metadata=SINCE)
    quantization_relative: float | None = field(default=None, metadata=SINCE)
    ceiling_by_round: Mapping[str, float] | None = field(default=None, metadata=SINCE)
    training_ceiling: float | None = field(default=None, metadata=SINCE)
    latest_seen: int | None = field(default=None, metadata=SINCE)

    def to_json(self) -> str:
        """Return the facts as one line."""
        return json.dumps(plain(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> ArmFacts:
        """Read a line of :meth:`to_json`; raises ResultError if it is not one."""
        return _record(cls, _table(line), "facts")


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as what standard JSON can write; infinite numbers become text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _table(line: str) -> dict[str, Any]:
    try:
        table = json.loads(line)
    except json.JSONDecodeError as error:
        raise ResultError(f"a result must be one line of JSON, got {line[:60]!r} ({error}). The run may have been cut off.") from error
    if not isinstance(table, dict):
        raise ResultError(f"a result must be a JSON object, got {type(table).__name__}. Remove the line.")
    return table


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin, args = _parts(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _record(hint, value, path)
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is Literal:
        return _checked(value in args, value, path, f"one of {', '.join(map(repr, args))}")
    if origin is tuple:
        _checked(isinstance(value, list) and (args[-1] is ... or len(value) == len(args)), value, path, "a list of the right length")
        kinds = repeat(args[0]) if args[-1] is ... else args
        pairs = enumerate(zip(value, kinds, strict=False))
        return tuple(item if type(item) is kind else _decode(kind, item, f"{path}.{i}") for i, (item, kind) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        _checked(isinstance(value, dict), value, path, "an object")
        return {key: _decode(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(_checked(number or value in ("inf", "-inf", "nan"), value, path, "a number"))
    return _checked(isinstance(value, hint) and not (hint is int and isinstance(value, bool)), value, path, f"of type {hint.__name__}")


def _record(cls: type[T], value: Any, path: str) -> T:
    hints, required = _keys(cls)  # type: ignore[arg-type]
    complete = isinstance(value, dict) and required <= value.keys() <= hints.keys()
    _checked(complete, value, path, f"an object with exactly the keys {', '.join(hints)}")
    try:
        found = {name: (value[name], hint) for name, hint in hints.items() if name in value}
        return cls(**{name: x if type(x) is hint else _decode(hint, x, f"{path}.{name}") for name, (x, hint) in found.items()})
    except ValueError as error:
        raise ResultError(f"{path}: {error}") from error


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


@cache
def _keys(cls: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a record's keys, and the keys that every version wrote."""
    hints = get_type_hints(cls)
    return hints, frozenset(hints) - {item.name for item in dataclasses.fields(cls) if item.metadata == SINCE}


def _checked(condition: bool, value: Any, path: str, wanted: str) -> Any:
    if not condition:
        raise ResultError(f"{path} must be {wanted}, got {str(value)[:80]!r}. Was it written by another version of fedpeek?")
    return value
