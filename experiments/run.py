"""Runs an experiment: every arm and seed is one task, done in a worker process of its own and written down when it ends.

A killed run loses at most the attack under way in each task: ``--resume`` reads what is there and does the rest. Nothing here changes
a number: each task runs on one thread, whoever runs it. Only an attack that its budget of CPU seconds stops depends on the machine.

What a kill may cut, and how it is mended, stands in :mod:`experiments.directory` and :mod:`experiments.parts`.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save_file

from clients.app import app as client_app
from experiments import candidates, cluster, estimate, isolated, ladder, parts
from experiments.directory import (
    FACTS,
    PICTURES,
    RESULTS,
    SPEC,
    TRANSCRIPTS,
    alone,
    claim,
    forget,
    note_how,
    read_facts,
    read_trials,
    secret_of,
)
from experiments.facts import gather, peak_bytes, reset_peak
from experiments.refusals import check
from experiments.result import ArmFacts, Trial
from experiments.spec import Experiment
from experiments.trial import Outcome, attack_victims
from experiments.under_attack import find_victims, foreseen
from experiments.workers import Notify, cores, each
from server.app import app as server_app
from simulator import config, engine
from simulator.errors import FedpeekError, SpecError, TranscriptError
from simulator.transcript import Record, read
from simulator.world import World


@dataclass(frozen=True)
class Task:
    """One arm under one seed: a federation, and every attack on it."""

    arm: str
    seed: int


@dataclass(frozen=True)
class Finished:
    """What a task produced, in so many seconds, those before a kill included; or, if it could not be carried out, the reason."""

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
    done: Callable[[Task, str, int], None] | None = None,
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
        done: hears of every task that ended, how long the others may take, in words, and how many have ended, those of before among them.

    Raises:
        SpecError: the experiment cannot run, or ``out`` holds something else.
    """
    check(experiment)
    if isinstance(workers, str) and experiment.driver == "simulation":
        raise SpecError("driver must not be 'simulation' with --workers ray, got both: each starts a Ray of its own. Use 'inprocess'.")
    if isinstance(workers, str):
        cluster.check(workers)
    out = out.resolve()
    experiment = replace(experiment, secret=experiment.secret or secret_of(out, resume))
    claim(out, tomli_w.dumps(config.dump(experiment)), resume)
    with alone(out):
        return _run_what_is_left(experiment, out, workers, notify=notify, done=done, begun=begun)


