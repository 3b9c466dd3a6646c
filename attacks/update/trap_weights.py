"""Reading out trap weights: quotients of rows that fired for one record alone, after an ACTIVE server made neurons fire rarely.

Not an attack of an honest-but-curious server: it needs ``threat.adversary = "active"`` and ``tampering.method = "trap_weights"``. A
neuron of the planted first layer fires for few records of a batch; where it fires for one, ∂W_i / ∂b_i is that record.

Source: Boenisch et al., 2023, "When the Curious Abandon Honesty", arXiv:2112.02918, section 5.
Deviations: the paper looks at all quotients with the truth beside it; here records are told from mixtures by their own gradient
    (:func:`attacks.update.linear_leak.explains`), of rows that agree first, then of rows on their own. A record that is proven is taken out
    of the gradient, which leaves other neurons with one record, and so on: peeling, as of a sparse code. The certificate is that of
    ``linear_leak``. What is left over is answered by the quotients farthest from all that is known, where breaching keeps the rows of
    smallest mean. Measured, without public records: claims active-trap-8 and -20, beside ``linear_leak`` on an honest
    model, active-none-8 and -20; beside breaching's choice of rows: ``tests/attacks/test_active.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attacks._gradient import maybe_clipped, mean_gradient, several_steps, unusable
from attacks._layers import Affine, Call, all_buffers, first_linear
from attacks._rest import placed
from attacks.update.imprint import not_active
from attacks.update.labels import known_or_recovered
from attacks.update.linear_leak import (
    PROOF,
    Candidate,
    as_images,
    explains,
    factors,
    isolated_rows,
    one_record,
    proven,
    rank_without,
)  # fmt: skip
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.training import per_example_gradients
from simulator.types import Batch, Observation, Tensors

SPENT = 1e-5
"""A row whose ∂b is below this fraction of the largest one before peeling holds rounding."""

BOX = 1e-3
"""How far outside [0, 1] rounding may take a pixel of a record."""

NEAR = 1e-3
"""Pictures whose pixels differ by less than this, root mean square, are the same guess."""


def trapped(view: Observation, knowledge: Knowledge) -> tuple[Call, Affine] | str:
    """The first layer, if every row's weights sum to less than 0 on the pixels, and the map that feeds it; else why not."""
    found = first_linear(knowledge, view.broadcast)
    if isinstance(found, str):
        return found
    layer, affine = found
    sums = (view.broadcast.parameters[layer.weight] * affine.scale).sum(1)
    if not isinstance(layer.layer, nn.Linear) or not bool((sums < 0).all()):
        return "the broadcast model must hold trap weights, got other ones. Set tampering.method = 'trap_weights'"
    return found


def agreeing(rest: Tensors, layer: Call, affine: Affine, view: Observation, knowledge: Knowledge, tolerance: float) -> Iterator[Candidate]:
    """Records that explain rows of what is left of the gradient which agree on them."""
    space = factors(rest[layer.weight])
    for x, rows in isolated_rows(rest[layer.weight], rest[layer.bias], space, tolerance):
        found = explains(as_images(affine.undo(x[None]), knowledge)[0], rows, rest, space, layer, view, knowledge)
        if found is not None:
            yield found


def single(rest: Tensors, layer: Call, affine: Affine, view: Observation, knowledge: Knowledge) -> Candidate | None:
    """A record that one row alone shows, where no clipping hides the scale of what flows back.

    The quotient of a row is in the span of the rows whatever it is a mixture of. It is a record if its own gradient has the size that
    was seen on that row, and if ∂W without its outer product has a rank that is lower by one: what flows back from a mixture to all the
    other neurons is not in the span of the columns.
    """
    weight, bias = rest[layer.weight], rest[layer.bias]
    space, alive = factors(weight), bias.nonzero().flatten()
    quotients = affine.undo(weight[alive] / bias[alive, None])
    alive = alive[inside(quotients)]
    images, classes = as_images(quotients[inside(quotients)], knowledge), knowledge.schema.num_classes
    for image, row in zip(images, alive, strict=True):
        every = Batch(image.expand(classes, *image.shape), torch.arange(classes))
        alone = own_gradients(every, layer, view, knowledge)
        difference = (alone[layer.bias][:, row] / knowledge.num_examples / bias[row] - 1).abs()
        label = int(difference.argmin())
        x, _ = one_record(alone[layer.weight][label], alone[layer.bias][label])
        signal = alone[layer.bias][label] / knowledge.num_examples
        if difference[label] < PROOF and rank_without(space, signal, x[0]) == len(space.values) - 1:
            return Candidate(image, label, 1.0)
    return None


