"""Exact recovery through a first linear layer with bias.

For a layer z = Wx + b every record adds δ·xᵀ to ∂W and δ to ∂b. One record: x = ∂Wᵀ∂b / ‖∂b‖², the least-squares solution of
∂W = ∂b·xᵀ. Several records: a neuron that only one of them activates holds that record alone, as ∂W_i / ∂b_i; when two neurons
agree on the quotient they hold the same single record, or the same mixture; the record's own gradient tells which.

Source: Phong et al., 2017, "Privacy-preserving deep learning: revisited and enhanced", section 3 (one record); Boenisch et al., 2021,
    arXiv:2112.02918, section 4 (neurons activated by one record).
Deviations: least squares over the rows in place of one row; certificates. Neither costs quality. Under a clipping of the whole update a
    record is certified only if another one shows the same factor; under DP-SGD with several records, only records left unclipped.
    upload.buffers (BatchNorm statistics after training) are not used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks._gradient import maybe_clipped, mean_gradient, several_steps, unusable
from attacks._intact import changed
from attacks._layers import Call, all_buffers, first_linear
from attacks._rest import placed
from attacks._settings import must_be_positive
from attacks.update.labels import known_or_recovered
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.training import per_example_gradients
from simulator.types import Batch, Observation, Tensors

PROOF = 1e-5
"""Relative difference up to which a record explains its rows; true records were seen up to 1.2e-6, mixtures from 2.1e-4 on."""

RANK = 1e-6
"""Singular values below this fraction of the largest are rounding of float32."""


@dataclass(frozen=True)
class Factors:
    """∂W = left · diag(values) · right of the rank that float32 tells from rounding, one for each record at most; orthonormal sides."""

    left: Float[Tensor, "neurons rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank inputs"]


def factors(weight: Float[Tensor, "neurons inputs"]) -> Factors:
    """The singular value decomposition of ∂W, by way of its smaller Gram matrix: the full one takes seconds."""
    if weight.shape[0] > weight.shape[1]:
        turned = factors(weight.T)
        return Factors(turned.right.T, turned.values, turned.left.T)
    squares, left = torch.linalg.eigh(weight @ weight.T)
    keep = squares > RANK**2 * squares[-1]
    left = left[:, keep].flip(1)
    right = left.T @ weight
    values = right.norm(dim=1)
    return Factors(left, values, right / values[:, None])


def rank_without(space: Factors, signal: Float[Tensor, " neurons"], x: Float[Tensor, " inputs"]) -> int:
    """The rank of ∂W − signal·xᵀ, found in the few dimensions that the two span."""

    def inside(basis: Tensor, vector: Tensor) -> Tensor:
        coordinates = basis.T @ vector
        return torch.cat([coordinates, (vector - basis @ coordinates).norm()[None]])

    core = torch.nn.functional.pad(torch.diag(space.values), (0, 1, 0, 1))
    core = core - torch.outer(inside(space.left, signal), inside(space.right.T, x))
    return int((torch.linalg.svdvals(core) > RANK * space.values[0]).sum())


def one_record(weight: Float[Tensor, "neurons inputs"], bias: Float[Tensor, " neurons"]) -> tuple[Float[Tensor, "1 inputs"], float]:
    """The least-squares x in ∂W = ∂b·xᵀ, and the relative residual; 0 means that ∂W has rank one."""
    x = weight.T @ bias / bias.square().sum()
    residual = (weight - torch.outer(bias, x)).norm() / weight.norm()
    return x[None], float(residual)


def isolated_rows(
    weight: Float[Tensor, "neurons inputs"], bias: Float[Tensor, " neurons"], space: Factors, tolerance: float
) -> list[tuple[Float[Tensor, " inputs"], Int[Tensor, " rows"]]]:
    """Quotients ∂W_i/∂b_i on which at least two neurons agree to a relative ``tolerance``, with the neurons; most frequent first."""
    alive = (bias.abs() > 1e-6 * bias.abs().max()).nonzero().flatten()
    quotients = space.left[alive] * space.values / bias[alive, None]  # in the coordinates of the few records
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


@dataclass(frozen=True)
class Candidate:
    """A record that may explain its rows alone: the image, its label, and the factor by which its gradient was scaled."""

    image: Float[Tensor, "channel height width"]
    label: int
    factor: float


def explains(
    image: Float[Tensor, "channel height width"],
    rows: Int[Tensor, " rows"],
    gradient: Tensors,
    space: Factors,
    layer: Call,
    view: Observation,
    knowledge: Knowledge,
) -> Candidate | None:
    """``image`` with the label and factor with which it alone explains ∂b on its rows; None if no label does.

    Two neurons also agree on a mixture of records when the signals that flow back to them are parallel, as for records of one
    class, and always with two classes. Two things tell a mixture from a record. Its own gradient is another one; but clipping
    hides the scale of what was seen, so the factor is left to the caller. And a record's outer product is one of those that ∂W
    is a sum of: without it, the rank of ∂W is lower by one.
    """
    model, buffers = knowledge.model, all_buffers(knowledge.model, view.broadcast)
    if model.training and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return None  # a record has no gradient of its own
    parameters, seen = view.broadcast.parameters, gradient[layer.bias].double()[rows]
    every = Batch(image.expand(knowledge.schema.num_classes, *image.shape), torch.arange(knowledge.schema.num_classes))
    smoothing = knowledge.training.label_smoothing
    alone = per_example_gradients(model, parameters, buffers, every, label_smoothing=smoothing, names=[layer.bias])
    signals = alone[layer.bias].double() / knowledge.num_examples
    factors = signals[:, rows] @ seen / signals[:, rows].square().sum(1)
    difference = (factors[:, None] * signals[:, rows] - seen).norm(dim=1) / seen.norm()
    fits = (difference < PROOF) & (factors > 0)
    if not fits.any():
        return None
    label = int(torch.where(fits, difference, torch.inf).argmin())
    mine = Batch(image[None], torch.tensor([label]))
    own = per_example_gradients(model, parameters, buffers, mine, label_smoothing=smoothing, names=[layer.weight, layer.bias])
    x, _ = one_record(own[layer.weight][0].double(), own[layer.bias][0].double())
    if rank_without(space, factors[label] * signals[label], x[0]) != len(space.values) - 1:
        return None
    return Candidate(image, label, float(factors[label]))


def proven(candidates: list[Candidate], *, scaled: bool) -> list[Candidate]:
    """The candidates whose factor is 1, or, where the update may have been scaled, one that at least two of them share."""

    def like(factor: float) -> list[Candidate]:
        return [candidate for candidate in candidates if abs(candidate.factor / factor - 1) < PROOF]

    if not scaled or not candidates:
        return like(1.0)
    shared = max((like(candidate.factor) for candidate in candidates if candidate.factor < 1 + PROOF), key=len, default=[])
    return shared if len(shared) > 1 else like(1.0)


def best_guesses(quotients: Float[Tensor, "rows inputs"], known: list[Tensor], wanted: int) -> list[Tensor]:
    """Fill up with the quotients farthest from all that is already there: mixtures, not records; with gray if there are none."""
    chosen = list(known)
    if not len(quotients):
        return (chosen + [torch.full_like(quotients[:1].sum(0), 0.5)] * wanted)[:wanted]
    while len(chosen) < wanted:
        if not chosen:
            chosen.append(quotients[0])
            continue
        distance = torch.cdist(quotients, torch.stack(chosen)).min(1).values
        chosen.append(quotients[int(distance.argmax())])
    return chosen[:wanted]


def as_images(rows: Float[Tensor, "batch pixels"], knowledge: Knowledge) -> Float[Tensor, "batch channel height width"]:
    """Flat rows as pictures in [0, 1]."""
    return torch.nan_to_num(rows, nan=0.5).clamp(0, 1).float().view(len(rows), *knowledge.schema.shape)


@register("attacks", "linear_leak")
@dataclass(frozen=True)
class LinearLeak:
    """Exact division through a first linear layer: one record always, of several those that own a neuron.

    Attributes:
        tolerance: largest relative difference between two quotients of the same record.
        seconds: CPU time for proving records of a batch, those with the most neurons first.
    """

    tolerance: float = 1e-4
    seconds: float = 20.0

    def __post_init__(self) -> None:
        must_be_positive(self, "seconds")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}. Use 1e-4 for float32 updates.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse models that do not start with a linear layer, and deltas of several steps."""
        if (reason := unusable(view, knowledge)) is not None:
            return reason
        found = first_linear(knowledge, view.broadcast)
        return found if isinstance(found, str) else several_steps(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Divide ∂W by ∂b and undo the normalization."""
        start, deadline = time.perf_counter(), time.process_time() + self.seconds
        found = first_linear(knowledge, view.broadcast)
        if isinstance(found, str):
            raise ValueError(found)
        layer, affine = found
        gradient = mean_gradient(view, knowledge)
        weight, bias = gradient[layer.weight].double(), gradient[layer.bias].double()
        records, labels = knowledge.num_examples, known_or_recovered(view, knowledge)

        # Soteria leaves a rank of one, with holes where it took columns out
        whole = affine.whole and changed(view, knowledge, layer.weight, layer.bias) is None
        x, residual = one_record(weight, bias)
        if records == 1:
            image = as_images(affine.undo(x), knowledge)
            proof = "rank one" if residual < self.tolerance and whole else ""
            return Reconstruction(image, labels, residual, certificate=(proof,), seconds=time.perf_counter() - start, converged=True)

        space, candidates, tried = factors(weight), [], True
        for x, rows in isolated_rows(weight, bias, space, self.tolerance):
            if not (tried := time.process_time() < deadline):
                break
            image = as_images(affine.undo(x[None]), knowledge)[0]
            if (candidate := explains(image, rows, gradient, space, layer, view, knowledge)) is not None:
                candidates.append(candidate)
        exact = proven(candidates, scaled=maybe_clipped(view, knowledge))[:records]
        strong = bias.abs() > 0.01 * bias.abs().max()
        quotients = affine.undo(weight[strong] / bias[strong, None])
        inside = ((quotients > -1e-3) & (quotients < 1 + 1e-3)).all(1)
        known = [candidate.image.flatten().double() for candidate in exact]
        guesses = best_guesses(quotients[inside] if inside.any() else quotients.clamp(0, 1), known, records)
        certificate = ("isolated rows" if whole else "",) * len(exact) + ("",) * (records - len(exact))
        named, order = placed([c.label for c in exact], labels, knowledge)
        return Reconstruction(
            as_images(torch.stack(guesses), knowledge)[order],
            named,
            residual,
            certificate=tuple(certificate[i] for i in order.tolist()),
            seconds=time.perf_counter() - start,
            converged=tried,
        )
