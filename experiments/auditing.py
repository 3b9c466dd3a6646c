"""Holds a run's identifications against its ceilings: whoever was named more often than (ε, δ) allows refutes the guarantee.

An attack is held against the ceiling for what it saw: where it used one round alone, that of the releases up to this round, which broken
code beats even if an attack on the whole training could not. Each trial has the ceiling of its own round, and those whose ceiling is 1 are
left out, since nothing can exceed it: the ceilings decide that, whatever was measured. From each upload one record counts, its first:
records of one upload share its noise, and the audit needs independent trials; for the same reason no record counts in two rounds. Where an
attack used all rounds, one upload of each client counts. What is not audited is said, with the reason, and where guessing alone names
half of the records, that this is no test.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from defenses.audit import Measured, Verdict, audit
from experiments import candidates as candidate_sets
from experiments.conclude import in_order
from experiments.directory import SPEC, read_facts, read_trials
from experiments.held import hold
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
    among = {arm.name: candidate_sets.number(experiment, experiment.judged(arm)) for arm in experiment.arms}
    trials = in_order(experiment, read_trials(out))
    skewed = experiment.federation.partition == "dirichlet"
    rows, skipped = measured(trials, facts, one_round=experiment.threat.rounds == "one", candidates=among, skewed=skewed)
    return audit(rows), skipped


def measured(
    trials: Sequence[Trial], facts: Sequence[ArmFacts], *, one_round: bool, candidates: int | Mapping[str, int], skewed: bool = False
) -> tuple[list[Measured], list[str]]:
    """Count what each attack identified under each arm whose guarantee allows less than everything; say what is left out.

    Args:
        trials: of a run.
        facts: of its arms; each trial is held against the ceiling of its seed and round.
        one_round: whether an attack used one round alone, so that each attacked round is a trial of its own.
        candidates: N, of all arms or of each.
        skewed: whether clients hold classes of their own.
    """
    rows: list[Measured] = []
    skipped: list[str] = []
    for arm, attack in dict.fromkeys((trial.arm, trial.attack) for trial in trials):
        mine = [trial for trial in trials if (trial.arm, trial.attack) == (arm, attack)]
        of = [fact for fact in facts if fact.arm == arm]
        if not of:
            continue  # nothing of the arm is finished
        among = candidates if isinstance(candidates, int) else candidates[arm]
        one = hold(mine, of, one_round=one_round, candidates=among, skewed=skewed)
        if isinstance(one, Measured):
            rows.append(one)
        else:
            skipped.append(one)
    return rows, list(dict.fromkeys(skipped))
