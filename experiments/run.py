"""Runs an experiment: every arm and seed is one task, done in a worker process of its own and written down when it ends.

A killed run loses only the tasks under way: ``--resume`` reads what is there and does the rest. Nothing here changes a number:
each task runs on one thread, whoever runs it. Only an attack that its budget of CPU seconds stops depends on the machine.

Longer than our usual, so that what a kill may cut, and how it is mended, stands in one place.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
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
from clients.cost import seconds_of_a_round
from clients.private import splits
from defenses.channel.secure_aggregation import SecureAggregation
from experiments import cluster, isolated
from experiments.guarantee import guarantee_of
from experiments.result import ArmFacts, Trial
from experiments.spec import Experiment, check
from experiments.trial import Outcome, Victim, attack_victims, find_victims, foreseen
from experiments.utility import accuracy
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
    """What a task produced; or, if it could not be carried out, the reason."""

    task: Task
    trials: tuple[Trial, ...] = ()
    facts: ArmFacts | None = None
    failure: str = ""


def run(
    experiment: Experiment,
    out: Path,
    *,
    workers: int | str = 0,
    resume: bool = False,
    notify: Notify | None = None,
    done: Callable[[Task], None] | None = None,
) -> list[Finished]:
    """Run what is not done yet, appending to ``out``; return the tasks that failed.

    Args:
        experiment: checked first; nothing is written if it cannot run.
        out: a directory that does not exist or is empty, unless ``resume``.
        workers: processes; 0 means one for each core. A text is the address of a Ray cluster, "" that of one to be started here.
        resume: go on with the run in ``out``, which must have the same spec.
        notify: hears of progress, from every worker.
        done: hears of every task that ended.

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
    failures = []
    job = partial(_job, config.dump(experiment), out)
    ended = cluster.each(tasks, job, workers, notify) if isinstance(workers, str) else each(tasks, job, workers or cores(), notify)
    for task, finished, death in ended:
        if done is not None:
            done(task)
        if finished is None or finished.facts is None:
            failures.append(finished or Finished(task, failure=death))
            continue
        with (out / RESULTS).open("a", encoding="utf-8") as lines:
            lines.writelines(f"{trial.to_json()}\n" for trial in finished.trials)
        with (out / FACTS).open("a", encoding="utf-8") as lines:  # last: a task without this line is done again
            lines.write(f"{finished.facts.to_json()}\n")
    return failures


def run_task(experiment: Experiment, task: Task, out: Path) -> Finished:
    """Run one federation, then every attack on its transcript."""
    torch.set_num_threads(1)
    arm = next(arm for arm in experiment.arms if arm.name == task.arm)
    world, slug = experiment.world(arm, task.seed), f"{arm.slug}-seed{task.seed}"
    trials: list[Trial] = []
    try:
        isolated.warm(experiment.attacks)  # it gets ready while the federation trains
        record, seconds = _federate(experiment, world, out / TRANSCRIPTS / slug)
        victims = foreseen(find_victims(experiment, world, record), task.seed)
        for attack in experiment.attacks:
            outcome = attack_victims(attack, victims, experiment.evaluation, world, arm.name)
            trials += outcome.trials
            _save_pictures(outcome, out / PICTURES / f"{slug}-{attack.name}.safetensors")
        return Finished(task, tuple(trials), _facts(experiment, task, world, record, victims, seconds, out / TRANSCRIPTS / slug))
    except FedpeekError as error:
        return Finished(task, failure=str(error))
    except Exception as error:  # one task must not take the others with it, however many workers there are
        logging.getLogger("fedpeek").exception("%s, seed %d", task.arm, task.seed)
        return Finished(task, failure=f"{type(error).__name__}: {error}")


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


def _federate(experiment: Experiment, world: World, directory: Path) -> tuple[Record, float]:
    """The transcript of the world's federation: the one on disk if it is whole, else a new one."""
    timing = directory.with_name(f"{directory.name}.seconds.json")  # with_suffix would cut a name at its last dot
    if directory.exists():
        try:
            return read(directory), float(json.loads(timing.read_text()))
        except (TranscriptError, OSError, ValueError):
            shutil.rmtree(directory)  # cut short by a kill
    started = time.perf_counter()
    engine.run(world, directory, server_app, client_app, experiment.driver)
    seconds = time.perf_counter() - started
    timing.write_text(json.dumps(seconds))
    return read(directory), seconds


def _facts(
    experiment: Experiment, task: Task, world: World, record: Record, victims: Sequence[Victim], seconds: float, directory: Path
) -> ArmFacts:
    evaluation = experiment.evaluation
    records = len(world.data.load().records)
    guesses = max(len(victim.truth) for victim in victims)  # the truth assigns k guesses, so that chance is up to k/N
    candidates = max(1, min(evaluation.candidates or records, records) // guesses)
    guarantee, ceiling = guarantee_of(world, delta=evaluation.delta, candidates=candidates)
    assert record.released is not None
    return ArmFacts(
        arm=task.arm, seed=task.seed, accuracy=accuracy(world, splits(world), record.released),
        epsilon=guarantee.epsilon, delta=guarantee.delta, epsilon_for=guarantee.sentence, ceiling=ceiling,
        client_failures=tuple(f"round {round}: {reason}" for round, _, reason in record.lost),
        upload_bytes=float(record.end["upload_bytes"]), train_seconds=seconds,
        quantization_error=rounding_error(world, record), download_bytes=float(record.end["download_bytes"]),
        client_seconds=seconds_of_a_round(directory), server_seconds=float(record.end["server_seconds"]), peak_bytes=peak_bytes(),
    )  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process has used."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rounding_error(world: World, record: Record) -> float | None:
    """Expected rms rounding error of a coordinate of the aggregate, in the update's unit; None without a channel that rounds."""
    if not isinstance(world.channel, SecureAggregation):
        return None
    (upload,), bound = record.observations[0].uploads, world.channel.largest_upload(world)
    return world.channel.rounding_rms(
        cohort=world.federation.cohort_size, senders=len(upload.senders), num_examples=upload.num_examples, max_examples=bound
    )


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
