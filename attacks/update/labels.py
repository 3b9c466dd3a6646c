"""Label recovery from the gradient of the last linear layer.

With mean cross-entropy ∂b_c = mean_i p_ic − n_c/B, where p_i is the softmax of record i and n_c counts the records of class c. One
record: only its own class has a negative entry. A batch: estimate the softmax, solve for n, round to integers that sum to B.

Source: Zhao et al., 2020, arXiv:2001.02610, section 3.1 (one record); Ma et al., 2023, arXiv:2304.06516 (iLRG: a softmax for each class
    from its embedding ∂W_c/∂b_c); Chen and Vikalo, 2024, ICML (RLU: softmax of auxiliary data, class by class); Geng et al., 2021,
    arXiv:2110.09074 (softmax of dummy inputs, average of the first and last model of a FedAvg round).
Deviations: one record without bias is the row of largest norm, which assumes no sign of the features. iLRG's embeddings are corrected
    for the records of other classes by generalized least squares, alternating with the counts. A known clipping hides the scale of
    the gradient: of 81 scales the one is taken whose counts are nearest to integers. RLU by nonnegative least squares, no Monte-Carlo
    over epochs. upload.buffers belong to the last model of a FedAvg round, but are not used as statistics of the batch.
Below the bar: exact batches of 32 must be 95 %, and without public data are not on linear and lenet. Untrained models, half of the
    batches of two classes only, digits 3×32×32: linear 15, mlp 19, lenet 12, convnet 20 of 20; 1×16×16: 13, 19, 19, 20 of 20. Batches
    of 8: 20 of 20, but lenet 19 at 3×32×32. Measured by ``pytest --slow -s tests/attacks/test_bars.py -k counts_by_model``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from attacks._gradient import maybe_clipped, mean_gradient, not_finite, steps_taken
from attacks._layers import Call, all_buffers, last_linear, trace
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation, Tensors

Estimate = Literal["auto", "uniform", "dummy", "embeddings", "public"]

PROBES = 256
"""Random or public inputs behind an estimated softmax, at most."""


ROUNDS = 60
"""Half-steps of the alternation in :func:`embedding_counts`."""

SCALES = torch.logspace(-2, 0, 81, dtype=torch.float64)
"""Factors of an unknown clipping that are tried, 6 % apart."""


def one_label(weight: Float[Tensor, "classes features"], bias: Float[Tensor, " classes"] | None) -> int:
    """The class of one record: ∂b_c = p_c − [c = y] is negative only at y, and so is the row of ∂W of largest norm."""
    if bias is not None:
        return int(bias.argmin())
    if len(weight) == 2:  # two rows of equal norm: assume that the features sum to more than zero
        return int(weight.sum(1).argmin())
    return int(weight.norm(dim=1).argmax())


def to_counts(estimate: Float[Tensor, " classes"], records: int) -> Int[Tensor, " classes"]:
    """Nonnegative integers that sum to ``records``, by largest remainders of the estimate scaled to that sum."""
    share = torch.nan_to_num(estimate.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    share = share * records / share.sum() if share.sum() > 0 else torch.full_like(share, records / len(share))
    counts = share.floor()
    missing = records - int(counts.sum())
    counts[(share - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts.long()


def class_softmax(logits: Float[Tensor, "records classes"], labels: Int[Tensor, " records"]) -> Float[Tensor, "classes classes"]:
    """Row c is the mean softmax of the records of class c, or of all of them where the class has none."""
    softmax = F.softmax(logits.double(), 1)
    present = torch.bincount(labels, minlength=softmax.shape[1]) > 0
    rows = [softmax[labels == c].mean(0) if present[c] else softmax.mean(0) for c in range(softmax.shape[1])]
    return torch.stack(rows)


def solve_counts(softmax: Float[Tensor, "classes classes"], bias: Float[Tensor, " classes"], records: int) -> Float[Tensor, " classes"]:
    """Nonnegative n that sums to B and solves Pᵀn − n = B·∂b, by least squares; row c of P is the softmax of class c."""
    classes = len(bias)
    system = softmax.T - torch.eye(classes, dtype=torch.float64)
    heavy = 10 * float(system.abs().max())  # the sum is known, the softmax is not
    rows = torch.cat([system, torch.full((1, classes), heavy, dtype=torch.float64)])
    right = torch.cat([records * bias.double(), torch.tensor([heavy * records], dtype=torch.float64)])
    return torch.from_numpy(nnls(rows.numpy(), right.numpy())[0])


def embedding_counts(
    weight: Float[Tensor, "classes features"], bias: Float[Tensor, " classes"], head: Call, parameters: Tensors, records: int
) -> Float[Tensor, " classes"]:
    """Alternate between the counts and the softmax P_c of each class's mean feature h_c, both read from the gradient alone.

    With ν = n/B and A = Pᵀ − I the layer has ∂b = Aν and ∂W = A·diag(ν)·h. The mean of n_c features scatters as 1/n_c about the mean
    of all, so given ν the features are, by generalized least squares with K = (A·diag(ν)·Aᵀ)⁺,

        h̄ = ∂Wᵀ K ∂b / (∂bᵀ K ∂b),    h_c = h̄ + (∂W − ∂b·h̄ᵀ)ᵀ K A_c,    P_c = softmax(W h_c + b),    ν ∝ max(0, Pᵀν − ∂b).

    Features enter only through their logits, so ∂W·Wᵀ stands in for ∂W. A tenth of a record for each class keeps K bounded.
    """
    bias, b = bias.double(), parameters[head.bias].double()
    logits_slope = weight.double() @ parameters[head.weight].double().T
    softmax = F.softmax(b, 0).expand(len(b), -1)
    share = (softmax[0] - bias).clamp(min=0)
    share = share / share.sum()
    for _ in range(ROUNDS):
        system = softmax.T - torch.eye(len(b), dtype=torch.float64)
        trust = torch.linalg.pinv(system * (share + 0.1 / records) @ system.T, rtol=1e-9, hermitian=True)
        mean = logits_slope.T @ trust @ bias / (bias @ trust @ bias)
        logits = mean + system.T @ trust @ (logits_slope - torch.outer(bias, mean)) + b
        softmax = (softmax + F.softmax(logits, 1)) / 2
        update = (share @ softmax - bias).clamp(min=0)
        share = (share + update / update.sum()) / 2
    return records * share


def bias_gradient_without_bias(weight: Tensor, head: Call) -> Float[Tensor, " classes"]:
    """What ∂b would be if every record had the mean feature h of random inputs: ∂W ≈ ∂b·hᵀ."""
    feature = head.inputs.mean(0)
    return weight @ feature / feature.square().sum()


def _models_along_the_way(view: Observation, knowledge: Knowledge) -> list[tuple[Tensors, Tensors]]:
    """The model before and, for more than one local step, after training: the softmax in between is about their average."""
    before, buffers = view.broadcast.parameters, all_buffers(knowledge.model, view.broadcast)
    if steps_taken(view, knowledge) == 1:
        return [(before, buffers)]
    delta = view.upload.update.tensors
    return [(before, buffers), ({name: before[name] + delta.get(name, 0) for name in before}, {**buffers, **view.upload.buffers})]


def estimate_counts(view: Observation, knowledge: Knowledge, estimate: Estimate = "auto") -> Float[Tensor, " classes"]:
    """How often each class occurs behind the upload, as real numbers.

    ``auto`` takes public records where they are granted, since theirs is the right softmax at any stage of training, and else
    the gradient's own embeddings, or random inputs where the last layer has no bias to divide by.

    Raises:
        ValueError: the model does not end in a linear layer, or public records are asked for but not granted.
    """
    head, records, classes = last_linear(knowledge, view.broadcast), knowledge.num_examples, knowledge.schema.num_classes
    if head is None:
        raise ValueError("the model must end in nn.Linear, got another last layer. Give the labels in the threat model.")
    method = estimate if estimate != "auto" else "public" if knowledge.public is not None else "embeddings"
    if method == "public" and knowledge.public is None:
        raise ValueError("estimate = 'public' must come with public data, got none. Set public_data = true in the threat model.")
    if knowledge.public is not None:
        inputs, labels = knowledge.public.inputs[:PROBES], knowledge.public.labels[:PROBES]
    else:
        noise = torch.Generator().manual_seed(PROBES)
        inputs, labels = torch.rand(PROBES, *knowledge.schema.shape, generator=noise), torch.zeros(PROBES).long()

    gradient, runs = mean_gradient(view, knowledge), []
    for parameters, buffers in _models_along_the_way(view, knowledge):
        calls, logits = trace(knowledge.model, parameters, buffers, inputs)
        runs.append((calls[-1], logits, parameters))
    weight = gradient[head.weight]
    bias = gradient[head.bias] if head.bias in gradient else bias_gradient_without_bias(weight, runs[0][0])

    def counts(scale: float) -> Tensor:
        """The counts if clipping had scaled the update by this."""
        w, b = weight / scale, bias / scale
        if method == "embeddings" and head.bias in gradient:
            return torch.stack([embedding_counts(w, b, head, parameters, records) for _, _, parameters in runs]).mean(0)
        if method == "public":
            softmax = torch.stack([class_softmax(logits, labels) for _, logits, _ in runs]).mean(0)
            return solve_counts(softmax, b, records)
        if method == "uniform":
            return records * (1 / classes - b)
        return records * (torch.stack([F.softmax(logits, 1).mean(0) for _, logits, _ in runs]).mean(0) - b)

    if not maybe_clipped(view, knowledge):
        return counts(1.0)
    tried = [counts(float(scale)) for scale in SCALES]
    return min(tried, key=lambda raw: float((raw - to_counts(raw, records)).abs().sum()))


def recovered_counts(view: Observation, knowledge: Knowledge, estimate: Estimate = "auto") -> Int[Tensor, " classes"]:
    """How often each class occurs behind the upload."""
    if knowledge.num_examples == 1:
        head = last_linear(knowledge, view.broadcast)
        if head is not None:
            gradient = mean_gradient(view, knowledge)
            label = one_label(gradient[head.weight], gradient.get(head.bias))
            return F.one_hot(torch.tensor(label), knowledge.schema.num_classes)
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
        estimate: where the softmax comes from: ``uniform`` 1/classes; ``dummy`` random inputs (Geng et al.); ``embeddings`` the
            gradient itself (after iLRG); ``public`` public records (RLU); ``auto`` public if granted, else embeddings.
    """

    estimate: Estimate = "auto"

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse models that do not end in a linear layer, and ``public`` without public records."""
        if last_linear(knowledge, view.broadcast) is None:
            return "labels can be recovered only from a last layer nn.Linear with one output for each class"
        if self.estimate == "public" and knowledge.public is None:
            return "estimate = 'public' must come with public data, got none"
        return not_finite(view)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Recover the counts and list the labels in ascending order."""
        start = time.perf_counter()
        counts = recovered_counts(view, knowledge, self.estimate)
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        return Reconstruction(None, labels, seconds=time.perf_counter() - start)
