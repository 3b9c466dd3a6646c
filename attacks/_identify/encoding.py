"""What entered the network, read off the gradient of one record: the mixture that was trained on, and what it was trained towards.

With one record a linear layer's gradient gives away its input. The head's gives away the logits, and with them the targets:
∂b = Σy·softmax − y, where y is 0 for some class. The first linear layer's gives away the features, from which the picture follows by
regression over pictures that the defense might have made of public records, and then by Gauss–Newton steps on the whole gradient.

Source: Phong et al., 2018, 10.1109/TIFS.2017.2787987 (a linear layer's input); Marquardt, 1963, for the steps. The rest is our own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks._chain import chain, weights
from attacks._dropout import layers as dropping_layers
from attacks._gradient import keeps_sizes, maybe_clipped, mean_gradient, noise_level, steps_taken
from attacks._identify.alone import prepared
from attacks._intact import lossy
from attacks._layers import Call, last_linear, probe
from attacks._matching.latents import bottlenecks, input_of
from attacks._peel import peel
from attacks._second_order.marquardt import fit
from attacks._second_order.residual import Residual
from attacks.update.r_gap import with_errors
from simulator.adversary import Knowledge
from simulator.types import Batch, Observation

READABLE = 1e-4
"""Noise of known defenses, relative to the update, up to which a mixture is read off."""

REHEARSED = 2000
"""Encodings that are simulated for the regression; a fifth of them measures its error."""

CLEAR = 1e-3
"""Probability of a class below which its gradient is not divided by it."""

SURE = 1e-3
"""Least deviation of a pixel that is assumed of what steps have found."""

ROUNDING = 1e-5
"""The same where the layers were peeled."""

Rehearse = Callable[[int], Float[Tensor, "count channel height width"]]
"""Draws this many pictures that the defense might have made."""


@dataclass(frozen=True)
class Encoding:
    """What was trained on, as it was read off.

    Attributes:
        image: flattened.
        error: its deviation from what entered the network, for each pixel.
        targets: what it was trained towards.
    """

    image: Float[Tensor, " pixels"]
    error: Float[Tensor, " pixels"]
    targets: Float[Tensor, " classes"]


def without_targets(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason why the head does not show what one record was trained towards; None if it does, but for noise."""
    if knowledge.num_examples > 1 or steps_taken(view, knowledge) > 1 or not keeps_sizes(view, knowledge):
        return "the update must be one record's gradient"
    if lossy(view, knowledge) or knowledge.training.label_smoothing or bottlenecks(knowledge.model) or dropping_layers(knowledge.model):
        return "the gradient must be whole, towards targets that are not smoothed and of a model that draws nothing"
    head = last_linear(knowledge, view.broadcast)
    if head is None or head.layer.bias is None or not bool(view.upload.update.tensors[head.bias].any()):
        return "the model must end in a linear layer with bias that learns"
    return None


def unreadable(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason why what entered the network cannot be read off; None if it can."""
    if noise_level(view, knowledge) > READABLE:
        return "the gradient must be without noise"
    return without_targets(view, knowledge)


def targets_of(view: Observation, knowledge: Knowledge) -> Float[Tensor, " classes"]:
    """What the one record was trained towards, whatever factor clipping has put before the gradient."""
    head = last_linear(knowledge, view.broadcast)
    assert head is not None
    gradient, parameters = mean_gradient(view, knowledge), view.broadcast.parameters
    features = input_of(gradient, head.name)
    softmax = (parameters[head.weight].double() @ features + parameters[head.bias].double()).softmax(0)
    bias = gradient[head.bias].double()
    scale = (bias / softmax)[softmax > CLEAR].max()  # Σy less what a class's share takes off: some class has none
    if noise_level(view, knowledge) > READABLE and not maybe_clipped(view, knowledge):
        scale = torch.ones_like(scale)
    return ((scale * softmax - bias).clamp(min=0)).float()


def read(view: Observation, knowledge: Knowledge, rehearse: Rehearse, *, seconds: float) -> Encoding:
    """The picture and the targets that entered the network."""
    deadline = time.process_time() + seconds
    towards, shape = targets_of(view, knowledge), knowledge.schema.shape
    model = chain(knowledge, view.broadcast)
    if not isinstance(model, str):
        x = peel(model, weights(knowledge, view.broadcast), with_errors(view, knowledge))[-1][1].x
        error = (x.error / model.scale.flatten()).abs().float()
        return Encoding(model.image(x.value).float().flatten(), error.clamp(min=ROUNDING), towards)
    image, error = regressed(view, knowledge, rehearse)
    labels = torch.zeros(1, dtype=torch.long)
    victim = replace(prepared(view, knowledge, Batch(torch.zeros(1, *shape), labels)), labels=towards.double()[None])  # type: ignore[arg-type]
    residual = Residual(victim, maybe_clipped(view, knowledge))
    begin = image.double().view(1, *shape)
    before = float(residual(begin).norm())
    found = fit(residual, begin, iterations=30, deadline=deadline, memory_bytes=2**29, task="candidate_identification", coarse=False)
    left = min(1.0, found.residual / before) if before else 1.0
    return Encoding(found.images.float().flatten(), (error * left).clamp(min=SURE), towards)


def regressed(view: Observation, knowledge: Knowledge, rehearse: Rehearse) -> tuple[Float[Tensor, " pixels"], Float[Tensor, " pixels"]]:
    """The picture by ridge regression on the features that the first linear layer gives away, and its error for each pixel."""
    made = rehearse(REHEARSED)
    call = first_with_bias(probe(knowledge, view.broadcast, made), view)
    features, pixels = call.inputs.flatten(1).double(), made.flatten(1).double()
    seen = input_of(mean_gradient(view, knowledge), call.name)
    held = REHEARSED // 5
    mean, middle = features[held:].mean(0), pixels[held:].mean(0)
    centered = features[held:] - mean
    gram = centered.T @ centered
    gram.diagonal().add_(1e-6 * float(gram.diagonal().mean()) + 1e-12)
    weights = torch.linalg.solve(gram, centered.T @ (pixels[held:] - middle))
    error = ((features[:held] - mean) @ weights + middle - pixels[:held]).square().mean(0).sqrt()
    return ((seen - mean) @ weights + middle).float(), error.float()


def first_with_bias(calls: list[Call], view: Observation) -> Call:
    """The first linear layer whose gradient gives its input away; there is the head at least."""
    update = view.upload.update.tensors
    return next(call for call in calls if isinstance(call.layer, nn.Linear) and call.bias in update and bool(update[call.bias].any()))
