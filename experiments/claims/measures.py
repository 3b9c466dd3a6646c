"""What an attack reaches on victims without a federation: the measurement behind most claims.

Long for its one class, whose settings are what a claim's file may say.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attacks._layers import all_buffers
from experiments import controls
from experiments.claims.claim import MEASURES
from experiments.claims.own import own_victim
from experiments.claims.scores import Trial, summarize
from experiments.matching import pairwise_mse
from experiments.victims import Victim, trained, victim
from simulator import progress
from simulator.adversary import BatchedAttack
from simulator.config import Plugin
from simulator.dataset import Splits, split, take
from simulator.errors import SpecError
from simulator.network import network
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation, Tensors, Update
from simulator.world import Split

UNITS = {
    "psnr_db": "dB, mean over records",
    "psnr_db_min": "dB, worst record",
    "psnr_db_median": "dB, median record",
    "gain_db": "dB over the best floor of each record, mean",
    "gain_db_low": "dB over the best floor, lower end of 95 %",
    "mse_max": "squared error, worst record",
    "mse_median": "squared error, median record",
    "exact": "share of records with squared error < 1e-6",
    "exact_batches": "share of batches all of whose records are exact",
    "close": "share of records with squared error < 1e-4",
    "counts_exact": "share of batches with all label counts right",
    "labels_right": "share of labels right",
    "certified": "share of records with a certificate",
    "certified_wrong": "records certified but not exact",
    "cpu_seconds": "CPU s a victim, mean",
    "cpu_seconds_median": "CPU s a victim, median",
    "cpu_seconds_max": "CPU s a victim, most",
    "model_accuracy": "share of public records that the attacked model gets right, mean over seeds",
    "difference_db": "dB over the other attack on the same records, mean",
    "cpu_ratio": "CPU s of the attack over the other's",
    "own_db": "dB to the own truth over other victims', paired, mean",
    "own_db_low": "the same, lower end of 95 %",
    "own_db_high": "the same, upper end of 95 %",
}
"""The figures of an attack, and in which unit."""

AGAINST, ABOVE_FLOOR, OWN = ("difference_db", "cpu_ratio"), ("gain_db", "gain_db_low"), ("own_db", "own_db_low", "own_db_high")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Plain SGD on private records that are no victims, before the attacked round."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class AttackMeasure:
    """One attack on the uploads of many victims.

    Attributes:
        against: a second attack on the same victims, for the figures that compare two.
        batch: records of each client.
        clients: senders behind one upload.
        classes: how many classes a batch may have, drawn for each victim; 0 means as they come.
        victims: uploads for each seed.
        seeds: each draws victims and initial weights anew.
        training: the recipe; a client trains on its whole batch unless it says otherwise.
        labels: what the attacker is told of them.
        public_records: of the data set's own that the attacker holds.
        split: of the data set; private records are attacked.
        pretraining: none attacks the initial model.
        control: what is done to the upload before the attack sees it: a floor.
        floors: also score the guesses that need no update, for the figures of gain.
        one_by_one: attack each victim alone even where the attack takes many at once, so that seconds are those of one victim.
    """

    kind: ClassVar[str] = "attack"

    data: Annotated[Any, Plugin("data")]
    model: Annotated[Any, Plugin("models")]
    attack: Annotated[Any, Plugin("attacks")]
    against: Annotated[Any, Plugin("attacks")] = None
    batch: int = 1
    clients: int = 1
    classes: int = 0
    victims: int = 1
    seeds: tuple[int, ...] = (0,)
    training: LocalTraining = field(default_factory=lambda: LocalTraining(batch_size=0))
    labels: Literal["none", "counts", "exact"] = "none"
    public_records: int = 0
    split: Split = field(default_factory=lambda: Split(test=0.0, public=0.0))
    pretraining: Pretraining | None = None
    control: Literal["none", "zeroed", "shuffled", "foreign"] = "none"
    floors: bool = False
    one_by_one: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "clients", "victims"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}. The default is 1.")
        if not self.seeds:
            raise ValueError("seeds must hold at least one, got none. Rates need five or more.")

    def names(self) -> Sequence[str]:
        """The figures that this setting gives, and the mean PSNR of each seed."""
        absent = [*(AGAINST if self.against is None else ()), *(() if self.floors else ABOVE_FLOOR)]
        absent += [] if self.pretraining and self.split.public else ["model_accuracy"]
        absent += [] if self.controlled else OWN
        known = [name for name in UNITS if name not in absent]
        return [*known, *(f"psnr_db_{seed}" for seed in self.seeds)]

    @property
    def controlled(self) -> bool:
        """Whether the uploads say nothing, and there are victims enough to see that the answers know nothing of their own."""
        return self.control != "none" and len(self.seeds) == 1 and self.victims >= (4 if self.control == "foreign" else 3)

    def __call__(self) -> Mapping[str, float]:
        """Attack every victim of every seed and summarize."""
        found = [self.one_seed(seed) for seed in self.seeds]
        trials = [trial for trials, _ in found for trial in trials]
        figures = summarize(trials)
        for seed, (own, _) in zip(self.seeds, found, strict=True):
            figures[f"psnr_db_{seed}"] = float(torch.cat([trial.psnr_db for trial in own]).mean())
        if self.controlled:
            apart = own_victim(trials, foreign=self.control == "foreign")
            figures |= dict(zip(OWN, (apart.mean, apart.low, apart.high), strict=True))
        if "model_accuracy" in self.names():
            figures["model_accuracy"] = sum(self.accuracy(seed) for seed in self.seeds) / len(self.seeds)
        if self.against is not None:
            others = [other for _, others in found for other in others]
            mine, theirs = (torch.cat([trial.psnr_db for trial in each]) for each in (trials, others))
            figures["difference_db"] = float((mine - theirs).mean())
            figures["cpu_ratio"] = sum(t.seconds for t in trials) / sum(t.seconds for t in others)
        return figures

    def one_seed(self, seed: int) -> tuple[list[Trial], list[Trial]]:
        """The trials of the attack and of the one that it is compared with."""
        victims = self.build(seed)
        shown = [replace(v, view=self.tampered(v, victims, seed, i)) for i, v in enumerate(victims)]
        trials = [self.run(attack, shown, seed) for attack in (self.attack, self.against) if attack is not None]
        return trials[0], trials[1] if len(trials) > 1 else []

    def run(self, attack: Any, victims: Sequence[Victim], seed: int) -> list[Trial]:
        """Attack the victims, together where the attack can; its CPU seconds are then shared evenly.

        Raises:
            SpecError: the attack refuses a victim.
        """
        for of in victims:
            if (reason := attack.supports(of.view, of.knowledge)) is not None:
                raise SpecError(f"{attack.name} must support the victims of its claim, got: {reason}. Change the setting.")
        rngs = [stream(seed, "attack", attack.name, i) for i in range(len(victims))]
        groups = [[i] for i in range(len(victims))]
        if isinstance(attack, BatchedAttack) and not self.one_by_one:
            groups = [list(range(len(victims)))]
        trials = []
        for group in groups:
            started = time.process_time()
            if len(group) > 1:
                answers = attack.many(
                    [victims[i].view for i in group], [victims[i].knowledge for i in group], rngs=[rngs[i] for i in group]
                )
            else:
                answers = [attack(victims[group[0]].view, victims[group[0]].knowledge, rng=rngs[group[0]])]
            seconds = (time.process_time() - started) / len(group)
            trials += [
                Trial(victims[i].truth, answer, seconds, self.floor_db(victims[i], seed)) for i, answer in zip(group, answers, strict=True)
            ]
            progress.tick(f"seed {seed}", len(trials), len(victims))
        return trials

    def build(self, seed: int) -> list[Victim]:
        """The victims of a seed: disjoint batches of private records, unless their classes are chosen."""
        parts = self.parts(seed)
        public = take(parts.public, slice(self.public_records)) if self.public_records else None
        if len(parts.public) < self.public_records:
            raise SpecError(f"public_records must be ≤ the {len(parts.public)} public ones, got {self.public_records}. Raise split.public.")
        chosen = self.chosen(parts, seed)
        model = network(self.model, parts.schema, self.training, seed)
        free = torch.ones(len(parts.private), dtype=torch.bool).index_fill(0, torch.cat(chosen), False)
        state = self.state(model, parts, take(parts.private, free), seed)
        batches = [[take(parts.private, ids) for ids in torch.split(chosen[i], self.batch)] for i in range(self.victims)]
        return [
            victim(model, parts.schema, clients, self.training, seed=seed, state=state, labels=self.labels, public=public)
            for clients in batches
        ]

    def state(self, model: nn.Module, parts: Splits, others: Batch, seed: int) -> tuple[Tensors, Tensors] | None:
        """What is broadcast: the initial model, or one trained on records that are no victims."""
        return None if self.pretraining is None else trained(model, others, **vars(self.pretraining), seed=seed)

    def accuracy(self, seed: int) -> float:
        """Share of the public records that the attacked model gets right."""
        of, public = self.build(seed)[0], self.parts(seed).public
        state = {**all_buffers(of.knowledge.model, of.view.broadcast), **of.view.broadcast.parameters}
        with torch.no_grad():
            logits = functional_call(of.knowledge.model, state, (public.inputs,))
        return float((logits.argmax(1) == public.labels).double().mean())

    def parts(self, seed: int) -> Splits:
        """The data set as this seed divides it."""
        return split(self.data.load(), self.split, seed)

    def chosen(self, parts: Splits, seed: int) -> list[Tensor]:
        """The private records of each victim.

        Raises:
            SpecError: there are too few.
        """
        each, held = self.batch * self.clients, len(parts.private)
        if not self.classes:
            if each * self.victims > held:
                raise SpecError(f"victims × clients × batch must be ≤ the {held} private records, got {each * self.victims}. Lower one.")
            return list(torch.split(torch.arange(each * self.victims), each))
        rng, found = stream(seed, "classes"), []
        for _ in range(self.victims):
            classes = torch.randperm(parts.schema.num_classes, generator=rng)[: self.classes]
            pool = torch.isin(parts.private.labels, classes).nonzero().flatten()
            if len(pool) < each:
                raise SpecError(
                    f"clients × batch must be ≤ the {len(pool)} private records of {self.classes} classes, got {each}. Lower it."
                )
            found.append(pool[torch.randperm(len(pool), generator=rng)[:each]])
        return found

    def tampered(self, of: Victim, victims: Sequence[Victim], seed: int, number: int) -> Observation:
        """The upload as it is, or without its information: the attack must then do no better than its floor."""
        if self.control == "none":
            return of.view
        if self.control == "shuffled":
            return controls.shuffled(of.view, stream(seed, "shuffled", number))
        if self.control == "foreign":
            if len(victims) < 2:
                raise SpecError(f"victims must be ≥ 2 for control = 'foreign', got {len(victims)}. Add one.")
            return victims[(number + 1) % len(victims)].view
        upload = of.view.upload
        zeros = {name: torch.zeros_like(tensor) for name, tensor in upload.update.tensors.items()}
        return replace(of.view, uploads=(replace(upload, update=Update(upload.update.kind, zeros)),))

    def floor_db(self, of: Victim, seed: int) -> Tensor | None:
        """PSNR in dB of the best guess that needs no update, for each record; None unless it is wanted."""
        if not self.floors:
            return None
        records = self.data.load().records
        index = pairwise_mse(of.truth.inputs, records.inputs).argmin(1)
        floors = controls.floors(of.truth.inputs, records, index, rng=stream(seed, "floors"))
        return torch.tensor([controls.best_floor(floor)[1].psnr_db for floor in floors])


MEASURES[AttackMeasure.kind] = AttackMeasure