def _run_what_is_left(
    experiment: Experiment,
    out: Path,
    workers: int | str,
    *,
    notify: Notify | None,
    done: Callable[[Task, str, int], None] | None,
    begun: Callable[[str], None] | None,
) -> list[Finished]:
    before = _ended(experiment, out)
    tasks = [Task(arm.name, seed) for seed in experiment.seeds for arm in experiment.arms if Task(arm.name, seed) not in before]
    forget(out, {(task.arm, task.seed) for task in tasks})
    differs = note_how(out) if tasks else []
    at_once = cores() if isinstance(workers, str) else workers or cores()
    failures, waiting = [], [task.arm for task in tasks]
    spent = [(task.arm, seconds) for task, seconds in before.items() if seconds]
    if begun is not None and tasks:
        seconds = estimate.left(spent, waiting, at_once)
        left = f", about {estimate.span(seconds)} left" if seconds else ""
        ahead = f"{len(before)} federations are done{left}." if before else "How long is said when the first one has ended."
        begun(f"{estimate.plan(experiment).sentence()} {ahead}")
    if begun is not None and tasks and not experiment.attacks and (withheld := ladder.left_out(experiment.threat)):
        begun(withheld)
    if begun is not None and tasks and differs:
        begun(f"The run in {out} was begun by another state of fedpeek: {'; '.join(differs)}. Its rows will be of both.")
    job = partial(_job, config.dump(experiment), out)
    ended = cluster.each(tasks, job, workers, notify) if isinstance(workers, str) else each(tasks, job, workers or cores(), notify)
    for task, finished, death in ended:
        waiting.remove(task.arm)
        spent += [(task.arm, finished.seconds)] if finished is not None and finished.seconds else []
        if done is not None:
            seconds = estimate.left(spent, waiting, at_once)
            done(task, estimate.span(seconds) if seconds else "", len(before) + len(tasks) - len(waiting))
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
        record, spent, earlier = _federate(experiment, world, out / TRANSCRIPTS / slug, partial(parts.forget, out, slug))
        evaluation = replace(experiment.judged(arm), candidates=candidates.number(experiment, experiment.judged(arm)))
        victims = foreseen(find_victims(experiment, world, record, evaluation), task.seed)
        if not victims:
            return Finished(task, failure="attacked uploads must hold records, got empty Poisson samples only. Attack more rounds.")
        for attack in experiment.asked(arm):
            if (done_before := parts.load(out, slug, attack.name)) is None:
                began = time.perf_counter()
                outcome = attack_victims(attack, victims, evaluation, world, arm.name)
                _save_pictures(outcome, out / PICTURES / f"{slug}-{attack.name}.safetensors")
                took = time.perf_counter() - began
                parts.save(out, slug, attack.name, outcome.trials, seconds=took)  # last: an attack without it is run again
                trials += outcome.trials
                continue
            found, took = done_before
            trials += found
            earlier += took
        facts = gather(
            world, record, out / TRANSCRIPTS / slug, victims, arm=task.arm, candidates=evaluation.candidates,
            delta=evaluation.delta, train_seconds=spent["seconds"], peak_bytes=spent.get("peak_bytes"),
        )  # fmt: skip
        seconds = time.perf_counter() - started + earlier
        return Finished(task, tuple(trials), replace(facts, seconds=seconds), seconds=seconds)
    except FedpeekError as error:
        return Finished(task, failure=str(error))
    except Exception as error:  # one task must not take the others with it, however many workers there are
        logging.getLogger("fedpeek").exception("%s, seed %d", task.arm, task.seed)
        return Finished(task, failure=f"{type(error).__name__}: {error}")


def _ended(experiment: Experiment, out: Path) -> dict[Task, float]:
    """The tasks that have ended, with the seconds that they took; one of which an attack failed is opened again."""
    trials, ended = read_trials(out), {}
    for known in read_facts(out):
        task = Task(known.arm, known.seed)
        own = [trial for trial in trials if (trial.arm, trial.seed) == (task.arm, task.seed)]
        if parts.failed(own):
            parts.reopen(out, _slug(experiment, task), own)
            continue
        ended[task] = known.seconds or 0.0
    return ended


def _slug(experiment: Experiment, task: Task) -> str:
    return f"{next(arm.slug for arm in experiment.arms if arm.name == task.arm)}-seed{task.seed}"


def _job(spec: Mapping[str, Any], out: Path, task: Task) -> Finished:
    """:func:`run_task` for a worker, which rebuilds the experiment: users' own classes need not be picklable."""
    if not (out / SPEC).is_file():
        return Finished(task, failure=f"--out must be a directory that every machine sees, got no {out / SPEC} there. Use a shared one.")
    return run_task(config.build(Experiment, spec), task, out)


def _federate(experiment: Experiment, world: World, directory: Path, anew: Callable[[], None]) -> tuple[Record, dict[str, float], float]:
    """The transcript of the world's federation, the one on disk if it is whole, else a new one; and seconds and memory that it took.

    Last, the seconds that were spent on it before this call. ``anew`` is called before a new one: nothing that was found on another
    transcript counts any more.
    """
    timing = directory.with_name(f"{directory.name}.seconds.json")  # with_suffix would cut a name at its last dot
    if directory.exists():
        try:
            spent = json.loads(timing.read_text())
            spent = spent if isinstance(spent, dict) else {"seconds": float(spent)}
            return read(directory), spent, spent["seconds"]
        except (TranscriptError, OSError, ValueError):
            shutil.rmtree(directory)  # cut short by a kill
    anew()
    held, started = reset_peak(), time.perf_counter()
    engine.run(world, directory, server_app, client_app, experiment.driver)
    spent = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes() - held}
    timing.write_text(json.dumps(spent))
    return read(directory), spent, 0.0


def _save_pictures(outcome: Outcome, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"private": outcome.private.contiguous(), "guess": outcome.guess.contiguous()}, path)


