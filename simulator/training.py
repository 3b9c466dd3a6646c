"""Local training, defined once: clients run it, attacks differentiate through it.

Everything here is a pure function of tensors (torch.func): no module state is read but the architecture and its mode, and
none is changed. Running statistics of BatchNorm go in and out as values; those that come out can be differentiated, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from simulator.models.elementary import ElementaryNorms
from simulator.types import Batch, LocalTraining, Tensors, Update

GradientRule = Callable[[nn.Module, Tensors, Tensors, Batch], tuple[Tensors, Tensors]]
"""(model, parameters, buffers, batch) → (gradient, buffers after the step)."""


def loss(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
    """Mean cross-entropy over the batch, and the buffers after the forward pass."""
    # BatchNorm writes into the buffers that it is given: hand it copies. Under vmap a copy must be one for each victim; the sum
    # with a zero that is derived from inputs and parameters is, whichever of the two is batched.
    zero = batch.inputs.new_zeros(()) + next(iter(parameters.values())).new_zeros(())
    after = {name: tensor + zero.to(tensor.dtype) if tensor.is_floating_point() else tensor.clone() for name, tensor in buffers.items()}
    with ElementaryNorms():
        logits = functional_call(model, {**parameters, **after}, (batch.inputs,))
    return F.cross_entropy(logits, batch.labels), after


def mean_gradient(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
    """The gradient of :func:`loss` with respect to the parameters, and the buffers after the forward pass."""
    gradient, after = grad(lambda p: loss(model, p, buffers, batch), has_aux=True)(dict(parameters))
    return gradient, after


def per_example_gradients(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensors:
    """One gradient for each record, stacked along a first axis of length ``len(batch)``."""

    def one(parameters: Tensors, record: Tensor, label: Tensor) -> Tensor:
        return loss(model, parameters, buffers, Batch(record[None], label[None]))[0]

    gradients: Tensors = vmap(grad(one), in_dims=(None, 0, 0))(dict(parameters), batch.inputs, batch.labels)
    return gradients


def local_sgd(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    batches: Sequence[Batch],
    recipe: LocalTraining,
    gradient_rule: GradientRule = mean_gradient,
) -> tuple[Tensors, Tensors]:
    """Run one SGD step on each batch; return the change of the parameters and the buffers afterwards.

    The update rule is that of torch.optim.SGD: d = ∇ + weight_decay·θ; v = momentum·v + d; θ ← θ − learning_rate·v.
    """
    current, velocity = dict(parameters), {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for batch in batches:
        gradient, buffers = gradient_rule(model, current, buffers, batch)
        for name in current:
            step = gradient[name] + recipe.weight_decay * current[name]
            velocity[name] = recipe.momentum * velocity[name] + step
        current = {name: current[name] - recipe.learning_rate * velocity[name] for name in current}
    return {name: current[name] - parameters[name] for name in current}, buffers


def local_update(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    batches: Sequence[Batch],
    recipe: LocalTraining,
    gradient_rule: GradientRule = mean_gradient,
) -> tuple[Update, Tensors]:
    """What a client computes from the broadcast: the gradient of its one batch, or the delta after local SGD.

    Raises:
        ValueError: FedSGD with other than one batch.
    """
    if recipe.algorithm == "fedavg":
        delta, buffers = local_sgd(model, parameters, buffers, batches, recipe, gradient_rule)
        return Update("delta", delta), buffers
    if len(batches) != 1:
        raise ValueError(f"fedsgd must train on exactly 1 batch, got {len(batches)}. Use algorithm = 'fedavg' for more.")
    gradient, buffers = gradient_rule(model, parameters, buffers, batches[0])
    return Update("gradient", gradient), buffers


def batch_indices(records: int, recipe: LocalTraining, rng: torch.Generator) -> list[Tensor]:
    """The record indices of each local step of one FedAvg round: fresh permutations, partial last batches kept."""
    size = min(recipe.batch_size or records, records)
    steps: list[Tensor] = []
    wanted = recipe.steps or recipe.epochs * -(-records // size)
    while len(steps) < wanted:
        steps += torch.split(torch.randperm(records, generator=rng), size)
    return steps[:wanted]
