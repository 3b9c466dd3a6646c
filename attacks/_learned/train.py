"""From one upload to an inverter of uploads like it: simulate, find the features, estimate; for labels and for records."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attacks._labels.counts import to_counts
from attacks._learned.batches import Pool, drawn, pool
from attacks._learned.estimate import ALTERED, FOREIGN, PURE, WEIGHTS, Affine, Estimator, Pairs, affine, learn
from attacks._learned.features import Basis, Shortened, basis, shortened
from attacks._learned.mechanisms import Compressed, Stack, visible
from attacks._learned.pairs import Sender, sender, updates
from attacks._matching.simulate import flat
from attacks.update.labels import known_or_recovered, unrecoverable
from simulator.adversary import Knowledge
from simulator.progress import tick
from simulator.types import Batch, Observation, Update

HELD_OUT = 0.2
"""Share of the public records on which choices are made."""

CHECKS = 256
"""Held-out uploads on which choices are made, at most."""

READ = 24
"""Held-out uploads on which the two ways to tell the labels are compared."""

FIRST = 32
"""Simulated updates that show how to shorten long tensors; also the fewest that anything is learned from."""

CHUNK_MB = 128

SECONDS_PER_PRODUCT, SECONDS_PER_TARGET, SECONDS_PER_CUBE = 4e-11, 8e-10, 5e-10
"""CPU time at a nominal rate for each product of pairs² and coordinates, of pairs² and pixels, and of pairs³, that goes into an estimate.
Nominal, so that the same budget gives the same answer on every machine."""

DRAWN = ((1.0, 0.0), (1.0, 1.0), (0.0, 0.5), (0.0, 0.5))
"""Shares of records of the label's own class, and of altered ones, in each quarter of the pairs."""


@dataclass(frozen=True)
class Plan:
    """How much to simulate.

    Attributes:
        pairs: simulated uploads to learn from.
        seconds: of CPU; simulation stops at half of them, since about as much goes into the estimate.
        memory_mb: budget for the simulated updates.
    """

    pairs: int
    seconds: float
    memory_mb: int


@dataclass(frozen=True)
class Reading:
    """How to read an upload: as features of the update that a sender like this would make."""

    of: Sender
    shorten: Shortened
    basis: Basis

    def __call__(self, view: Observation) -> Float[Tensor, "one features"]:
        """The features of an observed upload."""
        tensors = {name: tensor.float() for name, tensor in view.upload.update.tensors.items()}
        return self.basis(self.shorten(flat(self.of.comparable(tensors), self.of.names)[None]))


@dataclass(frozen=True)
class Inverter:
    """What was learned for uploads of one kind, and whether all the pairs that were asked for went in."""

    reading: Reading
    estimator: Estimator
    whole: bool

    def __call__(self, view: Observation) -> Float[Tensor, " pixels"]:
        """The records behind an upload, flat."""
        return self.estimator(self.reading(view))[0]


@dataclass(frozen=True)
class Reader:
    """What was learned of the labels: expected counts of classes as an affine function of the features."""

    reading: Reading
    counts: Affine

    def __call__(self, view: Observation) -> Int[Tensor, " batch"]:
        """The labels behind an upload, in ascending order."""
        return listed(self.counts(self.reading(view))[0], sum(self.reading.of.sizes))


def listed(expected: Float[Tensor, " classes"], records: int) -> Int[Tensor, " batch"]:
    """That many labels whose counts are nearest to the expected ones."""
    return torch.arange(len(expected)).repeat_interleave(to_counts(expected.double(), records))


def parts(public: Batch, rng: torch.Generator) -> tuple[Pool, Pool]:
    """The public records to learn from, and those to choose on."""
    order, held = torch.randperm(len(public), generator=rng), max(2, round(HELD_OUT * len(public)))
    learned, chosen = (pool(Batch(public.inputs[rows], public.labels[rows])) for rows in (order[held:], order[:held]))
    return learned, chosen


def compression(view: Observation, knowledge: Knowledge) -> dict[str, Compressed]:
    """The compression that shows in an upload beside simulated ones of random public records."""
    assert knowledge.public is not None
    of, rng = sender(view, knowledge, {}), torch.Generator().manual_seed(0)
    of = replace(of, chain=replace(of.chain, steps=tuple(step for step in of.chain.steps if not step.heuristic)))
    rows = torch.randint(len(knowledge.public), (4, knowledge.num_examples), generator=rng)
    own = updates(of, knowledge.public.inputs[rows], knowledge.public.labels[rows], rng)
    tensors = {name: tensor.float() for name, tensor in view.upload.update.tensors.items()}
    return visible(Update(view.upload.update.kind, tensors), dict(zip(of.names, torch.split(own, of.numels, dim=1), strict=True)))


