"""Gradient disaggregation: what one client uploads, from the sums that secure aggregation shows over many rounds.

The sum of round t is Σ_i P_ti·G_i with P the participation of the clients and G_i their updates times their examples, nearly the same
in every round. Where the rounds' cohorts differ, a combination c of the sums with Pᵀc = e_i leaves client i alone. Each client so found
is attacked by itself, and what is left of the attacked sum as a smaller sum.

Source: Lam et al., 2021, arXiv:2106.06089 (the participation matrix is known or factorized, then least squares for the updates).
Deviations: P is known, since the protocol of secure aggregation shows the server who takes part: the binary factorization from
    participation counts is not needed. Least squares is generalized: a round's error is what the clients' gradients change from
    the attacked model to that round's, which is in proportion to the distance of the two models and alike along one direction. So
    the combination prefers rounds near the attacked one, and cancels drift that several rounds share (universal kriging). The
    examples of each client are solved from the rounds' totals by the same equations. No certificate: the update is an estimate.
    The error to expect is told by what constant updates leave of spare rounds: 16 rounds of 3 of 6 clients, one photograph each, convnet
    of width 16, server step 0.01: 4.8, 6.6 and 5.0 % expected, 4.4, 6.6 and 5.6 % real; 27.6 dB on average against 22.6 dB of strongest
    on the sum, in 12.9 and 11.4 CPU seconds (one federation). For an MLP on the same pictures updates are constant at steps of 3e-4 only
    (15 to 22 % expected, 20 to 29 % real); at 0.01 it refuses, with 67 % expected and 89 % real.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._cohorts import mixed, separate
from attacks._gradient import unusable
from attacks._rest import in_order
from attacks._rounds import redraws
from attacks._settings import must_be_positive
from attacks.strongest import Strongest
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation, Tensors, Update, Upload

WORST = 0.5
"""Expected relative error of a client's update beyond which it is not worth an attack."""


@register("attacks", "gradient_disaggregation")
@dataclass(frozen=True)
class GradientDisaggregation:
    """Takes a sum over clients apart by the sums of other rounds, then attacks each client alone with ``strongest``.

    Attributes:
        seconds: CPU seconds for each record.
    """

    seconds: float = 30.0

    def __post_init__(self) -> None:
        must_be_positive(self, "seconds")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse single senders, records that change from round to round, and rounds whose cohorts leave nobody alone."""
        if (reason := unusable(view, knowledge)) is not None:
            return reason
        if len(view.upload.senders) < 2:
            return "the upload must be an aggregate of ≥ 2 senders, got one sender. Use strongest"
        if not knowledge.history:
            return "the history must hold other rounds, got none. Set threat.rounds = 'all' and record more rounds"
        largest = knowledge.num_examples - len(view.upload.senders) + 1  # others hold one record at least
        if (reason := redraws(knowledge.training, largest)) is not None:
            return reason
        found, rounds = separate(view, knowledge)
        if not found:
            return (
                f"the cohorts of the rounds must leave one of the {len(view.upload.senders)} senders alone in some combination, "
                f"got none in {len(rounds)} rounds. Record more rounds with other cohorts"
            )
        if (best := min(item.error for item in found)) >= WORST:
            return f"the expected error of a client's update must be < {WORST:.0%}, got {best:.0%}: the model moved too far between rounds"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Take the sum apart and attack every part."""
        began = time.perf_counter()
        found, rounds = separate(view, knowledge)
        parts = [
            self.part(view, frozenset({item.client}), item.examples, *(mixed(item, rounds, buffers=which) for which in (False, True)))
            for item in found
            if item.error < WORST
        ]
        rest = self.rest(view, parts)
        answers = [self.attacked(view, knowledge, part, rng) for part in [*parts, *([rest] if rest is not None else [])]]
        images, labels = torch.cat([inputs for inputs, _ in answers]), torch.cat([found for _, found in answers])
        told = knowledge.labels
        if told is None and knowledge.label_counts is not None:
            told = torch.arange(len(knowledge.label_counts)).repeat_interleave(knowledge.label_counts)
        order = list(range(len(labels))) if told is None else in_order(labels.tolist(), told.tolist())
        return Reconstruction(
            images[order], labels if told is None else told, certificate=("",) * len(labels), seconds=time.perf_counter() - began
        )

    def part(self, view: Observation, senders: frozenset[int], examples: int, tensors: Tensors, buffers: Tensors) -> Observation:
        """The attacked round as if these senders alone had uploaded."""
        upload = Upload(senders, Update(view.upload.update.kind, tensors), buffers, examples)
        return replace(view, uploads=(upload,))

    def rest(self, view: Observation, parts: Sequence[Observation]) -> Observation | None:
        """The attacked sum without the parts; None where nobody is left."""
        whole = view.upload
        senders = whole.senders.difference(*(part.upload.senders for part in parts))
        examples = whole.num_examples - sum(part.upload.num_examples for part in parts)
        if not senders or examples < len(senders):
            return None

        def left(all_of: Tensors, each: Sequence[Tensors]) -> Tensors:
            known = {name: sum(p.upload.num_examples * own[name] for p, own in zip(parts, each, strict=True)) for name in all_of}
            return {name: (whole.num_examples * tensor - known[name]) / examples for name, tensor in all_of.items()}

        tensors = left(whole.update.tensors, [part.upload.update.tensors for part in parts])
        return self.part(view, senders, examples, tensors, left(whole.buffers, [part.upload.buffers for part in parts]))

    def attacked(
        self, view: Observation, knowledge: Knowledge, part: Observation, rng: torch.Generator
    ) -> tuple[Float[Tensor, "batch channel height width"], Tensor]:
        """Pictures and labels of one part; gray where no solver takes it."""
        examples = part.upload.num_examples
        told = replace(knowledge, num_examples=examples, labels=None, label_counts=None, history=())
        inner = Strongest(seconds=self.seconds)
        if inner.supports(part, told) is not None:
            return torch.full((examples, *knowledge.schema.shape), 0.5), torch.zeros(examples, dtype=torch.long)
        answer = inner(part, told, rng=rng)
        assert answer.inputs is not None
        return answer.inputs, answer.labels
