"""Local training, defined once: clients run it, attacks differentiate through it.

Everything here is a pure function of tensors (torch.func): no module state is read but the architecture and its mode, and
none is changed. Running statistics of BatchNorm go in and out as values; those that come out can be differentiated, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from simulator.models.dropout import dropping
from simulator.models.elementary import ElementaryNorms
from simulator.models.latent import noisy, penalties
from simulator.types import Batch, LocalTraining, Tensors, Update

# torch loads what its own forward-mode derivatives need by a function that it deprecates: nothing that a user of ours can mend
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning, r"torch\.jit\._script")

GradientRule = Callable[[nn.Module, Tensors, Tensors, Batch], tuple[Tensors, Tensors]]
"""(model, parameters, buffers, batch) → (gradient, buffers after the step)."""


def loss(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensors]:
    """Mean cross-entropy over the batch and what the model's own layers add to it, and the buffers after the forward pass."""
    # BatchNorm writes into the buffers that it is given: hand it copies. Under vmap a copy must be one for each victim; the sum
    # with a zero that is derived from inputs and parameters is, whichever of the two is batched.
    zero = batch.inputs.new_zeros(()) + next(iter(parameters.values())).new_zeros(())
    after = {name: tensor + zero.to(tensor.dtype) if tensor.is_floating_point() else tensor.clone() for name, tensor in buffers.items()}
    with ElementaryNorms(), penalties() as added:
        logits = functional_call(model, {**parameters, **after}, (batch.inputs,))
    wanted = batch.labels if batch.targets is None else batch.targets
    return sum(added, F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)), after


def mean_gradient(
    model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch, *, label_smoothing: float = 0.0
) -> tuple[Tensors, Tensors]:
    """The gradient of :func:`loss` with respect to the parameters, and the buffers after the forward pass."""
    gradient, after = grad(lambda p: loss(model, p, buffers, batch, label_smoothing=label_smoothing), has_aux=True)(dict(parameters))
    return gradient, after


def settled_gradient(
    model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch, *, label_smoothing: float = 0.0
) -> tuple[Tensors, Tensors]:
    """:func:`mean_gradient` to the bit, for a client: nobody differentiates through it or batches it, so that plain autograd will do."""
    own = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    with torch.enable_grad():
        value, after = loss(model, own, buffers, batch, label_smoothing=label_smoothing)
        # torch.func makes a graph of the backward pass, too, for which group norm has other kernels, with other last bits
        slopes = torch.autograd.grad(value, list(own.values()), create_graph=True, materialize_grads=True)
    gradient = {name: slope.detach() for name, slope in zip(own, slopes, strict=True)}
    return gradient, {name: tensor.detach() for name, tensor in after.items()}


def sampled_gradient(
    model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch, *, expected: int, label_smoothing: float = 0.0
) -> tuple[Tensors, Tensors]:
    """The sum of the records' gradients over the ``expected`` number of them: the mean gradient of a Poisson sample; 0 for an empty one."""
    if not len(batch):
        return {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}, buffers
    gradient, after = settled_gradient(model, parameters, buffers, batch, label_smoothing=label_smoothing)
    return {name: tensor * (len(batch) / expected) for name, tensor in gradient.items()}, after


def per_example_gradients(
    model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch, *, label_smoothing: float = 0.0, names: Sequence[str] = ()
) -> Tensors:
    """One gradient for each record, stacked along a first axis of length ``len(batch)``, which may be 0; of all parameters or some."""
    own = {name: parameters[name] for name in names or parameters}
    if not len(batch):
        return {name: tensor.new_zeros(0, *tensor.shape) for name, tensor in own.items()}

    wanted = batch.labels if batch.targets is None else batch.targets

    def one(own: Tensors, record: Tensor, label: Tensor) -> Tensor:  # a label is an index or a row of targets
        return loss(model, {**parameters, **own}, buffers, Batch(record[None], label[None]), label_smoothing=label_smoothing)[0]

    if dropping() or noisy():  # masks and noise are drawn, one after the other
        each = [grad(one)(own, record, label) for record, label in zip(batch.inputs, wanted, strict=True)]
        return {name: torch.stack([gradient[name] for gradient in each]) for name in own}
    gradients: Tensors = vmap(grad(one), in_dims=(None, 0, 0))(own, batch.inputs, wanted)
    return gradients


