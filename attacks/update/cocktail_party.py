"""Cocktail party: the records that the first linear layer's update mixes, unmixed by what pictures look like.

∂W = D·X has the records' span as its row space: every record is c·R for some c. Which c are records is asked of independent component
analysis: mixtures of pictures are less sparse than pictures. What it finds approximately, the network makes exact: behind a ReLU the
record's mask (:mod:`attacks._sparse`), behind a smooth activation its own backward signal, which must lie in the column space of the
update (:mod:`attacks._unmixing.span`). Proven records leave the mixture, which makes the others easier to tell apart.

Source: Kariyappa et al., 2023, arXiv:2209.05578 (CPA: unmixing by whitening, non-Gaussianity, smoothness and decorrelation); Hyvärinen,
    1999, doi:10.1109/72.761722 (FastICA). The solution by the backward signal is our own.
Deviations: no gradient descent on a sum of priors, but FastICA where pictures are independent and sparse, on the differences of
    neighbouring pixels in mean and opponent colors. Scale and sign from the bias.
    Measured: claims cocktail-sigmoid-16, -64 and -128, and cocktail-relu-64. Where no record is found, nothing good is left, since
    errors of the unmixing move a picture's brightness.
    Only at the input: features of a hidden layer are no pictures.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks._gradient import maybe_clipped, mean_gradient, several_steps, unusable
from attacks._layers import Affine, Call, first_linear, linear_before_relu
from attacks._rest import in_order
from attacks._settings import must_be_positive
from attacks._sparse.factorize import Guess
from attacks._sparse.space import Layer, Space, decompose
from attacks._unmixing.contrast import edges, separable, unmix
from attacks._unmixing.span import Roots, Signal, backward_signal, residuals, solve
from attacks.update.sparse_factorization import SparseFactorization, mixes_records
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

PROVEN = "backward signal"

FOUND = 1e-3
"""Relative residual of a record that leaves the mixture."""

CLOSE = 1e-4
"""Pixel error up to which a record is exact by its residual."""

SPARE = 8
"""Equations beyond the unknowns that a proof needs."""

SAME = 0.02
"""Difference, relative to their size, of starts that ended at one record."""

TRIES = 4
"""Unmixings without a new record after which the rest is given up."""

ONE = 1e-3
"""Relative difference up to which a record's share of the update is 1/records."""


@dataclass(frozen=True)
class Found:
    """One record: its coordinates in the row space, its label, and the error that its residual can stand for."""

    coordinates: Float[Tensor, " rank"]
    column: Float[Tensor, " rank"]
    label: int
    error: float


def without(space: Space, found: list[Found]) -> tuple[Space, Float[Tensor, "rank free"]]:
    """What is left of the mixture, and the basis of its coordinates: c is orthogonal to the columns found, D to their coordinates."""
    if not found:
        return space, torch.eye(space.rank, dtype=torch.float64)
    columns = torch.stack([item.column / item.column.norm() for item in found])
    coordinates = torch.stack([item.coordinates / item.coordinates.norm() for item in found])
    free, span = (torch.linalg.svd(rows)[2][len(found) :].T for rows in (columns, coordinates))
    rest = replace(space, left=space.left @ span, right=free.T @ space.right, slopes=space.slopes @ free, unit=free.T @ space.unit)
    return rest, free


def pictures(shape: tuple[int, int, int], affine: Affine) -> Guess:
    """Coordinates under which mixed pictures come apart; random ones where the pictures are too small."""

    def guess(right: Float[Tensor, "rank inputs"], rng: torch.Generator) -> Float[Tensor, "rank rank"]:
        if not separable(shape, len(right)):
            return torch.randn(len(right), len(right), generator=rng, dtype=torch.float64)
        return unmix(edges(right / affine.scale.double(), shape), rng=rng)

    return guess


