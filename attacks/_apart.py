"""A sum over clients taken apart by the sums of other rounds, and each part attacked by itself.

:mod:`attacks.update.gradient_disaggregation` says where it comes from; ``strongest`` asks it, too, and is the attack on each part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._cohorts import mixed, separate
from attacks._gradient import unusable
from attacks._rest import in_order
from attacks._rounds import redraws
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation, Tensors, Update, Upload

WORST = 0.5
"""Expected relative error of a client's update beyond which it is not worth an attack."""


class Solver(Protocol):
    """An attack on one client's update."""

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None: ...

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction: ...


def inseparable(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason to refuse single senders, records that change from round to round, and rounds whose cohorts leave nobody alone."""
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


def part_by_part(view: Observation, knowledge: Knowledge, solver: Solver, *, rng: torch.Generator) -> Reconstruction:
    """Take the sum apart and attack every part; the records of the whole, in the order of the labels where those were told."""
    began = time.perf_counter()
    answers = [attacked(part, knowledge, solver, rng) for part in parts(view, knowledge)]
    images, labels = torch.cat([inputs for inputs, _, _ in answers]), torch.cat([found for _, found, _ in answers])
    told = knowledge.labels
    if told is None and knowledge.label_counts is not None:
        told = torch.arange(len(knowledge.label_counts)).repeat_interleave(knowledge.label_counts)
    order = list(range(len(labels))) if told is None else in_order(labels.tolist(), told.tolist())
    return Reconstruction(
        images[order],
        labels if told is None else told,
        certificate=("",) * len(labels),
        seconds=time.perf_counter() - began,
        converged=all(ended for _, _, ended in answers),
    )


def parts(view: Observation, knowledge: Knowledge) -> list[Observation]:
    """The attacked round as each client that can be told apart would have shown it, and then as the others together."""
    found, rounds = separate(view, knowledge)
    alone = [
        as_if(view, frozenset({item.client}), item.examples, *(mixed(item, rounds, buffers=which) for which in (False, True)))
        for item in found
        if item.error < WORST
    ]
    rest = without(view, alone)
    return [*alone, *([rest] if rest is not None else [])]


def as_if(view: Observation, senders: frozenset[int], examples: int, tensors: Tensors, buffers: Tensors) -> Observation:
    """The attacked round as if these senders alone had uploaded."""
    upload = Upload(senders, Update(view.upload.update.kind, tensors), buffers, examples)
    return replace(view, uploads=(upload,))


def without(view: Observation, alone: Sequence[Observation]) -> Observation | None:
    """The attacked sum without the parts; None where nobody is left."""
    whole = view.upload
    senders = whole.senders.difference(*(part.upload.senders for part in alone))
    examples = whole.num_examples - sum(part.upload.num_examples for part in alone)
    if not senders or examples < len(senders):
        return None

    def left(all_of: Tensors, each: Sequence[Tensors]) -> Tensors:
        known = {name: sum(p.upload.num_examples * own[name] for p, own in zip(alone, each, strict=True)) for name in all_of}
        return {name: (whole.num_examples * tensor - known[name]) / examples for name, tensor in all_of.items()}

    tensors = left(whole.update.tensors, [part.upload.update.tensors for part in alone])
    return as_if(view, senders, examples, tensors, left(whole.buffers, [part.upload.buffers for part in alone]))


def attacked(
    part: Observation, knowledge: Knowledge, solver: Solver, rng: torch.Generator
) -> tuple[Float[Tensor, "batch channel height width"], Tensor, bool]:
    """Pictures and labels of one part, gray where the solver does not take it, and whether more time would change nothing.

    What it proves of an estimate is no proof.
    """
    examples = part.upload.num_examples
    told = replace(knowledge, num_examples=examples, labels=None, label_counts=None, history=())
    if solver.supports(part, told) is not None:
        return torch.full((examples, *knowledge.schema.shape), 0.5), torch.zeros(examples, dtype=torch.long), True
    answer = solver(part, told, rng=rng)
    assert answer.inputs is not None
    return answer.inputs, answer.labels, answer.converged
