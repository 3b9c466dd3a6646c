"""Gradient matching over several rounds: the same records must explain the client's update in each of them.

Rounds come in turn, one for each step of the optimizer: a step costs as much as on one round, and noise that is drawn anew in each
round averages out along the way. Where the model moved so little that a gradient changes less than known noise changes it, the rounds
are averaged before, which is the same at one round's cost.

Source: Geiping et al., 2020, arXiv:2003.14053 (the objective and the optimizer, as in inverting_gradients); the sum over rounds is our
    own. A coordinate-wise trimmed mean of the rounds' pixel gradients is an option.
Deviations: rounds in turn instead of all in each step, which at equal time are too few steps.
Measured: one of 8 rounds 13.0 dB, all 8 of them 16.0, under Gaussian noise of 0.01 (claims multi-round-one, multi-round-eight).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attacks._dropout import layers
from attacks._gradient import noise_level, norm
from attacks._matching.objective import Candidates, Objective
from attacks._matching.optimize import Run, adam
from attacks._matching.rounds import Combine, Recurring, Rounds, averaged, recurring
from attacks._matching.simulate import prepare
from attacks._matching.solve import solve
from attacks._rounds import of_round, redraws, same_sender
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.labels import count_posterior, recovered_counts, to_counts
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation


def votes(view: Observation, knowledge: Knowledge) -> Tensor:
    """What one round says of the label counts, as real numbers."""
    if knowledge.num_examples == 1:
        return recovered_counts(view, knowledge).double()
    return count_posterior(view, knowledge).mean.double()


def by_all_rounds(view: Observation, knowledge: Knowledge, others: Sequence[Observation]) -> Knowledge:
    """The knowledge with label counts on which the rounds agree, where it has neither labels nor counts."""
    if knowledge.labels is not None or knowledge.label_counts is not None:
        return knowledge
    counts = torch.stack([votes(seen, of_round(knowledge, seen)) for seen in (view, *others)]).mean(0)
    return replace(knowledge, label_counts=to_counts(counts, knowledge.num_examples))


@register("attacks", "multi_round_matching")
@dataclass(frozen=True)
class MultiRoundMatching(InvertingGradients):
    """Inverting Gradients over the rounds in which the client trained on the same records.

    Attributes:
        rounds: of the recorded ones, those nearest to the attacked round, itself among them.
        at_once: rounds in each step, taken in turn; a step costs as many times more. As many as ``rounds`` takes all.
        combine: how the rounds of one step become one pixel gradient: ``mean``, or coordinate by coordinate the ``trimmed`` mean
            without a quarter at either end.
        average: whether to match the rounds' mean update at their mean model, as one round: ``auto`` where known noise is larger than
            what the model's drift changes.
    """

    rounds: int = 8
    at_once: int = 1
    combine: Combine = "mean"
    average: Literal["auto", "always", "never"] = "auto"

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse what one round refuses, aggregates, dropout, and clients whose records no other round shows again."""
        if (reason := super().supports(view, knowledge)) is not None:
            return reason
        if (senders := len(view.upload.senders)) > 1:
            return f"the upload must be of one sender, got {senders}. Use gradient_disaggregation"
        if layers(knowledge.model):
            return "no unit must be dropped, got dropout, whose masks differ from round to round. Use inverting_gradients on one"
        if (reason := redraws(knowledge.training, knowledge.num_examples)) is not None:
            return reason
        if not same_sender(view, knowledge):
            return "the history must hold another round of the same sender, got none. Set threat.rounds = 'all' and record more rounds"
        return None

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once."""
        return solve(views, knowledge, rngs, setting=self.setting(), optimize=self.optimize, task=self.name, ready=self.ready)

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """Signed Adam on rounds in turn."""
        rounds = Rounds(objective, at_once=self.at_once, combine=self.combine)
        return adam(rounds, start, steps=self.steps, learning_rate=self.learning_rate, signed=True)

    def ready(self, view: Observation, knowledge: Knowledge) -> Recurring:
        """All rounds made ready for matching, with labels on which they agree."""
        others = same_sender(view, knowledge)[: self.rounds - 1]
        known = by_all_rounds(view, knowledge, others)
        found = recurring(prepare(view, known), tuple(prepare(seen, of_round(known, seen)) for seen in others))
        return averaged(found) if self.averages(view, knowledge, others) else found

    def averages(self, view: Observation, knowledge: Knowledge, others: Sequence[Observation]) -> bool:
        """Whether noise changes the update more than the model's drift to any of the rounds does.

        Two uploads differ by the drift and by two draws of noise, whose size is known.
        """
        if self.average != "auto" or not others:
            return self.average == "always"
        noise, here = noise_level(view, knowledge), view.upload.update.tensors
        if not noise:
            return False
        apart = [{name: seen.upload.update.tensors[name].float() - tensor.float() for name, tensor in here.items()} for seen in others]
        return max((norm(difference) / norm(here)) ** 2 for difference in apart) - 2 * noise**2 < noise**2
