"""Which directions are columns of D: their zeros must be exact, and must be the mask of a ReLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks._sparse.space import Space

ROUNDS = 25
"""Newton steps of :func:`separate`; a mask is separated in fewer than ten."""


ALIKE = 1e-3
"""Angle, as a share of a half turn, within which :func:`unmixed` counts rows as one direction."""

COMMON = 0.03
"""Share of neurons that a column must at least be zero on; below, there are too many sets of rows to look at."""

JUMP = 10.0
"""Ratio of neighbouring sizes that sets zeros apart from the rest before they are exact."""

CLEAR = 8.0
"""Entries of L·q below this many standard deviations of their noise count as zero, and above twice as many as not."""


@dataclass(frozen=True)
class Atom:
    """A direction of the column space that makes many rows zero.

    Attributes:
        direction: q, of norm 1.
        zeros: how many are.
        spread: second smallest singular value of the zero rows without the one that it hangs on most; where it is small, q is not
            the only vector that they leave. A mixture of two columns is zero where both are, and by accident on one row more.
        residual: smallest singular value of the zero rows.
        rival: the other vector that they leave.
    """

    direction: Float[Tensor, " rank"]
    zeros: int
    spread: float
    residual: float
    rival: Float[Tensor, " rank"]

    def common(self, space: Space) -> bool:
        """Whether it is zero on too many rows for chance: any vector can be made zero on rank − 1, and noise hides a few more."""
        neurons, rank = space.left.shape
        size = (space.left @ self.direction).abs()
        zero = below(space, self.direction, size)
        if not bool((size > zero).any()):
            return False
        accidents = float(zero.sum() / size[size > zero].median())
        return self.zeros >= max(COMMON * neurons, fewest(neurons, rank) + int(3 * accidents))

    @property
    def alone(self) -> bool:
        """Whether no other vector is zero on the same rows."""
        return self.spread > 10 * self.residual

    def on_off(self, space: Space) -> tuple[Bool[Tensor, " neurons"], Bool[Tensor, " neurons"]]:
        """Rows that are clearly not zero, and rows that are zero; what lies between says nothing."""
        size = (space.left @ self.direction).abs()
        zero = below(space, self.direction, size)
        return size > 2 * zero, size < zero


def below(space: Space, q: Float[Tensor, " rank"], size: Float[Tensor, " neurons"]) -> Float[Tensor, " neurons"]:
    """The size up to which each entry of L·q is zero for all that the noise tells."""
    return (CLEAR * space.blur(q)).clamp_min(1e-7 * float(size.max()))


def polish(space: Space, q: Float[Tensor, " rank"], rounds: int = 16) -> Atom:
    """The null vector of the rows on which L·q is nearly zero, repeated until these rows no longer change."""
    left, (neurons, rank) = space.left, space.left.shape
    size = (left @ q).abs()
    if rank == 1:
        return Atom(q, int((size < below(space, q, size)).sum()), 1.0, 0.0, q)
    threshold = min(0.15 * float(size.median()), 10 * float(size.quantile(0.15)), cut(size, rank))
    zero = size < threshold
    values, least = torch.zeros(rank, dtype=torch.float64), fewest(neurons, rank)
    for _ in range(rounds):
        if int(zero.sum()) < least:
            zero = torch.zeros_like(zero).index_fill(0, torch.topk(size, min(least, neurons), largest=False).indices, True)
        rows = left[zero]
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        q = vectors[:, 0]
        size = (left @ q).abs()
        noise = below(space, q, size)
        threshold = min(threshold, 6 * float(size[zero].median()))
        before, zero = zero, size < noise.clamp_min(threshold)
        if threshold <= float(noise.max()) and torch.equal(zero, before):
            break
    spared = rows[(rows @ vectors[:, 1]).abs().argmax()]
    less, others = torch.linalg.eigh(rows.T @ rows - torch.outer(spared, spared))
    roots = torch.stack([less[1], values[0]]).clamp_min(0).sqrt().tolist()
    rival = others[:, :2] @ torch.linalg.svd(others[:, :2].T @ q[:, None])[0][:, 1]
    return Atom(q, int((size < noise).sum()), roots[0], roots[1], rival)


def fewest(neurons: int, rank: int) -> int:
    """Rows that a column must be zero on: a few more than the rank − 1 that any vector can be made zero on, one where there are few."""
    return min(rank + 4, max(rank, neurons // 20))


def cut(size: Float[Tensor, " neurons"], rank: int) -> float:
    """A size in the last wide gap between neighbours among the smaller half of the entries; ∞ without one.

    The rank − 1 smallest do not count: any vector can be made zero there.
    """
    order = size.sort().values
    few = order[rank - 1 : max(rank + 1, len(order) // 2)].clamp_min(1e-12 * float(order[-1]))
    wide = (few[1:] > JUMP * few[:-1]).nonzero().flatten()
    return float((few[wide[-1]] * few[wide[-1] + 1]).sqrt()) if len(wide) else torch.inf


def unmixed(space: Space, atom: Atom, best: int = 4) -> Float[Tensor, "few rank"]:
    """The directions in the plane of ``atom`` and its rival that make most further rows zero.

    Of two records that are nearly alike, every mixture is zero on almost as many rows as the two columns; but rows on which just
    one of the records is on all give the same direction in the plane.
    """
    plane = torch.stack([atom.direction, atom.rival])
    seen = space.left @ plane.T
    size = seen.norm(dim=1)
    seen = seen[size > 4 * below(space, atom.direction, size)]
    turns = torch.atan2(seen[:, 1], seen[:, 0]).div(torch.pi).remainder(1)
    apart = (turns[:, None] - turns).abs()
    apart = torch.minimum(apart, 1 - apart)
    equal = (-(apart / ALIKE).square()).exp().sum(1) + (-(apart / ALIKE * 30).square()).exp().sum(1)
    chosen = list[int]()
    for place in equal.argsort(descending=True).tolist():
        if all(float(apart[place, other]) > ALIKE for other in chosen):
            chosen.append(place)
        if len(chosen) == best:
            break
    across = torch.nn.functional.normalize(torch.stack([-seen[chosen, 1], seen[chosen, 0]], 1), dim=1)
    return across @ plane


def separate(
    slopes: Float[Tensor, "neurons rank"], on: Bool[Tensor, " neurons"], off: Bool[Tensor, " neurons"]
) -> tuple[int, Float[Tensor, " rank"]]:
    """A record's coordinates c with A·c > 0 on the rows ``on`` and < 0 on ``off``, and how many rows violate it at best.

    Squared hinge with margin 1, by Newton's method in coordinates in which A has orthonormal columns.
    """
    keep = on | off
    sign = torch.where(on[keep], 1.0, -1.0).double()
    basis, scale = torch.linalg.qr(slopes)
    signed = basis[keep] * sign[:, None]
    rows, rank = signed.shape
    ridge = 1e-9 * torch.eye(rank, dtype=torch.float64)
    c = torch.linalg.solve(signed.T @ signed + ridge, signed.sum(0))
    best, answer = rows, c
    for step in range(ROUNDS):
        margin = signed @ c
        violations = int((margin <= 0).sum())
        if violations < best:
            best, answer = violations, c
        if violations == 0 or (step >= 6 and violations > 0.12 * rows):
            break
        active = signed[margin < 1]
        lack = 1 - margin[margin < 1]
        move = torch.linalg.solve(active.T @ active + ridge, active.T @ lack)
        loss, length, slope = float(lack.square().sum()), 1.0, signed @ move
        for _ in range(10):
            if float((1 - margin - length * slope).clamp_min(0).square().sum()) < loss:
                break
            length *= 0.5
        if float(move.norm()) * length < 1e-10 * (1 + float(c.norm())):
            break
        c = c + length * move
    return best, torch.linalg.solve_triangular(scale, answer[:, None], upper=True)[:, 0]


class Pool:
    """Atoms found so far; of near-equal ones the one with more zeros stays."""

    def __init__(self, rank: int, tolerance: float) -> None:
        self.tolerance, self.atoms, self.rows = tolerance, list[Atom](), torch.zeros(0, rank, dtype=torch.float64)

    def add(self, atom: Atom) -> bool:
        """Keep ``atom``; whether it is new or better than one like it."""
        if self.atoms:
            cosine = (self.rows @ atom.direction).abs()
            place = int(cosine.argmax())
            if float(cosine[place]) > self.tolerance:
                better = atom.zeros > self.atoms[place].zeros
                if better:
                    self.rows[place], self.atoms[place] = atom.direction, atom
                return better
        self.rows = torch.cat([self.rows, atom.direction[None]])
        self.atoms.append(atom)
        return True

    def independent(self) -> list[Atom]:
        """Linearly independent ones, those with most zeros first: a mixture of columns has no more zeros than each of them."""
        basis, chosen = self.rows[:0], list[Atom]()
        for atom in sorted(self.atoms, key=lambda atom: -atom.zeros):
            rest = atom.direction
            for _ in range(2):
                rest = rest - basis.T @ (basis @ rest)
            if float(rest.norm()) > 1e-4 and len(basis) < basis.shape[1]:
                basis = torch.cat([basis, rest[None] / rest.norm()])
                chosen.append(atom)
        return chosen
