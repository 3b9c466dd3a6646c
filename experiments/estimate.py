"""How long a run will take: what there is to do, before it starts, and how much is left, from the tasks that have ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.arms import Arm
from experiments.report.values import count
from experiments.spec import Experiment


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    Attributes:
        arms, seeds: whose product is the number of federations.
        attacks: run on each of them.
        uploads: under attack by each attack, over all arms and seeds; fewer where a sample is empty.
        shuffled: reconstructions from shuffled updates beside those of the attacks.
        seconds: of CPU, after which budgets have stopped every attack; infinite where one has none.
    """

    arms: int
    seeds: int
    attacks: int
    uploads: int
    shuffled: int
    seconds: float

    def sentence(self) -> str:
        """The plan in words."""
        federations, runs = self.arms * self.seeds, self.uploads * self.attacks
        more = "as many" if self.shuffled == runs else str(self.shuffled)
        return (
            f"{count(self.arms, 'arm')} × {count(self.seeds, 'seed')} = {count(federations, 'federation')}; "
            f"{count(self.attacks, 'attack')} × {count(self.uploads, 'upload')} = {count(runs, 'reconstruction')}"
            f"{f', and {more} on shuffled updates' if self.shuffled else ''}."
        )

    def bound(self, workers: int) -> str:
        """What is certain of the time that the attacks take on so many workers, by their budgets alone."""
        if math.isinf(self.seconds):
            return "No bound is certain: an attack without a budget of seconds is among them."
        most = span(self.seconds / max(1, min(workers, self.arms * self.seeds)))
        return f"Certain is only that budgets stop the attacks on uploads of one record within {most} of CPU time on {workers} workers."


def plan(experiment: Experiment) -> Plan:
    """What this experiment has to do from its start."""
    counts, seeds = [(arm, uploads(experiment, arm)) for arm in experiment.arms], len(experiment.seeds)
    runs = [
        (float(getattr(attack, "seconds", math.inf)), count, experiment.judged(arm).shuffled(attack.name, count))
        for arm, count in counts
        for attack in experiment.asked(arm)
    ]
    return Plan(
        arms=len(counts), seeds=seeds, attacks=len(experiment.rungs), uploads=seeds * sum(count for _, count in counts),
        shuffled=seeds * sum(blind for _, _, blind in runs),
        seconds=seeds * sum(budget * (count + blind) for budget, count, blind in runs if count + blind),
    )  # fmt: skip


def uploads(experiment: Experiment, arm: Arm) -> int:
    """The uploads of one federation that are attacked."""
    evaluation, senders = experiment.judged(arm), experiment.federation_of(arm).cohort_size - experiment.threat.colluding
    count = 1 if any(defense.channel for defense in arm.defenses) else senders
    return min(evaluation.victims or count, count) * len(evaluation.rounds)


def left(spent: Sequence[tuple[str, float]], waiting: Sequence[str], workers: int) -> float | None:
    """Return the seconds that the tasks still need on so many workers; None before any has ended.

    Args:
        spent: arm and seconds of each task that has ended.
        waiting: the arm of each that has not; those under way count in full.
        workers: at work at a time.
    """
    if not spent:
        return None
    typical = sum(seconds for _, seconds in spent) / len(spent)
    by_arm = {arm: [seconds for other, seconds in spent if other == arm] for arm, _ in spent}
    needed = [sum(by_arm[arm]) / len(by_arm[arm]) if arm in by_arm else typical for arm in waiting]
    return max(sum(needed) / max(1, workers), max(needed, default=0.0))


def span(seconds: float) -> str:
    """A time to wait in the unit that a person would name: 40 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 95:
        return f"{max(1, round(seconds))} s"
    if seconds < 95 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
