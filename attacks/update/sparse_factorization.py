"""Exact recovery of a whole batch from the update of a first linear layer before a ReLU.

With D the backward signals and X the records, ∂W = D·X and ∂b = D·1. The column space of ∂W is known; a ReLU makes each column of
D zero where its record leaves the neuron off. So D is the sparse basis of that space, and each column's zeros must be the mask of
the record that the factorization gives: a proof that needs no truth.

Source: Dimitrov et al., 2024, arXiv:2403.03945 (SPEAR: the factorization, scales from the bias). Bakarsky et al., 2025,
    arXiv:2510.24200 (SPEAR++) replace sampling by dictionary learning.
Deviations: neither samples submatrices nor learns a dictionary: a candidate alternates between its sparse column and the linear
    classifier that its zeros must be (``attacks._sparse.alternate``); records still missing are sought orthogonally to those found.
    Each column is proven by its own mask before it is kept; of records that are nearly alike, whose mixtures are sparse too, the
    columns are read off the plane that they span. Labels by the record's own backward signal. Several local steps get no
    certificate, since masks move on the way; the model halfway is the guess of where they were (claims B10, B10-target). Where columns
    are missing, the others' records are the middle of what their masks leave. Between two classes all backward signals of one hidden
    layer are parallel, where a linear layer follows, and so known: rows that one record tells apart give it away
    (``attacks._sparse.parallel``; claims B9-lfw, two-classes-sparse). Measured: claims B5, B6, B7, B7-target, B9-digits; of two hidden
    layers and of 16-bit updates ``tests/attacks/test_sparse.py``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks._gradient import maybe_clipped, mean_gradient, steps_taken, unusable
from attacks._layers import backward_signals, first_linear, linear_before_relu
from attacks._rest import in_order, labels_left
from attacks._settings import must_be_positive
from attacks._sparse.factorize import SLACK, Factorization, Guess, Layer, factorize
from attacks._sparse.parallel import shared_signal
from attacks.update.labels import known_or_recovered, unrecoverable
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

PROOF = 1e-3
"""Relative difference up to which a record's own backward signal is the column that was found for it."""

PROVEN = "mask agreement"

MOVED = 0.15
"""Share of neurons whose mask may move during several local steps."""


def explained(
    backward: Float[Tensor, "neurons records"], signals: Float[Tensor, "classes records neurons"]
) -> tuple[Int[Tensor, " records"], Float[Tensor, " records"], Float[Tensor, " records"]]:
    """For each record the label whose signal is parallel to its column, the factor between them, and the relative difference."""
    columns, own = backward.T[None], signals.double()
    factors = (columns * own).sum(2) / own.square().sum(2).clamp_min(1e-300)
    difference = (columns - factors[..., None] * own).norm(dim=2) / columns.norm(dim=2).clamp_min(1e-300)
    best, labels = torch.where(factors > 0, difference, torch.inf).min(0)
    return labels, factors.gather(0, labels[None])[0], best


