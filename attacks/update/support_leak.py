"""Support leakage: what a single sender of a sum touches is there as if no one else had sent, and other rounds tell who that was.

Secure aggregation hides who added what only where at least two did. A neuron of a first linear layer that one record alone activates
holds that record, whatever the number of senders (:mod:`attacks.update.linear_leak`). Each record so proven is taken out of the sum, and
the rest looked at again. It is then looked for in the sums of the other rounds, whose models let other neurons fire for one record only:
what is proven in one round is looked for in all. A sender who took part wherever a record is, and in no round where it is not, is whose
it is.

Source: Suimon et al., 2025, arXiv:2508.04285, section 1 (a value to which one client contributes is revealed by the sum); Boenisch et al.,
    2021, arXiv:2112.02918, section 4 (neurons activated by one record). The search through rounds is this project's.
Deviations: the paper's leak is of whole coordinates of sparse updates; here of ReLU neurons, and proven for each record. A record of
    another round is in this one if it lowers the rank of the gradient here, too, at exactly its weight (:mod:`attacks._isolated`): no
    assumption on how far the model moved. It says nothing where as many records as neurons or pixels are behind the sum, and under
    rounding to coarse words.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._cohorts import aggregates
from attacks._isolated import Sum, as_sum, owner, unaided
from attacks._rest import farthest, in_order, separable, without
from attacks._solving import TWIN
from attacks.update.linear_leak import LinearLeak
from simulator.adversary import Knowledge, Reconstruction
from simulator.progress import tick
from simulator.registry import register
from simulator.types import Batch, Observation


@dataclass(frozen=True)
class Leaked:
    """One record with a proof: the round that gave it, and in which sums it is."""

    record: Batch
    certificate: str
    presence: tuple[bool | None, ...]


@register("attacks", "support_leak")
@dataclass(frozen=True)
class SupportLeak:
    """Records that one neuron shows alone, in any round of secure aggregation, and which sender they are of.

    Attributes:
        tolerance: largest relative difference between two quotients of the same record.
        seconds: CPU time for all rounds' sums together.
    """

    tolerance: float = 1e-4
    seconds: float = 60.0

    def __post_init__(self) -> None:
        LinearLeak(self.tolerance, self.seconds)

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse single senders, and what linear_leak refuses."""
        if (reason := LinearLeak(self.tolerance).supports(view, knowledge)) is not None:
            return reason
        if len(view.upload.senders) < 2:
            return "the upload must be an aggregate of ≥ 2 senders, got one sender. Use linear_leak"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Look through all sums, and answer for the attacked one: first what is proven to be in it."""
        start, deadline = time.perf_counter(), time.process_time() + self.seconds
        rounds = [(view, knowledge), *((seen, unaided(seen, knowledge)) for seen in aggregates(view, knowledge)[1:])]
        sums = list[Sum]()
        for seen, known in rounds:
            if (not sums or time.process_time() < deadline) and (found := as_sum(seen, known)) is not None:
                sums.append(found)
        leaked = self.everywhere(sums, deadline, rng)
        here = [item for item in leaked if item.presence[0]][: knowledge.num_examples]
        clients = [owner(item.presence, sums, view.upload.senders) for item in here]
        rest = self.rest(sums[0], here, rng)
        images, labels = torch.cat([*(item.record.inputs for item in here), rest.inputs]), [*(int(i.record.labels) for i in here)]
        labels += rest.labels.tolist()
        order = list(range(len(labels))) if knowledge.labels is None else in_order(labels, knowledge.labels.tolist())
        proofs = [*(item.certificate for item in here), *[""] * len(rest)]
        whose = [*clients, *[-1] * len(rest)]
        return Reconstruction(
            images[order],
            torch.tensor([labels[i] for i in order]) if knowledge.labels is None else knowledge.labels,
            certificate=tuple(proofs[i] for i in order),
            clients=tuple(whose[i] for i in order),
            seconds=time.perf_counter() - start,
            converged=time.process_time() < deadline,
        )

    def everywhere(self, sums: list[Sum], deadline: float, rng: torch.Generator) -> list[Leaked]:
        """What any sum proves, each record once, until no sum proves more after what is known was taken out of it."""
        leaked: list[Leaked] = []
        fresh = True
        while fresh:
            fresh = False
            for place, each in enumerate(sums):
                tick("sums", place, len(sums))
                if time.process_time() > deadline:
                    return leaked
                known = [item.record for item in leaked if item.presence[place]]
                for record, proof in self.proven(each, known, deadline, rng):
                    if any(same(record, item.record) and item.presence[place] for item in leaked):
                        continue
                    presence = [other.holds(record) for other in sums]
                    presence[place] = True
                    leaked.append(Leaked(record, proof, tuple(presence)))
                    fresh = True
        return leaked

    def proven(self, each: Sum, known: list[Batch], deadline: float, rng: torch.Generator) -> list[tuple[Batch, str]]:
        """The records that one sum proves once the known ones were taken out of it."""
        view, knowledge = left(each, known)
        if view is None or knowledge is None:
            return []
        answer = LinearLeak(self.tolerance, max(0.1, deadline - time.process_time()))(view, knowledge, rng=rng)
        assert answer.inputs is not None
        sure = [i for i, proof in enumerate(answer.certificate) if proof]
        return [(Batch(answer.inputs[i : i + 1], answer.labels[i : i + 1]), answer.certificate[i]) for i in sure]

    def rest(self, each: Sum, here: list[Leaked], rng: torch.Generator) -> Batch:
        """Guesses without a proof for the records of the attacked sum that nothing proves."""
        missing = each.knowledge.num_examples - len(here)
        view, knowledge = left(each, [item.record for item in here])
        if not missing or view is None or knowledge is None:
            return Batch(torch.zeros(0, *each.knowledge.schema.shape), torch.zeros(0, dtype=torch.long))
        answer = LinearLeak(self.tolerance, seconds=0.1)(view, knowledge, rng=rng)  # it was tried: nothing more is proven
        assert answer.inputs is not None
        keep = farthest(answer.inputs, [item.record.inputs[0] for item in here] if len(answer.labels) > missing else [])
        return Batch(answer.inputs[keep], answer.labels[keep])


def left(each: Sum, known: list[Batch]) -> tuple[Observation | None, Knowledge | None]:
    """A sum without the known records; as it is where it is no mean of single gradients; nothing where nothing is left."""
    if len(known) >= each.knowledge.num_examples:
        return None, None
    if not known or not separable(each.view, each.knowledge):
        return each.view, each.knowledge
    together = Batch(torch.cat([record.inputs for record in known]), torch.cat([record.labels for record in known]))
    return without(each.view, each.knowledge, together)


def same(one: Batch, other: Batch) -> bool:
    """Whether two exact images are of one record."""
    difference: Float[Tensor, ""] = (one.inputs - other.inputs).abs().max()
    return float(difference) < TWIN and bool(one.labels == other.labels)
