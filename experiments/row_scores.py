"""What one row of the summary says of its scores: their distributions, their floors, and how far above these the attack came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.controls import SAMPLE, best_floor, label_floor
from experiments.groups import Group, Row, Scored, Upload, bounds, interval_of, mean, rate_of, seed_means
from experiments.ladder import BEST
from experiments.metrics import chance
from experiments.result import Trial
from experiments.statistics import Interval, Rate

SCORES = ("psnr_db", "ssim", "mse", "lpips")
"""Scores of images, with a distribution over victims; ``lpips`` only where every record has it."""

DEALT = 200
"""Random deals of an upload's records to its senders, over which the chance to name a record's sender is averaged."""


def above_floor(group: Group, candidates: int) -> Interval | None:
    """What the attack reached over its floor: in dB of PSNR, as a share of labels, or as a rate over chance; None without scores.

    Labels without a known floor are taken to be worth nothing: the tool claims no leakage that it cannot compare.
    """
    scored = group.scored
    if not scored:
        return None
    if group.chosen:
        identified, chance = rate_of([item.record.identified for item in scored], scored), _chance(scored, candidates) or 0.0
        return Interval(identified.rate - chance, identified.low - chance, identified.high - chance)
    if not group.labels_only:
        return interval_of([item.gain_db for item in scored], scored)
    labels = _labels(group)
    floor = 1.0 if labels is None or labels.floor is None else labels.floor
    return Interval(*(end - floor for end in (vars(labels.accuracy).values() if labels else (0.0, 0.0, 0.0))))


def scores(group: Group) -> Row:
    """Each score of a row; those of images are null where the attack answered none."""
    scored, row = group.scored, Row()
    for name in SCORES:
        values = [getattr(item.record, name) for item in scored]
        if None not in values:
            row[name] = None if group.labels_only or group.chosen else _distribution(values, scored)
    labels = _labels(group)
    if labels:
        accuracy = labels.accuracy
        row["label_accuracy"] = {"mean": accuracy.rate, "low": accuracy.low, "high": accuracy.high, "floor": labels.floor}
    row["exact"] = None if group.labels_only or group.chosen else bounds(rate_of([item.record.exact for item in scored], scored))
    return row


def attributed(scored: Sequence[Scored]) -> Row | None:
    """Records whose sender the attack names, how many of them rightly, and what a guess among the senders gets right; None without any."""
    named = [item for item in scored if item.record.attributed is not None]
    if not named:
        return None
    uploads = {id(item.trial): item.trial for item in named}.values()
    chance = float(np.mean([dealt_owners(trial) for trial in uploads]))
    return bounds(rate_of([bool(item.record.attributed) for item in named], named)) | {"records": len(named), "chance": chance}


def dealt_owners(trial: Trial) -> float:
    """Share of records that go to their sender if the senders' records are dealt at random: who guesses knows n_i, and no more.

    Labels alone are interchangeable: within a class, as many as possible count as right, as they do for the attack.
    """
    owners = np.array([record.client for record in trial.records])
    kinds = np.array([record.label if trial.answered == "labels" else place for place, record in enumerate(trial.records)])
    rng, right = np.random.default_rng(0), 0
    for _ in range(DEALT):
        dealt = rng.permutation(owners)
        pairs = (Counter(zip(kinds.tolist(), of.tolist(), strict=True)) for of in (owners, dealt))
        right += (next(pairs) & next(pairs)).total()
    return right / (DEALT * len(owners))


def _distribution(values: Sequence[float], scored: Sequence[Scored]) -> Row:
    return (
        bounds(interval_of(values, scored))
        | seed_means(values, scored)
        | {
            "min": min(values),
            "median": float(np.median(values)),
            "p95": float(np.quantile(values, 0.95)),
            "max": max(values),
        }
    )


@dataclass(frozen=True)
class Labels:
    """How many labels an attack got right, and how many a guess would that knows the class frequencies; None if unknown."""

    accuracy: Rate
    floor: float | None


def _labels(group: Group) -> Labels | None:
    """Judge the labels of a row; None where the attack gave none.

    Those of a batch are matched to the truth among themselves, or as their pictures are, which class means would bring to their classes:
    the floor has the freedom of the first, the larger one.
    """
    labelled = [item for item in group.scored if item.record.label_correct is not None]
    if not labelled:
        return None
    batches: dict[Upload, list[int]] = {}
    for item in labelled:
        if item.record.label is not None:
            batches.setdefault(item.upload, []).append(item.record.label)
    known = sum(map(len, batches.values())) == len(labelled)
    floor = label_floor(list(batches.values()), matched=any(len(labels) > 1 for labels in batches.values())) if known else None
    return Labels(rate_of([bool(item.record.label_correct) for item in labelled], labelled), floor)


def floor(scored: Sequence[Scored]) -> Row:
    """The mean of each record's best floor, the floor that is best most often, and the mean of every floor."""
    best = [best_floor(item.record.floors) for item in scored]
    names = dict.fromkeys(name for item in scored for name in item.record.floors if name != SAMPLE)
    return {
        "psnr_db": mean([score.psnr_db for _, score in best]),
        "name": Counter(name for name, _ in best).most_common(1)[0][0],
        "by_name": {
            name: {"psnr_db": mean([item.record.floors[name].psnr_db for item in scored if name in item.record.floors])} for name in names
        },
    }


def over_prior(scored: Sequence[Scored]) -> tuple[Interval, int] | None:
    """PSNR in dB above that of the same attack on shuffled updates, on the victims on which that was asked, and how many records these are.

    What is not above it, the attack knew before: of a learned one, the mean of what it learned from, say. None of the best of several
    attacks, whose shuffled one was another.
    """
    scored = [item for item in scored if item.trial.attack != BEST]
    asked = [(item, item.record.floors.get("shuffled_gradient") or item.record.floors.get(SAMPLE)) for item in scored]
    pairs = [(item, blind) for item, blind in asked if blind is not None]
    if not pairs:
        return None
    return interval_of([item.record.psnr_db - blind.psnr_db for item, blind in pairs], [item for item, _ in pairs]), len(pairs)


def guessed(group: Group, candidates: int) -> float | None:
    """Chance of the identification; where each victim has its best attack, that of the guesses of all that it was chosen from."""
    return _chance(group.scored, candidates)


def guessed_in_class(group: Group) -> float | None:
    """The same for who knows each record's class, which is more to know than to guess; None in lines of an older version."""
    return mean([item.record.class_chance for item in group.scored if item.record.class_chance is not None])


def _chance(scored: Sequence[Scored], candidates: int) -> float | None:
    return mean([chance(item.trial.tries, candidates) for item in scored])
