"""Runs an experiment: every arm and seed is one task, done in a worker process of its own and written down when it ends.

A killed run loses at most the attack under way in each task: ``--resume`` reads what is there and does the rest. Nothing here changes
a number: each task runs on one thread, whoever runs it. Only an attack that its budget of CPU seconds stops depends on the machine.

Longer than our usual, so that what a kill may cut, and how it is mended, stands in one place.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save_file

from clients.app import app as client_app
from experiments import cluster, estimate, isolated, parts
from experiments.facts import gather, peak_bytes, reset_peak
from experiments.result import ArmFacts, Trial
from experiments.spec import Experiment, check
from experiments.trial import Outcome, attack_victims, find_victims, foreseen
from experiments.workers import Notify, cores, each
from server.app import app as server_app
from simulator import config, engine
from simulator.errors import FedpeekError, SpecError, TranscriptError
from simulator.transcript import Record, read
from simulator.world import World

SPEC, HOW, RESULTS, FACTS, TRANSCRIPTS, PICTURES = "spec.toml", "run.json", "results.jsonl", "facts.jsonl", "transcript", "reconstructions"
PACKAGES = ("flwr", "torch", "torchvision", "numpy", "cryptography", "dp-accounting")


@dataclass(frozen=True)
class Task:
    """One arm under one seed: a federation, and every attack on it."""

    arm: str
    seed: int


@dataclass(frozen=True)
class Finished:
    """What a task produced, in so many seconds; or, if it could not be carried out, the reason."""

    task: Task
    trials: tuple[Trial, ...] = ()
    facts: ArmFacts | None = None
    failure: str = ""
    seconds: float = 0.0


def run(
    experiment: Experiment,
    out: Path,
    *,
    workers: int | str = 0,
    resume: bool = False,
    notify: Notify | None = None,
    done: Callable[[Task, str], None] | None = None,
    begun: Callable[[str], None] | None = None,
) -> list[Finished]:
    """Run what is not done yet, appending to ``out``; return the tasks that failed.

    Args:
        experiment: checked first; nothing is written if it cannot run.
        out: a directory that does not exist or is empty, unless ``resume``.
        workers: processes; 0 means one for each core. A text is the address of a Ray cluster, "" that of one to be started here.
        resume: go on with the run in ``out``, which must have the same spec.
        notify: hears of progress, from every worker.
        begun: hears what there is to do, in words.
        done: hears of every task that ended, and how long the others may take, in words.

    Raises:
        SpecError: the experiment cannot run, or ``out`` holds something else.
    """
    check(experiment)
    if isinstance(workers, str) and experiment.driver == "simulation":
        raise SpecError("driver must not be 'simulation' with --workers ray, got both: each starts a Ray of its own. Use 'inprocess'.")
    if isinstance(workers, str):
        cluster.check(workers)
    out = out.resolve()
    experiment = replace(experiment, secret=experiment.secret or _secret_of(out, resume))
    _claim(out, tomli_w.dumps(config.dump(experiment)), resume)
    _note_how(out)
    finished_before = {(facts.arm, facts.seed) for facts in read_facts(out)}
    tasks = [Task(arm.name, seed) for seed in experiment.seeds for arm in experiment.arms if (arm.name, seed) not in finished_before]
    _forget_halves(out, tasks)
    at_once = cores() if isinstance(workers, str) else workers or cores()
    if begun is not None and tasks:
        before = f" {len(finished_before)} federations are done." if finished_before else ""
        begun(estimate.plan(experiment).sentence(at_once) + before)
    failures, spent, waiting = [], [], [task.arm for task in tasks]
    job = partial(_job, config.dump(experiment), out)
    ended = cluster.each(tasks, job, workers, notify) if isinstance(workers, str) else each(tasks, job, workers or cores(), notify)
    for task, finished, death in ended:
        waiting.remove(task.arm)
        spent += [(task.arm, finished.seconds)] if finished is not None and finished.seconds else []
        if done is not None:
            seconds = estimate.left(spent, waiting, at_once)
            done(task, estimate.span(seconds) if seconds else "")
        if finished is None or finished.facts is None:
            failures.append(finished or Finished(task, failure=death))
            continue
        with (out / RESULTS).open("a", encoding="utf-8") as lines:
            lines.writelines(f"{trial.to_json()}\n" for trial in finished.trials)
        with (out / FACTS).open("a", encoding="utf-8") as lines:  # last: a task without this line is done again
            lines.write(f"{finished.facts.to_json()}\n")
        parts.forget(out, _slug(experiment, task))
    parts.sweep(out)
    return failures


def run_task(experiment: Experiment, task: Task, out: Path) -> Finished:
    """Run one federation, then every attack on its transcript."""
    torch.set_num_threads(1)
    arm = next(arm for arm in experiment.arms if arm.name == task.arm)
    world, slug = experiment.world(arm, task.seed), _slug(experiment, task)
    trials: list[Trial] = []
    started = time.perf_counter()
    try:
        isolated.warm(experiment.rungs)  # it gets ready while the federation trains
        record, spent = _federate(experiment, world, out / TRANSCRIPTS / slug, partial(parts.forget, out, slug))
        victims = foreseen(find_victims(experiment, world, record), task.seed)
        if not victims:
            return Finished(task, failure="attacked uploads must hold records, got empty Poisson samples only. Attack more rounds.")
        for attack in experiment.rungs:
            if (done_before := parts.load(out, slug, attack.name)) is None:
                outcome = attack_victims(attack, victims, experiment.evaluation, world, arm.name)
                _save_pictures(outcome, out / PICTURES / f"{slug}-{attack.name}.safetensors")
                parts.save(out, slug, attack.name, outcome.trials)  # last: an attack without it is run again
            trials += outcome.trials if done_before is None else done_before
        facts = gather(
            world, record, out / TRANSCRIPTS / slug, victims, arm=task.arm, candidates=experiment.evaluation.candidates,
            delta=experiment.evaluation.delta, train_seconds=spent["seconds"], peak_bytes=spent.get("peak_bytes"),
        )  # fmt: skip
        return Finished(task, tuple(trials), facts, seconds=time.perf_counter() - started)
    except FedpeekError as error:
        return Finished(task, failure=str(error))
    except Exception as error:  # one task must not take the others with it, however many workers there are
        logging.getLogger("fedpeek").exception("%s, seed %d", task.arm, task.seed)
        return Finished(task, failure=f"{type(error).__name__}: {error}")


def _slug(experiment: Experiment, task: Task) -> str:
    return f"{next(arm.slug for arm in experiment.arms if arm.name == task.arm)}-seed{task.seed}"


def _job(spec: Mapping[str, Any], out: Path, task: Task) -> Finished:
    """:func:`run_task` for a worker, which rebuilds the experiment: users' own classes need not be picklable."""
    if not (out / SPEC).is_file():
        return Finished(task, failure=f"--out must be a directory that every machine sees, got no {out / SPEC} there. Use a shared one.")
    return run_task(config.build(Experiment, spec), task, out)


