"""Which uploads are attacked, what the adversary is told of each, and what the evaluator alone may know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from attacks._gradient import noise_level, unusable
from attacks._intact import lossy
from attacks.identifiability import Identifiability, identify
from clients.private import private_record_ids, splits
from experiments.collude import colluders, reduced
from experiments.disclose import architecture, disclose
from experiments.metadata import withheld
from experiments.spec import Evaluation, Experiment
from simulator import progress
from simulator.adversary import Knowledge
from simulator.dataset import Splits, take
from simulator.rng import secret_stream, stream
from simulator.transcript import Record
from simulator.types import Batch, Observation
from simulator.world import World

EXACT_UP_TO = 1e-6
"""Norm of known noise, relative to the update's, up to which a record can be exact."""


@dataclass(frozen=True)
class Victim:
    """One upload under attack, and what the evaluator alone may know of it.

    Attributes:
        view, knowledge: what the attack gets.
        truth: the private records behind the upload, client by client.
        record_ids: their indices within all private records.
        clients: who holds each of them.
        predicted: records that identifiability says can be exact; None where it was not asked, see :func:`foreseen`.
    """

    view: Observation
    knowledge: Knowledge
    truth: Batch
    record_ids: Int[Tensor, " batch"]
    clients: tuple[int, ...]
    predicted: int | None = None

    @property
    def senders(self) -> tuple[int, ...]:
        """The clients behind the upload, ascending."""
        return tuple(sorted(self.view.upload.senders))

    @property
    def round(self) -> int:
        """The round of the upload."""
        return self.view.broadcast.round


def find_victims(experiment: Experiment, world: World, record: Record, evaluation: Evaluation | None = None) -> list[Victim]:
    """The uploads to attack: the first ``evaluation.victims`` of each attacked round, with the knowledge that is disclosed.

    Without ``evaluation``, that of the experiment counts, whatever an arm changes of it.
    """
    evaluation = evaluation or experiment.evaluation
    parts, found = splits(world), []
    model = architecture(world, parts)
    known = colluders(world, experiment.threat.colluding)
    shown = record.observations if experiment.threat.metadata else [withheld(seen, world) for seen in record.observations]
    rounds = {seen.broadcast.round: reduced(seen, world, model, known) if known else seen for seen in shown}
    for round in sorted(evaluation.rounds):
        observation = rounds[round]
        others = [seen for number, seen in rounds.items() if number != round]
        count = len(observation.uploads)
        for index in range(min(evaluation.victims or count, count)):
            view = observation.only(index)
            senders = sorted(view.upload.senders)
            ids = [private_record_ids(world, client, round) for client in senders]
            if not sum(map(len, ids)):
                continue  # an empty Poisson sample: there is nothing to reconstruct
            truth = take(parts.private, torch.cat(ids))
            clients = tuple(client for client, own in zip(senders, ids, strict=True) for _ in own)
            knowledge = disclose(experiment.threat, world, parts, truth, view.upload, model, others=others)
            victim = Victim(view, knowledge, truth, torch.cat(ids), clients)
            asked = evaluation.candidates
            found.append(with_candidates(victim, parts, asked, world) if experiment.threat.candidates else victim)
    return found


def foreseen(victims: Sequence[Victim], seed: int) -> list[Victim]:
    """The victims with what their updates can tell by :func:`attacks.identifiability.identify`, said before any attack.

    Under noise that known defenses added nothing is exact, and nothing is asked.
    """
    found = outlooks([(victim.view, victim.knowledge) for victim in victims], seed)
    for place, one in enumerate(found):
        if one is not None:
            note = f"{one.exact} of {one.records} records can be exact: {one.prediction}"
            progress.tick("identifiability", place + 1, len(victims), note)
    return [replace(victim, predicted=None if one is None else one.exact) for victim, one in zip(victims, found, strict=True)]


def outlooks(surfaces: Sequence[tuple[Observation, Knowledge]], seed: int) -> list[Identifiability | None]:
    """What each update can tell; None where it cannot be used, holds known noise, lacks what was left out, or is of changed records.

    Singular values, which take as long as a quick attack, are those of the broadcast model at likely images: the first upload of a round
    stands for all that have as many records.
    """
    found: list[Identifiability | None] = []
    known: dict[tuple[int, int], tuple[float, float]] = {}
    for view, knowledge in surfaces:
        if knowledge.encoded or lossy(view, knowledge) or unusable(view, knowledge) or noise_level(view, knowledge) > EXACT_UP_TO:
            found.append(None)
            continue
        key = (view.broadcast.round, knowledge.num_examples)
        one = identify(view, knowledge, rng=stream(seed, "identifiability"), range_of_values=known.get(key))
        if one.largest_singular_value > 0:  # an update of nothing says nothing of the others
            known[key] = (one.smallest_singular_value, one.largest_singular_value)
        found.append(one)
    return found


def candidate_set(victim: Victim, parts: Splits, wanted: int, seed: int) -> tuple[Batch, Int[Tensor, " batch"]]:
    """The N records among which the true ones must be found: them first, then distractors of the same data set.

    A distractor that the adversary's knowledge rules out is none, and would put identification above its chance k/N without any
    update: public records are left out where they were disclosed, and classes outside the batch where labels or counts were. (Among
    several classes of one batch, exact labels still say more than k/N.)
    """
    told = victim.knowledge
    pool = [parts.private, parts.test] if told.public is not None else parts.all
    records, labels = torch.cat([part.inputs for part in pool]), torch.cat([part.labels for part in pool])
    possible = torch.ones(len(records), dtype=torch.bool).index_fill(0, victim.record_ids, False)
    if told.labels is not None or told.label_counts is not None:
        possible &= torch.isin(labels, victim.truth.labels)
    others = possible.nonzero().flatten()
    rng = stream(seed, "candidates", victim.round, victim.senders)
    count = max(0, (wanted or len(records)) - len(victim.record_ids))
    drawn = others[torch.randperm(len(others), generator=rng)[:count]]
    chosen = torch.cat([victim.record_ids, drawn])
    return Batch(records[chosen], labels[chosen]), torch.arange(len(victim.record_ids))


def with_candidates(victim: Victim, parts: Splits, wanted: int, world: World) -> Victim:
    """The victim whose adversary is handed the candidates, in an order that says nothing."""
    candidates, _ = candidate_set(victim, parts, wanted, world.seed)
    rng = secret_stream(world.seed, world.secret, "order of candidates", victim.round, victim.senders)  # a seed could be guessed
    return replace(victim, knowledge=replace(victim.knowledge, candidates=take(candidates, torch.randperm(len(candidates), generator=rng))))
