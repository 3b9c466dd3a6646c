"""From trials to the table: one row for each arm, attack and view, and, if asked, attacked round.

Failures count with the score of the mid-gray image. Every mean has an interval over whole uploads, every score its floor, and
every defended arm its difference to the undefended one on the same victims and seeds. An attack that answered labels only is
judged by its labels: its row has no scores of images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.checks import flags_for
from experiments.controls import best_floor, label_floor
from experiments.metrics import chance
from experiments.result import ArmFacts, RecordResult, Trial, plain
from experiments.statistics import Interval, Rate, bootstrap_difference, bootstrap_mean, clustered_rate, holm, sign_flip_p

SCHEMA = 1

SCORES = ("psnr_db", "ssim", "mse", "lpips")
"""Scores of images, with a distribution over victims; ``lpips`` only where every record has it."""

Key = tuple[int, int, int, int]
"""A victim: seed, round, client, record."""

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
        """The victim, the same under every arm."""
        return self.trial.seed, self.trial.round, self.record.client, self.record.record

    @property
    def upload(self) -> Upload:
        """What is resampled as a whole: seed, round and senders of the upload that the record is in."""
        return self.trial.seed, self.trial.round, self.trial.senders

    @property
    def gain_db(self) -> float:
        """PSNR in dB above the record's best floor."""
        return self.record.psnr_db - best_floor(self.record.floors)[1].psnr_db

    @property
    def beats_floor(self) -> bool:
        """Whether a picture was rebuilt that is nearer than any floor; the mid-gray image of a failure never counts as one."""
        return self.trial.status == "ok" and self.trial.answered == "inputs" and self.gain_db > 0


@dataclass(frozen=True)
class Group:
    """The trials behind one row."""

    arm: str
    attack: str
    view: str
    round: int | None
    trials: tuple[Trial, ...]

    @property
    def scored(self) -> list[Scored]:
        """Every record of every trial; unsupported trials have none."""
        return [Scored(trial, record) for trial in self.trials for record in trial.records]

    @property
    def labels_only(self) -> bool:
        """Whether no trial that ended well guessed inputs; one that did makes the others' mid-gray pictures its failures."""
        return {trial.answered for trial in self.trials if trial.status == "ok"} == {"labels"}


def summarize(
    trials: Sequence[Trial],
    facts: Sequence[ArmFacts],
    *,
    candidates: int,
    control_arm: str | None,
    environment: Mapping[str, object],
    version: str,
    by_round: bool = False,
) -> dict[str, Any]:
    """Return the content of ``summary.json``, in the order in which arms and attacks first appear.

    Means of PSNR are means of dB. ``identified.chance`` is 1/N for single records and at most k/N for a joint batch of k.

    Args:
        candidates: N, the records among which the true one must be the nearest.
        control_arm: name of the undefended arm; None where there is none.
        by_round: one row for each attacked round, to see the initial beside the trained model, instead of one for all.

    Raises:
        ValueError: a victim was scored twice by the same attack under the same arm.
    """
    groups = _groups(trials, by_round)
    rows = [
        _row(group, _control(group, groups, control_arm), [fact for fact in facts if fact.arm == group.arm], candidates) for group in groups
    ]
    _correct(rows)
    return {"schema": SCHEMA, "fedpeek": version, "environment": plain(environment), "rows": plain(rows)}


def _groups(trials: Sequence[Trial], by_round: bool) -> list[Group]:
    named: dict[tuple[str, str, str, int | None], list[Trial]] = {}
    for trial in trials:
        named.setdefault((trial.arm, trial.attack, trial.view, trial.round if by_round else None), []).append(trial)
    groups = [Group(*name, tuple(members)) for name, members in named.items()]
    for group in groups:
        twice = [key for key, count in Counter(scored.key for scored in group.scored).items() if count > 1]
        if twice:
            raise ValueError(
                f"a victim must be scored once by {group.attack!r} under {group.arm!r}, got (seed, round, client, record) = {twice[0]} "
                "more than once. Remove the repeated lines."
            )
    return groups


def _control(group: Group, groups: Sequence[Group], control_arm: str | None) -> Group | None:
    """The same attack on the same rounds without defense, whatever the view; the group itself if it is the control."""
    wanted = control_arm, group.attack, group.round
    return next((other for other in groups if (other.arm, other.attack, other.round) == wanted), None)


