"""One attack under one arm, held against its ceiling: which of its trials count, how many named the true candidate, and among how few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from defenses.audit import Measured
from experiments.facts import most_of
from experiments.metrics import chance
from experiments.result import ArmFacts, Trial


def hold(trials: Sequence[Trial], facts: Sequence[ArmFacts], *, one_round: bool, candidates: int, skewed: bool) -> Measured | str:
    """Count what an attack identified, where its arm's guarantee allows less than everything; else say why it is not audited.

    Args:
        trials: of one attack under one arm.
        facts: of the arm, one for each seed: a trial's ceiling is that of its seed and round. Where it is 1 the trial is left out, whatever
            it measured: nothing can exceed it, and the others would have to be held against 1 with it.
        one_round: whether the attack used one round alone, so that each attacked round is a trial of its own.
        candidates: N.
        skewed: whether clients hold classes of their own.
    """
    independent = _independent(trials, one_round=one_round)
    if min(_ceiling(trial, facts) for trial in independent or trials) >= 1:
        certified = all(math.isfinite(fact.epsilon) for fact in facts)
        why = "(ε, δ) lets everybody be named by what an attack saw" if certified else "nothing is certified against this adversary"
        return f"{trials[0].arm}: not audited: {why}."
    counted = [trial for trial in independent if _ceiling(trial, facts) < 1]
    name = f"{trials[0].arm}, {trials[0].attack}"
    if _told_apart(counted, skewed=skewed):
        why = "the classes of the records beside it tell of each, where clients hold classes of their own"
        why = why if skewed else "labels that were told rule candidates out"
        return f"{name}: not audited: {why}, which the ceiling does not know of."
    if not counted:
        return f"{name}: not audited: it named nobody; see results.jsonl for the reason."
    ceilings = tuple(_ceiling(trial, facts) for trial in counted)
    differ = len(set(ceilings)) > 1
    return Measured(
        name,
        successes=sum(trial.records[0].identified for trial in counted),
        trials=len(counted),
        ceiling=fmean(ceilings) if differ else ceilings[0],
        chance=fmean(chance(trial.tries, candidates) for trial in counted),
        own=ceilings if differ else (),
        left_out=len(independent) - len(counted),
    )


def _ceiling(trial: Trial, facts: Sequence[ArmFacts]) -> float:
    """The ceiling for what the attack saw in this trial; where nothing is known of its seed, the highest of the others."""
    return most_of([fact for fact in facts if fact.seed == trial.seed] or facts, trial.round)


def _independent(trials: Sequence[Trial], *, one_round: bool) -> list[Trial]:
    """The trials of one attack under one arm of which the first record counts against a ceiling: no two share noise.

    Records of one upload do. So do uploads of several rounds with a record in common: the model of the later round tells of the earlier
    one, whose noise may name that record in both. Of those the first one counts.

    Args:
        trials: that named or could have named somebody.
        one_round: whether the attack used one round alone; else all uploads that a client had a part in are one trial.
    """
    counted: list[Trial] = []
    taken: set[tuple[int, ...]] = set()
    for trial in trials:
        if not trial.records or trial.answered == "labels":
            continue
        whole: set[tuple[int, ...]] = {(trial.seed, client) for client in trial.senders}
        units = {(trial.seed, record.client, record.record) for record in trial.records} if one_round else whole
        if units.isdisjoint(taken):
            counted.append(trial)
        taken |= units
    return counted


def _told_apart(trials: Sequence[Trial], *, skewed: bool) -> bool:
    """Whether more than the upload tells candidates apart, which a ceiling does not know of: the other records beside the counted one.

    Their labels, where these are told; and where each client holds classes of its own, their pictures.

    Args:
        trials: those that count.
        skewed: whether clients hold classes of their own.
    """
    return any(("oracle_used" in trial.flags or skewed) and len(trial.records) > 1 for trial in trials)
