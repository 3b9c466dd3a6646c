"""Attacks on uploads behind one defense, and on records that resemble each other: victims without a federation, like all of a claim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from experiments.claims.claim import MEASURES
from experiments.claims.measures import AttackMeasure
from experiments.victims import Victim
from simulator import config
from simulator.config import Plugin
from simulator.dataset import Splits
from simulator.defense import CLIENT_HOOKS, ClientContext, Defense, overrides
from simulator.rng import stream
from simulator.types import Batch


@dataclass(frozen=True, kw_only=True)
class DefendedMeasure(AttackMeasure):
    """As an attack on uploads, from a client that defends itself or whose records are hard to tell apart.

    Attributes:
        defense: of the client, by ``on_update`` alone; the attacker is told which, and its settings.
        near: standard deviation in pixels of what is added to every first record of two to give the second, which takes its label, too;
            0 leaves the records as they are.
    """

    kind: ClassVar[str] = "defended"

    defense: Annotated[Any, Plugin("defenses")] = None
    near: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.near >= 0 or (self.near and self.classes):
            raise ValueError(f"near must be ≥ 0, and 0 where classes are chosen, got {self.near} with {self.classes}. Leave one out.")
        if self.defense is None:
            return
        elsewhere = any(overrides(self.defense, hook) for hook in CLIENT_HOOKS if hook != "on_update") or self.defense.looks_again
        if not overrides(self.defense, "on_update") or elsewhere:
            raise ValueError(f"defense must act by on_update alone, got {self.defense.name}. Use a spec: measure.kind = 'spec'.")
        if self.clients > 1 or self.training.upload_dtype != "float32":
            raise ValueError(f"defense must be that of one client that uploads float32, got {self.clients} clients. Leave one out.")

    def parts(self, seed: int) -> Splits:
        """The data set, every second record in the likeness of the one before."""
        whole = super().parts(seed)
        return replace(whole, private=paired(whole.private, self.near, stream(seed, "near"))) if self.near else whole

    def build(self, seed: int) -> list[Victim]:
        """The victims, behind the defense."""
        victims = super().build(seed)
        return victims if self.defense is None else [defended(of, self.defense, seed, number) for number, of in enumerate(victims)]


def paired(records: Batch, near: float, rng: torch.Generator) -> Batch:
    """The records, each second one replaced by the first with noise of this standard deviation, within [0, 1]."""
    inputs, labels = records.inputs.clone(), records.labels.clone()
    firsts = inputs[: len(inputs) // 2 * 2 : 2]
    inputs[1::2] = (firsts + near * torch.randn(firsts.shape, generator=rng)).clamp(0, 1)
    labels[1::2] = labels[: len(labels) // 2 * 2 : 2]
    return Batch(inputs, labels)


def defended(of: Victim, defense: Defense, seed: int, number: int) -> Victim:
    """The victim behind a defense, of which the attacker is told all but its randomness."""
    upload = of.view.upload
    context = ClientContext(number, of.view.broadcast.round, upload.num_examples, stream(seed, "defense", number))
    view = replace(of.view, uploads=(replace(upload, update=defense.on_update(upload.update, context)),))
    return replace(of, view=view, knowledge=replace(of.knowledge, defenses=((defense.name, config.dump(defense)),)))


MEASURES[DefendedMeasure.kind] = DefendedMeasure
