"""What an update can tell, before any attack: how many of its records can be exact, and why.

Three questions, each free of any attack. Can a linear layer before a ReLU be taken apart (rank, width, and neurons that are on for one
record and off for another)? If it is not the first layer: do its features fix the image? And else: are there more independent equations
than unknowns, and does the update depend enough on the weakest direction of the records?

Source: Dimitrov et al., 2024, arXiv:2403.03945, theorem 3.1 (the gradient of a linear layer has rank at most B); Zhu and Blaschko, 2021,
    arXiv:2010.07733, section 4 (rank of the constraints on an image); Lanczos, 1950 (singular values from products).
Deviations: the truth is unknown, so derivatives and activation patterns are taken at public records where they are granted and else at
    random pictures with structure at every scale, whose patterns are as alike as photographs' (``tests/attacks/test_identifiability.py``).
    What is independent is counted layer by layer: a linear layer's gradient has at most B·(inputs + outputs − B) free values. The
    weakest direction is known from above only beyond EXACT_BELOW unknowns: it can refute that a batch is exact, not confirm it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks._features import Entrance, relu_entrance
from attacks._gradient import mean_gradient, not_finite, steps_taken
from attacks._layers import probe
from attacks._matching.simulate import prepare
from attacks._second_order.linear import ritz_values
from attacks._second_order.residual import Residual
from attacks._second_order.smoothness import is_smooth
from attacks._sparse.space import numerical_rank
from simulator.adversary import Knowledge
from simulator.types import Observation

SEPARABLE_RECORDS = 32
"""Records up to which the columns of ∂W were separated reliably; a limit of today's factorization, not of the update."""
NEURONS_PER_RECORD = 8
"""Neurons that each record needs so that its pattern of active ones tells it from mixtures."""
SEPARATING = 0.03
"""Share of a layer's neurons that must be on for one and off for the other of the two records that are most alike. Initial models
have 4 to 6 % (64 to 512 neurons, 8 to 32 records: all exact), MLPs after 50 to 200 steps 0 to 1 %, where some batches come out whole and
some not at all: claim B23-trained."""
POINTS = 64
"""Pictures on which activation patterns are compared."""
ROUNDING, EXACT_ERROR = 2.0**-24, 1e-3
"""Relative rounding of a float32 update, and the root mean square error up to which a record counts as exact."""
LANCZOS_STEPS = 24
EXACT_BELOW = 256
"""Unknowns up to which the Jacobian is formed."""


@dataclass(frozen=True)
class Identifiability:
    """What the update can tell.

    Attributes:
        records: behind the upload.
        rank: of the best linear layer's gradient: the effective batch size, at most ``records``; None without a linear layer.
        unknowns: values of all records.
        equations: independent values of the update, at most.
        relu_layers: (name, width) of the linear layers with bias whose outputs go through a ReLU.
        separating: share of that layer's neurons that are on for one and off for the other of the two records that are most alike, as
            expected at likely images; None for one record or without such a layer.
        active_features: features of one image that fix it, on average, where such a layer stands behind others; else None.
        smallest_singular_value: of ∂update/∂records in units of the update's norm; an estimate from above beyond EXACT_BELOW unknowns.
        largest_singular_value: the same at the other end.
        exact: how many records can be exact.
        prediction: why, in a sentence.
    """

    records: int
    rank: int | None
    unknowns: int
    equations: int
    relu_layers: tuple[tuple[str, int], ...]
    separating: float | None
    active_features: float | None
    smallest_singular_value: float
    largest_singular_value: float
    exact: int
    prediction: str

    def __str__(self) -> str:
        rank = "no linear layer" if self.rank is None else f"rank {self.rank} for {self.records} records"
        weakest = f"smallest singular value {self.smallest_singular_value:.2g} of {self.largest_singular_value:.2g}"
        apart = "" if self.separating is None else f"; {100 * self.separating:.1f} % of neurons tell the closest two apart"
        return (
            f"{rank}; {self.equations} equations for {self.unknowns} unknowns; {weakest}{apart}; "
            f"{self.exact} of {self.records} records can be exact: {self.prediction}"
        )


