"""Which of N candidates it was: the likelihood-ratio guess of an adversary that is handed a list with the true records in it.

No picture is drawn. For each candidate the update is computed that it would have caused, with what is known of the defenses, and the
candidate is named under which the observed update is likeliest. Under Gaussian noise that is the argmax of ⟨y, g⟩ − ‖g‖²/2. It is the
attack that approaches the ceiling of differential privacy, and what it finds where optimization finds nothing shows that a blurred
picture is no proof of privacy. Where a defense draws at random what becomes of a record, its likelihood is the mean over the draws:
  - of ATS, over all policies and signs;
  - of MixUp and InstaHide, whose mixture one record's gradient gives away: over partners and the mask (attacks/_identify/mixture.py);
    where noise hides the picture, over mixtures with public records of the classes that the head shows.

Source: Balle, Cherubin and Hayes, 2022, arXiv:2201.04845 (reconstruction robustness: an informed adversary with a prior); Hayes,
    Mahloujifar and Balle, 2023, arXiv:2302.07225, section 4 (the attack that matches the bound: inner products with each candidate's
    clipped gradient).
Deviations: likelihoods of other mechanisms than Gaussian noise, those of adaptive_matching. Of several records those are named whose mean
    update is likeliest, from nonnegative least squares over all candidates on and then by exchanges of one; of several local steps
    each record's gradients are taken along the straight line that the delta says, about where the client took them, and their mean counts,
    unless what each record would have caused by itself explains the update better.
    Senders' updates are clipped before their mean; of senders with several records each, which records share one is a guess. Randomness
    of the model that the update does not give away is averaged over. Rounds in which the same client takes the same records again add
    their evidence; of several records that were changed at random, one round counts. The other records of the training set are not
    known, as they would be to the adversary of the bound: for one record behind an upload there are none.
Measured: random unit gradients of 2000 numbers, as the bound has them: in 1000 trials each within four standard errors of the exact
    rates .341, .674, .323 and .915 at (N, √T/z) = (10, 1), (10, 2), (100, 2) and (100, 4), which the ceilings .389, .764, .372 and .953
    allow (``pytest tests/attacks/test_identification.py -k likelihood_ratio``). What it names under each defense
    stands on the pages in docs/defenses (``fedpeek run defenses``).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks._gradient import clip_limit, unusable
from attacks._identify.alone import clipped, each_alone, path, prepared, rows_of
from attacks._identify.choice import Evidence, Told, by_candidate, named, surprises
from attacks._identify.encoding import read, targets_of, unreadable, without_targets
from attacks._identify.mixture import Population, weigh
from attacks._identify.versions import drawn, drawn_given, mixing, transformed
from attacks._matching.stack import known_stack
from attacks._rest import in_order
from attacks._rounds import of_round, redraws, same_sender
from attacks.modeled import NOISY_LATER
from simulator.adversary import Knowledge, Reconstruction
from simulator.progress import tick
from simulator.registry import register
from simulator.types import Batch, Observation


@register("attacks", "candidate_identification")
@dataclass(frozen=True)
class CandidateIdentification:
    """Names the candidates under which the observed update is likeliest; the answer's pictures are theirs.

    Attributes:
        draws: of what is random and cannot be read off or listed, for each candidate.
        rounds: of those in which the client takes the same records again, at most.
        seconds: CPU time after which no more candidates are exchanged, and no more steps refine what is read off.
        memory_mb: budget for the candidates' updates; of more than fit the likeliest by themselves are kept.
    """

    draws: int = 8
    rounds: int = 8
    seconds: float = 60.0
    memory_mb: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ValueError(f"{field.name} must be > 0, got {value}. The default is {field.default}.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse without candidates, or with fewer than there are records."""
        if knowledge.candidates is None:
            return "the adversary must be handed candidates, got none. Set threat.candidates = true"
        if (count := len(knowledge.candidates)) < knowledge.num_examples:
            return f"candidates must be at least the {knowledge.num_examples} records behind the upload, got {count}. Hand over more"
        return unusable(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Weigh the candidates and name the likeliest."""
        begun, deadline = time.perf_counter(), time.process_time() + self.seconds
        assert knowledge.candidates is not None
        pool = possible(knowledge.candidates, knowledge)
        rounds = [(view, knowledge)]
        if redraws(knowledge.training, knowledge.num_examples) is None and (knowledge.num_examples == 1 or not knowledge.encoded):
            rounds += [(seen, of_round(knowledge, seen)) for seen in same_sender(view, knowledge)[: self.rounds - 1]]
        if knowledge.num_examples == 1:
            total = torch.zeros(len(pool), dtype=torch.float64)
            for place, (seen, known) in enumerate(rounds):
                tick("candidate_identification", place, len(rounds))
                total += self.surprise(seen, known, pool, rng)
            chosen, surprise = total.argmin()[None], float(total.min())
        else:
            chosen, surprise = self.several(rounds, pool, deadline, rng)
        labels = pool.labels[chosen]
        if knowledge.labels is not None:
            order = torch.tensor(in_order(labels.tolist(), knowledge.labels.tolist()))
            chosen, labels = chosen[order], knowledge.labels
        return Reconstruction(
            pool.inputs[chosen], labels, objective=surprise, certificate=("",) * len(labels), seconds=time.perf_counter() - begun,
            converged=time.process_time() < deadline,
        )  # fmt: skip

    def surprise(self, view: Observation, knowledge: Knowledge, pool: Batch, rng: torch.Generator) -> Float[Tensor, " candidates"]:
        """How unlikely the update of one record is for each candidate; a chunk of updates at a time, and none is kept."""
        mixed, classes = mixing(knowledge), knowledge.schema.num_classes
        others = knowledge.public if knowledge.public is not None else pool
        if mixed and not unreadable(view, knowledge):
            name, settings = mixed

            def rehearse(count: int) -> Tensor:
                own = rows_of(others, torch.randint(len(others), (count,), generator=rng))
                return drawn(name, settings, own, others, classes, rng)[0]

            seen = read(view, knowledge, rehearse, seconds=self.seconds)
            return weigh(seen, pool, Population(others, classes), name=name, settings=settings, rng=rng)
        versions, owner = transformed(pool, knowledge)
        if mixed and mixed[0] == "mixup" and not without_targets(view, knowledge):
            versions, owner = rows_of(pool, owner.repeat_interleave(self.draws)), owner.repeat_interleave(self.draws)
            inputs, targets = drawn_given(targets_of(view, knowledge), versions, others, rng)
            versions = Batch(inputs, versions.labels, targets)
        victim, stack = prepared(view, knowledge, pool), known_stack(view, knowledge)
        parts = each_alone(victim, versions, stack.record_clip, draws=self.draws, rng=rng)
        found = torch.cat([surprises(part, victim.target, victim.spans, stack.distance) for part in parts])
        return by_candidate(found.double(), owner, stack.distance.random)

    def several(
        self, rounds: list[tuple[Observation, Knowledge]], pool: Batch, deadline: float, rng: torch.Generator
    ) -> tuple[Int[Tensor, " records"], float]:
        """The set of candidates that explains all rounds best, and its surprise."""
        view, knowledge = rounds[0]
        versions, owner = transformed(pool, knowledge)
        room = self.memory_mb * 2**20 // (4 * len(prepared(view, knowledge, pool).target) * len(rounds))
        rows = self.shortlist(view, knowledge, versions, max(2 * knowledge.num_examples, room), rng)
        versions, owner = rows_of(versions, rows), owner[rows]
        if len(set(owner.tolist())) < knowledge.num_examples:
            versions, owner = transformed(pool, knowledge)
        led = bool(path(view, knowledge, prepared(view, knowledge, versions)))
        tries = []
        for along in (True, False) if led else (False,):  # signs, say, are no way: the likelier answer tells which it was
            each = []
            for place, (seen, known) in enumerate(rounds):
                tick("candidate_identification", place, len(rounds))
                each.append(self.evidence(seen, known, versions, rng, along=along))
            tries.append(named(each, owner, knowledge.num_examples, deadline=deadline, told=told_of(versions, knowledge)))
        best, surprise = min(tries, key=lambda found: found[1])
        return owner[best], surprise

    def shortlist(self, view: Observation, knowledge: Knowledge, versions: Batch, most: int, rng: torch.Generator) -> Int[Tensor, " rows"]:
        """As many versions as fit in memory, those whose own updates are most in line with the observed one."""
        if len(versions) <= most:
            return torch.arange(len(versions))
        victim, stack = prepared(view, knowledge, versions), known_stack(view, knowledge)
        parts = each_alone(victim, versions, stack.record_clip, path(view, knowledge, victim), draws=1, rng=rng)
        alike = torch.cat([own @ victim.target / own.norm(dim=1).clamp(min=1e-30) for own in parts])
        return alike.topk(most).indices.sort().values

    def evidence(self, view: Observation, knowledge: Knowledge, versions: Batch, rng: torch.Generator, *, along: bool) -> Evidence:
        """What each version would have caused in this round, by itself or along the client's path, beside what was seen."""
        victim, stack = prepared(view, knowledge, versions), known_stack(view, knowledge)
        updates, first = torch.empty(len(versions), len(victim.target)), 0
        way = path(view, knowledge, victim) if along else ()
        for part in each_alone(victim, versions, stack.record_clip, way, draws=self.draws, rng=rng):
            updates[first : first + len(part)] = part
            first += len(part)
        senders, limit = clipping_of(view, knowledge, stack.distance.clip_norm)
        distance = stack.distance if limit == math.inf else replace(stack.distance, clip_norm=math.inf)
        if senders == knowledge.num_examples and limit < math.inf:
            updates, senders, limit = clipped(updates, limit), 1, math.inf
        return Evidence(victim.target, updates, victim.spans, distance, senders, limit)


def possible(candidates: Batch, knowledge: Knowledge) -> Batch:
    """The candidates whose label is one of those that were disclosed, if those are enough."""
    if knowledge.labels is None and knowledge.label_counts is None:
        return candidates
    told = knowledge.labels if knowledge.labels is not None else knowledge.label_counts.nonzero().flatten()  # type: ignore[union-attr]
    fitting = torch.isin(candidates.labels, told)
    if int(fitting.sum()) < knowledge.num_examples:
        return candidates
    return Batch(candidates.inputs[fitting], candidates.labels[fitting])


def told_of(versions: Batch, knowledge: Knowledge) -> Told | None:
    """Labels of the versions, and how many of each class were disclosed; None where none were, or the candidates cannot be those."""
    counts = knowledge.label_counts
    if knowledge.labels is not None:
        counts = torch.bincount(knowledge.labels, minlength=knowledge.schema.num_classes)
    if counts is None or not set(counts.nonzero().flatten().tolist()) <= set(versions.labels.tolist()):
        return None
    return versions.labels, counts


def clipping_of(view: Observation, knowledge: Knowledge, stated: float) -> tuple[int, float]:
    """Of an aggregate, its senders and the norm to which each one's update was clipped; of one sender the distance knows of it."""
    senders = len(view.upload.senders)
    if senders == 1 or knowledge.num_examples % senders:
        return 1, math.inf
    told = [clip_limit(view, name, settings) for name, settings in knowledge.defenses if name in (*NOISY_LATER, "simulated_enclave")]
    limit = min([stated, *told])
    return (senders, limit) if limit < math.inf else (1, math.inf)
