"""Exact recovery through a first linear layer with bias.

For a layer z = Wx + b every record adds δ·xᵀ to ∂W and δ to ∂b. One record: x = ∂Wᵀ∂b / ‖∂b‖², the least-squares solution of
∂W = ∂b·xᵀ. Several records: a neuron that only one of them activates holds that record alone, as ∂W_i / ∂b_i; when two neurons
agree on the quotient they hold the same single record, or the same mixture; the record's own gradient tells which.

Source: Phong et al., 2017, "Privacy-preserving deep learning: revisited and enhanced", section 3 (one record); Boenisch et al., 2021,
    arXiv:2112.02918, section 4 (neurons activated by one record).
Deviations: least squares over the rows in place of one row; certificates. Neither costs quality.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks._gradient import mean_gradient, not_finite, steps_taken
from attacks._layers import Call, all_buffers, first_linear
from attacks.update.labels import known_or_recovered
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.training import per_example_gradients
from simulator.types import Batch, Observation

PROOF = 1e-3
"""Relative difference up to which a record explains its rows; chosen, not measured."""


def one_record(weight: Float[Tensor, "neurons inputs"], bias: Float[Tensor, " neurons"]) -> tuple[Float[Tensor, "1 inputs"], float]:
    """The least-squares x in ∂W = ∂b·xᵀ, and the relative residual; 0 means that ∂W has rank one."""
    x = weight.T @ bias / bias.square().sum()
    residual = (weight - torch.outer(bias, x)).norm() / weight.norm()
    return x[None], float(residual)


def isolated_rows(
    weight: Float[Tensor, "neurons inputs"], bias: Float[Tensor, " neurons"], tolerance: float
) -> list[tuple[Float[Tensor, " inputs"], Int[Tensor, " rows"]]]:
    """Quotients ∂W_i/∂b_i on which at least two neurons agree to a relative ``tolerance``, with the neurons; most frequent first."""
    alive = (bias.abs() > 1e-6 * bias.abs().max()).nonzero().flatten()
    quotients = weight[alive] / bias[alive, None]
    agree = torch.cdist(quotients, quotients, compute_mode="donot_use_mm_for_euclid_dist") <= tolerance * quotients.norm(dim=1)[:, None]
    found: list[tuple[Tensor, Tensor]] = []
    free = torch.ones(len(alive), dtype=torch.bool)
    for place in range(len(alive)):
        members = agree[place] & free
        if free[place] and members.sum() >= 2:
            rows = alive[members]
            found.append((one_record(weight[rows], bias[rows])[0][0], rows))
        free &= ~members
    return sorted(found, key=lambda item: -len(item[1]))


def proven_label(
    image: Float[Tensor, "channel height width"],
    rows: Int[Tensor, " rows"],
    bias: Float[Tensor, " neurons"],
    layer: Call,
    view: Observation,
    knowledge: Knowledge,
) -> int | None:
    """The label with which ``image`` alone explains ∂b on its rows; None if no label does.

    Two neurons also agree on a mixture of records when the signals that flow back to them are parallel, as for records of one
    class. A mixture's own gradient is another one: this is what tells it from a record.
    """
    model, buffers = knowledge.model, all_buffers(knowledge.model, view.broadcast)
    if model.training and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return None  # a record has no gradient of its own
    seen = bias[rows] * knowledge.num_examples
    every = Batch(image.expand(knowledge.schema.num_classes, *image.shape), torch.arange(knowledge.schema.num_classes))
    alone = per_example_gradients(model, view.broadcast.parameters, buffers, every)[layer.bias].double()[:, rows]
    difference = (alone - seen).norm(dim=1) / seen.norm()
    return int(difference.argmin()) if difference.min() < PROOF else None


def best_guesses(quotients: Float[Tensor, "rows inputs"], known: list[Tensor], wanted: int) -> list[Tensor]:
    """Fill up with the quotients farthest from all that is already there: mixtures, not records."""
    chosen = list(known)
    while len(chosen) < wanted:
        if not chosen:
            chosen.append(quotients[0])
            continue
        distance = torch.cdist(quotients, torch.stack(chosen)).min(1).values
        chosen.append(quotients[int(distance.argmax())])
    return chosen[:wanted]


def with_found_first(found: list[int], labels: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Labels proven for the first records, then what is left of the recovered ones."""
    rest = labels.tolist()
    for label in found:
        rest.remove(label if label in rest else rest[-1])
    return torch.tensor(found + rest)


def as_images(rows: Float[Tensor, "batch pixels"], knowledge: Knowledge) -> Float[Tensor, "batch channel height width"]:
    """Flat rows as pictures in [0, 1]."""
    return torch.nan_to_num(rows, nan=0.5).clamp(0, 1).float().view(len(rows), *knowledge.schema.shape)


@register("attacks", "linear_leak")
@dataclass(frozen=True)
class LinearLeak:
    """Exact division through a first linear layer: one record always, of several those that own a neuron.

    Attributes:
        tolerance: largest relative difference between two quotients of the same record.
    """

    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}. Use 1e-4 for float32 updates.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse models that do not start with a linear layer, and deltas of several steps."""
        found = first_linear(knowledge, view.broadcast)
        if isinstance(found, str):
            return found
        if steps_taken(view, knowledge) > 1:
            return "the update must be a gradient or the delta of one step, got several local steps"
        return not_finite(view)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Divide ∂W by ∂b and undo the normalization."""
        start = time.perf_counter()
        found = first_linear(knowledge, view.broadcast)
        if isinstance(found, str):
            raise ValueError(found)
        layer, affine = found
        gradient = mean_gradient(view, knowledge)
        weight, bias = gradient[layer.weight].double(), gradient[layer.bias].double()
        records, labels = knowledge.num_examples, known_or_recovered(view, knowledge)

        x, residual = one_record(weight, bias)
        if records == 1:
            image = as_images(affine.undo(x), knowledge)
            proof = "rank one" if residual < self.tolerance else ""
            return Reconstruction(image, labels, residual, certificate=(proof,), seconds=time.perf_counter() - start)

        proven: list[Tensor] = []
        found_labels: list[int] = []
        for x_row, rows in isolated_rows(weight, bias, self.tolerance):
            image = as_images(affine.undo(x_row[None]), knowledge)[0]
            label = proven_label(image, rows, bias, layer, view, knowledge)
            if label is not None and len(proven) < records:
                proven.append(image.flatten().double())
                found_labels.append(label)
        strong = bias.abs() > 0.01 * bias.abs().max()
        quotients = affine.undo(weight[strong] / bias[strong, None])
        inside = ((quotients > -1e-3) & (quotients < 1 + 1e-3)).all(1)
        guesses = best_guesses(quotients[inside] if inside.any() else quotients.clamp(0, 1), proven, records)
        certificate = ("isolated rows",) * len(proven) + ("",) * (records - len(proven))
        return Reconstruction(
            as_images(torch.stack(guesses), knowledge),
            with_found_first(found_labels, labels) if knowledge.labels is None else labels,
            residual,
            certificate=certificate,
            seconds=time.perf_counter() - start,
        )
