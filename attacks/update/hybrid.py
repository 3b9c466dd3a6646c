"""Features first, exactly; then every image alone from its features.

The hidden layer with ReLU of a convolutional network holds the features of every record of the batch, and a sparse factorization of its
update gives them all. With the features known, the gradient of the last layer is linear in the labels, which a least-squares solve reads
record by record. What is left is to invert the convolutions for one image at a time, without any second derivative.

Source: Dimitrov et al., 2024, arXiv:2403.03945 (SPEAR: the factorization); Kariyappa et al., 2023, arXiv:2209.05578, section 5 (feature
    inversion after unmixing). The labels are the linear-algebra reading of Zhao et al., 2020, arXiv:2001.02610, with the features known.
Deviations: where a defense (Soteria) changed the last layer's gradient, a record's label is that whose signal came back to the hidden
    layer. The inversion is finished by Gauss–Newton, since with the right pattern of active units the convolutions are linear: exact from
    near (tests/attacks/test_hybrid.py, -k finish). Measured: claims B16, B16-against and two-classes-hybrid. Where dark regions leave
    too few active features the prior decides, and nothing is certified.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf, prod

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from attacks._dropout import layers
from attacks._features import Entrance, Features, relu_entrance
from attacks._gradient import mean_gradient, several_steps, unusable
from attacks._intact import changed
from attacks._layers import backward_signals, last_linear, probe
from attacks._matching.latents import bottlenecks
from attacks._matching.priors import box
from attacks._second_order.inversion import Inverted, finish, search, sensitivity
from attacks._second_order.proof import RADIUS
from attacks._settings import must_be_positive
from attacks._sparse.factorize import Layer, factorize
from attacks._sparse.parallel import shared_signal
from attacks.update.labels import known_or_recovered
from attacks.update.sparse_factorization import explained
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation, Tensors

PROOF = "injective features"
CLEAN = 3e-6
"""Relative feature error above which something other than rounding is left."""
MISSED = 2e-3
"""Relative feature error that tells of a wrong pattern of active units."""
SECOND = 0.3
"""Largest negative score of another class, as a share of the lowest; label smoothing makes small ones."""
AGREED = 1e-2
"""Relative difference up to which the signal of a class is taken for that which came back to a layer."""
MARGIN = 8.0
"""By how much an estimated smallest singular value may be too large."""


def label_scores(entrance: Entrance, features: Features, gradient: Tensors, head: str, like: Tensor) -> Float[Tensor, "batch classes"]:
    """p − y of each record up to a positive factor: the one solution of ∂W = Σ (p_i − y_i)·h_iᵀ/B with the features h known.

    Only the class of the record itself has a negative entry.
    """
    hidden, _ = entrance.beyond(features, like)
    system, right = hidden.double().T, gradient[f"{head}.weight"].double().T
    if f"{head}.bias" in gradient:
        size = hidden.double().abs().mean().clamp(min=1e-12)
        system = torch.cat([system, size.expand(1, len(hidden))])
        right = torch.cat([right, size * gradient[f"{head}.bias"].double()[None]])
    solution: Tensor = torch.linalg.lstsq(system, right).solution
    return solution


def signal_scores(
    backward: Float[Tensor, "neurons records"], signals: Float[Tensor, "classes records neurons"]
) -> Float[Tensor, "records classes"]:
    """The same where the head's gradient is not what the client computed: −1 for the class whose signal is what came back to the layer."""
    labels, _, difference = explained(backward, signals)
    return -F.one_hot(labels, len(signals)).double() * (difference < AGREED)[:, None]


def one_negative(scores: Float[Tensor, "records classes"]) -> Bool[Tensor, " records"]:
    """Whether one class stands out as p − y says: scores that wrong features of another record have mixed do not name a label."""
    lowest, second = scores.sort(dim=1).values[:, :2].unbind(1)
    return (lowest < 0) & (second >= SECOND * lowest)


