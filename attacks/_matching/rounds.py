"""One guess against several rounds: the same records must explain every round's update at that round's model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._matching.objective import Candidates, Objective, Rows, Values
from attacks._matching.simulate import Victim

Combine = Literal["mean", "trimmed"]

TRIMMED = 0.25
"""Share of the rounds that a trimmed mean leaves out at either end."""


@dataclass(frozen=True)
class Recurring(Victim):
    """A victim that other rounds show again.

    Attributes:
        others: the same records' uploads in other rounds, each with the model of its round.
    """

    others: tuple[Victim, ...] = ()

    @property
    def kin(self) -> tuple[object, ...]:
        """As of any victim, and the number of rounds."""
        return *super().kin, len(self.others)


def recurring(victim: Victim, others: tuple[Victim, ...]) -> Recurring:
    """The victim with its other rounds."""
    return Recurring(**{item.name: getattr(victim, item.name) for item in fields(Victim)}, others=others)


def averaged(victim: Recurring) -> Recurring:
    """All rounds as one: their mean update at their mean model, where noise averages out and the model's drift does to first order."""
    rounds = (victim, *victim.others)
    parameters = {name: torch.stack([r.parameters[name] for r in rounds]).mean(0) for name in victim.parameters}
    return replace(victim, parameters=parameters, target=torch.stack([r.target for r in rounds]).mean(0), others=())


def trimmed_mean(slopes: Float[Tensor, "rows rounds freedom"]) -> Candidates:
    """The mean over rounds without the smallest and the largest of them, coordinate by coordinate."""
    rounds = slopes.shape[1]
    cut = min(int(TRIMMED * rounds), (rounds - 1) // 2)
    return slopes.sort(dim=1).values[:, cut : rounds - cut].mean(1)


@dataclass(frozen=True)
class Rounds:
    """The mean of one objective over the rounds of each victim, as a problem of :mod:`attacks._matching.optimize`.

    Attributes:
        first: the objective on the attacked rounds alone, all of whose victims are :class:`Recurring` with equally many others.
        at_once: rounds that one evaluation takes, in turn; 0 takes all.
        combine: how the rounds' slopes become one: their mean, or coordinate by coordinate a trimmed mean.
        turn: counts the rounds that were taken.
    """

    first: Objective
    at_once: int = 0
    combine: Combine = "mean"
    turn: Iterator[int] = field(default_factory=itertools.count)

    @property
    def restarts(self) -> int:
        """Rows of each victim."""
        return self.first.restarts

    @property
    def seconds(self) -> float:
        """CPU time for all rows together."""
        return self.first.seconds

    @property
    def settles(self) -> bool:
        """Whether weights move during the run."""
        return self.first.settles

    @property
    def rates(self) -> Float[Tensor, " freedom"] | None:
        """Factors on the step of Adam."""
        return self.first.rates

    @property
    def task(self) -> str:
        """What to call the work."""
        return self.first.task

    def project(self, z: Candidates) -> Candidates:
        """The nearest allowed rows."""
        return self.first.project(z)

    @cached_property
    def rounds(self) -> tuple[Objective, ...]:
        """One objective for each round, the attacked one first."""
        shown = [(victim, *(victim.others if isinstance(victim, Recurring) else ())) for victim in self.first.victims]
        return tuple(replace(self.first, victims=victims) for victims in zip(*shown, strict=True))

    def __call__(self, z: Candidates, rows: Rows, progress: float = 1.0) -> Values:
        """Evaluate rounds on the same rows."""
        count = len(self.rounds)
        chosen = range(count) if not 0 < self.at_once < count else [next(self.turn) % count for _ in range(self.at_once)]
        values = [self.rounds[place](z, rows, progress) for place in chosen]
        total, match, slopes = (torch.stack(column, dim=1) for column in zip(*values, strict=True))
        return Values(total.mean(1), match.mean(1), slopes.mean(1) if self.combine == "mean" else trimmed_mean(slopes))