def _row(group: Group, control: Group | None, facts: Sequence[ArmFacts], candidates: int) -> Row:
    scored, uploads, seeds = group.scored, {item.upload for item in group.scored}, {trial.seed for trial in group.trials}
    statuses = {"ok": 0} | Counter(trial.status for trial in group.trials)
    pictured = [] if group.labels_only else scored
    gain = _interval([item.gain_db for item in pictured], pictured) if pictured else None
    identified = _rate([item.record.identified for item in pictured], pictured) if pictured else None
    comparison = _comparison(pictured, control.scored) if pictured and control and control is not group else None
    epsilon, ceiling = max((fact.epsilon for fact in facts), default=math.inf), max((fact.ceiling for fact in facts), default=1.0)
    flags = flags_for(
        statuses=statuses,
        records=len(scored),
        seeds=len(seeds),
        uploads=len(uploads),
        unconverged=sum(trial.status == "ok" and not trial.converged for trial in group.trials),
        gain=_above_floor(group),
        controlled=control is not None and not {item.key for item in scored}.isdisjoint(item.key for item in control.scored),
        control_gain=_above_floor(control) if control else None,
        difference=comparison.interval if comparison else None,
        identified=identified,
        epsilon=epsilon,
        ceiling=ceiling,
        oracle=any("oracle_used" in trial.flags for trial in group.trials),
        clients_lost=any(fact.client_failures for fact in facts),
    )
    return {
        "defense": group.arm,
        "attack": group.attack,
        "view": group.view,
        "answered": "labels" if group.labels_only else "inputs",
        "control": control is group,
        "rounds": sorted({trial.round for trial in group.trials}),
        "victims": len(scored),
        "seeds": len(seeds),
        "uploads": len(uploads),
        "statuses": statuses,
        "reasons": sorted({trial.reason for trial in group.trials if trial.reason}),
        "scores": _scores(group) if scored else {},
        "floor": _floor(pictured) if pictured else None,
        "gain": {"psnr_db": _bounds(gain)} if gain else None,
        "difference_to_control": comparison.row if comparison else None,
        "identified": _bounds(identified) | {"chance": _chance(scored, candidates), "candidates": candidates} if identified else None,
        "epsilon": epsilon,
        "delta": max((fact.delta for fact in facts if fact.delta is not None), default=None),
        "epsilon_for": "; ".join(dict.fromkeys(fact.epsilon_for for fact in facts if fact.epsilon_for)),
        "ceiling": ceiling,
        "accuracy": _mean([fact.accuracy for fact in facts if math.isfinite(fact.accuracy)]),
        "accuracy_by_seed": {str(fact.seed): fact.accuracy if math.isfinite(fact.accuracy) else None for fact in facts},
        "seconds": _mean([trial.seconds for trial in group.trials if trial.status != "unsupported"]),
        "train_seconds": _mean([fact.train_seconds for fact in facts]),
        "upload_bytes": _mean([fact.upload_bytes for fact in facts] or [float(trial.upload_bytes) for trial in group.trials]),
        "quantization_error": max((fact.quantization_error for fact in facts if fact.quantization_error is not None), default=None),
        "client_failures": [failure for fact in facts for failure in fact.client_failures],
        "flags": flags + sorted({flag for trial in group.trials for flag in trial.flags} - set(flags)),
    }


def _above_floor(group: Group) -> Interval | None:
    """What the attack reached over its floor, in dB of PSNR or as a share of labels; None without scores.

    Labels without a known floor are taken to be worth nothing: the tool claims no leakage that it cannot compare.
    """
    scored = group.scored
    if not scored:
        return None
    if not group.labels_only:
        return _interval([item.gain_db for item in scored], scored)
    labels = _labels(group)
    floor = 1.0 if labels is None or labels.floor is None else labels.floor
    return Interval(*(end - floor for end in (vars(labels.accuracy).values() if labels else (0.0, 0.0, 0.0))))


def _scores(group: Group) -> Row:
    """Each score of a row; those of images are null where the attack answered none."""
    scored, row = group.scored, Row()
    for name in SCORES:
        values = [getattr(item.record, name) for item in scored]
        if None not in values:
            row[name] = None if group.labels_only else _distribution(values, scored)
    labels = _labels(group)
    if labels:
        accuracy = labels.accuracy
        row["label_accuracy"] = {"mean": accuracy.rate, "low": accuracy.low, "high": accuracy.high, "floor": labels.floor}
    row["exact"] = None if group.labels_only else _bounds(_rate([item.record.exact for item in scored], scored))
    return row


