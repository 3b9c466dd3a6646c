"""A timed sample of a run, for its estimate: two rounds, and one upload under each attack, of as many kinds of arms as a minute allows.

Arms are of one kind if they have the same defenses at whatever strength, and change the same of the world; they cost about the same. A
kind that was not reached costs as the ones do that change the same of the world, else as the mean. CPU seconds are counted,
which a busy machine does not stretch. Everything is written to a directory that is removed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from clients.app import app as client_app
from experiments import estimate, isolated
from experiments.arms import Arm
from experiments.facts import gather
from experiments.spec import Experiment
from experiments.stopwatch import LONGEST_SECONDS, Tell, attack_seconds
from experiments.trial import attack_victims
from experiments.under_attack import find_victims, foreseen
from experiments.workers import Notify
from server.app import app as server_app
from simulator import engine, lookup, progress
from simulator.errors import FedpeekError
from simulator.transcript import read

LIMIT_SECONDS = 45.0
"""No further arm is begun after this time."""

ROUNDS = 2
"""Of a sampled federation: the time between them is that of a round without the set-up."""

Kind = tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """Seconds of CPU, one thread each, under one arm: of the set-up, of a round, of each attack on one upload, and of what comes once."""

    setup: float
    round: float
    attacks: Mapping[str, float]
    rest: float


@dataclass(frozen=True)
class Timed:
    """What was sampled, out of how many kinds of arms, and in how many seconds.

    Attributes:
        seconds: of each federation with its attacks, one for every arm; seeds are alike.
        kinds: how many there are.
        sampled: how many of them were timed.
        took: seconds for that.
    """

    seconds: tuple[float, ...]
    kinds: int
    sampled: int
    took: float

    def sentence(self, seeds: int, workers: int) -> str:
        """The extrapolation in words."""
        federations = [seconds for seconds in self.seconds for _ in range(seeds)]
        wall = max(sum(federations) / max(1, min(workers, len(federations))), max(federations))
        many = f"{workers} worker{'' if workers == 1 else 's'}"
        return (
            f"About {estimate.span(wall)} on {many} with a core each: an extrapolation from one upload under each attack, on the model of "
            f"round 1, in {self.sampled} of {self.kinds} kinds of arms, timed in {estimate.span(self.took)}."
        )


def kind_of(arm: Arm) -> Kind:
    """What arms of similar cost share; the first part is the world that they change it to."""
    world = repr(sorted((place, repr(value)) for place, value in arm.changes.items() if place[1] != "learning_rate"))
    own = repr(sorted((name, repr(settings)) for name, settings in arm.attacks.items()))
    return (world + own, *(defense.name or type(defense).__name__ for defense in arm.defenses))


def in_turn(experiment: Experiment) -> list[Arm]:
    """One arm of each kind: first one of each world, those with most arms first, then a second one of each, and so on."""
    kinds: dict[Kind, list[Arm]] = {}
    for arm in experiment.arms:
        kinds.setdefault(kind_of(arm), []).append(arm)
    worlds: dict[str, list[Kind]] = {}
    for kind in sorted(kinds, key=lambda each: -len(kinds[each])):
        worlds.setdefault(kind[0], []).append(kind)
    heaviest = sorted(worlds.values(), key=lambda each: -sum(len(kinds[kind]) for kind in each))
    turns = max(map(len, heaviest))
    arms = [kinds[world[turn]][0] for turn in range(turns) for world in heaviest if turn < len(world)]
    return sorted(arms, key=lambda arm: arm is not experiment.control)


def sample(
    experiment: Experiment, notify: Notify | None = None, done: Callable[[Any], None] | None = None, *, limit: float = LIMIT_SECONDS
) -> Timed:
    """Time one arm after the other until the time is up, at least one.

    Raises:
        FedpeekError: none of them could be carried out.
    """
    started, found, problem = time.perf_counter(), dict[Kind, Sample](), ""
    arms = in_turn(experiment)
    for arm in arms:
        if found and time.perf_counter() - started > limit:
            break
        tell = partial(notify, arm.name) if notify else _nothing
        try:
            found[kind_of(arm)] = timed(experiment, arm, tell, until=started + limit)
        except FedpeekError as error:
            problem = f"arm {arm.name!r}: {error}"
        if done is not None:
            done(arm.name)
    if not found:
        raise FedpeekError(f"an arm must run before its time can be told, got none that did: {problem}")
    seconds = tuple(_whole(experiment, arm, _nearest(kind_of(arm), found)) for arm in experiment.arms)
    return Timed(seconds, kinds=len(arms), sampled=len(found), took=time.perf_counter() - started)


def timed(experiment: Experiment, arm: Arm, tell: Tell, *, until: float = math.inf) -> Sample:
    """Run the arm in miniature under the first seed, and time its parts; no attack is begun long after ``until``."""
    small = replace(arm, federation={**arm.federation, "rounds": ROUNDS}, evaluation={"rounds": [1], "victims": 1}, control="")
    federation = replace(experiment.federation, rounds=ROUNDS, record_rounds=())
    evaluation = replace(experiment.evaluation, rounds=(1,), victims=1, shuffled_control=False, shuffled_attacks=(), shuffled_victims=0)
    mini = replace(
        experiment, arms=(small,), layers=(), attacks=experiment.rungs, federation=federation, evaluation=evaluation,
        secret=experiment.secret or "estimate",
    )  # fmt: skip
    world, ticks, attacks = mini.world(small, experiment.seeds[0]), list[float](), dict[str, float]()
    ready = lookup.get("attacks", "random_guess")()
    with tempfile.TemporaryDirectory() as scratch:
        isolated.warm(mini.rungs)
        clock = time.process_time if experiment.driver == "inprocess" else time.perf_counter
        begun, directory = clock(), Path(scratch) / "transcript"
        with _heard(tell, ticks, clock):
            engine.run(world, directory, server_app, client_app, experiment.driver)
        whole = clock() - begun
        round = ticks[1] - ticks[0] if len(ticks) >= ROUNDS else whole / ROUNDS
        begun = time.process_time()
        record = read(directory)
        victims = foreseen(find_victims(mini, world, record, mini.judged(small))[:1], world.seed)
        rest = time.process_time() - begun
        if victims:  # the attacks' process is ready when it has answered
            attack_victims(ready, victims, mini.judged(small), world, "estimate")
        for attack in experiment.asked(arm) if victims else ():
            if time.perf_counter() > until + LONGEST_SECONDS:
                break
            attacks[attack.name], ended = attack_seconds(attack, victims, mini.judged(small), world, tell)
            if ended:
                attack_victims(ready, victims, mini.judged(small), world, "estimate")
        begun = time.process_time()
        if victims:
            gather(
                world, record, directory, victims, arm=arm.name, candidates=evaluation.candidates, delta=evaluation.delta,
                train_seconds=0.0, peak_bytes=None,
            )  # fmt: skip
        rest += time.process_time() - begun
    return Sample(max(0.0, whole - ROUNDS * round), round, attacks, rest)


@contextmanager
def _heard(tell: Tell, ticks: list[float], clock: Callable[[], float]) -> Iterator[None]:
    """Note when each round of a federation ended."""

    def listen(what: str, done: int, total: int, note: str) -> None:
        tell(what, done, total, note)
        if what == "rounds":
            ticks.append(clock())

    with progress.listening(listen):
        yield


def _nothing(*_: object) -> None:
    """Nobody listens."""


def _nearest(kind: Kind, found: Mapping[Kind, Sample]) -> Sample:
    """The sample of this kind, else the mean of those of its world, else the mean of all."""
    every = list(found.values())
    alike = [found[kind]] if kind in found else [sample for other, sample in found.items() if other[0] == kind[0]] or every
    attacks = {}
    for name in {name for sample in every for name in sample.attacks}:
        own = [sample.attacks[name] for sample in alike if name in sample.attacks]
        attacks[name] = fmean(own or [sample.attacks[name] for sample in every if name in sample.attacks])
    parts = ([getattr(sample, part) for sample in alike] for part in ("setup", "round", "rest"))
    setup, round, rest = map(fmean, parts)
    return Sample(setup, round, attacks, rest)


def _whole(experiment: Experiment, arm: Arm, sample: Sample) -> float:
    """Seconds of the arm's federation under one seed with all attacks on it."""
    uploads, evaluation = estimate.uploads(experiment, arm), experiment.judged(arm)
    runs = {attack.name: uploads + evaluation.shuffled(attack.name, uploads) for attack in experiment.rungs}
    attacking = sum(seconds * runs[name] for name, seconds in sample.attacks.items())
    return sample.setup + sample.round * experiment.federation_of(arm).rounds + sample.rest + attacking
