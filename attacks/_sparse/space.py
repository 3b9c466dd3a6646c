"""The two small spaces in which the batch hides: column and row space of the layer's gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-6
"""Singular values below this fraction of the largest are rounding, of float32 and of the Gram matrix."""

GAP = 5.0
"""A ratio of neighbouring singular values that ends the signal, where the number of records is unknown."""

ALIKE = 4.0
"""Coherence of coarse rounding: equal pixels are rounded alike. In photos with saturated regions 22 standard deviations were seen."""

PRIOR_ENTRIES = 4
"""Entries of typical noise that are added to the few that a short row has outside the space."""


@dataclass(frozen=True)
class Layer:
    """A linear layer z = W·x + b before a ReLU, and what the update says of it, up to one common factor.

    ``coarse``: whether the update was rounded to less than float32. ``signal``: what all records' backward signals are multiples of where
    they are on, as between two classes; NaN where it is not known.
    """

    weight_gradient: Float[Tensor, "neurons inputs"]
    bias_gradient: Float[Tensor, " neurons"]
    weight: Float[Tensor, "neurons inputs"]
    bias: Float[Tensor, " neurons"]
    coarse: bool = False
    signal: Float[Tensor, " neurons"] | None = None


@dataclass(frozen=True)
class Space:
    """The factors of [∂W, β·∂b] = L·R of rank r; β balances the two, and R keeps the columns of ∂W only.

    With D = L·Q the records are X = Q⁻¹·R. A row c of Q⁻¹ gives the record Rᵀc, its preactivations A·c, and unit·c = 1.

    Attributes:
        left: L, orthonormal columns.
        right: R.
        slopes: A = W·Rᵀ + b·unitᵀ.
        unit: ∂b in the coordinates of L.
        values: singular values of L·R.
        noise: root mean square of the entries of each row of ∂W outside the space; rounding to few bits is in proportion to the row.
        coherence: factor by which errors that are alike add up to more in L than independent ones do.
        signal: as the layer's.
    """

    left: Float[Tensor, "neurons rank"]
    right: Float[Tensor, "rank inputs"]
    slopes: Float[Tensor, "neurons rank"]
    unit: Float[Tensor, " rank"]
    values: Float[Tensor, " rank"]
    noise: Float[Tensor, " neurons"]
    coherence: float = 1.0
    signal: Float[Tensor, " neurons"] | None = None

    @property
    def rank(self) -> int:
        """Effective batch size."""
        return self.left.shape[1]

    def blur(self, q: Float[Tensor, " rank"]) -> Float[Tensor, " neurons"]:
        """Standard deviation that the noise gives each entry of L·q."""
        deviations: Tensor = self.coherence * self.noise * (q / self.values).norm()
        return deviations

    def live(self) -> Space:
        """The space without the neurons that are off for every record: their rows are zero for every q."""
        size = self.left.norm(dim=1)
        keep = size > 1e-5 * size.max()
        signal = None if self.signal is None else self.signal[keep]
        return replace(self, left=self.left[keep], slopes=self.slopes[keep], noise=self.noise[keep], signal=signal)


def numerical_rank(values: Float[Tensor, " values"], records: int | None) -> int:
    """How many of the descending singular values are signal.

    Noise has many singular values of about one size, the signal at most one for each record. So with the records known, the
    largest value that must be noise is the floor; without, the last large gap ends the signal.
    """
    values = values / values[0]
    if records is not None and records < len(values):
        floor = max(float(values[records]) * 2, FLOOR)
        return max(1, int((values[:records] > floor).sum()))
    last = min(len(values) - 1, int((values > FLOOR).sum()))
    if last == 0:
        return 1
    ratio = values[:last] / values[1 : last + 1].clamp_min(1e-9)
    large = (ratio > GAP).nonzero().flatten()
    return int(large[-1]) + 1 if len(large) else int(ratio.argmax()) + 1


def decompose(layer: Layer, records: int | None = None) -> Space | None:
    """Split the gradient into its two spaces, in float64; None where it is zero."""
    weight, bias = layer.weight_gradient.double(), layer.bias_gradient.double()
    balance = float(weight.norm() / bias.norm().clamp_min(1e-300)) / weight.shape[1] ** 0.5  # its rounding weighs as a pixel's
    if not 0 < balance < float("inf"):
        return None
    both = torch.cat([weight, balance * bias[:, None]], 1)
    if both.shape[0] <= both.shape[1]:
        squares, left = torch.linalg.eigh(both @ both.T)
        squares, left = squares.flip(0).clamp_min(0), left.flip(1)
    else:
        squares, right = torch.linalg.eigh(both.T @ both)
        squares, right = squares.flip(0).clamp_min(0), right.flip(1)
        left = both @ right
    rank = numerical_rank(squares.sqrt(), records)
    left = torch.linalg.qr(left[:, :rank])[0].contiguous()
    right, unit = left.T @ weight, left.T @ bias
    slopes = layer.weight.double() @ right.T + torch.outer(layer.bias.double(), unit)
    free = max(weight.shape[1] - rank, 0)
    outside = (both - left @ (left.T @ both)).square().sum(1)
    typical = outside.sum() / max((len(both) - rank) * free, 1)
    noise = ((outside + PRIOR_ENTRIES * typical) / (free + PRIOR_ENTRIES)).sqrt()
    return Space(left, right, slopes, unit, squares[:rank].sqrt(), noise, ALIKE if layer.coarse else 1.0, layer.signal)
