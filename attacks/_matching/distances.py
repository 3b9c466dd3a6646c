"""How far a simulated update is from the observed one.

A distance is a plain function of two flat updates and of the spans that their tensors take in them; it can be differentiated twice
and batched by vmap. All but :func:`squared` and :func:`likelihood` are free of scale or relative to the observed update, so that one
tolerance and one weight of a prior fit all models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Span = tuple[int, int]
Flat = Float[Tensor, " coordinates"]
Distance = Callable[[Flat, Flat, Sequence[Span]], Float[Tensor, ""]]
"""(simulated, observed, first and end of each tensor) → distance, at least 0."""

TINY = 1e-30


def inverse_norm(update: Flat) -> Float[Tensor, ""]:
    """1/‖update‖, in operations whose derivative is one product: that of ``norm`` takes four passes over the update."""
    return update.square().sum().rsqrt()


def cosine(trial: Flat, target: Flat, _: Sequence[Span] = ()) -> Float[Tensor, ""]:
    """1 − cos of the whole updates: one angle over all layers, in [0, 2]; blind to the scale of either."""
    return 1 - (trial @ target) * inverse_norm(trial) * inverse_norm(target)


def angle(trial: Flat, target: Flat, _: Sequence[Span] = ()) -> Float[Tensor, ""]:
    """√(2·(1 − cos)): the chord between the directions, for small angles the angle in radians.

    Its slope does not fade as the match improves, so that a prior weighs less and less against it; under 1 − cos a prior that is
    right for the start dominates the end. The constant keeps the root differentiable at a perfect match.
    """
    return (2 * cosine(trial, target) + 1e-9).clamp(min=1e-9).sqrt()


def l2(trial: Flat, target: Flat, _: Sequence[Span] = ()) -> Float[Tensor, ""]:
    """Squared distance of the directions: 0 is parallel, 2 orthogonal; blind to the scale of either, so that clipping changes nothing.

    Equal to 2·(1 − cos), but of differences: near a match it keeps the digits that 1 − cos cancels.
    """
    return (trial * inverse_norm(trial) - target * inverse_norm(target)).square().sum()


def relative_l2(trial: Flat, target: Flat, _: Sequence[Span] = ()) -> Float[Tensor, ""]:
    """Squared distance over the squared norm of the observed update: sees the scale, 1 for an update of zeros."""
    return (trial - target).square().sum() / target.square().sum()


def squared(trial: Flat, target: Flat, _: Sequence[Span] = ()) -> Float[Tensor, ""]:
    """Squared distance in the units of the update, as DLG has it: absolute tolerances then depend on the size of the gradient."""
    return (trial - target).square().sum()


def l1(trial: Flat, target: Flat, _: Sequence[Span] = ()) -> Float[Tensor, ""]:
    """Sum of absolute differences over that of the observed update: the likelihood under Laplace noise, robust to outliers."""
    return (trial - target).abs().sum() / target.abs().sum()


def layer_cosine(trial: Flat, target: Flat, spans: Sequence[Span]) -> Float[Tensor, ""]:
    """Mean over the tensors of 1 − cos: each counts alike, however small its gradient. A tensor without gradient counts 0."""
    parts = [(trial[a:b], target[a:b]) for a, b in spans]
    norms = [((u.square().sum() + TINY).sqrt() * (v.square().sum() + TINY).sqrt(), v) for u, v in parts]
    return torch.stack([(v != 0).any() * (1 - u @ v / n) for (u, v), (n, _) in zip(parts, norms, strict=True)]).mean()


def kernel(trial: Flat, target: Flat, spans: Sequence[Span]) -> Float[Tensor, ""]:
    """Mean over the tensors of 1 − exp(−‖Δ‖²/σ²), where σ² is the squared norm of the observed tensor.

    Wang et al., 2020, arXiv:2009.06228: a tensor that is far off saturates instead of dominating.
    """
    gaps = [(trial[a:b] - target[a:b]).square().sum() / (target[a:b].square().sum() + TINY) for a, b in spans]
    return -torch.expm1(-torch.stack(gaps)).mean()


def likelihood(sigma: float, clip_norm: float = float("inf")) -> Distance:
    """‖Δ‖²/2σ²: the negative log-likelihood of the observed update under Gaussian noise of deviation ``sigma`` per coordinate.

    The mechanism that the defense states is applied to the simulated update too: it is clipped to ``clip_norm`` first.
    Balunović et al., 2022, arXiv:2111.04706, section 4. About half the number of coordinates at the truth, not 0.
    """

    def distance(trial: Flat, target: Flat, _: Sequence[Span] = ()) -> Float[Tensor, ""]:
        if isfinite(clip_norm):
            trial = trial * (clip_norm / trial.norm()).clamp(max=1)
        return (trial - target).square().sum() / (2 * sigma**2)

    return distance


def partial(inner: Distance, fraction: float) -> Distance:
    """``inner`` over the fraction of the coordinates in which the observed update is largest, the others taken as 0 in both.

    For updates of which small coordinates are noise, rounding or pruned away.
    """

    def distance(trial: Flat, target: Flat, spans: Sequence[Span]) -> Float[Tensor, ""]:
        kept = max(1, round(fraction * target.numel()))
        mask = (target.abs() >= target.abs().topk(kept).values[-1]).to(trial.dtype)
        return inner(trial * mask, target * mask, spans)

    return distance


DistanceName = Literal["angle", "cosine", "kernel", "l1", "l2", "layer_cosine", "relative_l2", "squared"]
"""What the setting of a distance may be."""

DISTANCES: dict[DistanceName, Distance] = {
    "angle": angle,
    "cosine": cosine,
    "kernel": kernel,
    "l1": l1,
    "l2": l2,
    "layer_cosine": layer_cosine,
    "relative_l2": relative_l2,
    "squared": squared,
}
"""By the names that settings use."""
