"""Label owners: how many records of each class every client holds, from the sums that secure aggregation shows over many rounds.

The head's gradient tells how often each class occurs behind a sum (:mod:`attacks.update.labels`). Those counts do not drift with the
model, as updates do: where clients take the same records in each round, L_t = Σ_i P_ti·Y_i exactly, with P who took part and Y_i client
i's own counts, which are whole numbers ≥ 0. Where P determines Y, the sums say who owns which class.

Source: Lam et al., 2021, arXiv:2106.06089, section 4 (least squares by the participation matrix, there for updates and with P unknown);
    Suimon et al., 2025, arXiv:2508.04285, section 1 (what one client alone contributes to is revealed), for the rows of a class that one
    client of a non-IID federation owns.
Deviations: least squares is bounded below by 0 and ends in whole numbers, class by class with the largest remainders where a client's
    number of records is known from the rounds' totals. A client whom the rounds do not single out is not named.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import lsq_linear
from torch import Tensor

from attacks._cohorts import SOLVED, WHOLE, aggregates, participation
from attacks._isolated import unaided
from attacks._labels.counts import to_counts
from attacks._rounds import redraws
from attacks.update.labels import LabelRecovery, recovered_counts
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

NOBODY = -1


@register("attacks", "label_owners")
@dataclass(frozen=True)
class LabelOwners:
    """Labels alone, and which sender of a sum holds them, by the label counts of the sums of several rounds."""

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse single senders, one round, records that change from round to round, and cohorts that single out nobody."""
        if (reason := LabelRecovery().supports(view, knowledge)) is not None:
            return reason
        if len(view.upload.senders) < 2:
            return "the upload must be an aggregate of ≥ 2 senders, got one sender. Use label_recovery"
        if not knowledge.history:
            return "the history must hold other rounds, got none. Set threat.rounds = 'all' and record more rounds"
        if (reason := redraws(knowledge.training, knowledge.num_examples - len(view.upload.senders) + 1)) is not None:
            return reason
        matrix, clients = participation(aggregates(view, knowledge))
        if not {clients[place] for place in singled_out(matrix)} & view.upload.senders:
            return "the cohorts of the rounds must single out one of the senders, got none. Record more rounds with other cohorts"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Count the labels of each sum, solve for the clients' own, and hand them to the attacked sum's labels."""
        start = time.perf_counter()
        rounds = aggregates(view, knowledge)
        told = (
            knowledge.label_counts if knowledge.labels is None else torch.bincount(knowledge.labels, minlength=knowledge.schema.num_classes)
        )
        here = recovered_counts(view, knowledge) if told is None else told
        sums = torch.stack([here, *(recovered_counts(seen, unaided(seen, knowledge)) for seen in rounds[1:])]).double()
        matrix, clients = participation(rounds)
        totals = torch.tensor([float(seen.upload.num_examples) for seen in rounds], dtype=torch.float64)
        own = owned(matrix, sums, totals)
        pairs = [
            (label, clients[place])
            for place in singled_out(matrix)
            if clients[place] in view.upload.senders
            for label, count in enumerate(own[place].tolist())
            for _ in range(count)
        ]
        labels = torch.arange(len(here)).repeat_interleave(here.long()) if knowledge.labels is None else knowledge.labels
        return Reconstruction(None, labels, clients=named(labels.tolist(), pairs), seconds=time.perf_counter() - start, converged=True)


def singled_out(matrix: Float[Tensor, "rounds clients"]) -> list[int]:
    """The columns that some combination of the rounds leaves alone: e_i in the row space of P."""
    inside = torch.linalg.pinv(matrix) @ matrix
    return [
        place
        for place in range(matrix.shape[1])
        if float((inside[place] - torch.eye(matrix.shape[1]).double()[place]).abs().max()) < SOLVED
    ]


def owned(
    matrix: Float[Tensor, "rounds clients"], sums: Float[Tensor, "rounds classes"], totals: Float[Tensor, " rounds"]
) -> Int[Tensor, "clients classes"]:
    """Each client's counts: least squares ≥ 0, in whole numbers that sum to the client's records where the totals tell those."""
    each = [torch.tensor(lsq_linear(matrix.numpy(), column.numpy(), bounds=(0, torch.inf)).x) for column in sums.T]
    raw = torch.stack(each, 1)
    sizes = torch.linalg.pinv(matrix) @ totals
    return torch.stack(
        [
            to_counts(row, round(size)) if abs(size - round(size)) < WHOLE and round(size) >= 1 else row.round().long()
            for row, size in zip(raw, sizes.tolist(), strict=True)
        ]
    )


def named(labels: Sequence[int], pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """For each label a client who holds one of its class; nobody where none that was singled out is left."""
    left, found = list(pairs), list[int]()
    for label in labels:
        place = next((i for i, (held, _) in enumerate(left) if held == label), None)
        found.append(NOBODY if place is None else left.pop(place)[1])
    return tuple(found)
