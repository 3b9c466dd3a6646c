"""Holds a run's identifications against its ceilings: whoever was named more often than (ε, δ) allows refutes the guarantee.

From each upload one record counts, its first: records of one upload share its noise, and the audit needs independent trials. Where an
attack used all rounds, one upload of each client counts. What is not audited is said, with the reason.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from defenses.audit import Measured, Verdict, audit
from experiments.conclude import in_order
from experiments.directory import SPEC, read_facts, read_trials
from experiments.groups import independent, told_apart
from experiments.result import ArmFacts, Trial
from experiments.spec import Experiment
from simulator import config
from simulator.errors import FedpeekError, SpecError


def audit_run(out: Path) -> tuple[list[Verdict], list[str]]:
    """Judge every attack of a finished run against the ceiling of its arm; return also why some are not judged.

    Raises:
        SpecError: ``out`` is not the directory of a run.
        FedpeekError: no task of the run has finished.
    """
    if not (out / SPEC).is_file():
        raise SpecError(f"directory must be that of a run, got {out} without {SPEC}. Give the --out of `fedpeek run`.")
    experiment = config.build(Experiment, tomllib.loads((out / SPEC).read_text(encoding="utf-8")))
    if not (facts := read_facts(out)):
        raise FedpeekError(f"run must have at least one finished task, got none in {out}. Run it again with --resume.")
    rows, skipped = measured(in_order(experiment, read_trials(out)), facts, one_round=experiment.threat.rounds == "one")
    return audit(rows), skipped


def measured(trials: Sequence[Trial], facts: Sequence[ArmFacts], *, one_round: bool) -> tuple[list[Measured], list[str]]:
    """Count what each attack identified under each arm whose guarantee allows less than everything; say what is left out.

    Args:
        trials: of a run.
        facts: of its arms; the highest ceiling over the seeds is an arm's.
        one_round: whether an attack used one round alone, so that each attacked round is a trial of its own.
    """
    ceilings = {arm: max(fact.ceiling for fact in facts if fact.arm == arm) for arm in dict.fromkeys(fact.arm for fact in facts)}
    rows, skipped = [], [f"{arm}: not audited: nothing is certified against this adversary." for arm, most in ceilings.items() if most >= 1]
    for arm, attack in dict.fromkeys((trial.arm, trial.attack) for trial in trials):
        if ceilings.get(arm, 1.0) >= 1:
            continue
        mine = [trial for trial in trials if (trial.arm, trial.attack) == (arm, attack) and trial.answered != "labels"]
        if told_apart(mine):
            skipped.append(f"{arm}, {attack}: not audited: labels that were told rule candidates out, which the ceiling does not know of.")
            continue
        counted = independent(mine, one_round=one_round)
        if not counted:
            skipped.append(f"{arm}, {attack}: not audited: it named nobody; see results.jsonl for the reason.")
            continue
        hits = sum(trial.records[0].identified for trial in counted)
        rows.append(Measured(f"{arm}, {attack}", hits, len(counted), ceilings[arm]))
    return rows, skipped
