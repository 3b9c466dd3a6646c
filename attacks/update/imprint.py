"""Reading out an imprint: differences of the gradients of neighboring neurons, after an ACTIVE server planted thresholds.

Not an attack of an honest-but-curious server: it needs ``threat.adversary = "active"`` and ``tampering.method = "imprint"``. All rows
of the planted first layer measure the same number of a record, here its brightness, each against its own threshold, and what flows
back to every neuron that fires is the same. So ∂W_i − ∂W_{i+1} and ∂b_i − ∂b_{i+1} are sums over the records between thresholds i and
i + 1 alone, and where there is one, their quotient is that record.

Source: Fowl et al., 2022, "Robbing the Fed", arXiv:2110.13057, section 3.
Deviations: the paper finds what is right with the truth beside it; here a record is certified, in one of two ways. As many gaps between
    thresholds are occupied as there are records, so that each holds one, and the records' own gradient is the observed one. Or, with
    few records too many, the gradient of the head says so of a gap (:func:`kinks`). A gap counts as occupied above the rounding of the
    uploaded number format, in place of ≠ 0, which rounding fills. If more are, as under noise, those with the largest signal are answered
    and none is certified. Measured: claims active-imprint-8 and -20, and active-imprint-prior-8 and -20.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attacks._gradient import maybe_clipped, mean_gradient, several_steps, unusable
from attacks._layers import Affine, Call, all_buffers, first_linear, probe
from attacks._rest import placed
from attacks.update.labels import known_or_recovered
from attacks.update.linear_leak import as_images
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.training import mean_gradient as batch_gradient
from simulator.training import per_example_gradients
from simulator.types import Batch, Observation, Tensors

ROUNDING = 64.0
"""A difference of rows is a signal above this many units in the last place of the largest gradient of a bias."""

BOX = 1e-3
"""How far outside [0, 1] rounding may take a pixel of a record that is alone in its gap."""

PROOF = 1e-4
"""Relative difference up to which the records' own gradient is the observed one."""

KINK, CROWD = 0.05, 0.7
"""How far a kink may be from a record's own, relatively, and a bound on how many records a gap may hold; see :func:`alone`."""


def not_active(knowledge: Knowledge, method: str) -> str | None:
    """The reason why an attack on a tampered model is none of this adversary's."""
    if knowledge.adversary == "active":
        return None
    return (
        f"the adversary must be active, since only that one plants what is read out here, got {knowledge.adversary}. "
        f"Set threat.adversary = 'active' and tampering.method = {method!r}"
    )


def planted(view: Observation, knowledge: Knowledge) -> tuple[Call, Affine] | str:
    """The first layer, if its rows are parallel and the columns behind them equal, and the map that feeds it; else why not."""
    found = first_linear(knowledge, view.broadcast)
    if isinstance(found, str):
        return found
    rows = view.broadcast.parameters[found[0].weight].double()
    calls = probe(knowledge, view.broadcast, torch.full((1, *knowledge.schema.shape), 0.5))
    following = view.broadcast.parameters[calls[1].weight].double() if len(calls) > 1 and isinstance(calls[1].layer, nn.Linear) else None
    equal = following is not None and following.shape[1] == len(rows) and bool((following == following[:, :1]).all())
    if len(rows) < 2 or not equal or not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-5):
        return "the broadcast model must hold an imprint, got other weights. Set tampering.method = 'imprint'"
    return found


def brightness(images: Float[Tensor, "batch pixels"], row: Float[Tensor, " pixels"], affine: Affine) -> Float[Tensor, " batch"]:
    """What the planted row measures, before its bias: an affine function of the brightness."""
    return (images * affine.scale.double() + affine.offset.double()) @ row


