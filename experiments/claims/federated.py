"""What sums, rounds and metadata give away, compared record by record: measurements on real federations, by example specs.

A row of a summary by itself has a bar that its counterpart may keep as well. Here both are of the same victims, and the figure is the
difference, whose interval resamples whole federations where their uploads share records (:func:`experiments.groups.clusters`).

Long for one file: three measurements, which share how records are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

from experiments.claims.claim import MEASURES
from experiments.claims.runs import SECRET, ran
from experiments.groups import Scored, interval_of
from experiments.refusals import check
from experiments.result import Trial
from experiments.row_scores import dealt_owners
from experiments.spec import Experiment, load
from experiments.statistics import Interval
from experiments.trial import attack_victims
from experiments.under_attack import Victim, find_victims
from simulator import engine
from simulator.errors import SpecError
from simulator.transcript import read

Score = Literal["psnr_db", "labels_right"]

DIFFERENCE: Mapping[Score, str] = {"psnr_db": "difference_db", "labels_right": "labels_difference"}
"""What the paired difference of a score is called."""

OF: Mapping[Score, Callable[[Scored], float]] = {
    "psnr_db": lambda item: item.record.psnr_db,
    "labels_right": lambda item: float(bool(item.record.label_correct)),
}
"""A score of one record. Labels beyond their number cost nothing, which favours an attack that is not told the number."""

UNITS = {
    **{f"{name}_low": "the same, lower end of 95 %" for name in DIFFERENCE.values()},
    **{f"{name}_high": "the same, upper end of 95 %" for name in DIFFERENCE.values()},
    "other_psnr_db": "dB, mean over records, of the other",
    "other_labels_right": "share of labels right, of the other",
    "labels_difference": "share of labels right over the other's on the same records",
    "least_step_db": "dB, least that more rounds add to the mean",
    "owners_named": "share of records whose sender is named",
    "owners_right": "share of records whose sender is named rightly",
    "owners_wrong": "share of records whose sender is named wrongly",
    "owners_chance": "share of records that a random deal to the senders gets right",
    "over_chance": "owners_right over owners_chance",
    "over_chance_low": "the same, lower end of 95 %",
    "named_over_chance": "of the named records, share right over chance",
    "named_over_chance_low": "the same, lower end of 95 %",
    **{f"psnr_db_by_{count}": f"dB, mean over records, by {count} round{'s' * (count > 1)}" for count in (1, 2, 4, 8, 16)},
}
"""The figures of these measurements that those of :data:`experiments.claims.measures.UNITS` lack."""


def scored(spec: str, assignments: tuple[str, ...], arm: str, attack: str) -> list[Scored]:
    """Every record of one attack under one arm of an example spec, in the order of their victims.

    Raises:
        SpecError: the attack did not end well on each of them.
    """
    trials = [trial for trial in ran(spec, assignments, workers=1).trials if (trial.arm, trial.attack) == (arm, attack)]
    bad = [f"{trial.status}: {trial.reason}" for trial in trials if trial.status != "ok"]
    if bad or not trials:
        raise SpecError(f"{attack} must answer under {arm!r} of {spec}, got {bad[0] if bad else 'no trial'}. Change the setting.")
    return sorted((Scored(trial, record) for trial in trials for record in trial.records), key=lambda item: item.key)


@dataclass(frozen=True, kw_only=True)
class PairedMeasure:
    """One attack on federations of an example spec, less another, or the same under another threat model or arm, on the same records.

    Attributes:
        spec: name of the example.
        set: assignments of both, as for ``--set``.
        arm, attack: the one.
        other_set: assignments that the other has besides.
        other_arm, other_attack: the other, where it is not the same.
        score: of the records; PSNR in dB, or whether a label of its own was named.
    """

    kind: ClassVar[str] = "paired"

    spec: str
    attack: str
    arm: str = "none"
    set: tuple[str, ...] = ()
    other_set: tuple[str, ...] = ()
    other_arm: str = ""
    other_attack: str = ""
    score: Score = "psnr_db"

    def __post_init__(self) -> None:
        if not (self.other_set or self.other_arm or self.other_attack):
            raise ValueError("other_set, other_arm or other_attack must be given, got none. Say what is compared with what.")

    def names(self) -> Sequence[str]:
        """Both means, and the paired difference with its 95 % interval."""
        difference = DIFFERENCE[self.score]
        return [self.score, f"other_{self.score}", difference, f"{difference}_low", f"{difference}_high"]

    def __call__(self) -> Mapping[str, float]:
        """Run both and pair their records."""
        mine = scored(self.spec, self.set, self.arm, self.attack)
        theirs = scored(self.spec, (*self.set, *self.other_set), self.other_arm or self.arm, self.other_attack or self.attack)
        values, others = ([OF[self.score](item) for item in each] for each in (mine, theirs))
        apart = paired(values, others, mine, theirs)
        means = sum(values) / len(values), sum(others) / len(others)
        return dict(zip(self.names(), (*means, apart.mean, apart.low, apart.high), strict=True))


def paired(values: Sequence[float], others: Sequence[float], mine: Sequence[Scored], theirs: Sequence[Scored]) -> Interval:
    """The mean of one less the other, record by record, with its interval over what records of either tie together.

    Raises:
        SpecError: they are not of the same records.
    """
    if [item.key for item in mine] != [item.key for item in theirs]:
        raise SpecError(f"both must be of the same victims, got {len(mine)} and {len(theirs)} records. Compare what attacks the same ones.")
    return interval_of([value - other for value, other in zip(values, others, strict=True)], mine, theirs)


@dataclass(frozen=True, kw_only=True)
class OwnersMeasure:
    """Of the records behind the sums of an example spec, those whose sender an attack names, beside a random deal to the senders.

    Chance is what such a deal gets right of the same records by who knows each n_i; of labels, by who knows them, too. Over all records
    an attack that names few is below it, however sure it is: so the named ones are judged by themselves as well.

    Attributes:
        spec: name of the example.
        set: assignments, as for ``--set``.
        arm, attack: which of its uploads, and by whom.
    """

    kind: ClassVar[str] = "owners"

    spec: str
    attack: str
    arm: str
    set: tuple[str, ...] = ()

    def names(self) -> Sequence[str]:
        """Shares of all records, and how far those named rightly lie above chance: of all, and of the named ones."""
        return [
            "owners_named", "owners_right", "owners_wrong", "owners_chance",
            "over_chance", "over_chance_low", "named_over_chance", "named_over_chance_low",
        ]  # fmt: skip

    def __call__(self) -> Mapping[str, float]:
        """Run the spec and count."""
        found = scored(self.spec, self.set, self.arm, self.attack)
        if any(len(item.trial.senders) < 2 for item in found):
            raise SpecError(f"arm must be one of sums over ≥ 2 senders, got {self.arm!r} with uploads of one. Add secure_aggregation.")
        named = [item for item in found if item.record.attributed is not None]
        lucky = {id(item.trial): dealt_owners(item.trial) for item in found}

        def over(items: Sequence[Scored]) -> Interval:
            return interval_of([bool(item.record.attributed) - lucky[id(item.trial)] for item in items], items)

        everyone, chosen = over(found), over(named) if named else Interval(math.nan, math.nan, math.nan)
        right = sum(bool(item.record.attributed) for item in found)
        shares = [count / len(found) for count in (len(named), right, len(named) - right, sum(lucky[id(item.trial)] for item in found))]
        return dict(zip(self.names(), (*shares, everyone.mean, everyone.low, chosen.mean, chosen.low), strict=True))


@dataclass(frozen=True, kw_only=True)
class RoundsMeasure:
    """One attack on the sum of one round of an example spec, by a server that remembers it alone, one more round, and so on.

    Attributes:
        spec: name of the example.
        set: assignments, as for ``--set``; ``threat.rounds`` is ``all``.
        arm, attack: whose sums, and by whom.
        otherwise: the attack on a sum that the first one refuses, as where the rounds leave nobody alone.
        rounds: how many it remembers, ascending: those nearest to the attacked one.
    """

    kind: ClassVar[str] = "rounds"

    spec: str
    attack: str
    otherwise: str
    arm: str
    set: tuple[str, ...] = ()
    rounds: tuple[int, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        if len(self.rounds) < 2 or list(self.rounds) != sorted({*self.rounds}) or self.rounds[0] < 1:
            raise ValueError(f"rounds must be ≥ 2 ascending numbers ≥ 1, got {list(self.rounds)}. The default is [1, 2, 4, 8, 16].")

    def names(self) -> Sequence[str]:
        """The mean PSNR for each number of rounds, the least that a step adds, and what the most add to the fewest."""
        means = [f"psnr_db_by_{count}" for count in self.rounds]
        return [*means, "least_step_db", "difference_db", "difference_db_low", "difference_db_high"]

    def __call__(self) -> Mapping[str, float]:
        """Run each seed's federation once, and attack one round with ever more of the others."""
        found: dict[int, list[Scored]] = {count: [] for count in self.rounds}
        for seed in self.experiment.seeds:
            for count, trials in self.one_seed(seed).items():
                found[count] += [Scored(trial, record) for trial in trials for record in trial.records]
        values = [[item.record.psnr_db for item in found[count]] for count in self.rounds]
        means = [sum(each) / len(each) for each in values]
        apart = paired(values[-1], values[0], found[self.rounds[-1]], found[self.rounds[0]])
        least = min(after - before for before, after in pairwise(means))
        return dict(zip(self.names(), (*means, least, apart.mean, apart.low, apart.high), strict=True))

    @cached_property
    def experiment(self) -> Experiment:
        """The spec with the assignments.

        Raises:
            SpecError: it cannot run, attacks several rounds, or withholds the others.
        """
        given = load(self.spec, self.set)
        made = replace(given, secret=given.secret or SECRET)
        check(made)
        if len(made.evaluation.rounds) > 1 or made.threat.rounds != "all" or made.federation.rounds < self.rounds[-1]:
            raise SpecError(
                f"spec must attack one round with threat.rounds = 'all' of {self.rounds[-1]} rounds or more, got rounds "
                f"{list(made.evaluation.rounds)} with {made.threat.rounds!r} of {made.federation.rounds}. Set them."
            )
        return made

    def one_seed(self, seed: int) -> Mapping[int, Sequence[Trial]]:
        """The trials for each number of rounds: the same federation, upload and luck of the attack."""
        from clients.app import app as client_app
        from server.app import app as server_app

        experiment = self.experiment
        arms, attacks = {arm.name: arm for arm in experiment.arms}, {attack.name: attack for attack in experiment.rungs}
        if self.arm not in arms or not {self.attack, self.otherwise} <= attacks.keys():
            asked = f"{self.arm!r}, {self.attack!r} and {self.otherwise!r}"
            raise SpecError(f"arm, attack and otherwise must be ones of {self.spec}, got {asked}. Add them by `set`.")
        world = experiment.world(arms[self.arm], seed)
        with TemporaryDirectory() as scratch:
            engine.run(world, Path(scratch), server_app, client_app)
            victims = find_victims(experiment, world, read(Path(scratch)))
        found: dict[int, list[Trial]] = {}
        for count in self.rounds:
            for of in [remembering(of, count) for of in victims]:
                asked = attacks[self.attack if attacks[self.attack].supports(of.view, of.knowledge) is None else self.otherwise]
                found.setdefault(count, []).extend(attack_victims(asked, [of], experiment.evaluation, world, self.arm).trials)
            if bad := [trial for trial in found[count] if trial.status != "ok"]:
                raise SpecError(f"{bad[0].attack} must answer with {count} rounds, got: {bad[0].reason}. Change the setting.")
        return found


def remembering(of: Victim, rounds: int) -> Victim:
    """The victim of a server that kept so many rounds alone: the attacked one and those nearest to it."""
    nearest = sorted(of.knowledge.history, key=lambda seen: abs(seen.broadcast.round - of.round))[: rounds - 1]
    kept = tuple(sorted(nearest, key=lambda seen: seen.broadcast.round))
    return replace(of, knowledge=replace(of.knowledge, history=kept))


MEASURES.update({cls.kind: cls for cls in (PairedMeasure, OwnersMeasure, RoundsMeasure)})