def own_gradients(batch: Batch, layer: Call, view: Observation, knowledge: Knowledge) -> dict[str, Tensor]:
    """Each record's own gradient of the first layer, in float64."""
    buffers, smoothing = all_buffers(knowledge.model, view.broadcast), knowledge.training.label_smoothing
    names = (layer.weight, layer.bias)
    alone = per_example_gradients(knowledge.model, view.broadcast.parameters, buffers, batch, label_smoothing=smoothing, names=names)
    return {name: alone[name].double() for name in names}


def inside(quotients: Float[Tensor, "row pixels"]) -> Bool[Tensor, " row"]:
    """Which quotients are pictures in [0, 1], up to rounding."""
    return ((quotients > -BOX) & (quotients < 1 + BOX)).all(1)


def remainder(pool: Float[Tensor, "row pixels"], known: list[Tensor], wanted: int, flat: Float[Tensor, " pixels"]) -> list[Tensor]:
    """Fill up with the quotients farthest from what is already there, mixtures, not records; then with the flattest picture."""
    chosen = list(known)
    while len(chosen) < wanted and len(pool):
        distance = torch.cdist(pool, torch.stack(chosen)).min(1).values if chosen else torch.ones(len(pool))
        if distance.max() < NEAR * pool.shape[1] ** 0.5:
            break
        chosen.append(pool[int(distance.argmax())])
    return chosen + [flat] * (wanted - len(chosen))


def peel(
    gradient: Tensors, layer: Call, affine: Affine, view: Observation, knowledge: Knowledge, tolerance: float
) -> tuple[list[Candidate], Tensors]:
    """The records that are proven one after another, and what they leave of the first layer's gradient."""
    rest = {name: gradient[name].double() for name in (layer.weight, layer.bias)}
    largest, scaled = rest[layer.bias].abs().max(), maybe_clipped(view, knowledge)
    exact: list[Candidate] = []
    while len(exact) < knowledge.num_examples:
        kept = proven([*exact, *agreeing(rest, layer, affine, view, knowledge, tolerance)], scaled=scaled)
        fresh = [candidate for candidate in kept if not any(candidate is known for known in exact)]
        if not fresh and not scaled and (alone := single(rest, layer, affine, view, knowledge)) is not None:
            fresh = [alone]
        fresh = fresh[: knowledge.num_examples - len(exact)]
        if not fresh:
            break
        for candidate in fresh:
            record = Batch(candidate.image[None], torch.tensor([candidate.label]))
            own, share = own_gradients(record, layer, view, knowledge), candidate.factor / knowledge.num_examples
            rest = {name: tensor - share * own[name][0] for name, tensor in rest.items()}
        exact += fresh
        spent = rest[layer.bias].abs() < SPENT * largest
        rest = {name: tensor.masked_fill(spent.view(-1, *[1] * (tensor.dim() - 1)), 0) for name, tensor in rest.items()}
    return exact, rest


@register("attacks", "trap_weights")
@dataclass(frozen=True)
class TrapWeights:
    """ACTIVE server only: reads records out of the rarely firing neurons that it planted (Curious Abandon Honesty), by peeling.

    Attributes:
        tolerance: largest relative difference between two quotients of the same record.
    """

    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}. Use 1e-4 for float32 updates.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse an honest-but-curious server, a model without trap weights, and deltas of several steps."""
        if (reason := not_active(knowledge, "trap_weights") or unusable(view, knowledge)) is not None:
            return reason
        found = trapped(view, knowledge)
        return found if isinstance(found, str) else several_steps(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Divide rows, prove records, take them out, again."""
        start = time.perf_counter()
        found = trapped(view, knowledge)
        if isinstance(found, str):
            raise ValueError(found)
        layer, affine = found
        records, labels = knowledge.num_examples, known_or_recovered(view, knowledge)
        exact, rest = peel(mean_gradient(view, knowledge), layer, affine, view, knowledge, self.tolerance)
        weight, bias = rest[layer.weight], rest[layer.bias]
        strong = (bias.abs() > 0.01 * bias.abs().max()) & (bias != 0)
        quotients = affine.undo(weight[strong] / bias[strong, None])
        flat = torch.full(weight.shape[1:], 0.5) if knowledge.public is None else knowledge.public.inputs.mean(0).flatten()
        known = [candidate.image.flatten().double() for candidate in exact]
        guesses = remainder(quotients[inside(quotients)], known, records, flat.double())
        certificate = ("isolated rows" if affine.whole else "",) * len(exact) + ("",) * (records - len(exact))
        named, order = placed([candidate.label for candidate in exact], labels, knowledge)
        return Reconstruction(
            as_images(torch.stack(guesses), knowledge)[order],
            named,
            1 - len(exact) / records,
            certificate=tuple(certificate[i] for i in order.tolist()),
            seconds=time.perf_counter() - start,
            converged=True,
        )