def read_trials(out: Path) -> list[Trial]:
    """The trials in ``out``, those of unfinished tasks left out."""
    done = {(facts.arm, facts.seed) for facts in read_facts(out)}
    trials = [Trial.from_json(line) for line in _lines(out / RESULTS)]
    return [trial for trial in trials if (trial.arm, trial.seed) in done]


def read_facts(out: Path) -> list[ArmFacts]:
    """What each finished arm and seed claimed and cost."""
    return [ArmFacts.from_json(line) for line in _lines(out / FACTS)]


def _federate(experiment: Experiment, world: World, directory: Path, anew: Callable[[], None]) -> tuple[Record, dict[str, float]]:
    """The transcript of the world's federation, the one on disk if it is whole, else a new one; and seconds and memory that it took.

    ``anew`` is called before a new one: nothing that was found on another transcript counts any more.
    """
    timing = directory.with_name(f"{directory.name}.seconds.json")  # with_suffix would cut a name at its last dot
    if directory.exists():
        try:
            spent = json.loads(timing.read_text())
            return read(directory), spent if isinstance(spent, dict) else {"seconds": float(spent)}
        except (TranscriptError, OSError, ValueError):
            shutil.rmtree(directory)  # cut short by a kill
    anew()
    reset_peak()
    started = time.perf_counter()
    engine.run(world, directory, server_app, client_app, experiment.driver)
    spent = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
    timing.write_text(json.dumps(spent))
    return read(directory), spent


def _save_pictures(outcome: Outcome, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"private": outcome.private.contiguous(), "guess": outcome.guess.contiguous()}, path)


def _secret_of(out: Path, resume: bool) -> str:
    """The secret of the run that is resumed, else a fresh one of 128 bits."""
    if resume and (out / SPEC).is_file():
        return str(tomllib.loads((out / SPEC).read_text(encoding="utf-8")).get("secret", ""))
    return secrets.token_hex(16)


def _note_how(out: Path) -> None:
    """Write down how the run was started, when, and with which versions: a report made later must not say its own."""
    if not (out / HOW).exists():
        facts = {"command": shlex.join(["fedpeek", *sys.argv[1:]]), "started": datetime.now(UTC).isoformat(timespec="seconds")}
        (out / HOW).write_text(json.dumps({**facts, "environment": environment()}, indent=2) + "\n", encoding="utf-8")


def environment() -> dict[str, str]:
    """The versions that may change a number."""
    return {"python": platform.python_version(), "platform": platform.platform(), **{name: version(name) for name in PACKAGES}}


def _claim(out: Path, spec: str, resume: bool) -> None:
    existing = out / SPEC
    if resume:
        if not existing.is_file():
            raise SpecError(f"--resume must name a run, got {out} without {SPEC}. Leave out --resume to start one there.")
        if existing.read_text(encoding="utf-8") != spec:
            raise SpecError(
                f"--resume must go on with the same spec, got another than {existing}. Give the same options, or another --out."
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"--out must be empty or new, got {out}. Add --resume to go on with it, or choose another directory.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        existing.write_text(spec, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--out must be a directory that can be written, got {out} ({error}). Choose another.") from error


def _forget_halves(out: Path, tasks: Sequence[Task]) -> None:
    """Drop the trials of tasks that were cut off between writing their trials and their facts."""
    pending = {(task.arm, task.seed) for task in tasks}
    kept = [line for line in _lines(out / RESULTS) if (json.loads(line)["arm"], json.loads(line)["seed"]) not in pending]
    for name, lines in ((RESULTS, kept), (FACTS, _lines(out / FACTS))):
        body = "".join(f"{line}\n" for line in lines)
        if (out / name).is_file() and (out / name).read_text(encoding="utf-8") != body:
            (out / f"{name}.new").write_text(body, encoding="utf-8")
            os.replace(out / f"{name}.new", out / name)  # a kill leaves the old file or the new one


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a last one without its end was cut off by a kill."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line.rstrip("\n") for line in lines if line.endswith("\n") and line.strip()]