def identify(
    view: Observation, knowledge: Knowledge, *, rng: torch.Generator, range_of_values: tuple[float, float] | None = None
) -> Identifiability:
    """Say what ``view.upload`` can tell.

    Args:
        range_of_values: smallest and largest singular value, where they are known: they are those of the broadcast model at likely
            images, nearly the same for all uploads of a round, and what takes time.

    Raises:
        ValueError: the update is not finite.
    """
    reason = not_finite(view)
    if reason is not None:
        raise ValueError(reason)
    records, pixels = knowledge.num_examples, math.prod(knowledge.schema.shape)
    points = likely_images(knowledge, rng)
    gradient = mean_gradient(view, knowledge)
    calls = probe(knowledge, view.broadcast, points[:2])
    linear = [call for call in calls if isinstance(call.layer, nn.Linear)]
    ranks = [effective_rank(gradient[call.weight], records) for call in linear]
    entrance = relu_entrance(knowledge, view.broadcast)
    found = None if isinstance(entrance, str) else entrance
    rank = max(ranks) if ranks else None
    equations = independent_equations(view, knowledge)
    active = separating = None
    if found is not None and calls[0].name != found.layer.name:
        active = fixing_features(found, points)
    if found is not None and 1 < records <= SEPARABLE_RECORDS:
        separating = separating_share(found, likely_images(knowledge, rng, least=POINTS), records)
    low, high = range_of_values or singular_values(view, knowledge, points, rng)
    exact, why = predict(view, knowledge, found, rank, equations, active, separating, pixels)
    if exact and found is None and low * EXACT_ERROR * math.sqrt(pixels) <= ROUNDING:
        exact, why = 0, "none: along some direction of the records the update changes by less than its rounding"
    layers = () if found is None else ((found.layer.name, found.layer.outputs.shape[1]),)
    return Identifiability(records, rank, records * pixels, equations, layers, separating, active, low, high, exact, why)


def likely_images(knowledge: Knowledge, rng: torch.Generator, least: int = 2) -> Float[Tensor, "batch channel height width"]:
    """Public records where granted, else random pictures with structure at every scale: as many as behind the upload, or ``least``."""
    wanted = max(least, knowledge.num_examples)
    if knowledge.public is not None and len(knowledge.public) >= wanted:
        return knowledge.public.inputs[torch.randperm(len(knowledge.public), generator=rng)[:wanted]]
    if knowledge.public is not None and len(knowledge.public) >= max(2, knowledge.num_examples):
        return knowledge.public.inputs
    channels, height, width = knowledge.schema.shape
    scales = [2**k for k in range(max(1, max(height, width).bit_length() - 2))]
    grids = (torch.rand(wanted, channels, min(side, height), min(side, width), generator=rng) for side in scales)
    octaves = [nn.functional.interpolate(grid, size=(height, width), mode="bilinear") for grid in grids]
    weighted: Tensor = torch.stack([octave / side for side, octave in zip(scales, octaves, strict=True)])
    total: float = sum(1 / side for side in scales)
    return weighted.sum(0) / total


def effective_rank(weight: Tensor, records: int) -> int:
    """Singular values of a gradient above its rounding and noise; 0 for a gradient that is zero."""
    weight = weight.double().flatten(1)
    square = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    values = torch.linalg.eigvalsh(square).flip(0).clamp(min=0).sqrt()
    return numerical_rank(values, records if records < len(values) else None) if float(values[0]) > 0 else 0


def independent_equations(view: Observation, knowledge: Knowledge) -> int:
    """Values of the update less the dependencies within linear layers: a matrix of rank B has B·(m + n − B) free entries."""
    rank, count = knowledge.num_examples * steps_taken(view, knowledge), 0
    for name, tensor in view.upload.update.tensors.items():
        if tensor.ndim == 2 and name.endswith("weight") and rank < min(tensor.shape):
            count += rank * (sum(tensor.shape) - rank)
        else:
            count += tensor.numel()
    return count


def fixing_features(entrance: Entrance, images: Tensor) -> float:
    """Mean number of features of an image that are not at zero: those that tell about it once their pattern is known."""
    with torch.no_grad():
        return float((entrance.features(images) != 0).sum(1).double().mean())


