"""What one run leaves behind: one line of JSON a trial, and what each arm cost and claimed.

The lines are standard JSON, read strictly: see :mod:`experiments.json_lines`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from experiments import json_lines
from experiments.json_lines import SINCE, ResultError, plain
from experiments.metrics import ImageScores

Status = Literal["ok", "failed", "unsupported", "diverged"]
"""``unsupported`` says before running why not; ``failed`` raised; ``diverged`` ended in values that are not finite."""

Answered = Literal["inputs", "labels", "candidates"]
"""What the attack gave back: a guess of the private inputs, of their labels alone, or which of the candidates they are that it was
handed. The last two are not to be judged as pictures."""


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
        class_chance: of naming it among the candidates of its class, which an update may tell; None in lines of an older version.
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
    class_chance: float | None = field(default=None, metadata=SINCE)


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
        guesses: how many the attack made, among which the truth chooses; None in lines of an older version: one for each record.
        surplus_proofs: of its guesses with a certificate those that are left when each record has its own: they are no record.
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
    guesses: int | None = field(default=None, metadata=SINCE)
    surplus_proofs: int = field(default=0, metadata=SINCE)

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

    @property
    def tries(self) -> int:
        """How many guesses might name a record: what chance is counted from."""
        return len(self.records) if self.guesses is None else self.guesses

    def to_json(self) -> str:
        """Return the trial as one line, ``view`` included for the reader's sake."""
        return json.dumps(plain(self) | {"view": self.view}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Trial:
        """Read a line of :meth:`to_json`; raises ResultError if it is not one."""
        table = json_lines.table(line)
        view = table.pop("view", None)
        trial = json_lines.record(cls, table, "trial")
        if view != trial.view:
            raise ResultError(f"trial.view must be {trial.view!r} for {len(trial.senders)} senders, got {view!r}. The line was altered.")
        return trial


@dataclass(frozen=True, kw_only=True)
class ArmFacts:
    """What one arm claimed, cost and left over under one seed; nothing here depends on the attack.

    Attributes:
        accuracy: on the test part, in [0, 1], the mean over the models after the last rounds.
        accuracy_per_round: of each of these models; empty in lines of an older version, which tested the last one alone.
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
        peak_bytes: the most memory that server and clients took, in one process, beyond what that process held before; in lines of an older
            version with that.
        memory_bytes_formula: the least that a round needs, see :func:`experiments.cost.memory_bytes`.
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
    memory_bytes_formula: float | None = field(default=None, metadata=SINCE)

    def to_json(self) -> str:
        """Return the facts as one line."""
        return json.dumps(plain(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> ArmFacts:
        """Read a line of :meth:`to_json`; raises ResultError if it is not one."""
        return json_lines.record(cls, json_lines.table(line), "facts")
