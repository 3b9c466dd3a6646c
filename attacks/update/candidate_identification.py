"""Which of N candidates it was: the likelihood-ratio guess of an adversary that is handed a list with the true records in it.

No picture is drawn. For each candidate the update is computed that it would have caused, with what is known of the defenses, and the
candidate is named under which the observed update is likeliest. Under Gaussian noise that is the argmax of ⟨y, g⟩ − ‖g‖²/2. It is the
attack that approaches the ceiling of differential privacy, and what it finds where optimization finds nothing shows that a blurred
picture is no proof of privacy.

Source: Balle, Cherubin and Hayes, 2022, arXiv:2201.04845 (reconstruction robustness: an informed adversary with a prior); Hayes,
    Mahloujifar and Balle, 2023, arXiv:2302.07225, section 4 (the attack that matches the bound: inner products with each candidate's
    clipped gradient).
Deviations: likelihoods of other mechanisms than Gaussian noise, those of adaptive_matching. Of several records those are named whose mean
    update is likeliest, from nonnegative least squares over all candidates on and then by exchanges of one; several local steps count
    as the mean of what each record alone would have caused. Randomness of the model that the update does not give away is averaged
    over. Rounds in which the same client takes the same records again add their evidence. The other records of the training set are not
    known, as they would be to the adversary of the bound: for one record behind an upload there are none.
Measured: random unit gradients of 2000 numbers, as the bound has them, 2000 trials each; (N, √T/z): (10, 1) .35, (10, 2) .68, (100, 2) .32,
    (100, 4) .91 against ceilings of .389, .764, .372 and .953.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor
from torch.func import vmap

from attacks._dropout import layers as dropping_layers
from attacks._gradient import unusable
from attacks._matching.distances import Distance, Span
from attacks._matching.latents import bottlenecks, prepare_told
from attacks._matching.simulate import Victim, flat
from attacks._matching.stack import known_stack
from attacks._rest import in_order
from attacks._rounds import of_round, redraws, same_sender
from simulator.adversary import Knowledge, Reconstruction
from simulator.models.dropout import drawn_masks, masks_from
from simulator.models.latent import drawn_noise, noise_from
from simulator.progress import tick
from simulator.registry import register
from simulator.training import local_update, per_example_gradients
from simulator.types import Batch, Observation, Tensors

CHUNK_MB = 64
SWEEPS = 5
"""Passes over the named candidates in which each is exchanged for a likelier one, at most."""


@dataclass(frozen=True)
class Evidence:
    """One round: what was observed, what each candidate alone would have caused, and how likely the one makes the other."""

    target: Float[Tensor, " coordinates"]
    updates: Float[Tensor, "candidates coordinates"]
    spans: tuple[Span, ...]
    distance: Distance

    def surprise(self, chosen: Int[Tensor, "guesses records"]) -> Float[Tensor, " guesses"]:
        """For each set of candidates, how unlikely the observed update is: −log likelihood, or an angle."""
        size = max(1, CHUNK_MB * 2**20 // (8 * self.target.numel()))
        means = (self.updates[some].mean(1) for some in torch.split(chosen, size))
        return torch.cat([surprises(some, self.target, self.spans, self.distance) for some in means])


def surprises(
    updates: Float[Tensor, "guesses coordinates"], target: Float[Tensor, " coordinates"], spans: Sequence[Span], distance: Distance
) -> Float[Tensor, " guesses"]:
    """The distance of each update from the observed one."""
    found: Tensor = vmap(lambda update: distance(update, target, spans))(updates)
    return torch.nan_to_num(found, nan=torch.inf)


@register("attacks", "candidate_identification")
@dataclass(frozen=True)
class CandidateIdentification:
    """Names the candidates under which the observed update is likeliest; the answer's pictures are theirs.

    Attributes:
        draws: of the model's randomness, over which a candidate's update is averaged where the upload does not give it away.
        rounds: of those in which the client takes the same records again, at most.
        memory_mb: budget for the candidates' updates; of more than fit the likeliest by themselves are kept.
    """

    draws: int = 8
    rounds: int = 8
    memory_mb: int = 1024

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
        start = time.perf_counter()
        assert knowledge.candidates is not None
        pool = possible(knowledge.candidates, knowledge)
        rounds = [(view, knowledge)]
        if redraws(knowledge.training, knowledge.num_examples) is None:
            rounds += [(seen, of_round(knowledge, seen)) for seen in same_sender(view, knowledge)[: self.rounds - 1]]
        if knowledge.num_examples > 1:
            pool = self.shortlist(view, knowledge, pool, rng)
        each = []
        for place, (seen, known) in enumerate(rounds):
            tick("candidate_identification", place, len(rounds))
            each.append(evidence(seen, known, pool, self.draws, rng))
        chosen, surprise = named(each, len(pool), knowledge.num_examples)
        labels = pool.labels[chosen]
        if knowledge.labels is not None:
            order = torch.tensor(in_order(labels.tolist(), knowledge.labels.tolist()))
            chosen, labels = chosen[order], knowledge.labels
        return Reconstruction(
            pool.inputs[chosen], labels, objective=surprise, certificate=("",) * len(labels), seconds=time.perf_counter() - start
        )

    def shortlist(self, view: Observation, knowledge: Knowledge, pool: Batch, rng: torch.Generator) -> Batch:
        """As many candidates as fit in memory, those whose own updates are most in line with the observed one."""
        most = max(2 * knowledge.num_examples, self.memory_mb * 2**20 // (4 * coordinates(view)))
        if len(pool) <= most:
            return pool
        target = prepare_told(view, told(knowledge, pool)).target
        parts = []
        for rows in torch.split(torch.arange(len(pool)), max(1, most // 4)):
            own = evidence(view, knowledge, Batch(pool.inputs[rows], pool.labels[rows]), 1, rng).updates
            parts.append(own @ target / own.norm(dim=1).clamp(min=1e-30))
        best = torch.cat(parts).topk(most).indices.sort().values
        return Batch(pool.inputs[best], pool.labels[best])


def coordinates(view: Observation) -> int:
    """Numbers in the update."""
    return sum(tensor.numel() for tensor in view.upload.update.tensors.values())


def possible(candidates: Batch, knowledge: Knowledge) -> Batch:
    """The candidates whose label is one of those that were disclosed, if those are enough."""
    if knowledge.labels is None and knowledge.label_counts is None:
        return candidates
    told = knowledge.labels if knowledge.labels is not None else knowledge.label_counts.nonzero().flatten()  # type: ignore[union-attr]
    fitting = torch.isin(candidates.labels, told)
    if int(fitting.sum()) < knowledge.num_examples:
        return candidates
    return Batch(candidates.inputs[fitting], candidates.labels[fitting])


def told(knowledge: Knowledge, pool: Batch) -> Knowledge:
    """The knowledge with labels in place, whichever, so that none are recovered: every candidate has its own."""
    return knowledge if knowledge.labels is not None else replace(knowledge, labels=pool.labels[: knowledge.num_examples])


def evidence(view: Observation, knowledge: Knowledge, pool: Batch, draws: int, rng: torch.Generator) -> Evidence:
    """What each candidate would have caused in this round, beside what was seen."""
    victim, stack = prepare_told(view, told(knowledge, pool)), known_stack(view, knowledge)
    random = bool(bottlenecks(victim.model) or dropping_layers(victim.model))
    masks, noise = drawn_masks(rng), drawn_noise(rng)
    total = torch.zeros(len(pool), len(victim.target))
    for _ in range(draws if random else 1):
        if not random:
            total = alone(victim, pool, stack.record_clip)
            break
        with masks_from(masks), noise_from(noise):
            total += alone(victim, pool, stack.record_clip) / draws
    return Evidence(victim.target, total, victim.spans, stack.distance)


def alone(victim: Victim, pool: Batch, record_clip: float) -> Float[Tensor, "candidates coordinates"]:
    """The update that each candidate would cause if it were the only record."""
    recipe, rows = victim.recipe, []
    if recipe.algorithm == "fedsgd":
        size = max(1, CHUNK_MB * 2**20 // (8 * len(victim.target)))
        for some in torch.split(torch.arange(len(pool)), size):
            batch = Batch(pool.inputs[some], pool.labels[some])
            each = per_example_gradients(victim.model, victim.parameters, victim.buffers, batch, label_smoothing=recipe.label_smoothing)
            rows.append(clipped(torch.cat([each[name].detach().flatten(1) for name in victim.names], 1), record_clip))
        return torch.cat(rows)
    for image, label in zip(pool.inputs, pool.labels, strict=True):
        steps = [Batch(image[None], label[None])] * len(victim.order)
        rule = clipping(recipe.label_smoothing, record_clip) if record_clip < float("inf") else None
        update, _ = local_update(victim.model, victim.parameters, victim.buffers, steps, recipe, rule)
        rows.append(flat(update.tensors, victim.names).detach())
    return torch.stack(rows)


def clipped(rows: Float[Tensor, "rows coordinates"], limit: float) -> Float[Tensor, "rows coordinates"]:
    """Each row scaled down to a norm."""
    return rows if limit == float("inf") else rows * (limit / rows.norm(dim=1, keepdim=True).clamp(min=limit))


def clipping(smoothing: float, limit: float) -> Callable[..., tuple[Tensors, Tensors]]:
    """The gradient rule of one record that clips it."""

    def rule(model: torch.nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        each = per_example_gradients(model, parameters, buffers, batch, label_smoothing=smoothing)
        size = torch.stack([tensor.square().sum() for tensor in each.values()]).sum().sqrt()
        return {name: tensor[0] * (limit / size.clamp(min=limit)) for name, tensor in each.items()}, buffers

    return rule


def named(each: Sequence[Evidence], candidates: int, records: int) -> tuple[Int[Tensor, " records"], float]:
    """The set of candidates that explains all rounds best, and its surprise."""

    def surprise(chosen: Tensor) -> Tensor:
        return torch.stack([one.surprise(chosen) for one in each]).sum(0)

    if records == 1:
        found = surprise(torch.arange(candidates)[:, None])
        return found.argmin()[None], float(found.min())
    best = start(each, records)
    lowest = float(surprise(best[None])[0])
    for _ in range(SWEEPS):
        before = lowest
        for place in range(records):
            others = torch.tensor([i for i in range(candidates) if i not in set(best.tolist()) - {int(best[place])}])
            tried = best.repeat(len(others), 1)
            tried[:, place] = others
            found = surprise(tried)
            if float(found.min()) < lowest:
                lowest, best = float(found.min()), tried[int(found.argmin())]
        if lowest == before:
            break
    return best, lowest


def start(each: Sequence[Evidence], records: int) -> Int[Tensor, " records"]:
    """The candidates with the largest weights in the nonnegative combination of updates that is nearest to the observed ones.

    Where an update has zeros, all are compared on the rest; the problem is reduced to one of as many equations as candidates.
    """
    count = len(each[0].updates)
    gram, seen = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for one in each:
        own = (one.updates * (one.target != 0)).double()
        scale = one.target.double().square().sum().clamp(min=1e-300)
        gram, seen = gram + own @ own.T / scale, seen + own @ one.target.double() / scale
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp(min=1e-12 * float(values.max())).sqrt()
    weights, _ = nnls((root[:, None] * vectors.T).numpy(), ((vectors.T @ seen) / root).numpy(), maxiter=30 * len(gram))
    return torch.tensor(weights).topk(records).indices
