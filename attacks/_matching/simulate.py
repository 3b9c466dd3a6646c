"""The attacker's own run of the client's recipe on dummy records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks._dropout import with_read_mask
from attacks._gradient import records_per_sender
from attacks.update.labels import known_or_recovered
from simulator.adversary import Knowledge
from simulator.training import GradientRule, local_update, loss
from simulator.types import Batch, LocalTraining, Observation, Tensors

Span = tuple[int, int]


def flat(update: Tensors, names: Sequence[str]) -> Float[Tensor, " coordinates"]:
    """The named tensors of an update as one vector."""
    return torch.cat([update[name].flatten() for name in names])


@dataclass(frozen=True)
class Victim:
    """One upload made ready for matching.

    Attributes:
        model: the architecture; victims that share the object can be matched in one go. Dropout whose mask is known has it in place.
        parameters: at the broadcast.
        buffers: all buffers of the model, at their broadcast values.
        names: the tensors of the update, in the order in which ``target`` holds them.
        target: the observed update.
        labels: known or recovered.
        shape: (channel, height, width) of a record.
        classes: that a label can name.
        told: whether the labels were disclosed, so that nothing about them is left to find.
        recipe: what the client is assumed to have run.
        order: (first, end) of the records of each local step, as assumed by the attacker.
        uploaded: the floating-point buffers that came with the update: BatchNorm's running statistics after training.
    """

    model: nn.Module
    parameters: Tensors
    buffers: Tensors
    names: tuple[str, ...]
    target: Float[Tensor, " coordinates"]
    labels: Int[Tensor, " batch"]
    shape: tuple[int, int, int]
    classes: int
    told: bool
    recipe: LocalTraining
    order: tuple[Span, ...]
    uploaded: Tensors = field(default_factory=dict)

    @property
    def kin(self) -> tuple[object, ...]:
        """Victims of equal kin differ only in tensor values."""
        return id(self.model), self.model.training, self.names, self.shape, len(self.labels), self.recipe, self.order, self.told

    @property
    def spans(self) -> tuple[Span, ...]:
        """First and end of each tensor in ``target``."""
        ends = list(accumulate(self.parameters[name].numel() for name in self.names))
        return tuple(zip([0, *ends[:-1]], ends, strict=True))


def assumed_order(records: int, recipe: LocalTraining, senders: int) -> tuple[Span, ...]:
    """The records of each local step: in the order of the dummies, every epoch alike.

    The client shuffles and the attacker cannot know how; the dummies have no order of their own, so only the second epoch on is
    wrong. Several senders are simulated as one client with all their records whose batches are as many times larger: the same
    number of steps, and for one step exactly the weighted mean of the senders' gradients (except under train-mode BatchNorm,
    where joint batch statistics are assumed). For more steps it approximates the mean of paths by the path of the mean.
    """
    steps = recipe.local_steps(-(-records // senders))
    size = min(recipe.batch_size * senders or records, records) if recipe.algorithm == "fedavg" else records
    if recipe.drop_last and records > size:  # full batches only, from the first record and up to the last in turn, so that all are used
        whole = records // size * size
        epoch = [(start + skip, start + skip + size) for skip in (0, records - whole) for start in range(0, whole, size)]
    else:
        epoch = [(start, min(start + size, records)) for start in range(0, records, size)]
    return tuple(epoch[step % len(epoch)] for step in range(steps))


def prepare(view: Observation, knowledge: Knowledge) -> Victim:
    """Make one upload ready for matching."""
    update, recipe = view.upload.update, knowledge.training
    recipe = replace(recipe, algorithm="fedsgd" if update.kind == "gradient" else "fedavg")
    names = tuple(name for name in view.broadcast.parameters if name in update.tensors)
    model, buffers = with_read_mask(view, knowledge)
    return Victim(
        model=model,
        parameters={name: tensor.detach() for name, tensor in view.broadcast.parameters.items()},
        buffers=buffers,
        names=names,
        target=flat(update.tensors, names).detach().float(),
        labels=known_or_recovered(view, knowledge),
        shape=knowledge.schema.shape,
        classes=knowledge.schema.num_classes,
        recipe=recipe,
        told=knowledge.labels is not None or knowledge.label_counts is not None,
        order=assumed_order(knowledge.num_examples, recipe, len(view.upload.senders)),
        uploaded=view.upload.buffers,
    )


def tracked_gradient(
    model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch, *, recipe: LocalTraining
) -> tuple[Tensors, Tensors]:
    """:func:`simulator.training.mean_gradient` by plain autograd, for parameters that require gradients."""
    value, after = loss(model, parameters, buffers, batch, label_smoothing=recipe.label_smoothing)
    gradient = torch.autograd.grad(value, list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradient, strict=True)), after


def run_recipe(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    inputs: Float[Tensor, "batch channel height width"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    *,
    recipe: LocalTraining,
    order: Sequence[Span],
    names: Sequence[str],
    rule: GradientRule | None = None,
) -> tuple[Float[Tensor, " coordinates"], Tensors]:
    """The update that the recipe makes of these records, flat, and the buffers afterwards; differentiable in inputs and soft labels.

    What ``rule`` does to the gradient of each step is done, if there is one. Parameters that require gradients ask for plain autograd
    inside, which has less overhead than torch.func but cannot be batched.
    """
    batches = [Batch(inputs[first:end], labels[first:end]) for first, end in order]
    tracked = all(tensor.requires_grad for tensor in parameters.values())
    rule = rule or (partial(tracked_gradient, recipe=recipe) if tracked else None)
    update, after = local_update(model, parameters, buffers, batches, recipe, rule)
    return flat(update.tensors, names), after


def simulate(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    inputs: Float[Tensor, "batch channel height width"],
    labels: Int[Tensor, " batch"],
    *,
    recipe: LocalTraining,
    order: Sequence[Span],
    names: Sequence[str],
    rule: GradientRule | None = None,
) -> Float[Tensor, " coordinates"]:
    """The update alone of :func:`run_recipe`."""
    return run_recipe(model, parameters, buffers, inputs, labels, recipe=recipe, order=order, names=names, rule=rule)[0]


def unroll_length(view: Observation, knowledge: Knowledge) -> int:
    """Local steps that the simulation of this upload takes."""
    if view.upload.update.kind == "gradient":
        return 1
    return replace(knowledge.training, algorithm="fedavg").local_steps(records_per_sender(view, knowledge))


def casted(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating-point tensors in another precision; integers as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
