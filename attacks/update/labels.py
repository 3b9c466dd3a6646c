"""Label recovery from the gradient of the last linear layer: how often each class occurs in the batch.

With mean cross-entropy ∂b_c = mean_i p_ic − n_c/B, where p_i is the softmax of record i and n_c counts the records of class c. One
record: only its own class has a negative entry. A batch: the posterior over all counts, from what each class is known to leave there.

Source: Zhao et al., 2020, arXiv:2001.02610, section 3.1 (iDLG, one record); Ma et al., 2023, arXiv:2304.06516 (iLRG: a softmax for each
    class from its embedding ∂W_c/∂b_c); Chen and Vikalo, 2024, ICML (RLU: softmax of auxiliary data, class by class); Geng et al.,
    2021, arXiv:2110.09074 (softmax of dummy inputs, average of the first and last model of a FedAvg round). ``posterior`` is our own.
Deviations: one record without bias is the row of largest norm, which assumes no sign of the features. RLU by nonnegative least squares,
    no Monte-Carlo over epochs: as Geng et al. it averages over the first and last model of a round. A known clipping hides the scale of
    the gradient: of 81 scales the one is taken whose counts are most probable, or nearest to integers. upload.buffers belong to the last
    model of a FedAvg round, but are not used as statistics of the batch. Measured effect of the posterior against the papers'
    estimates: ``python -m experiments.benchmarks.labels``, and what is still below its bar, in tests/attacks/test_labels.py.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from attacks._gradient import maybe_clipped, mean_gradient, unusable
from attacks._labels import published
from attacks._labels.counts import Posterior, posterior, to_counts
from attacks._labels.embeddings import around, embedding_counts
from attacks._labels.moments import likelihood
from attacks._labels.runs import along_the_way, bias_from, reference, weights
from attacks._labels.taught import noise_deviation, taught
from attacks._labels.visible import nearest_label
from attacks._layers import Call, last_linear
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

__all__ = ["LabelRecovery", "Posterior", "count_posterior", "known_or_recovered", "recovered_counts", "to_counts", "unrecoverable"]

Estimate = Literal["auto", "posterior", "idlg", "ilrg", "rlu", "uniform", "dummy"]

SCALES = torch.logspace(-2, 0, 81, dtype=torch.float64)
"""Factors of an unknown clipping that are tried, 6 % apart."""

BLURRED = 0.1
"""Deviation of the known noise on a count beyond which a class's mean feature ∂W_c/∂b_c is not read off the gradient any more."""

DIFFUSE = 0.3
"""Where the most probable counts are less probable than this, the expected ones, rounded, have more labels right."""


def _head(view: Observation, knowledge: Knowledge) -> Call:
    head = last_linear(knowledge, view.broadcast)
    if head is None:
        raise ValueError("the model must end in nn.Linear, got another last layer. Give the labels in the threat model.")
    return head


def _scales(view: Observation, knowledge: Knowledge) -> list[float]:
    return SCALES.tolist() if maybe_clipped(view, knowledge) else [1.0]


def estimate_counts(view: Observation, knowledge: Knowledge, estimate: Estimate) -> Tensor:
    """How often each class occurs behind the upload by one of the papers' estimates, as real numbers.

    Raises:
        ValueError: the model does not end in a linear layer, or public records are asked for but not granted.
    """
    head, records, recipe, classes = _head(view, knowledge), knowledge.num_examples, knowledge.training, knowledge.schema.num_classes
    if estimate == "rlu" and knowledge.public is None:
        raise ValueError("estimate = 'rlu' must come with public data, got none. Set public_data = true in the threat model.")
    gradient = mean_gradient(view, knowledge)
    weight = gradient[head.weight].double()
    if estimate == "idlg":
        return F.one_hot(torch.tensor(published.one_label(weight, gradient.get(head.bias))), classes).double() * records
    known = reference(knowledge)
    runs = along_the_way(view, knowledge, known.inputs)
    bias = gradient[head.bias].double() if head.bias in gradient else bias_from(weight, runs[0].head)

    def counts(scale: float) -> Tensor:
        """The counts if clipping had scaled the update by this."""
        w, b = weight / scale, bias / scale
        if estimate == "ilrg" and head.bias in gradient:
            each = [published.ilrg(w, b, weights(run.parameters, head), records, recipe) for run in runs]
            return torch.stack(each).mean(0)
        if estimate == "rlu":
            rows = torch.stack([published.class_softmax(run.softmax.log(), known.labels[: len(run.softmax)]) for run in runs])
            return published.solve_counts(rows.mean(0), b, records, recipe)
        if estimate == "uniform":
            return published.from_softmax(torch.full_like(b, 1 / classes), b, records, recipe)
        return published.from_softmax(torch.stack([run.softmax.mean(0) for run in runs]).mean(0), b, records, recipe)

    tried = [counts(scale) for scale in _scales(view, knowledge)]
    return min(tried, key=lambda raw: float((raw - to_counts(raw, records)).abs().sum()))


