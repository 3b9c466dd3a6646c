"""Exact recovery through a first linear layer with bias.

For a layer z = Wx + b every record adds δ·xᵀ to ∂W and δ to ∂b. One record: x = ∂Wᵀ∂b / ‖∂b‖², the least-squares solution of
∂W = ∂b·xᵀ. Several records: a neuron that only one of them activates holds that record alone, as ∂W_i / ∂b_i; when two neurons
agree on the quotient they hold the same single record, because quotients of mixtures differ.

Source: Phong et al., 2017, "Privacy-preserving deep learning: revisited and enhanced", section 3 (one record); Boenisch et al., 2021,
    arXiv:2112.02918, section 4 (neurons activated by one record).
Deviations: least squares over the rows in place of one row; certificates. Neither costs quality.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._gradient import mean_gradient, not_finite, steps_taken
from attacks._layers import first_linear
from attacks.update.labels import known_or_recovered
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation


def one_record(weight: Float[Tensor, "neurons inputs"], bias: Float[Tensor, " neurons"]) -> tuple[Float[Tensor, "1 inputs"], float]:
    """The least-squares x in ∂W = ∂b·xᵀ, and the relative residual; 0 means that ∂W has rank one."""
    x = weight.T @ bias / bias.square().sum()
    residual = (weight - torch.outer(bias, x)).norm() / weight.norm()
    return x[None], float(residual)


def isolated_rows(
    weight: Float[Tensor, "neurons inputs"], bias: Float[Tensor, " neurons"], tolerance: float
) -> list[Float[Tensor, " inputs"]]:
    """Quotients ∂W_i/∂b_i on which at least two neurons agree to a relative ``tolerance``; most frequent first."""
    alive = (bias.abs() > 1e-6 * bias.abs().max()).nonzero().flatten()
    alive = alive[bias[alive].abs().argsort(descending=True)]
    weight, bias = weight[alive], bias[alive]
    quotients = weight / bias[:, None]
    agree = torch.cdist(quotients, quotients, compute_mode="donot_use_mm_for_euclid_dist") <= tolerance * quotients.norm(dim=1)[:, None]
    found: list[tuple[int, Tensor]] = []
    free = torch.ones(len(alive), dtype=torch.bool)
    for row in range(len(alive)):
        members = agree[row] & free
        if free[row] and members.sum() >= 2:
            found.append((int(members.sum()), one_record(weight[members], bias[members])[0][0]))
        free &= ~members
    return [x for _, x in sorted(found, key=lambda item: -item[0])]


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


@register("attacks", "linear_leak")
@dataclass(frozen=True)
class LinearLeak:
    """Exact division through a first linear layer: one record always, of several those that own a neuron.

    Attributes:
        tolerance: largest relative difference between two quotients of the same record; float32 leaves about 1e-6.
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
            rows, certified = x, ["rank one"] if residual < self.tolerance else [""]
        else:
            # The rows of a softmax layer sum to zero and are touched by every record: agreement there proves nothing. Neither does
            # it with two classes, where the signals of all records that flow back are multiples of one vector.
            generic = layer.layer.out_features != knowledge.schema.num_classes and knowledge.schema.num_classes > 2
            isolated = isolated_rows(weight, bias, self.tolerance)[:records] if generic else []
            strong = bias.abs() > 0.01 * bias.abs().max()
            quotients = affine.undo(weight[strong] / bias[strong, None])
            inside = ((quotients > -1e-3) & (quotients < 1 + 1e-3)).all(1)
            pool = (affine.scale * (quotients[inside] if inside.any() else quotients.clamp(0, 1))) + affine.offset
            rows = torch.stack(best_guesses(pool, isolated, records))
            certified = ["isolated rows"] * len(isolated) + [""] * (records - len(isolated))
        inputs = torch.nan_to_num(affine.undo(rows), nan=0.5).clamp(0, 1).float().view(records, *knowledge.schema.shape)
        return Reconstruction(inputs, labels, residual, certificate=tuple(certified), seconds=time.perf_counter() - start)
