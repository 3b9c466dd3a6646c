"""Counts from the gradient of the last layer alone: it holds the mean feature of each class next to its count."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attacks._gradient import smoothed, unsmoothed
from attacks._labels.counts import Gaussian
from simulator.types import LocalTraining

ROUNDS = 60
"""Half-steps of the alternation."""

RIDGE = 0.03
"""Records added to each class, so that the trust in absent ones stays bounded. A choice."""

SMOOTHEST = 0.05
"""Least variance of the error in any direction, as a share of the mean one."""

Head = tuple[Float[Tensor, "classes features"], Float[Tensor, " classes"]]
"""Weight and bias of the last layer, in float64."""


def embedding_counts(
    weight: Float[Tensor, "*many classes features"], bias: Float[Tensor, "*many classes"], head: Head, records: int, recipe: LocalTraining
) -> tuple[Float[Tensor, "*many classes"], Float[Tensor, "*many classes classes"]]:
    """Alternate between the counts and the softmax P_c of each class's mean feature h_c; return counts and covariance of their error.

    With ν = n/B, targets Q and A = (P − Q)ᵀ the layer has ∂b = Aν and ∂W = A·diag(ν)·h. The mean of n_c features scatters as 1/n_c
    about the mean of all, so given ν the features are, by generalized least squares with K = (A·diag(ν)·Aᵀ)⁺,

        h̄ = ∂Wᵀ K ∂b / (∂bᵀ K ∂b),    h_c = h̄ + (∂W − ∂b·h̄ᵀ)ᵀ K A_c,    P_c = softmax(W h_c + b),    ν ∝ max(0, Q⁻¹(Pᵀν − ∂b)).

    Features enter only through their logits, so ∂W·Wᵀ stands in for ∂W. What remains wrong is h̄, the more the fewer classes there are
    to average and the more their features differ: its covariance S/classes, S the scatter of the h_c, gives the counts' B²·J·S·J/classes
    with J the slope of the mean softmax.
    """
    bias, classes = bias.double(), bias.shape[-1]
    logits_slope, targets = weight.double() @ head[0].T, smoothed(torch.eye(classes, dtype=torch.float64), recipe)
    softmax = F.softmax(head[1], 0).expand(classes, -1)
    share = _normal(unsmoothed(softmax[0] - bias, recipe))
    away = torch.zeros_like(logits_slope)
    for _ in range(ROUNDS):
        system = (softmax - targets).mT
        trust = torch.linalg.pinv(system * (share + RIDGE / records)[..., None, :] @ system.mT, rtol=1e-9, hermitian=True)
        trusted = _times(bias, trust)
        energy = (trusted * bias).sum(-1, keepdim=True)  # zero for an update of zeros, which knows no mean
        mean = torch.where(energy > 0, _times(trusted, logits_slope) / energy, 0.0)
        away = system.mT @ trust @ (logits_slope - bias[..., :, None] * mean[..., None, :])
        softmax = (softmax + F.softmax(mean[..., None, :] + away + head[1], -1)) / 2
        share = (share + _normal(unsmoothed(_times(share, softmax) - bias, recipe))) / 2
    present = records * share / (records * share + 1)
    classes_seen = present.sum(-1)[..., None, None]
    scatter = (away.mT * present[..., None, :]) @ away / classes_seen
    middle = _times(share, softmax)
    slope = (middle.diag_embed() - middle[..., :, None] * middle[..., None, :]) * records / (1 - recipe.label_smoothing)
    return records * share, slope @ scatter @ slope / classes_seen


def around(estimate: Float[Tensor, " classes"], covariance: Float[Tensor, "classes classes"]) -> Gaussian:
    """The likelihood of counts whose estimate has a Gaussian error; errors of every direction are allowed for."""
    estimate = torch.nan_to_num(estimate.double(), nan=0.0, posinf=0.0, neginf=0.0)
    covariance = torch.nan_to_num(covariance, nan=0.0, posinf=0.0, neginf=0.0)
    least = SMOOTHEST * covariance.trace() / len(estimate) + 1e-6
    curvature = torch.linalg.inv(covariance + least * torch.eye(len(estimate), dtype=torch.float64))
    return Gaussian(curvature @ estimate, curvature)


def _normal(share: Tensor) -> Tensor:
    share = torch.nan_to_num(share).clamp(min=0)
    total = share.sum(-1, keepdim=True)
    return torch.where(total > 0, share / total, 1 / share.shape[-1])


def _times(row: Float[Tensor, "*many rows"], matrix: Float[Tensor, "*many rows columns"]) -> Float[Tensor, "*many columns"]:
    return (row[..., None, :] @ matrix)[..., 0, :]
