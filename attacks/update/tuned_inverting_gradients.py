"""Inverting Gradients with its weight of total variation chosen by attacking public records on the victim's own pipeline first.

The right weight depends on the network, the batch and the defense: wrong by ten it costs more than most defenses take. A server can
rehearse: it knows the recipe and the defenses, and draws their randomness itself. No victim is looked at.

Source: Geiping et al., 2020, arXiv:2003.14053, for the attack; the rehearsal is this project's, its simulated clients are those of
    learning_to_invert.
Deviations: those of inverting_gradients. It can be expected to buy little where the defaults were tuned: photographs, no defense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attacks._learned.train import compression
from attacks._rehearsal import psnr_db, rehearsal
from attacks._settings import must_be_positive
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.learning_to_invert import kinds
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

FACTORS = (3.0, 1.0, 0.3, 0.1, 0.03)
"""On both ends of the weight of inverting_gradients."""


@register("attacks", "tuned_inverting_gradients")
@dataclass(frozen=True)
class TunedInvertingGradients:
    """Inverting Gradients after a rehearsal on public records, which chooses its weight of total variation.

    Attributes:
        steps: iterations, in the rehearsal as on the victim: the best weight depends on them.
        rehearsals: uploads of public records that are attacked with each of five weights; all victims of one kind share them.
        seconds: CPU time for each victim, at most; the rehearsal may take as much again for each of its attacks.
        memory_mb: budget for uploads that are attacked at once.
    """

    steps: int = 1000
    rehearsals: int = 4
    seconds: float = 600.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        must_be_positive(self)

    @property
    def attack(self) -> InvertingGradients:
        """The attack with its default weight."""
        return InvertingGradients(steps=self.steps, seconds=self.seconds, memory_mb=self.memory_mb)

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse without public records, with BatchNorm's statistics, which a rehearsal does not make, and what the attack refuses."""
        needed, held = self.rehearsals * knowledge.num_examples, 0 if knowledge.public is None else len(knowledge.public)
        if held < needed:
            return f"the adversary must hold at least {needed} public records to rehearse, got {held}. Set public_data = true"
        if view.upload.buffers:
            return "the upload must hold no buffers, got statistics of BatchNorm, which a rehearsal does not make. Use inverting_gradients"
        return self.attack.supports(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Attack one victim."""
        return self.many([view], [knowledge], rngs=[rng])[0]

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims; those of one kind share a rehearsal, whose randomness is its own."""
        found: dict[int, Reconstruction] = {}
        seen = [compression(view, known) for view, known in zip(views, knowledge, strict=True)]
        for members in kinds(views, knowledge, seen):
            tuned = self.tuned(views[members[0]], knowledge[members[0]])
            answers = tuned.many([views[i] for i in members], [knowledge[i] for i in members], rngs=[rngs[i] for i in members])
            found.update(zip(members, answers, strict=True))
        return [found[i] for i in range(len(views))]

    def tuned(self, view: Observation, knowledge: Knowledge) -> InvertingGradients:
        """The attack with the weight that served best in the rehearsal."""
        views, told, truth = rehearsal(view, knowledge, self.rehearsals)
        scores: dict[float, float] = {}
        for factor in FACTORS:
            rngs = [torch.Generator().manual_seed(number) for number in range(len(views))]
            answers = scaled(self.attack, factor).many(views, told, rngs=rngs)
            scores[factor] = sum(psnr_db(answer.inputs, batch) for answer, batch in zip(answers, truth, strict=True))
        return scaled(self.attack, max(FACTORS, key=lambda factor: scores[factor]))


def scaled(attack: InvertingGradients, factor: float) -> InvertingGradients:
    """The attack with both ends of its weight of total variation times ``factor``."""
    return replace(attack, tv=factor * attack.tv, tv_final=factor * attack.tv_final)