def root(squares: Tensor) -> Tensor:
    """The square root, whose derivatives at 0 are 0 and not infinite: a dead unit's gradient stays 0 there."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def clip_by_norm(gradient: Tensors, max_norm: float) -> Tensors:
    """torch.nn.utils.clip_grad_norm_: all tensors times min(1, max_norm/(‖gradient‖ + 1e-6)); 0 does not clip."""
    if not max_norm:
        return gradient
    norm = root(torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum())
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {name: factor * tensor for name, tensor in gradient.items()}


def local_training(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    batches: Sequence[Batch],
    recipe: LocalTraining,
    gradient_rule: GradientRule | None = None,
) -> tuple[Tensors, Tensors]:
    """Run one local step on each batch; return the change of the parameters and the buffers afterwards.

    A step, as a training loop around torch.optim does it: d = ∇loss + proximal·(θ − θ_broadcast), clipped to ``max_grad_norm``; then
    d ← d + weight_decay·θ, and SGD: v = momentum·v + d; θ ← θ − learning_rate·v, or Adam (Kingma and Ba, 2015, algorithm 1):
    m = β₁m + (1 − β₁)d; s = β₂s + (1 − β₂)d²; θ ← θ − learning_rate·m/(1 − β₁ᵗ)/(√(s/(1 − β₂ᵗ)) + eps).

    Args:
        gradient_rule: what gives ∇loss; the mean gradient of the batch by default.
    """
    rule = gradient_rule or partial(mean_gradient, label_smoothing=recipe.label_smoothing)
    current = dict(parameters)
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in parameters.items()} for _ in range(2))
    for step, batch in enumerate(batches, start=1):
        gradient, buffers = rule(model, current, buffers, batch)
        if recipe.proximal:
            gradient = {name: gradient[name] + recipe.proximal * (current[name] - parameters[name]) for name in current}
        gradient = clip_by_norm(gradient, recipe.max_grad_norm)
        for name, theta in current.items():
            slope = gradient[name] + recipe.weight_decay * theta
            if recipe.optimizer == "sgd":
                first[name] = recipe.momentum * first[name] + slope
                current[name] = theta - recipe.learning_rate * first[name]
            else:
                first[name] = recipe.adam_beta1 * first[name] + (1 - recipe.adam_beta1) * slope
                second[name] = recipe.adam_beta2 * second[name] + (1 - recipe.adam_beta2) * slope.square()
                spread = root(second[name] / (1 - recipe.adam_beta2**step)) + recipe.adam_eps
                current[name] = theta - recipe.learning_rate / (1 - recipe.adam_beta1**step) * first[name] / spread
    return {name: current[name] - parameters[name] for name in current}, buffers


def local_update(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    batches: Sequence[Batch],
    recipe: LocalTraining,
    gradient_rule: GradientRule | None = None,
) -> tuple[Update, Tensors]:
    """What a client computes from the broadcast: the gradient of its one batch, or the delta after local training.

    In float32, whatever ``upload_dtype`` is: rounding to it is :func:`rounded`, which has no useful derivative.

    Raises:
        ValueError: FedSGD with other than one batch.
    """
    if recipe.algorithm == "fedavg":
        delta, buffers = local_training(model, parameters, buffers, batches, recipe, gradient_rule)
        return Update("delta", delta), buffers
    if len(batches) != 1:
        raise ValueError(f"fedsgd must train on exactly 1 batch, got {len(batches)}. Use algorithm = 'fedavg' for more.")
    rule = gradient_rule or partial(mean_gradient, label_smoothing=recipe.label_smoothing)
    gradient, buffers = rule(model, parameters, buffers, batches[0])
    return Update("gradient", gradient), buffers


def rounded(update: Update, recipe: LocalTraining) -> Update:
    """The update in the number format in which it is uploaded."""
    dtype: torch.dtype = getattr(torch, recipe.upload_dtype)
    return Update(update.kind, {name: tensor.to(dtype) for name, tensor in update.tensors.items()})


def batch_indices(records: int, recipe: LocalTraining, rng: torch.Generator) -> list[Tensor]:
    """The record indices of each local step of one round: fresh permutations, with or without partial last batches, or Poisson samples."""
    if recipe.sampling == "poisson":
        rate = recipe.sampling_rate(records)  # in float64: at float32's 2^-24 a rate would be rounded
        draws = (torch.rand(records, generator=rng, dtype=torch.float64) < rate for _ in range(recipe.local_steps(records)))
        return [torch.nonzero(draw).flatten() for draw in draws]
    size, in_epoch = recipe.size_of_batch(records), recipe.steps_in_epoch(records)
    steps: list[Tensor] = []
    wanted = recipe.steps or recipe.epochs * in_epoch
    while len(steps) < wanted:
        steps += torch.split(torch.randperm(records, generator=rng), size)[:in_epoch]
    return steps[:wanted]