@register("attacks", "sparse_factorization")
@dataclass(frozen=True)
class SparseFactorization:
    """Exact factorization of the first layer's update, for models that begin with a linear layer and a ReLU.

    Attributes:
        seconds: CPU seconds for the search of each victim.
    """

    seconds: float = 30.0

    def __post_init__(self) -> None:
        must_be_positive(self, "seconds")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse models that do not begin with a linear layer before a ReLU."""
        if (reason := unusable(view, knowledge)) is not None:
            return reason
        found = first_linear(knowledge, view.broadcast)
        if isinstance(found, str):
            return found
        if found[0].name not in linear_before_relu(knowledge, view.broadcast):
            return "the output of the first linear layer must go through a ReLU, whose mask is what this attack finds"
        return unrecoverable(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Factorize, undo the normalization, and ask each record for its label."""
        return self.recovered(view, knowledge, rng=rng)[0]

    def recovered(
        self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator, guess: Guess | None = None
    ) -> tuple[Reconstruction, Factorization]:
        """The answer with the factors behind it; ``guess`` gives the search better starts than chance."""
        start = time.perf_counter()
        found = first_linear(knowledge, view.broadcast)
        if isinstance(found, str):
            raise ValueError(found)
        call, affine = found
        gradient, parameters, records = mean_gradient(view, knowledge), view.broadcast.parameters, knowledge.num_examples
        one_step = steps_taken(view, knowledge) == 1
        between = {  # masks during several steps are nearest those of the model halfway
            name: parameters[name] if one_step else parameters[name] + view.upload.update.tensors[name].float() / 2
            for name in (call.weight, call.bias)
        }
        coarse = view.upload.update.tensors[call.weight].dtype != torch.float32 or knowledge.training.upload_dtype != "float32"
        signal = shared_signal(knowledge, view.broadcast, call.name) if one_step else None
        layer = Layer(gradient[call.weight], gradient[call.bias], between[call.weight], between[call.bias], coarse, signal)
        factors = factorize(layer, rng=rng, seconds=self.seconds, records=records, slack=SLACK if one_step else MOVED, guess=guess)
        inputs = factors.outlines if factors.inputs is None else factors.inputs
        images = torch.full((records, *knowledge.schema.shape), 0.5)
        if inputs is None or factors.backward is None or len(inputs) == 0:
            labels = known_or_recovered(view, knowledge)
            spent = time.perf_counter() - start
            nothing = Reconstruction(images, labels, certificate=("",) * records, seconds=spent, converged=factors.rank == 0)
            return nothing, factors
        pixels = torch.nan_to_num(affine.undo(inputs), nan=0.5)
        inside = ((pixels > -1e-3) & (pixels < 1 + 1e-3)).all(1)
        found_images = pixels.clamp(0, 1).float().view(-1, *knowledge.schema.shape)
        signals = backward_signals(knowledge, view.broadcast, call.name, found_images)
        smoothing = knowledge.training.label_smoothing
        signals = (1 - smoothing) * signals + smoothing * signals.mean(0)
        labels, scale, difference = explained(factors.backward, signals)
        clipped, alone = maybe_clipped(view, knowledge), one_step and not mixes_records(knowledge.model)
        multiplicity = scale / scale.median() if clipped else scale * records
        places = list(range(len(labels)))
        if factors.inputs is None or not affine.whole:
            proven = torch.zeros(len(labels), dtype=torch.bool)
        elif alone:
            # Records that coincide, or nearly, share one column: only a column of one record proves it.
            proven = torch.tensor(factors.certified) & inside & (difference < PROOF) & ((multiplicity - 1).abs() < PROOF)
        else:
            # Masks that move on the way prove nothing.
            proven = torch.tensor(factors.certified) & inside & (one_step and factors.rank == records)
        if alone and not clipped:
            places += [i for i in places if float(difference[i]) < PROOF for _ in range(round(float(multiplicity[i])) - 1)]
        places = places[:records]
        images[: len(places)] = found_images[places]
        everywhere, wanted = labels[places], None
        certificate = [PROVEN if bool(proven[place]) else "" for place in places] + [""] * (records - len(places))
        told = knowledge.labels is not None or knowledge.label_counts is not None
        if told or len(places) < records:
            known = known_or_recovered(view, knowledge)
            everywhere, wanted = torch.cat([everywhere, labels_left(known, everywhere.tolist())]), known if told else None
        order = list(range(records)) if wanted is None else in_order(everywhere.tolist(), wanted.tolist())
        answer = Reconstruction(
            images[order],
            everywhere if wanted is None else wanted,
            1 - min(factors.agreement),
            certificate=tuple(certificate[place] for place in order),
            seconds=time.perf_counter() - start,
            converged=factors.inputs is not None,
        )
        return answer, factors


def mixes_records(model: nn.Module) -> bool:
    """Whether a record's loss depends on the other records of its batch."""
    return model.training and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
