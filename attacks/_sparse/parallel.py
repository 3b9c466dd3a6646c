"""Two classes: each column of D is one known signal, cut by its record's mask, so that rows of ∂W are sums over subsets of the records.

Between two classes every record pulls along the same line of the logits, each with its own force f. Before a ReLU that only a linear
layer follows, D[j, i] = f_i·v[j] where record i is on, with v the same for all records, and known. So row j of L = D·Q⁻¹ over v[j] is the
sum of f_i·c_i over the records that are on, c_i their coordinates, and rows of neurons that disagree about one record differ by f_i·c_i.
Each such difference proves itself: c_i gives a mask, and v cut by it lies in the space of columns, or it does not. What is proven is
taken out of all rows, after which more of them differ by one record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks._layers import backward_signals
from attacks._sparse.certify import CLEAR
from attacks._sparse.space import Space
from simulator.adversary import Knowledge
from simulator.types import Broadcast

PROBES = 64
"""Random pictures, which show each neuron's signal where it is on."""

SAME = 0.01
"""Difference up to which two signals are one, relative to the typical one; float32 and a softmax that is nearly sure take 1e-4 of it."""

ROUNDED = 1e-9
"""Share of a column's square that may lie outside the space beside what the update's noise puts there: that of v, and of two near signs."""

NEAR = 0.02
"""The same share beyond which nothing else is looked at."""

INDEPENDENT = 1e-3
"""Part of a new direction that must be no sum of those found; two records that one neuron of 1000 tells apart leave 0.03."""

PAIRS = 1 << 12
"""Differences that are looked at together: for each one every neuron's preactivation is held."""

MOST = 1 << 17
"""Differences that are looked at in one turn, all of them up to 512 neurons."""


def shared_signal(knowledge: Knowledge, broadcast: Broadcast, name: str) -> Float[Tensor, " neurons"] | None:
    """v of the layer ``name``: the derivative of the difference of the two logits by each output that is on, NaN where none was on.

    None with other than two classes, and where it depends on the record.
    """
    if knowledge.schema.num_classes != 2:
        return None
    images = torch.rand(PROBES, *knowledge.schema.shape, generator=torch.Generator().manual_seed(0))
    one, other = backward_signals(knowledge, broadcast, name, images).double()
    seen = one - other  # softmax's share cancels
    on = seen != 0
    mean = seen.sum(0) / on.sum(0)
    differs = on & ((seen - mean).abs() > SAME * mean[on.any(0)].square().mean().sqrt())
    return None if bool(differs.any()) else mean


@dataclass(frozen=True)
class Rows:
    """What each neuron says: the sum of f·c over the records that are on, its slope, its signal v; and the space that columns lie in."""

    sums: Float[Tensor, "neurons rank"]
    slopes: Float[Tensor, "neurons rank"]
    signal: Float[Tensor, " neurons"]
    unit: Float[Tensor, " rank"]
    basis: Float[Tensor, "neurons rank"]
    scale: Float[Tensor, "rank rank"]
    blur: Float[Tensor, " rank"]


@dataclass(frozen=True)
class Proven:
    """Records that differences gave away: f·c, mask, direction q of the column, and the share of its square that lies outside."""

    steps: Float[Tensor, "proven rank"]
    masks: Bool[Tensor, "proven neurons"]
    directions: Float[Tensor, "proven rank"]
    outside: Float[Tensor, " proven"]


def parallel(space: Space, rng: torch.Generator) -> Float[Tensor, "found rank"]:
    """Directions q of the columns of D that differences of rows prove: v cut by the mask of the record that such a difference is."""
    found = space.left[:0]
    if space.signal is None:
        return found
    usable = space.signal.isfinite()
    if int(usable.sum()) <= 2 * space.rank:  # any cut would lie in the space
        return found
    left, signal = space.left[usable], space.signal[usable]
    blur = space.coherence * space.noise[usable].norm() / space.values
    basis, scale = torch.linalg.qr(left)
    rows = Rows(left / signal[:, None], space.slopes[usable], signal, space.unit, basis, scale, blur)
    before = -1
    while before < len(found) < space.rank:
        before = len(found)
        for first, second in _pairs(len(left), rng):
            records = _proven(rows, first, second)
            for place in records.outside.argsort().tolist():
                q = records.directions[place]
                known = torch.linalg.lstsq(found.T, q[:, None])[0][:, 0] @ found if len(found) else 0 * q
                if len(found) < space.rank and float((q - known).norm()) > INDEPENDENT:
                    found = torch.cat([found, q[None]])
                    rows = replace(rows, sums=rows.sums - records.masks[place, :, None] * records.steps[place])
            if len(found) == space.rank:
                break
    return found


def _pairs(neurons: int, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Each row by itself, with −1 as the second, and pairs of rows at random, at most :data:`MOST` of them, in parts."""
    first, second = torch.triu_indices(neurons, neurons, 1)
    some, alone = torch.randperm(len(first), generator=rng)[:MOST], torch.arange(neurons)
    first, second = torch.cat([alone, first[some]]), torch.cat([torch.full_like(alone, -1), second[some]])
    return list(zip(torch.split(first, PAIRS), torch.split(second, PAIRS), strict=True))


def _proven(of: Rows, first: Tensor, second: Tensor) -> Proven:
    """Those of some differences that are one record's."""
    padded = torch.cat([of.sums, torch.zeros_like(of.sums[:1])])
    steps = padded[first] - padded[second]
    masks = (steps / (steps @ of.unit)[:, None]) @ of.slopes.T > 0
    cut = masks * of.signal
    inside, size = cut @ of.basis, cut.square().sum(1).clamp_min(1e-300)
    outside = 1 - inside.square().sum(1) / size
    on = masks.gather(1, first[:, None])[:, 0]  # which of the two is on says the sign of the force
    off = torch.where(second < 0, torch.zeros_like(on), masks.gather(1, second.clamp_min(0)[:, None])[:, 0])
    near = ((on != off) & (outside < NEAR)).nonzero()[:, 0]
    q = torch.linalg.solve_triangular(of.scale, inside[near].T, upper=True).T
    kept = outside[near] < (CLEAR * (q * of.blur).norm(dim=1)).square() / size[near] + ROUNDED
    chosen, q = near[kept], q[kept]
    signed = torch.where(on, 1.0, -1.0)[chosen, None] * steps[chosen]
    return Proven(signed, masks[chosen], q / q.norm(dim=1, keepdim=True), outside[chosen])