def signals_of(images: Float[Tensor, "batch channel height width"], layer: Call, view: Observation, knowledge: Knowledge) -> Tensor:
    """For each image and label, what flows back to a neuron that fires, over the number of records; (image, class)."""
    classes = knowledge.schema.num_classes
    every = Batch(images.repeat_interleave(classes, 0), torch.arange(classes).repeat(len(images)))
    buffers, smoothing = all_buffers(knowledge.model, view.broadcast), knowledge.training.label_smoothing
    alone = per_example_gradients(knowledge.model, view.broadcast.parameters, buffers, every, label_smoothing=smoothing)
    each = alone[layer.bias].double()
    strongest = each.gather(1, each.abs().argmax(1, keepdim=True))
    return strongest.view(len(images), classes) / knowledge.num_examples


def reproduces(images: Tensor, labels: Int[Tensor, " batch"], gradient: Tensors, view: Observation, knowledge: Knowledge) -> bool:
    """Whether the gradient of these records is the observed one, in every tensor together."""
    buffers, smoothing = all_buffers(knowledge.model, view.broadcast), knowledge.training.label_smoothing
    own, _ = batch_gradient(knowledge.model, view.broadcast.parameters, buffers, Batch(images, labels), label_smoothing=smoothing)
    error = sum(float((own[name] - gradient[name]).double().square().sum()) for name in gradient)
    return error <= PROOF**2 * sum(float(tensor.double().square().sum()) for tensor in gradient.values())


def kinks(
    gradient: Float[Tensor, "class neuron"],
    own: Float[Tensor, "gap class neuron"],
    thresholds: Float[Tensor, " neuron"],
    gaps: Int[Tensor, " gap"],
    occupied: Int[Tensor, " occupied"],
) -> Bool[Tensor, " gap"]:
    """Where the gradient of the layer behind, as a function of the threshold, breaks as it would for the one record alone.

    Neuron j puts out max(0, m_r − t_j) for record r, so that column j of that gradient is Σ g_r·max(0, m_r − t_j): linear in t_j but
    for a kink in each occupied gap. Where the gaps on both sides of a gap are empty, the two columns on each side determine the kink.

    Args:
        gradient: of the second layer, columns in the order of the thresholds.
        own: the same of the record that each gap is believed to hold.
        thresholds: ascending.
        gaps: number of the threshold below each gap.
        occupied: the gaps that hold any record.
    """
    taken = torch.zeros(len(thresholds) + 2, dtype=torch.bool)
    taken[occupied] = True
    past = torch.cat([gradient, torch.zeros(len(gradient), 2, dtype=gradient.dtype)], 1)
    step = thresholds[-1] - thresholds[-2]
    limits = torch.cat([thresholds, thresholds[-1] + step * torch.tensor([1.0, 2.0], dtype=thresholds.dtype)])
    fits = torch.zeros(len(gaps), dtype=torch.bool)
    for place, gap in enumerate(gaps.tolist()):
        if gap == 0 or taken[gap - 1] or taken[gap + 1]:
            continue
        right, slope = past[:, gap + 1], (past[:, gap + 2] - past[:, gap + 1]) / (limits[gap + 2] - limits[gap + 1])
        left = torch.tensor([gap - 1, gap])
        kink = past[:, left] - (right[:, None] + slope[:, None] * (limits[left] - limits[gap + 1]))
        expected = own[place][:, left]
        fits[place] = bool(((kink - expected).norm(dim=0) <= KINK * expected[:, 0].norm()).all())
    return fits


def alone(
    images: Float[Tensor, "gap channel height width"],
    labels: Int[Tensor, " gap"],
    gradient: Tensors,
    order: Int[Tensor, " neuron"],
    gaps: Int[Tensor, " gap"],
    occupied: Int[Tensor, " occupied"],
    view: Observation,
    knowledge: Knowledge,
) -> Bool[Tensor, " gap"]:
    """Which gaps are proven to hold one record, by the kink in the gradient of the head.

    In a gap with its lower neighbor empty every record reaches 1 to 2 times the gap's width above the threshold below that neighbor.
    So n records that are not one have a kink which differs from any single record's by at least 1 − p·(2n − 1) gap widths in the
    entry of one of their labels, where p is the largest probability that the model gives to a class. With p·(2n − 1) ≤ CROWD that
    is far above what is tolerated. n is at most what is left when every other occupied gap holds one.
    """
    calls = probe(knowledge, view.broadcast, images)
    head, none = calls[-1], torch.zeros(len(gaps), dtype=torch.bool)
    most = float(head.outputs.softmax(1).max())
    if len(calls) != 2 or most * (2 * (knowledge.num_examples - len(occupied) + 1) - 1) > CROWD:
        return none
    buffers, smoothing = all_buffers(knowledge.model, view.broadcast), knowledge.training.label_smoothing
    batch = Batch(images, labels)
    each = per_example_gradients(knowledge.model, view.broadcast.parameters, buffers, batch, label_smoothing=smoothing)
    own = each[head.weight].double()[:, :, order] / knowledge.num_examples
    thresholds = -view.broadcast.parameters[calls[0].bias].double()[order]
    return kinks(gradient[head.weight].double()[:, order], own, thresholds, gaps, occupied)