def assigned(scores: Float[Tensor, "records classes"], labels: Int[Tensor, " batch"]) -> Tensor:
    """For each told label the record that takes it, −1 where records are fewer than labels: the assignment of least score."""
    cost = scores / scores.abs().amax(1, keepdim=True).clamp(min=1e-300)
    rows, places = linear_sum_assignment(cost[:, labels].numpy())
    order = torch.full((len(labels),), -1)
    order[torch.from_numpy(places)] = torch.from_numpy(rows)
    return order


@register("attacks", "hybrid")
@dataclass(frozen=True)
class Hybrid:
    """Sparse factorization of the hidden layer, labels by a linear solve, then feature inversion.

    Attributes:
        seconds: CPU seconds for each victim.
        steps: of signed Adam.
        learning_rate: of signed Adam, in units of the pixel range.
        tv, tv_final: weight of the roughness against the squared relative feature error at the start, and at 7/8 of the steps.
        rounds: of Gauss–Newton at most.
        cg_steps: conjugate gradients in each.
        restarts: starts at most for images whose features are not met.
    """

    seconds: float = 60.0
    steps: int = 700
    learning_rate: float = 0.05
    tv: float = 0.01
    tv_final: float = 0.0002
    rounds: int = 12
    cg_steps: int = 60
    restarts: int = 3

    def __post_init__(self) -> None:
        must_be_positive(self, "steps", "cg_steps", "restarts", "seconds", "learning_rate", "tv", "tv_final")
        if self.rounds < 0:
            raise ValueError(f"rounds must be ≥ 0, got {self.rounds}. Use 0 for signed Adam alone.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse models without a hidden linear layer with ReLU behind other layers, batches it cannot separate, and long deltas."""
        if (reason := unusable(view, knowledge)) is not None:
            return reason
        entrance = relu_entrance(knowledge, view.broadcast)
        if isinstance(entrance, str):
            return entrance
        if entrance.layer.name == first_parameterized(knowledge, view):
            return "the linear layer with ReLU must stand behind other layers, got it as the first. Use sparse_factorization"
        if last_linear(knowledge, view.broadcast) is None:
            return "the model must end in nn.Linear with one output for each class, got another last layer"
        if (reason := several_steps(view, knowledge)) is not None:
            return reason
        neurons = entrance.layer.outputs.shape[1]
        if 2 * knowledge.num_examples >= neurons:
            return f"the hidden layer must have more than 2 neurons for each of {knowledge.num_examples} records, got {neurons}"
        if not bool(view.upload.update.tensors[entrance.layer.weight].any()):
            return "the update of the hidden layer must not be zero everywhere, got nothing to factorize"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Factorize, read the labels, invert."""
        began, deadline = time.perf_counter(), time.process_time() + self.seconds
        entrance, head = relu_entrance(knowledge, view.broadcast), last_linear(knowledge, view.broadcast)
        if isinstance(entrance, str) or head is None:
            raise ValueError(f"the model must have a hidden linear layer with ReLU and end in nn.Linear, got {entrance}")
        gradient, parameters, name = mean_gradient(view, knowledge), view.broadcast.parameters, entrance.layer
        signal = shared_signal(knowledge, view.broadcast, name.name)
        layer = Layer(gradient[name.weight], gradient[name.bias], parameters[name.weight], parameters[name.bias], signal=signal)
        found = factorize(layer, rng=rng, seconds=self.seconds / 2, records=knowledge.num_examples)
        if found.inputs is None:
            shape = (knowledge.num_examples, *knowledge.schema.shape)
            nothing = torch.full(shape, 0.5)
            labels = known_or_recovered(view, knowledge)
            return Reconstruction(nothing, labels, inf, certificate=("",) * len(labels), seconds=time.perf_counter() - began)

        features = found.inputs
        inverted = self.invert(entrance, features, knowledge.schema.shape, rng, deadline)
        if changed(view, knowledge, head.weight) is None or found.backward is None:
            scores = label_scores(entrance, features, gradient, head.name, torch.full(knowledge.schema.shape, 0.5))
        else:
            scores = signal_scores(found.backward, backward_signals(knowledge, view.broadcast, name.name, box(inverted.images).float()))
        told = knowledge.labels if knowledge.labels is not None else None
        if told is None and (knowledge.label_counts is not None or len(features) < knowledge.num_examples):
            told = known_or_recovered(view, knowledge)
        labels = scores.argmin(1) if told is None else told
        order = torch.arange(len(features)) if told is None else assigned(scores, told)

        random = layers(knowledge.model) or bottlenecks(knowledge.model)  # features of another picture, labels by other noise
        merged = len(features) < knowledge.num_examples  # records with equal masks: what was found may be their mean, whose mask is theirs
        certain = (False,) * len(features) if random or merged else found.certified
        exact = self.proven(entrance, features, inverted, certain, rng, deadline)
        clear = one_negative(scores)
        agree = [bool(clear[i]) and int(scores[i].argmin()) == int(labels[k]) for k, i in enumerate(order.tolist())]
        return Reconstruction(
            inputs=box(torch.nan_to_num(inverted.images[order.clamp(min=0)], nan=0.5)).float(),
            labels=labels,
            objective=float(inverted.error.mean()),
            certificate=tuple(PROOF if i >= 0 and exact[i] and ok else "" for i, ok in zip(order.tolist(), agree, strict=True)),
            seconds=time.perf_counter() - began,
            converged=time.process_time() < deadline and len(features) == knowledge.num_examples,
        )

    def invert(
        self, entrance: Entrance, features: Features, shape: tuple[int, int, int], rng: torch.Generator, deadline: float
    ) -> Inverted:
        """All images from their features: signed Adam in float32, then Gauss–Newton in float64.

        An image whose pattern of active units was missed starts again, with three times the prior.
        """
        best = Inverted(torch.full((len(features), *shape), 0.5).double(), torch.full((len(features),), inf, dtype=torch.float64))
        for turn in range(self.restarts):
            todo = (best.error > MISSED).nonzero().flatten()
            if not len(todo) or time.process_time() > deadline:
                break
            start = torch.rand(len(todo), *shape, generator=rng)
            rough = search(
                entrance.features, features[todo].float(), start, steps=self.steps, rate=self.learning_rate,
                tv=self.tv * 3**turn, tv_final=self.tv_final * 3**turn, deadline=deadline, task="hybrid",
            )  # fmt: skip
            found = finish(entrance.features, features[todo], rough, rounds=self.rounds, steps=self.cg_steps, deadline=deadline)
            better = found.error < best.error[todo]
            best.images[todo[better]], best.error[todo[better]] = found.images[better], found.error[better]
        return best

    def proven(
        self, entrance: Entrance, features: Features, inverted: Inverted, certified: tuple[bool, ...], rng: torch.Generator, deadline: float
    ) -> list[bool]:
        """Whether each image is the only one near that has these features, within RADIUS of the pixel range.

        As in :mod:`attacks._second_order.proof`, with the active features as equations; the features themselves must be certified.
        """
        pixels = prod(inverted.images.shape[1:])
        active = (features.abs() > 1e-6 * features.abs().amax(1, keepdim=True)).sum(1)
        likely = torch.tensor(certified) & (inverted.error < CLEAN) & (active > pixels)
        exact = torch.zeros(len(features), dtype=torch.bool)
        chosen = likely.nonzero().flatten()
        if len(chosen):
            smallest = sensitivity(entrance.features, inverted.images[chosen], rng=rng, steps=600, deadline=deadline) / MARGIN
            noise = (inverted.error * features.norm(dim=1) * (active / (active - pixels)).sqrt())[chosen]
            exact[chosen] = (2 * noise <= RADIUS * pixels**0.5 * smallest) & pictures(inverted.images[chosen])
        return exact.tolist()


def pictures(images: Float[Tensor, "batch channel height width"]) -> Bool[Tensor, " batch"]:
    """Which have all values in [0, 1], up to ten times the root mean square error that a proof allows: nothing else can be a record."""
    values = images.flatten(1)
    return ((values > -10 * RADIUS) & (values < 1 + 10 * RADIUS)).all(1)


def first_parameterized(knowledge: Knowledge, view: Observation) -> str:
    """Name of the first layer that has parameters."""
    calls = probe(knowledge, view.broadcast, torch.full((2, *knowledge.schema.shape), 0.5))
    return calls[0].name if calls else ""
