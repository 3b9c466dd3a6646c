"""Two classes: each column of D is one known signal, cut by its record's mask, so that rows of ∂W are sums over subsets of the records.

Between two classes every record pulls along the same line of the logits, each with its own force f (up to float32, which a record that
the model is sure of feels). Before a ReLU that only a linear layer follows, D[j, i] = f_i·v[j] where record i is on, with v the same for
all records, and known. So row j of L = D·Q⁻¹ over v[j] is the sum of f_i·c_i over the records that are on, c_i their coordinates, and
rows of neurons that disagree about one record differ by f_i·c_i. Each such difference is tested by itself: c_i gives a mask, and v cut by
it lies in the space of columns, as far as noise lets that be seen, or it does not. What passes is taken out of all rows, after which
more of them differ by one record. It is a candidate: certificates rest on what follows. Records with equal masks count as one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks._dropout import layers
from attacks._layers import backward_signals
from attacks._matching.latents import bottlenecks
from attacks._sparse.certify import CLEAR
from attacks._sparse.space import Space
from simulator.adversary import Knowledge
from simulator.types import Broadcast

PROBES = 64
"""Random pictures, which show each neuron's signal where it is on."""

SAME = 1e-3
"""Difference up to which the probes' signals are one, relative to the typical one; float32 takes 1e-4 of it."""

ROUNDED = 1e-9
"""Share of a column's square that may lie outside the space beside what the update's noise puts there: v is known in float32 only."""

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

    None with other than two classes, where the model draws dropout or noise of its own for each record, and where the random pictures
    have different signals, as behind a second ReLU.
    """
    if knowledge.schema.num_classes != 2 or layers(knowledge.model) or bottlenecks(knowledge.model):
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
class Passing:
    """Records that differences gave away: f·c, mask, direction q of the column, and the share of its square that lies outside."""

    steps: Float[Tensor, "passing rank"]
    masks: Bool[Tensor, "passing neurons"]
    directions: Float[Tensor, "passing rank"]
    outside: Float[Tensor, " passing"]


def parallel(space: Space, rng: torch.Generator, deadline: float) -> Float[Tensor, "found rank"]:
    """Directions q of columns of D that differences of rows give away: v cut by the mask of the record that such a difference is.

    ``deadline`` is in CPU seconds of this process.
    """
    found = spanned = space.left[:0]
    if space.signal is None or space.coherence > 1:  # rounding to few bits is alike in all rows and passes for records
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
            if time.process_time() > deadline:
                return found
            records = _passing(rows, first, second)
            for place in records.outside.argsort().tolist():
                if len(found) == space.rank:
                    break
                q = records.directions[place]
                rest = q - spanned.T @ (spanned @ q)
                if float(rest.norm()) > INDEPENDENT:
                    found, spanned = torch.cat([found, q[None]]), torch.cat([spanned, rest[None] / rest.norm()])
                    rows = replace(rows, sums=rows.sums - records.masks[place, :, None] * records.steps[place])
            if len(found) == space.rank:
                break
    return found


def _pairs(neurons: int, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Each row by itself, with −1 as the second, and pairs of rows at random, at most :data:`MOST` of them, in parts."""
    alone = torch.arange(neurons)
    if neurons * (neurons - 1) // 2 <= MOST:
        first, second = torch.triu_indices(neurons, neurons, 1)
        mixed = torch.randperm(len(first), generator=rng)
        first, second = first[mixed], second[mixed]
    else:
        first = torch.randint(neurons, (MOST,), generator=rng)
        second = (first + torch.randint(1, neurons, (MOST,), generator=rng)) % neurons
    first, second = torch.cat([alone, first]), torch.cat([torch.full_like(alone, -1), second])
    return list(zip(torch.split(first, PAIRS), torch.split(second, PAIRS), strict=True))


def _passing(of: Rows, first: Tensor, second: Tensor) -> Passing:
    """Those of some differences that look like one record's."""
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
    return Passing(signed, masks[chosen], q / q.norm(dim=1, keepdim=True), outside[chosen])