@register("attacks", "imprint")
@dataclass(frozen=True)
class Imprint:
    """ACTIVE server only: reads records out of the thresholds that it planted in the first layer (Robbing the Fed)."""

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse an honest-but-curious server, a model without an imprint, and deltas of several steps."""
        if (reason := not_active(knowledge, "imprint") or unusable(view, knowledge)) is not None:
            return reason
        found = planted(view, knowledge)
        return found if isinstance(found, str) else several_steps(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Divide the differences of neighboring rows."""
        start = time.perf_counter()
        found = planted(view, knowledge)
        if isinstance(found, str):
            raise ValueError(found)
        layer, affine = found
        gradient, records = mean_gradient(view, knowledge), knowledge.num_examples
        row, thresholds = view.broadcast.parameters[layer.weight].double()[0], -view.broadcast.parameters[layer.bias].double()
        order = thresholds.argsort()
        weight, bias = gradient[layer.weight].double()[order], gradient[layer.bias].double()[order]
        weight_gap = weight - torch.cat([weight[1:], torch.zeros_like(weight[:1])])
        bias_gap = bias - torch.cat([bias[1:], torch.zeros_like(bias[:1])])
        precision = max(torch.finfo(tensor.dtype).eps for tensor in view.upload.update.tensors.values())
        occupied = (bias_gap.abs() > ROUNDING * precision * bias.abs().max()).nonzero().flatten()
        one_each = len(occupied) == records
        gaps = occupied[bias_gap[occupied].abs().argsort(descending=True)][:records]

        exact = affine.undo(weight_gap[gaps] / bias_gap[gaps, None])
        edges = torch.cat([thresholds[order], torch.tensor([torch.inf], dtype=torch.float64)])
        measured, slack = brightness(exact, row, affine), BOX * (edges[-2] - edges[0])
        inside = ((exact > -BOX) & (exact < 1 + BOX)).all(1)
        inside &= (measured > edges[gaps] - slack) & (measured < edges[gaps + 1] + slack)
        images, labels = as_images(exact, knowledge), known_or_recovered(view, knowledge)
        mine, certificate = labels[:0], [""] * records
        if len(images):
            difference = (signals_of(images, layer, view, knowledge) / bias_gap[gaps, None] - 1).abs()
            mine = difference.argmin(1)
            whole = one_each and bool(inside.all()) and reproduces(images, mine, gradient, view, knowledge)
            if whole:
                certificate = ["one record in each gap"] * records
            elif len(occupied) <= records and not maybe_clipped(view, knowledge):
                sure = inside & (difference.min(1).values < PROOF)
                sure &= alone(images, mine, gradient, order, gaps, occupied, view, knowledge)
                certificate[: len(images)] = ["alone in its gap" if proof else "" for proof in sure.tolist()]
        named, places = placed(mine.tolist(), labels, knowledge)
        rest = torch.full((records - len(images), *knowledge.schema.shape), 0.5)
        if knowledge.public is not None:
            rest = knowledge.public.inputs.mean(0).expand_as(rest)
        return Reconstruction(
            torch.cat([images, rest])[places],
            named,
            float(1 - inside.sum() / records),
            certificate=tuple(certificate[i] for i in places.tolist()) if affine.whole else ("",) * records,
            seconds=time.perf_counter() - start,
            converged=True,
        )
