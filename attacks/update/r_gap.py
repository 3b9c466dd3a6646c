"""R-GAP: one record from a chain of convolutional and linear layers, layer by layer, by linear systems alone.

Source: Zhu and Blaschko, 2021, arXiv:2010.07733 (R-GAP), algorithm 1: forward and gradient constraints of a layer, solved together; its
    rank analysis decides what is refused.
Deviations: cross-entropy over any number of classes in place of a logistic loss, from the bias of the head, whose gradient is that of the
    logits. Each equation is weighed by its error, which rounding starts and every layer passes on; what no equation tells is filled in
    by smoothness. A ReLU's dead outputs are no equations (the paper takes activations that can be undone everywhere). Certificates.
    It starts at the last linear layer with bias from which down all gradients are what the client computed: of such a layer the bias'
    gradient is what came back, and x = ∂Wᵀ∂b/‖∂b‖² its input (Phong et al., 2018), whatever a defense did to the layers behind. The
    certificate then compares all tensors that no defense changed, with a bottleneck's noise read off. Soteria and PRECODE cost nothing
    (tests/defenses/test_heuristics_solved.py: 10 of 10 records proven at 150 dB for each of three strengths, as without them).
    A frozen layer has W·x = z − b alone. Where a first layer of up to 1024 inputs has too few equations, the range of pixels and the
    signs of dead outputs fill in (attacks._bounds): same cnn, first layer frozen, 10 of 10 proven at 134 dB.
    Measured, CIFAR-10 pictures: claims r-gap-lenet and r-gap-cnn (exact and proven) and r-gap-relu (too few equations: a guess, never
    certified). Smooth activations whose errors grow most, tanh among them, and deltas: tests/attacks/test_r_gap.py.
    Norms, pooling, branches and dropout are refused by the name of their layer.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace

import torch

from attacks._bounds import bounded
from attacks._chain import Chain, chain, weights
from attacks._dropout import layers as dropouts
from attacks._gradient import maybe_clipped, mean_gradient, reach, several_steps, unusable
from attacks._intact import intact
from attacks._matching.latents import prepare_told
from attacks._matching.priors import box
from attacks._matching.simulate import Victim, flat
from attacks._peel import Known, peel
from attacks._second_order.proof import RADIUS
from attacks._second_order.residual import Residual
from attacks._settings import must_be_positive
from attacks.update.labels import known_or_recovered, unrecoverable
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

PROOF, BOUNDED = "layer by layer", "layer by layer, in bounds"

MARGIN = 3.0
"""Root mean square error that is allowed over the one that is expected."""

MISFIT = 4.0
"""Residuals' mean square over the expected, beyond which a layer's equations do not hold."""

EXPLAINED = 1e-4
"""Relative residual of the whole update, simulated from the answer, up to which the answer's expected errors are the explanation."""

LARGEST = 8192
"""Inputs of a convolution up to which its system takes seconds."""


def with_errors(view: Observation, knowledge: Knowledge) -> dict[str, Known]:
    """The gradient and the rounding of each of its numbers; a delta is a difference of rounded parameters."""
    known: dict[str, Known] = {}
    recipe, sent = knowledge.training, view.upload.update.tensors
    for name, tensor in mean_gradient(view, knowledge).items():
        value = tensor.double()
        number = torch.finfo(sent[name].dtype)
        error = number.eps * value.abs().clamp(min=number.smallest_normal)
        if view.upload.update.kind == "delta":
            parameter = view.broadcast.parameters[name].double().abs()
            error = error + torch.finfo(torch.float32).eps * parameter / reach(recipe, 1)
        known[name] = Known(value, error)
    return known


def compared(view: Observation, knowledge: Knowledge) -> Victim:
    """The upload as far as an exact answer must explain it: tensors that defenses left alone, the noise of bottlenecks in place."""
    victim, whole = prepare_told(view, knowledge), intact(view, knowledge)
    names = tuple(name for name in victim.names if name in whole)
    return replace(victim, names=names, target=flat(view.upload.update.tensors, names).detach().float())