def simulated(
    of: Sender, images: Tensor, labels: Int[Tensor, "pairs batch"], shorten: Shortened, until: float, rng: torch.Generator
) -> Stack:
    """Shortened updates of these batches, as many as there is CPU time for until this reading of the clock; at least :data:`FIRST`."""
    fitting, out, done, wanted = max(1, CHUNK_MB * 2**20 // (4 * sum(of.numels))), list[Tensor](), 0, FIRST
    while done < len(images) and wanted > 0:
        rows, began = slice(done, done + min(wanted, fitting)), time.process_time()
        out.append(shorten(updates(of, images[rows], labels[rows], rng)))
        done += len(out[-1])
        tick("learning_to_invert", done, len(images))
        now = time.process_time()
        more = int((until - now) / max(now - began, 1e-9) * len(out[-1]))
        wanted = FIRST - done if now >= until else max(FIRST, min(done, more))  # twice as many each time: the first are the slowest
    return torch.cat(out)


def shortening(of: Sender, images: Tensor, labels: Int[Tensor, "pairs batch"], rng: torch.Generator) -> Shortened:
    """How to shorten updates like those of the first of these batches."""
    shapes = [tuple(of.parameters[name].shape) for name in of.names]
    return shortened(updates(of, images[:FIRST], labels[:FIRST], rng), shapes)


def affordable(plan: Plan, coordinates: int, targets: int) -> int:
    """Simulated updates of this length that fit into memory, where the stack is there twice, and whose estimate fits into the time."""
    most = min(plan.pairs, plan.memory_mb * 2**20 // (8 * coordinates))
    while most > 2 * FIRST and estimate_seconds(most, coordinates, targets) > plan.seconds / 2:
        most = most * 9 // 10
    return max(2 * FIRST, most)


def estimate_seconds(pairs: int, coordinates: int, targets: int) -> float:
    """CPU time that learning from so many pairs takes, about."""
    return pairs**2 * (SECONDS_PER_PRODUCT * coordinates + SECONDS_PER_TARGET * targets + SECONDS_PER_CUBE * pairs)


def train(view: Observation, knowledge: Knowledge, labels: Int[Tensor, " batch"], seen: dict[str, Compressed], plan: Plan) -> Inverter:
    """An inverter for uploads of records with these labels: a function of what the adversary knows, and of no upload's values.

    Half of the pairs are of records of the labels' own classes, half of any; what these count is chosen on held-out records.
    """
    assert knowledge.public is not None
    now, rng = time.process_time(), torch.Generator().manual_seed(0)
    of, (learned, chosen) = sender(view, knowledge, seen), parts(knowledge.public, rng)
    quarter = max(FIRST, plan.pairs // 4)
    sets = [drawn(learned, labels, quarter, rng, own=own, altered=altered) for own, altered in DRAWN]
    images, kinds = torch.stack(sets, 1).flatten(0, 1), torch.tensor([PURE, ALTERED, FOREIGN, FOREIGN]).repeat(quarter)
    held = drawn(chosen, labels, min(CHECKS, 2 * quarter), rng, own=1.0, altered=0.0)
    targets = labels.expand(len(images), -1)
    shorten = shortening(of, held, targets, rng)
    checks = simulated(of, held, targets[: len(held)], shorten, now + plan.seconds / 8, rng)
    images = images[: affordable(plan, checks.shape[1], images[0].numel())]
    stack = simulated(of, images, targets[: len(images)], shorten, now + plan.seconds / 2, rng)
    found = basis(stack, shorten.sizes, of.noise)
    estimator = learn(
        Pairs(found(stack), images[: len(stack)].flatten(1), kinds[: len(stack)]),
        Pairs(found(checks), held[: len(checks)].flatten(1), torch.full((len(checks),), PURE)),
        of.noise,
        rng,
    )
    return Inverter(Reading(of, shorten, found), estimator, len(stack) == 4 * quarter)


def reader(view: Observation, knowledge: Knowledge, seen: dict[str, Compressed], plan: Plan) -> Reader | None:
    """Labels learned from simulated uploads, or None where recovering them from the last layer's gradient is as good.

    Which of the two is decided on held-out public records.
    """
    assert knowledge.public is not None
    until, rng = time.process_time() + plan.seconds / 4, torch.Generator().manual_seed(1)
    of, (learned, chosen) = sender(view, knowledge, seen), parts(knowledge.public, rng)
    if unrecoverable(view, knowledge) is None and not (of.noise or seen or of.chain.steps or of.chain.record):
        return None
    sets = []
    for source, count in ((learned, max(FIRST, plan.pairs)), (chosen, READ)):
        rows = torch.randint(len(source.public), (count, knowledge.num_examples), generator=rng)
        sets.append((source.public.inputs[rows], source.public.labels[rows]))
    (images, labels), (shown, truth) = sets
    shorten = shortening(of, images, labels, rng)
    most = affordable(plan, sum(shorten.sizes), knowledge.schema.num_classes)
    stack = simulated(of, images[:most], labels[:most], shorten, until, rng)
    found = basis(stack, shorten.sizes, of.noise)
    classes = knowledge.schema.num_classes
    counts = F.one_hot(labels[: len(stack)], classes).sum(1).float()
    pairs = Pairs(found(stack), counts, torch.full((len(stack),), PURE))
    learned_counts = affine(pairs, of.noise, WEIGHTS[0], 1e-4)
    own = Reader(Reading(of, shorten, found), learned_counts)
    if unrecoverable(view, knowledge) is not None:
        return own
    uploads = updates(of, shown, truth, rng)
    uploads = uploads + of.noise * torch.randn(uploads.shape, generator=rng)
    hits = [0, 0]
    for row, labelled in zip(uploads, truth, strict=True):
        imagined = with_update(view, of, row)
        for place, told in enumerate((own(imagined), known_or_recovered(imagined, knowledge))):
            hits[place] += int(torch.minimum(*(torch.bincount(each, minlength=classes) for each in (told, labelled))).sum())
    return own if hits[0] > hits[1] else None


def with_update(view: Observation, of: Sender, row: Float[Tensor, " coordinates"]) -> Observation:
    """The view with another update."""
    tensors = {name: part.view_as(of.parameters[name]) for name, part in zip(of.names, torch.split(row, of.numels), strict=True)}
    return replace(view, uploads=(replace(view.upload, update=Update(view.upload.update.kind, tensors)),))
