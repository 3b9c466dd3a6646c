"""What is left of a batch once some of its records are proven: the gradient of the others, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks._dropout import layers, with_read_mask
from attacks._gradient import maybe_clipped, mean_gradient, steps_taken
from attacks._intact import lossy
from attacks._layers import all_buffers
from attacks._matching.latents import bottlenecks, prepare_told
from attacks._matching.priors import roughness
from attacks._matching.records import clipping
from attacks._matching.simulate import simulate
from attacks._matching.stack import known_stack
from simulator.adversary import Knowledge
from simulator.training import mean_gradient as gradient_of
from simulator.types import Batch, Observation, Update

PRIOR = 0.02
"""Weight of the roughness in :func:`mismatch`: the one with which inverting_gradients ends."""


def mismatch(view: Observation, knowledge: Knowledge, guess: Batch) -> tuple[float, float]:
    """How badly a guess explains the update, and how unlikely it is: (angle in radians, angle plus weighted roughness).

    The angle is that between the observed update and the one that the client's recipe makes of the guess; it is blind to scale, so that
    a clipped update is judged like any other, and to what known defenses left out; records that were clipped one by one are so here.
    Dropout whose masks are not read off is simulated without them: the angle is then only a rough judge, and no longer small at the
    truth.
    """
    told = replace(knowledge, labels=guess.labels)
    victim, stack = prepare_told(view, told), known_stack(view, told)
    defended, rule = stack.distance, None
    if knowledge.num_examples > 1 and stack.record_clip < torch.inf:
        rule = clipping(stack.record_clip, victim.recipe.label_smoothing)
    trial = simulate(
        victim.model, victim.parameters, victim.buffers, guess.inputs, guess.labels,
        recipe=victim.recipe, order=victim.order, names=victim.names, rule=rule,
    ).double()  # fmt: skip
    target = victim.target.double()
    trial, target = defended.compared(trial, target, victim.spans)
    angle = float((trial / trial.norm() - target / target.norm()).norm())
    if angle != angle:
        return torch.inf, torch.inf
    return angle, angle + PRIOR * float(torch.stack([roughness(image) for image in guess.inputs]).mean())


def separable(view: Observation, knowledge: Knowledge) -> bool:
    """Whether the update is the mean of gradients of one record each, at a known scale, whole, and without unknown masks or noise."""
    joint = any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in knowledge.model.modules())
    dropped = bool(layers(with_read_mask(view, knowledge)[0]))
    altered = bool(lossy(view, knowledge)) or bool(bottlenecks(knowledge.model))
    return steps_taken(view, knowledge) == 1 and not joint and not dropped and not altered and not maybe_clipped(view, knowledge)


def without(view: Observation, knowledge: Knowledge, proven: Batch) -> tuple[Observation, Knowledge]:
    """The same view with the proven records taken out of the mean gradient, and the knowledge about those that are left.

    Raises:
        ValueError: the update is not :func:`separable`, or nothing would be left.
    """
    left = knowledge.num_examples - len(proven)
    if left < 1 or not separable(view, knowledge):
        raise ValueError(f"records left must be ≥ 1 in a mean of single gradients, got {left}. Attack the whole update.")
    seen = mean_gradient(view, knowledge)
    buffers = all_buffers(knowledge.model, view.broadcast)
    known, _ = gradient_of(knowledge.model, view.broadcast.parameters, buffers, proven, label_smoothing=knowledge.training.label_smoothing)
    share = len(proven) / knowledge.num_examples
    rest = {name: (tensor - share * known[name]) / (1 - share) for name, tensor in seen.items()}
    senders = frozenset(sorted(view.upload.senders)[:left])  # each has a record; which of them is left does not change a mean
    upload = replace(view.upload, senders=senders, update=Update("gradient", rest), num_examples=left)
    recipe = replace(knowledge.training, algorithm="fedsgd")
    counts = knowledge.label_counts
    if counts is not None:
        counts = (counts - torch.bincount(proven.labels, minlength=len(counts))).clamp(min=0)
    labels = None if knowledge.labels is None else labels_left(knowledge.labels, proven.labels.tolist())
    # other rounds still hold the proven records
    told = replace(knowledge, training=recipe, num_examples=left, label_counts=counts, labels=labels, history=())
    return replace(view, uploads=(upload,)), told


def in_order(found: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """For each wanted label the index of a found one: an equal one where there is one, else any that is left."""
    left = list(range(len(found)))
    order: list[int] = []
    for label in wanted:
        equal = [i for i in left if found[i] == label]
        order.append(equal[0] if equal else -1)
        if equal:
            left.remove(equal[0])
    return [i if i >= 0 else left.pop(0) for i in order]


def labels_left(told: Int[Tensor, " batch"], found: Sequence[int]) -> Int[Tensor, " left"]:
    """The told labels but for one of each found one."""
    rest = told.tolist()
    for label in found:
        rest.remove(label if label in rest else rest[-1])
    return torch.tensor(rest, dtype=torch.long)


def with_found_first(found: list[int], labels: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Labels proven for the first records, then what is left of the recovered ones."""
    return torch.cat([torch.tensor(found, dtype=torch.long), labels_left(labels, found)])


def placed(found: list[int], labels: Int[Tensor, " batch"], knowledge: Knowledge) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """The labels of an answer, and for each of them which of its records it belongs to: those of these labels come first, then guesses.

    Told labels keep their order.
    """
    named = with_found_first(found, labels)
    if knowledge.labels is None:
        return named, torch.arange(len(named))
    return knowledge.labels, torch.tensor(in_order(named.tolist(), knowledge.labels.tolist()))


def farthest(guesses: Float[Tensor, "guess channel height width"], known: Sequence[Float[Tensor, "channel height width"]]) -> Tensor:
    """Indices of the guesses that remain when each known record took away the one nearest to it."""
    keep = list(range(len(guesses)))
    for image in known:
        distance = [float((guesses[i] - image).square().mean()) for i in keep]
        keep.pop(distance.index(min(distance)))
    return torch.tensor(keep, dtype=torch.long)
