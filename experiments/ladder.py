"""The ladder of attackers: which attacks a spec runs that names none, and the strongest of them for each victim.

Every rung sees the same view. The non-adaptive one does not ask which defense acted, the adaptive one does; where all rounds may be used,
another takes sums over clients apart; the learned one trains on defended updates of public records, and the identifier need only say
which of N candidates it was (arXiv:2201.04845). A rung for which the threat model withholds what it needs is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from experiments.result import RecordResult, Trial
from simulator import lookup
from simulator.adversary import ThreatModel

IDENTIFIER = "candidate_identification"

OF_SUMS = ("gradient_disaggregation", "support_leak", "label_owners")
"""What takes sums over clients apart by those of other rounds; each refuses lone senders."""

BEST = "best per victim"
"""Name of the row that takes each victim's strongest attack."""


def rungs(threat: ThreatModel, *, defended: bool) -> tuple[Any, ...]:
    """The attacks on each arm: the strongest, which knows the defenses; one that does not, where there are any; and what is granted.

    Args:
        defended: whether any arm has a defense.
    """
    names = {"inverting_gradients": defended, "strongest": True}
    names |= dict.fromkeys(OF_SUMS, threat.rounds == "all")
    names["learning_to_invert"] = threat.public_data
    names[IDENTIFIER] = threat.candidates
    return tuple(lookup.get("attacks", name)() for name, granted in names.items() if granted)


def left_out(threat: ThreatModel) -> str:
    """Which rungs the threat model withholds what they need, and the setting that grants it, as a sentence; empty if none."""
    needs = {"learning_to_invert": ("public_data", threat.public_data), IDENTIFIER: ("candidates", threat.candidates)}
    missing = [f"{name} (threat.{key} = true)" for name, (key, granted) in needs.items() if not granted]
    return f"The ladder of attackers is without {' and '.join(missing)}: grant it to see what they find." if missing else ""


def best_per_victim(trials: Sequence[Trial]) -> list[Trial]:
    """One trial for each upload of an arm on which several attacks rebuilt pictures, with every record from the one that came nearest.

    Choosing it needs the truth: no single adversary reaches it, each reaches part of it. Its floors have the same freedom. A record
    counts as identified if its chosen picture or the attack that names candidates says so: as many guesses as there were attacks, since
    the choice among their pictures is the truth's, too. Seconds are those of all attacks.
    """
    painters: dict[str, set[str]] = {}
    for trial in filter(_drew, trials):
        painters.setdefault(trial.arm, set()).add(trial.attack)
    found = []
    for _, group in groupby(sorted(trials, key=_upload), key=_upload):
        tried = [trial for trial in group if trial.records]
        drawn = [trial for trial in tried if _drew(trial)]
        if drawn and len(painters[drawn[0].arm]) > 1:  # also of an upload to which only one of them applies
            found.append(_best(drawn, next((trial for trial in tried if trial.answered == "candidates"), None)))
    return found


def _drew(trial: Trial) -> bool:
    """Whether the attack rebuilt pictures, or failed to; an identifier that failed drew nothing either."""
    return bool(trial.records) and trial.answered == "inputs" and trial.attack != IDENTIFIER


def _upload(trial: Trial) -> tuple[str, int, int, tuple[int, ...]]:
    return trial.arm, trial.seed, trial.round, trial.senders


def _best(trials: Sequence[Trial], named: Trial | None) -> Trial:
    ended, asked = [trial for trial in trials if trial.status == "ok"], [*trials, *([named] if named else [])]
    chosen = [_nearest(place, trials) for place in range(len(trials[0].records))]
    records = [record for _, record in chosen]
    if named is not None:
        answers = {(record.client, record.record): record for record in named.records}
        told = [answers[record.client, record.record] for record in records]
        records = [
            replace(record, identified=record.identified or who.identified, rank=min(record.rank, who.rank))
            for record, who in zip(records, told, strict=True)
        ]
    return replace(
        trials[0],
        attack=BEST,
        status="ok" if ended else trials[0].status,
        reason="" if ended else trials[0].reason,
        records=tuple(replace(record, class_chance=_chance_in_class(record, asked)) for record in records),
        converged=all(trial.converged for trial, _ in chosen if trial.status == "ok"),
        trace=(),
        seconds=sum(trial.seconds for trial in asked),
        predicted=None,
        flags=tuple(dict.fromkeys(flag for trial in trials for flag in trial.flags)),
        guesses=sum(trial.tries for trial in asked),
        surplus_proofs=max(trial.surplus_proofs for trial in trials),
    )


def _nearest(place: int, trials: Sequence[Trial]) -> tuple[Trial, RecordResult]:
    """The best attack on the record at ``place``, and the record as it left it; ``solver`` says which that was."""
    wanted = trials[0].records[place]
    tries = [(trial, record) for trial in trials for record in trial.records if _who(record) == _who(wanted)]
    tries = [(trial, record) for trial, record in tries if trial.status == "ok"] or tries  # the gray picture of a failure is no guess
    trial, best = max(tries, key=lambda pair: pair[1].psnr_db)
    offered = [(name, floor) for _, record in tries for name, floor in record.floors.items()]
    floors = {name: max((floor for other, floor in offered if other == name), key=lambda floor: floor.psnr_db) for name, _ in offered}
    return trial, replace(best, floors=floors, solver=trial.attack)


def _chance_in_class(record: RecordResult, asked: Sequence[Trial]) -> float | None:
    """Of naming it among the candidates of its class by any attack that was asked; None in lines of an older version."""
    each = [own.class_chance for trial in asked for own in trial.records if _who(own) == _who(record)]
    known = [chance for chance in each if chance is not None]
    return min(1.0, sum(known)) if known else None


def _who(record: RecordResult) -> tuple[int, int]:
    return record.client, record.record