@register("attacks", "cocktail_party")
@dataclass(frozen=True)
class CocktailParty:
    """Independent component analysis of the first layer's update, then exact solution record by record.

    Attributes:
        seconds: CPU seconds for each victim.
    """

    seconds: float = 60.0

    def __post_init__(self) -> None:
        must_be_positive(self, "seconds")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse models that do not begin with a linear layer, layers too narrow for the batch, and long deltas."""
        if (reason := unusable(view, knowledge)) is not None:
            return reason
        found = first_linear(knowledge, view.broadcast)
        if isinstance(found, str):
            return found
        if (reason := several_steps(view, knowledge)) is not None:
            return reason
        narrowest, records = min(found[0].outputs.shape[1], found[0].inputs.shape[1]), knowledge.num_examples
        if records >= narrowest:
            return f"the first linear layer must have more inputs and outputs than there are records, got {narrowest} for {records}"
        if not bool(view.upload.update.tensors[found[0].weight].any()):
            return "the update of the first layer must not be zero everywhere, got nothing to unmix"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Unmix, solve, and take out what is proven, until nothing new comes."""
        began, deadline = time.perf_counter(), time.process_time() + self.seconds
        first = first_linear(knowledge, view.broadcast)
        if isinstance(first, str):
            raise ValueError(first)
        call, affine = first
        guess = pictures(knowledge.schema.shape, affine)
        gradient, parameters = mean_gradient(view, knowledge), view.broadcast.parameters
        layer = Layer(gradient[call.weight], gradient[call.bias], parameters[call.weight], parameters[call.bias])
        space = decompose(layer, knowledge.num_examples)
        if space is None:
            raise ValueError("the update of the first layer must have weights and biases that are not zero. There is nothing to unmix.")
        answer: Reconstruction | None = None
        known, signal = list[Found](), backward_signal(knowledge, view.broadcast, call)
        classes = possible(knowledge)
        if call.name in linear_before_relu(knowledge, view.broadcast):
            half = SparseFactorization(seconds=self.seconds / 2)
            answer, factors = half.recovered(view, knowledge, rng=rng, guess=guess)
            if factors.inputs is not None:
                return answer
            known = outlined(space, factors.backward, factors.outlines)
        elif not mixes_records(knowledge.model):
            known = self.found(space, signal, classes, guess, rng, deadline)
        rest, free = without(space, known)
        others = oriented(guess(rest.right, rng), rest) @ free.T if rest.rank else space.right.new_zeros(0, space.rank)
        return self.read(view, knowledge, call, affine, space, signal, known, others, time.perf_counter() - began)

    def found(
        self, space: Space, signal: Signal, classes: Int[Tensor, " classes"], guess: Guess, rng: torch.Generator, deadline: float
    ) -> list[Found]:
        """The records that solve their equations, each once."""
        known, tries = list[Found](), 0
        while len(known) < space.rank and tries < TRIES and time.process_time() < deadline:
            rest, free = without(space, known)
            last = tries == TRIES - 1  # then chance
            drawn = torch.randn(rest.rank, rest.rank, generator=rng, dtype=torch.float64) if last else guess(rest.right, rng)
            starts = oriented(drawn, rest)
            likely = residuals(rest, signal, starts, classes).argsort(dim=1)
            labels = classes[likely[:, min(tries, len(classes) - 1)]]
            ended = solve(rest, signal, starts, labels, deadline=deadline)
            new = [i for i in ended.residual.argsort().tolist() if float(ended.residual[i]) < FOUND]
            fresh = self.settled(space, signal, ended.coordinates[new] @ free.T, labels[new], known, deadline)
            tries = 0 if fresh else tries + 1
            known += fresh
        return known

    def settled(
        self, space: Space, signal: Signal, coordinates: Tensor, labels: Tensor, known: list[Found], deadline: float
    ) -> list[Found]:
        """The new records among these, solved once more in the whole mixture."""
        if not len(coordinates):
            return []
        ended: Roots = solve(space, signal, coordinates, labels, deadline=deadline)
        rows, fresh = [item.coordinates @ space.right for item in known], list[Found]()
        for c, label, residual, error in zip(ended.coordinates, labels, ended.residual, ended.error, strict=True):
            row, column = c @ space.right, space.left.T @ signal(space.slopes @ c, label)
            # 1/(column·c) is the record's share of the update, at most 1; a signal that has faded to zero solves anything
            if (
                float(residual) < FOUND
                and 0.5 < float(column @ c) < torch.inf
                and all(float((row - other).norm()) > SAME * float(row.norm()) for other in rows)
            ):
                rows.append(row)
                fresh.append(Found(c, column, int(label), float(error)))
        return fresh

    def read(
        self, view: Observation, knowledge: Knowledge, call: Call, affine: Affine, space: Space, signal: Signal,
        known: list[Found], others: Float[Tensor, "others rank"], seconds: float,
    ) -> Reconstruction:  # fmt: skip
        """Images, labels and proofs of what was found, and the unmixed guesses of the rest."""
        records, classes = knowledge.num_examples, possible(knowledge)
        scales = torch.stack([1 / (item.column @ item.coordinates) for item in known]) if known else torch.zeros(0, dtype=torch.float64)
        clipped = maybe_clipped(view, knowledge)
        times = scales / scales.median() if clipped and known else scales * records
        rows = torch.cat([torch.stack([item.coordinates for item in known]), others]) if known else others
        pixels = torch.nan_to_num(affine.undo(rows @ space.right), nan=0.5)
        inside = ((pixels > -1e-3) & (pixels < 1 + 1e-3)).all(1)
        enough = affine.whole and call.outputs.shape[1] - 2 * space.rank >= SPARE  # more equations than unknowns
        proven = [
            enough and item.error < CLOSE * float(affine.scale.min()) and abs(float(times[i]) - 1) < ONE and bool(inside[i])
            for i, item in enumerate(known)
        ]
        guessed = classes[residuals(space, signal, rows, classes).argmin(1)].tolist()
        labels = [item.label if item.label >= 0 else guessed[i] for i, item in enumerate(known)] + guessed[len(known) :]
        places = [i for i in range(len(known)) for _ in range(1 if clipped else max(1, round(float(times[i]))))]
        places = (places + list(range(len(known), len(rows))))[:records]
        shape = knowledge.schema.shape
        images = torch.cat([pixels[places].clamp(0, 1).float().view(-1, *shape), torch.full((records - len(places), *shape), 0.5)])
        named = [labels[i] for i in places] + [int(classes[0])] * (records - len(places))
        proofs = [PROVEN if i < len(known) and proven[i] and places.count(i) == 1 else "" for i in places] + [""] * (records - len(places))
        told = knowledge.labels
        if told is None and knowledge.label_counts is not None:
            told = torch.arange(len(knowledge.label_counts)).repeat_interleave(knowledge.label_counts)
        order = list(range(records)) if told is None else in_order(named, told.tolist())
        return Reconstruction(
            images[order],
            torch.tensor(named) if told is None else told,
            objective=float(sum(not proof for proof in proofs)) / records,
            certificate=tuple(proofs[i] for i in order),
            seconds=seconds,
            converged=len(known) == space.rank,
        )


def possible(knowledge: Knowledge) -> Int[Tensor, " classes"]:
    """The labels that a record can have."""
    if knowledge.labels is not None:
        return torch.tensor(sorted(set(knowledge.labels.tolist())))
    if knowledge.label_counts is not None:
        return knowledge.label_counts.nonzero().flatten()
    return torch.arange(knowledge.schema.num_classes)


def oriented(coordinates: Float[Tensor, "some rank"], space: Space) -> Float[Tensor, "some rank"]:
    """Scaled so that unit·c = 1; where that is nearly 0, as far as the largest of the others."""
    along = coordinates @ space.unit
    least = 0.05 * along.abs().median()
    return coordinates / torch.where(along.abs() > least, along, torch.where(along < 0, -least, least))[:, None]


def outlined(space: Space, columns: Tensor | None, rows: Tensor | None) -> list[Found]:
    """The records of a factorization that found only some: their columns are right, the rows are not exact."""
    if columns is None or rows is None or not len(rows):
        return []
    coordinates = torch.linalg.lstsq(space.right.T, rows.T).solution.T
    return [Found(c, space.left.T @ column, -1, torch.inf) for c, column in zip(coordinates, columns.T, strict=True)]