@torch.no_grad()
def separating_share(entrance: Entrance, images: Tensor, records: int) -> float:
    """Median share of neurons that are on for one and off for the other of the two records that are most alike, among ``records``.

    Over all ordered pairs of ``images``: of n = records·(records − 1) draws the smallest is below the 1 − 2^(−1/n) quantile half of the
    time.
    """
    call = entrance.layer
    outputs = nn.functional.linear(entrance.features(images), entrance.parameters[call.weight], entrance.parameters[call.bias])
    on = (outputs > 0).double()
    only = on @ (1 - on).T
    pairs = only[~torch.eye(len(on), dtype=torch.bool)]
    return float(pairs.quantile(1 - 0.5 ** (1 / (records * (records - 1))))) / on.shape[1]


def singular_values(view: Observation, knowledge: Knowledge, points: Tensor, rng: torch.Generator) -> tuple[float, float]:
    """Smallest and largest singular value of ∂update/∂records, in units of the update's norm.

    With several records and no batch statistics those of one record, divided by their number as the mean gradient is: no
    direction that mixes records can be weaker than the weakest of a record by more than their likeness.
    """
    if not any(bool(tensor.any()) for tensor in view.upload.update.tensors.values()):
        return 0.0, 0.0
    labels = knowledge.labels if knowledge.labels is not None else torch.zeros(knowledge.num_examples, dtype=torch.long)
    residual = Residual(prepare(view, replace(knowledge, labels=labels)), balanced=False)
    count = knowledge.num_examples
    images = points[: 1 if residual.separable else count].double()
    if residual.separable:
        residual = residual.alone(int(labels[0]))
    if images.numel() <= EXACT_BELOW:
        values = torch.linalg.svdvals(residual.jacobian(images, torch.eye(images[0].numel(), dtype=torch.float64)))
        smallest = float(values[-1]) if len(residual.victim.target) >= images.numel() else 0.0
        return smallest, float(values[0])
    push, pull = residual.products(images)
    normal: Callable[[Tensor], Tensor] = lambda v: pull(push(v.view(images.shape))).flatten()  # noqa: E731
    start = torch.randn(images.numel(), generator=rng, dtype=torch.float64)
    values = ritz_values(normal, start, LANCZOS_STEPS).clamp(min=0).sqrt()
    return float(values[0]), float(values[-1])


def predict(
    view: Observation, knowledge: Knowledge, entrance: Entrance | None, rank: int | None, equations: int, active: float | None,
    separating: float | None, pixels: int,
) -> tuple[int, str]:  # fmt: skip
    """How many records can be exact, and the reason."""
    records = knowledge.num_examples
    if rank == 0:
        return 0, "none: the update of every linear layer is zero"
    if records == 1 and entrance is not None and active is None:
        return 1, "all: one record behind a linear layer with bias is a quotient of its gradients"
    if entrance is not None:
        name, width = entrance.layer.name, entrance.layer.outputs.shape[1]
        inside = effective_rank(mean_gradient(view, knowledge)[entrance.layer.weight], records)
        if inside < records:
            return 0, f"none: the gradient of {name} has rank {inside} for {records} records, which cannot be told apart in it"
        if records > SEPARABLE_RECORDS or NEURONS_PER_RECORD * records > width:
            return 0, f"none: {records} records are too many to separate by the {width} neurons of {name}"
        if separating is not None and separating < SEPARATING:
            few = f"{separating * width:.0f} of {width}"
            return 0, f"none surely: only {few} neurons of {name} tell the two records apart that are most alike"
        if active is not None and active <= pixels:
            return 0, f"none: an image of {pixels} values has only {active:.0f} active features at {name}"
        what = "inputs" if active is None else f"features, {active:.0f} active ones for {pixels} values,"
        return records, f"all: {name} has {width} ReLU neurons that separate the {what} of {records} records"
    if not is_smooth(knowledge, view.broadcast):
        return 0, "none: without a hidden linear layer before a ReLU no solver is exact for a network with kinks"
    if equations <= records * pixels:
        return 0, f"none: {equations} equations for {records * pixels} unknowns"
    return records, f"all: the network is smooth, with {equations} equations for {records * pixels} unknowns"