@register("attacks", "r_gap")
@dataclass(frozen=True)
class RGap:
    """One image, exactly, from the linear equations that its gradient makes of every layer's input, from the last layer to the first.

    Attributes:
        seconds: CPU time for the layers' systems; an image that they do not end in stays gray.
    """

    seconds: float = 20.0

    def __post_init__(self) -> None:
        must_be_positive(self, "seconds")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse batches, deltas of several steps, dropout, and models that are no chain or have too few equations at a layer."""
        reason = unusable(view, knowledge) or several_steps(view, knowledge) or unrecoverable(view, knowledge)
        if reason is not None:
            return reason
        if knowledge.num_examples != 1:
            return f"the batch must be 1 record, got {knowledge.num_examples}: a layer's gradient is then a sum over records"
        if dropouts(knowledge.model):
            return "no unit must be dropped, got dropout, which hides what its layer gave. Use dlg, which optimizes the masks along"
        found = chain(knowledge, view.broadcast, intact=intact(view, knowledge))
        if isinstance(found, str):
            return found
        large = next((layer for layer in found.layers if not layer.linear and layer.unknowns > LARGEST), None)
        if large is not None:
            return f"a convolution must take ≤ {LARGEST} values, got {large.unknowns} in {large.call.name}: its system is too large"
        head = found.layers[-1].call.bias
        if not bool(view.upload.update.tensors[head].any()):
            return f"the gradient of {head} must not be zero everywhere, got nothing to peel"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Peel all layers; simulate the update from the answer; certify what its expected error and that residual allow."""
        start = time.perf_counter()
        model = chain(knowledge, view.broadcast, intact=intact(view, knowledge))
        if isinstance(model, str):
            raise ValueError(model)
        deadline = time.process_time() + self.seconds
        try:
            found = peel(model, weights(knowledge, view.broadcast), with_errors(view, knowledge), deadline=deadline)
        except TimeoutError:
            gray, labels = torch.full((1, *knowledge.schema.shape), 0.5), known_or_recovered(view, knowledge)
            return Reconstruction(gray, labels, math.inf, certificate=("",), seconds=time.perf_counter() - start, converged=False)
        for layer, peeled in found:
            if peeled.short:
                logging.getLogger("fedpeek").info(
                    "r_gap: the input of %s has %d values more than equations, the rest is a guess", layer.call.name, peeled.short
                )
        x = found[-1][1].x
        image = torch.nan_to_num(model.image(x.value), nan=0.5)
        whole, holds = not any(peeled.short for _, peeled in found), all(peeled.misfit <= MISFIT for _, peeled in found)
        determined, proof = whole and within(model, image, x), PROOF
        first = found[-1][1].system
        filled = None if first is None else bounded(model, first, deadline=deadline)
        if filled is not None:
            image, proof = filled.pixels.view(image.shape), BOUNDED
            whole = not any(peeled.short for _, peeled in found[:-1]) and math.isfinite(filled.radius)
            determined = whole and filled.radius <= RADIUS * math.sqrt(image.numel())
        residual = float(Residual(compared(view, knowledge), maybe_clipped(view, knowledge))(image).norm())
        certain = determined and holds and residual <= EXPLAINED
        return Reconstruction(
            inputs=box(image).float(),
            labels=known_or_recovered(view, knowledge),
            objective=residual,
            certificate=(proof if certain else "",),
            seconds=time.perf_counter() - start,
            converged=whole,
        )


def within(model: Chain, image: torch.Tensor, x: Known) -> bool:
    """Whether the image is a picture, and its expected error far below the one that counts as exact."""
    error = float((x.error / model.scale.flatten()).square().mean().sqrt())
    inside = bool(((image > -RADIUS) & (image < 1 + RADIUS)).all())
    return inside and math.isfinite(error) and MARGIN * error <= RADIUS
