"""Learning to Invert: an inverter trained on public records that went through the client's own recipe and defenses.

Source: Wu et al., 2023, arXiv:2210.10880 (UAI), section 3: simulate pairs (update, records) from auxiliary data with the defense in
    place, and train an inverter on them; section 4: gradients under sign compression, pruning of 99 %, and noise of 0.1.
Deviations: the paper trains a perceptron of three layers of 3000 units; this is closed form and takes seconds. Ridge regression, which
    knows the covariance of the noise instead of drawing it, on pairs made for the labels at hand, then kernel regression of what that
    leaves. Gradients are not hashed but brought onto their principal directions: hashing d numbers into D multiplies the noise of each by
    √(d/D). Records of one label are told apart by their order along the first principal component, not
    by the Hungarian loss. Labels that are not disclosed are recovered, or learned where that is right more often on held-out records.
    What it was told of the defenses is simulated: clipping and noise of every kind, and the heuristics of ``attacks.modeled.LOSSY``,
    with randomness of its own; of a layer that Soteria touched nothing is used. Where no heuristic was told, pruning, signs and uniform
    grids are read off the update, and stochastic rounding is then simulated as rounding to nearest. Other defenses are ignored: it
    is trained without them, and where they change records (ATS, MixUp, InstaHide) it guesses at plain ones.
    The uploaded buffers (BatchNorm statistics) are not used. No polish by gradient matching.
Measured: 20 digits, lenet, labels recovered: claims learned-digits (no defense) and learned-noise beside learned-noise-matching
    (noise of 0.1). Behind noise, signs and pruning of 99 % it is at least 4 dB above matching at equal CPU seconds (``pytest --slow
    tests/attacks/test_learning_to_invert.py``). Which of the two serves a victim better ``strongest`` rehearses on public records,
    but where it takes the update for hidden: there it is asked alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from attacks._gradient import unusable
from attacks._learned.mechanisms import Compressed
from attacks._learned.pairs import spared
from attacks._learned.train import Inverter, Plan, Reader, compression, reader, train
from attacks._matching.objective import equal
from attacks._settings import must_be_positive
from attacks.update.labels import known_or_recovered
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

FEWEST = 32
"""Public records below which there is nothing to learn from."""

FLAT = 0.9
"""Where twice the pairs leave more than this share of the held-out error, more would add little."""

Seen = Mapping[str, Compressed]


@register("attacks", "learning_to_invert")
@dataclass(frozen=True)
class LearningToInvert:
    """An inverter learned from public records, for whatever defense the attacker can simulate.

    The answer is the conditional mean of the records given the update: blurred where the update says little, the mean image of the
    class where it says nothing, and never certified. Its objective is the mean squared error on held-out public records.

    Attributes:
        pairs: simulated uploads to learn from, for each kind of upload and set of labels; half of them from records of those labels.
        seconds: CPU time for each victim, about; those of one kind share theirs. Where it is short, fewer pairs are learned from.
        memory_mb: budget for the simulated updates.
    """

    pairs: int = 1024
    seconds: float = 30.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        must_be_positive(self)

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse without public records; any recipe, model and defense will do."""
        held = 0 if knowledge.public is None else len(knowledge.public)
        if held < FEWEST:
            return f"the adversary must hold at least {FEWEST} public records to learn an inverter from, got {held}. Set public_data = true"
        return unusable(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Attack one victim. What is learned has its own fixed randomness, so that victims attacked together get the same."""
        return self.many([view], [knowledge], rngs=[rng])[0]

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims; what is learned for one kind of upload serves all of that kind."""
        seen = [compression(view, known) for view, known in zip(views, knowledge, strict=True)]
        found: dict[int, Reconstruction] = {}
        for members in kinds(views, knowledge, seen):
            began, clock, plan = time.perf_counter(), time.process_time(), Plan(self.pairs, self.seconds * len(members), self.memory_mb)
            first, inverters = members[0], dict[tuple[int, ...], Inverter]()
            told = knowledge[first].labels is not None or knowledge[first].label_counts is not None
            read = None if told else reader(views[first], knowledge[first], seen[first], plan)
            labels_of = {i: told_labels(views[i], knowledge[i], read) for i in members}
            wanted = {i: tuple(labels.sort().values.tolist()) for i, labels in labels_of.items()}
            left = max(plan.seconds - (time.process_time() - clock), plan.seconds / 2)
            own = Plan(self.pairs, left / len(set(wanted.values())), self.memory_mb)
            for i, labels in labels_of.items():
                ascending = wanted[i]
                if ascending not in inverters:
                    inverters[ascending] = train(views[i], knowledge[i], torch.tensor(ascending), seen[i], own)
                found[i] = answered(views[i], knowledge[i], labels, inverters[ascending])
            share = (time.perf_counter() - began) / len(members)
            found |= {i: replace(found[i], seconds=share) for i in members}
        return [found[i] for i in range(len(views))]


def told_labels(view: Observation, knowledge: Knowledge, read: Reader | None) -> Int[Tensor, " batch"]:
    """The labels that were disclosed, else as they are read best."""
    if knowledge.labels is not None or knowledge.label_counts is not None or read is None:
        return known_or_recovered(view, knowledge)
    return read(view)


def answered(view: Observation, knowledge: Knowledge, labels: Int[Tensor, " batch"], inverter: Inverter) -> Reconstruction:
    """What the inverter makes of an upload, in the order of the labels."""
    images = inverter(view).view(-1, *knowledge.schema.shape)
    order, estimator = labels.argsort(stable=True), inverter.estimator
    (_, half), (_, whole) = estimator.curve[-2:]
    return Reconstruction(
        torch.empty_like(images).index_copy(0, order, images),
        labels,
        objective=estimator.error,
        trace=estimator.curve,
        certificate=("",) * len(labels),
        converged=inverter.whole and whole > FLAT * half,
    )


def kinds(views: Sequence[Observation], knowledge: Sequence[Knowledge], seen: Sequence[Seen]) -> list[list[int]]:
    """Indices of the victims of one kind: the same broadcast, recipe, numbers, defenses, compression and public records."""
    groups: dict[object, list[list[int]]] = {}
    for i, (view, known) in enumerate(zip(views, knowledge, strict=True)):
        upload = view.upload
        same = (id(known.model), id(known.public), known.training, known.num_examples, len(upload.senders), str(known.defenses))
        key = (*same, tuple(sorted(seen[i].items(), key=str)), known.labels is None, known.label_counts is None, spared(view, known))
        for group in (alike := groups.setdefault(key, [])):
            other = views[group[0]].broadcast
            if equal(view.broadcast.parameters, other.parameters) and equal(view.broadcast.buffers, other.buffers):
                group.append(i)
                break
        else:
            alike.append([i])
    return [group for alike in groups.values() for group in alike]