def _distribution(values: Sequence[float], scored: Sequence[Scored]) -> Row:
    return _bounds(_interval(values, scored)) | {
        "min": min(values),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": max(values),
    }


@dataclass(frozen=True)
class Labels:
    """How many labels an attack got right, and how many a guess would that knows the class frequencies; None if unknown."""

    accuracy: Rate
    floor: float | None


def _labels(group: Group) -> Labels | None:
    """Judge the labels of a row; None where the attack gave none. Matched among themselves only where no picture decides."""
    labelled = [item for item in group.scored if item.record.label_correct is not None]
    if not labelled:
        return None
    batches: dict[Upload, list[int]] = {}
    for item in labelled:
        if item.record.label is not None:
            batches.setdefault(item.upload, []).append(item.record.label)
    known = sum(map(len, batches.values())) == len(labelled)
    floor = label_floor(list(batches.values()), matched=group.labels_only) if known else None
    return Labels(_rate([bool(item.record.label_correct) for item in labelled], labelled), floor)


def _floor(scored: Sequence[Scored]) -> Row:
    """The mean of each record's best floor, the floor that is best most often, and the mean of every floor."""
    best = [best_floor(item.record.floors) for item in scored]
    names = dict.fromkeys(name for item in scored for name in item.record.floors)
    return {
        "psnr_db": _mean([score.psnr_db for _, score in best]),
        "name": Counter(name for name, _ in best).most_common(1)[0][0],
        "by_name": {
            name: {"psnr_db": _mean([item.record.floors[name].psnr_db for item in scored if name in item.record.floors])} for name in names
        },
    }


@dataclass(frozen=True)
class Comparison:
    """The paired difference to the control: its interval, None where no pair is left, and what the row says of it."""

    interval: Interval | None
    row: Row


def _comparison(scored: Sequence[Scored], control: Sequence[Scored]) -> Comparison | None:
    """Compare the victims that both arms share, resampled by the larger of the two uploads that a victim is in.

    A victim on which the undefended attack misses its own floor gives no defense credit and is excluded (rule T13); where the
    control is at its floor, the ones that are left are its lucky ones, so that the difference errs towards the defense.
    """
    undefended = {item.key: item for item in control}
    shared = [(item, undefended[item.key]) for item in scored if item.key in undefended]
    if not shared:
        return None
    pairs = [(item, other) for item, other in shared if other.beats_floor]
    counts = {"pairs": len(pairs), "excluded": len(shared) - len(pairs)}
    if not pairs:
        return Comparison(None, {"psnr_db": None, "identified": None, **counts, "p": None})
    clusters = [max(item.upload, other.upload, key=lambda upload: len(upload[2])) for item, other in pairs]
    values, reference = [item.record.psnr_db for item, _ in pairs], [other.record.psnr_db for _, other in pairs]
    interval = bootstrap_difference(values, reference, clusters, rng=_rng())
    p = sign_flip_p([value - other for value, other in zip(values, reference, strict=True)], clusters, rng=_rng())
    identified = _mean([float(item.record.identified) - float(other.record.identified) for item, other in pairs])
    return Comparison(interval, {"psnr_db": _bounds(interval), "identified": {"mean": identified}, **counts, "p": p})


def _correct(rows: Sequence[Row]) -> None:
    """Add to each difference its p-value after Holm's correction over all rows."""
    differences = [row["difference_to_control"] for row in rows if row["difference_to_control"]]
    for difference in differences:
        difference["p_holm"] = None
    compared = [difference for difference in differences if difference["p"] is not None]
    for difference, p in zip(compared, holm([difference["p"] for difference in compared]), strict=True):
        difference["p_holm"] = p


def _interval(values: Sequence[float], scored: Sequence[Scored]) -> Interval:
    return bootstrap_mean(values, [item.upload for item in scored], rng=_rng())


def _rate(hits: Sequence[bool], scored: Sequence[Scored]) -> Rate:
    """The share of hits; its interval allows for records of one upload sharing its fate."""
    return clustered_rate(hits, [item.upload for item in scored], rng=_rng())


def _rng() -> np.random.Generator:
    """The same resamples for each number, so that adding a row changes no other."""
    return np.random.default_rng(0)


def _chance(scored: Sequence[Scored], candidates: int) -> float | None:
    return _mean([chance(len(item.trial.records), candidates) for item in scored])


def _bounds(interval: Interval | Rate) -> Row:
    """The interval as a table; an end that is not finite says nothing and becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in vars(interval).items()}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