def count_posterior(view: Observation, knowledge: Knowledge) -> Posterior:
    """The posterior over the counts: with public records of every class from their moments, else from the gradient's own embeddings.

    ``counts`` are the most probable ones or, where no counts are probable, the expected ones, rounded.
    """
    head, records = _head(view, knowledge), knowledge.num_examples
    gradient, rng = mean_gradient(view, knowledge), torch.Generator().manual_seed(records)
    if knowledge.public is not None and int(torch.bincount(knowledge.public.labels, minlength=len(gradient[head.weight])).min()) > 1:
        return _from_public(view, knowledge, head, rng)
    noise = records * noise_deviation(view, knowledge)
    if head.bias not in gradient or noise > BLURRED:
        raw = estimate_counts(view, knowledge, "dummy")
        return _decided(posterior(around(raw, (raw.abs().mean() + noise**2) * torch.eye(len(raw)).double()), records, raw, rng=rng), raw)
    weight, bias = gradient[head.weight].double(), gradient[head.bias].double()
    runs = along_the_way(view, knowledge, torch.full((2, *knowledge.schema.shape), 0.5))
    scales = torch.tensor(_scales(view, knowledge), dtype=torch.float64)[:, None]
    many = weight / scales[..., None], bias / scales
    each = [embedding_counts(*many, weights(run.parameters, head), records, knowledge.training) for run in runs]
    raws, covariances = (torch.stack(parts).mean(0) for parts in zip(*each, strict=True))
    misses = [float((raw - to_counts(raw, records)).abs().sum()) for raw in raws]
    best = min(range(len(misses)), key=lambda place: misses[place] if math.isfinite(misses[place]) else math.inf)
    unread = 0.0 if bool(weight.any()) else float(raws[best].mean())  # zeros hold no mean feature, so that nothing bounds its error
    raw, covariance = raws[best], covariances[best] + (noise**2 + unread) * torch.eye(len(raws[best]), dtype=torch.float64)
    return _decided(posterior(around(raw, covariance), records, raw, rng=rng), raw)


def _from_public(view: Observation, knowledge: Knowledge, head: Call, rng: torch.Generator) -> Posterior:
    gradient, records = mean_gradient(view, knowledge), knowledge.num_examples
    known = taught(view, knowledge, head, biased=head.bias in gradient)
    observed = records * known.statistic(gradient, head)
    scales = torch.tensor(_scales(view, knowledge), dtype=torch.float64)
    expected, gaussian = likelihood(observed / scales[:, None], known.moments, known.belief, records, scales).best()
    return _decided(posterior(gaussian, records, expected, rng=rng), expected)


def _decided(found: Posterior, expected: Tensor) -> Posterior:
    if found.probability >= DIFFUSE:
        return found
    return Posterior(to_counts(expected, int(found.counts.sum())), found.probability, found.mean, found.deviation)


def recovered_counts(view: Observation, knowledge: Knowledge, estimate: Estimate = "auto") -> Int[Tensor, " classes"]:
    """How often each class occurs behind the upload; ``auto`` is iDLG for one record and else the posterior.

    Where a defense left out the one negative entry of ∂b, ``auto`` takes the class of the public record that is nearest in what is seen.
    """
    head = last_linear(knowledge, view.broadcast) if knowledge.num_examples == 1 else None
    if head is not None:
        near = nearest_label(view, knowledge, mean_gradient(view, knowledge).get(head.bias)) if estimate == "auto" else None
        if near is not None:
            return F.one_hot(torch.tensor(near), knowledge.schema.num_classes)
        return estimate_counts(view, knowledge, "idlg").long()
    if estimate in ("auto", "posterior"):
        return count_posterior(view, knowledge).counts
    return to_counts(estimate_counts(view, knowledge, estimate), knowledge.num_examples)


def known_or_recovered(view: Observation, knowledge: Knowledge) -> Int[Tensor, " batch"]:
    """The labels that the threat model discloses, else recovered ones, in ascending order."""
    if knowledge.labels is not None:
        return knowledge.labels
    counts = knowledge.label_counts if knowledge.label_counts is not None else recovered_counts(view, knowledge)
    return torch.arange(knowledge.schema.num_classes).repeat_interleave(counts)


def unrecoverable(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason why labels are neither known nor recoverable."""
    known = knowledge.labels is not None or knowledge.label_counts is not None
    if known or last_linear(knowledge, view.broadcast) is not None:
        return None
    return "labels can be recovered only from a last layer nn.Linear with one output for each class"


@register("attacks", "label_recovery")
@dataclass(frozen=True)
class LabelRecovery:
    """Labels alone, from the gradient of the last layer.

    Attributes:
        estimate: ``posterior`` the most probable counts, by public records where they are granted and else by the gradient's own
            embeddings; ``idlg`` the one class of a batch of one; where the papers take the softmax from: ``uniform`` 1/classes;
            ``dummy`` random inputs (Geng et al.); ``ilrg`` the gradient (Ma et al.); ``rlu`` public records (Chen and Vikalo);
            ``auto`` idlg for one record, else posterior.
    """

    estimate: Estimate = "auto"

    def __post_init__(self) -> None:
        if self.estimate not in get_args(Estimate):
            names = ", ".join(get_args(Estimate))
            raise ValueError(f"estimate must be one of {names}, got {self.estimate!r}. embeddings is now posterior, public is rlu.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse models that do not end in a linear layer, ``rlu`` without public records, and ``idlg`` for more than one record."""
        if (reason := unusable(view, knowledge)) is not None:
            return reason
        if last_linear(knowledge, view.broadcast) is None:
            return "labels can be recovered only from a last layer nn.Linear with one output for each class"
        if self.estimate == "rlu" and knowledge.public is None:
            return "estimate = 'rlu' must come with public data, got none. Set public_data = true in the threat model"
        if self.estimate == "idlg" and knowledge.num_examples > 1:
            return f"estimate = 'idlg' must get one record, got {knowledge.num_examples}. Use estimate = 'posterior'"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Recover the counts and list the labels in ascending order. The objective is −log of the posterior's probability of them."""
        start = time.perf_counter()
        surprise = math.nan
        if self.estimate in ("auto", "posterior") and knowledge.num_examples > 1:
            found = count_posterior(view, knowledge)
            counts, surprise = found.counts, -math.log(max(found.probability, 1e-12))
        else:
            counts = recovered_counts(view, knowledge, self.estimate)
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        return Reconstruction(None, labels, objective=surprise, seconds=time.perf_counter() - start, converged=True)
