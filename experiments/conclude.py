"""From the results on disk to the answer: summary.json, the report, the table, and what the reader must be warned of."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from experiments import candidates
from experiments.arms import Arm
from experiments.directory import FACTS, HOW, SPEC, TRANSCRIPTS, mixed, read_facts, read_trials
from experiments.gallery import gallery
from experiments.marginals import marginals
from experiments.marginals import table as layers_table
from experiments.report import html
from experiments.report.table import table as terminal_table
from experiments.result import Trial
from experiments.spec import Experiment
from experiments.summary import summarize
from experiments.unmodeled import sentence, unmodeled
from simulator import config
from simulator.errors import FedpeekError, SpecError
from simulator.transcript import LINES

SUMMARY = "summary.json"
RATE = ("training", "learning_rate")


def conclude(out: Path) -> tuple[RenderableType, Path, list[str]]:
    """Write ``summary.json`` and ``report.html``; return the tables, the report's path, and warnings of lost clients or tasks.

    Raises:
        SpecError: ``out`` is not the directory of a run.
        FedpeekError: no task of the run has finished.
    """
    path = out / SPEC
    if not path.is_file():
        raise SpecError(f"directory must be that of a run, got {out} without {SPEC}. Give the --out of `fedpeek run`.")
    spec = path.read_text(encoding="utf-8")
    experiment = config.build(Experiment, tomllib.loads(spec))
    trials, facts = in_order(experiment, read_trials(out)), read_facts(out)
    if not facts:
        raise FedpeekError(f"run must have at least one finished task, got none in {out / FACTS}. Run it again with --resume.")
    how = json.loads((out / HOW).read_text(encoding="utf-8"))
    _require_whole(experiment, trials, {(fact.arm, fact.seed) for fact in facts})
    control = experiment.control
    absent = {arm.name: found for arm in experiment.arms if (found := unmodeled(names(arm)))}
    summary = summarize(
        trials, facts, candidates=candidates.number(experiment), control_arm=control.name if control else None,
        controls=experiment.controls, environment=how["environment"], version=version("fedpeek"), by_round=experiment.evaluation.by_round,
        stacks=stacks(experiment), colluding=experiment.threat.colluding > 0,
        one_round=experiment.threat.rounds == "one", skewed=experiment.federation.partition == "dirichlet",
        candidates_of={arm.name: candidates.number(experiment, experiment.judged(arm)) for arm in experiment.arms},
        not_modeled=absent,
    )  # fmt: skip
    if experiment.layers:
        summary["layers"] = marginals(experiment.layers, summary["rows"])
    (out / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    public_spec = "\n".join(line for line in spec.splitlines() if not line.startswith("secret = "))
    report = html.write(
        out, summary=summary, pictures=list(gallery(experiment, trials, out)), threat=threat(experiment), spec_toml=public_spec,
        provenance=provenance(experiment, how, spec, out),
    )  # fmt: skip
    hopeless = [row for row in summary["rows"] if not row["statuses"].get("ok")]
    failed = [f"{row['defense']}, {row['attack']}: no trial ended well; {first_reason(row)}" for row in hopeless]
    lost = [f"{fact.arm}, seed {fact.seed}: {failure}" for fact in facts for failure in fact.client_failures]
    planned = len(experiment.arms) * len(experiment.seeds)
    missing = [] if len(facts) == planned else [f"only {len(facts)} of {planned} arms × seeds are finished; go on with --resume"]
    shown: list[RenderableType] = [terminal_table(summary)]
    shown += [Text(f"{arm}: {sentence(found)}.", style="yellow") for arm, found in absent.items()]
    if experiment.layers:
        shown.append(layers_table(summary["layers"]))
    differs = [f"the run was resumed by another state of fedpeek, and its rows are of both: {'; '.join(mixed(how))}"] if mixed(how) else []
    return Group(*shown), report, missing + failed + lost + differs


def first_reason(row: Mapping[str, Any]) -> str:
    """Why the trials of a row are not ok: the first of the reasons that they gave."""
    reasons = row.get("reasons") or {}
    return str(next(iter(reasons), "see results.jsonl"))


def _require_whole(experiment: Experiment, trials: Sequence[Trial], finished: set[tuple[str, int]]) -> None:
    """Refuse results that lack the trials of a task which is marked as finished.

    Raises:
        FedpeekError: lines are missing from results.jsonl.
    """
    found = {(trial.arm, trial.seed, trial.attack) for trial in trials}
    lacking = sorted((arm, seed, a.name) for arm, seed in finished for a in experiment.rungs if (arm, seed, a.name) not in found)
    if lacking:
        raise FedpeekError(f"results.jsonl must hold trials of every finished task, got none of {lacking[0]}. Run it again elsewhere.")


def in_order(experiment: Experiment, trials: Sequence[Trial]) -> list[Trial]:
    """The trials in the spec's order of arms and attacks: workers finish in any."""
    arms = {arm.name: place for place, arm in enumerate(experiment.arms)}
    attacks = {attack.name: place for place, attack in enumerate(experiment.rungs)}
    return sorted(trials, key=lambda trial: (arms[trial.arm], attacks[trial.attack], trial.seed, trial.round, trial.senders))


def stacks(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """The names of each arm's defenses; what it changes of the world and its control does not counts as one.

    The number of senders is a strength of a channel and no defense of its own beside it, nor is the learning rate beside any: of a
    gradient it changes nothing.
    """
    arms = {arm.name: arm for arm in experiment.arms}
    return {name: _stack(arm, arms.get(experiment.controls.get(name, ""))) for name, arm in arms.items()}


def _stack(arm: Arm, control: Arm | None) -> tuple[str, ...]:
    alike = control.changes if control else {}
    own = [place for place, value in arm.changes.items() if alike.get(place) != value]
    changed = [(table, name) for table, name in own if not arm.defenses or not (table == "federation" or (table, name) == RATE)]
    tables = {table: [name for other, name in changed if other == table] for table, _ in changed}
    words = [f"{table}: {', '.join(names)}" for table, names in tables.items()]
    return (*names(arm), *words)


def names(arm: Arm) -> tuple[str, ...]:
    """The names of an arm's defenses."""
    return tuple(defense.name or type(defense).__name__ for defense in arm.defenses)


def threat(experiment: Experiment) -> dict[str, object]:
    """The threat model with what the world adds to it: the words of the report's card."""
    planted = {} if experiment.tampering.method == "none" else {"tampering": experiment.tampering.method}
    rounds, batch_size, dumped = list(experiment.evaluation.rounds), experiment.training.batch_size, config.dump(experiment.threat)
    used = {"rounds_it_may_use": "all that it recorded"} if dumped.pop("rounds") == "all" else {}
    dumped = {name: granted for name, granted in dumped.items() if granted or name not in ("colluding", "candidates")}
    return {**dumped, **planted, **used, "rounds": rounds, "batch_size": batch_size}


def provenance(experiment: Experiment, how: Mapping[str, Any], spec: str, out: Path) -> Mapping[str, str]:
    """What is needed to run it again, and to know that it is the same."""
    transcripts = sorted((out / TRANSCRIPTS).glob(f"*/{LINES}"))
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in transcripts)).hexdigest()
    return {
        "command": str(how["command"]),
        "started": str(how["started"]),
        "seeds": ", ".join(map(str, experiment.seeds)),
        "driver": experiment.driver,
        "CPU": str(how["environment"].get("cpu", "not noted")),
        "SHA-256 of the spec": hashlib.sha256(spec.encode()).hexdigest(),
        "SHA-256 of the transcripts": digest,
    }
