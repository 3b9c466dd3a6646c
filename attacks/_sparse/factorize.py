"""Exact factors ∂W = D·X of the update of one layer before a ReLU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks._sparse.alternate import alternate, distinct, left_over
from attacks._sparse.certify import Atom, Pool, below, polish, separate, unmixed
from attacks._sparse.parallel import parallel
from attacks._sparse.space import Layer, Space, decompose

__all__ = ["Factorization", "Guess", "Layer", "factorize"]

Guess = Callable[[Float[Tensor, "rank inputs"], torch.Generator], Float[Tensor, "rank rank"]]
"""Rows that mix records → coordinates that may unmix them, up to scale and sign."""

SLACK = 0.004
"""Share of neurons that may disagree with a record's mask while the search goes on."""

UNDECIDED = 3e-3
"""Preactivation, relative to the typical one, below which a neuron may disagree with a certified record's mask, and just one may: ten
times :data:`EXACT`, the error that a certified record may have from noise, and so its preactivations."""

EXACT = 3e-4
"""Largest error of a certified record, relative to its size, that the noise of the update may cause."""

SETTLED = 1e-8
"""1 − cosine by which polishing may move a column that the shared signal gave: it makes that more exact, and finds no other."""

GUESSED = (0.3, 0.0)
"""Share of the schedule of :func:`alternate` that a guess skips, in turn: a good one needs no coarse sides, a poor one does."""


@dataclass(frozen=True)
class Factorization:
    """What was recovered.

    Attributes:
        inputs: the records at the layer's input, float64; None where not all columns were found.
        backward: D, ∂loss/∂preactivation of each record including the 1/B, in the scale of the update; where not all columns were
            found, those of ``outlines``.
        certified: for each record, whether it is proven exact.
        rank: effective batch size: records, less those that coincide.
        agreement: for each record, the share of neurons on which the zeros of D are its ReLU mask.
        seconds: CPU seconds.
        outlines: where only some columns were found, their records as closely as the masks tell: never exact.
    """

    inputs: Float[Tensor, "records inputs"] | None
    backward: Float[Tensor, "neurons records"] | None
    certified: tuple[bool, ...]
    rank: int
    agreement: tuple[float, ...]
    seconds: float
    outlines: Float[Tensor, "found inputs"] | None = None


def factorize(
    layer: Layer, *, rng: torch.Generator, seconds: float, records: int | None = None, slack: float = SLACK, guess: Guess | None = None
) -> Factorization:
    """Recover the records and their backward signals from one layer's update.

    ``records`` bounds the rank where it is known. ``slack`` is the share of neurons that may disagree with a record's mask: after
    several local steps some have moved. ``guess`` gives better starts than chance, from what records look like.
    """
    start = time.process_time()
    space = decompose(layer, records)
    if space is None:
        return Factorization(None, None, (), 0, (), time.process_time() - start)
    found = search(space, start + seconds, rng, slack, guess)
    spent = time.process_time() - start
    if len(found) < space.rank:
        rough, columns = outlines(space, found)
        return Factorization(None, columns, (False,) * space.rank, space.rank, (0.0,) * space.rank, time.process_time() - start, rough)
    return solved(space, found, spent)


def directions(atoms: list[Atom], rank: int) -> Float[Tensor, "atoms rank"]:
    """The atoms' directions, one a row."""
    return torch.stack([atom.direction for atom in atoms]) if atoms else torch.zeros(0, rank, dtype=torch.float64)


def is_mask(space: Space, atom: Atom, slack: float) -> bool:
    """Whether the zeros of ``atom`` are more than chance gives, leave no other vector, and are a mask that some record has."""
    if not atom.common(space) or not atom.alone:
        return False
    on, off = atom.on_off(space)
    violations, _ = separate(space.slopes, on, off)
    return violations <= slack * len(on) + hidden(on, off)


def hidden(on: Bool[Tensor, " neurons"], off: Bool[Tensor, " neurons"]) -> int:
    """How many neurons that are on can look off: as many entries lie below the noise as just above it, on each side twice."""
    return 2 * int((~on & ~off).sum())


def search(space: Space, deadline: float, rng: torch.Generator, slack: float, guess: Guess | None = None) -> list[Atom]:
    """Independent columns of D, until there are as many as records and each agrees with its record, or time is up."""
    rank = space.rank
    live = space.live()
    if rank == 1:
        return [polish(space, torch.ones(1, dtype=torch.float64))]
    fast = live.left.float()
    pool, tested = Pool(rank, 0.9999), Pool(rank, 1 - 1e-9)
    turns, stuck, known, trusted, planes = 20, False, list[Atom](), list[Atom](), set[bytes]()
    begins = itertools.cycle(GUESSED)
    for atom in told_by_signal(live, rng, deadline, slack):
        tested.add(atom)
        pool.add(atom)
    if len(trusted := pool.independent()) == rank:
        if agree(live, trusted, slack).all():
            return trusted
        pool, trusted = Pool(rank, 0.9999), []
    while time.process_time() < deadline:
        # The coordinates of the records that are still missing are orthogonal to the columns found.
        found = directions(trusted, rank)
        rest = torch.linalg.svd(found)[2][len(found) :].T if len(found) else torch.eye(rank, dtype=torch.float64)
        sides = torch.linalg.qr(live.slopes @ rest)[0].float()
        drawn = torch.zeros(0, rank, dtype=torch.float64)
        if guess is not None and rest.shape[1] > 1:
            coordinates = guess(rest.T @ space.right, rng)
            side = coordinates * (coordinates @ (rest.T @ space.unit)).sign()[:, None] @ (live.slopes @ rest).T
            drawn = distinct(alternate(fast, sides, starts=0, turns=20, rng=rng, first=side.float(), begin=next(begins))).double()
        if guess is None or stuck:
            drawn = torch.cat([drawn, distinct(alternate(fast, sides, starts=2 * sides.shape[1] + 16, turns=turns, rng=rng)).double()])
        if rank - len(found) == 1 or (rank - len(found) == 2 and stuck):
            drawn = torch.cat([drawn, left_over(live, found)])
        for q in drawn:
            if time.process_time() > deadline:
                break
            atom = polish(live, q)
            if not tested.add(atom):
                continue
            if is_mask(live, atom, slack):
                pool.add(atom)
            elif not atom.alone and atom.common(live) and (zeros := atom.on_off(live)[1].numpy().tobytes()) not in planes:
                planes.add(zeros)
                for other in unmixed(live, atom):
                    atom = polish(live, other)
                    if tested.add(atom) and is_mask(live, atom, slack):
                        pool.add(atom)
        before, known = len(known), pool.independent()
        stuck = len(known) <= before
        if len(known) < rank:
            turns = min(2 * turns, 160) if stuck else turns
            keep = torch.rand(len(known), generator=rng) > (0.5 if stuck and len(trusted) == before and guess is None else 0.0)
            if stuck and guess is not None and known:  # what is no column is zero on rows that leave another vector, nearly
                spreads = torch.tensor([atom.spread for atom in known])
                keep = spreads > torch.rand(1, generator=rng) * spreads.median()
        else:
            keep = agree(live, known, slack)
            if keep.all():
                break
        trusted = [atom for atom, kept in zip(known, keep.tolist(), strict=True) if kept]
    return known


def told_by_signal(space: Space, rng: torch.Generator, deadline: float, slack: float) -> list[Atom]:
    """Columns that :func:`parallel` finds, each with zeros that are a mask."""
    found = list[Atom]()
    for q in parallel(space, rng, deadline):
        atom, size = polish(space, q), (space.left @ q).abs()
        zeros = int((size < below(space, q, size)).sum())
        if zeros >= atom.zeros or float((atom.direction @ q).abs()) < 1 - SETTLED:  # nothing is gained, or another vector is zero there
            atom = replace(atom, direction=q, zeros=zeros)
        on, off = atom.on_off(space)
        if separate(space.slopes, on, off)[0] <= slack * len(on) + hidden(on, off):
            found.append(atom)
    return found


def agree(space: Space, atoms: list[Atom], slack: float) -> Bool[Tensor, " atoms"]:
    """Whether each of all columns is zero where its own record is off, but for the share ``slack`` of the neurons."""
    preactivations = (space.slopes @ torch.linalg.inv(scaled(space, atoms)).T).T
    wrong = [disagreements(space, atom, z) for atom, z in zip(atoms, preactivations, strict=True)]
    return torch.tensor(wrong) <= slack * len(space.left)


def outlines(space: Space, atoms: list[Atom]) -> tuple[Float[Tensor, "found inputs"], Float[Tensor, "neurons found"]]:
    """Records and scaled columns of ``atoms``, where other columns are missing: the middle of what each record can still be.

    A record's coordinates c are orthogonal to the other columns, unit·c = 1, and A·c has the signs of its mask.
    """
    every, records, columns = directions(atoms, space.rank), list[Tensor](), list[Tensor]()
    for place, atom in enumerate(atoms):
        others = torch.cat([every[:place], every[place + 1 :]])
        free = torch.linalg.svd(others)[2][len(others) :].T if len(others) else torch.eye(space.rank, dtype=torch.float64)
        c = free @ separate(space.slopes @ free, *atom.on_off(space))[1]
        if float(c @ space.unit) > 0:
            c = c / (c @ space.unit)
            records.append(c @ space.right)
            columns.append(space.left @ (atom.direction / (c @ atom.direction)))
    if not records:
        return space.right[:0], space.left[:, :0]
    return torch.stack(records), torch.stack(columns, 1)


def scaled(space: Space, atoms: list[Atom]) -> Float[Tensor, "rank rank"]:
    """Q with D = L·Q: the columns have the scales with which they sum to ∂b."""
    q = directions(atoms, space.rank).T
    scales: Tensor = torch.linalg.solve(q, space.unit)
    return q * scales


def disagreements(space: Space, atom: Atom, z: Float[Tensor, " neurons"], *, beyond: float = 0.0) -> int:
    """Clear neurons on which a column is not zero exactly where its record's preactivations z are negative.

    Args:
        beyond: the size of a preactivation, relative to the typical one, up to which either sign will do.
    """
    on, off = atom.on_off(space)
    far = z.abs() > beyond * z.square().mean().sqrt()
    return int((on & far & (z < 0)).sum()) + max(0, int((off & far & (z > 0)).sum()) - hidden(on, off))


def solved(space: Space, atoms: list[Atom], spent: float) -> Factorization:
    """Inputs and backward signals from all columns.

    Certified are columns that are no accident of few rows, each zero exactly where its record is off, but for one neuron at its kink, and
    for those whose entries the noise hides.
    """
    q = scaled(space, atoms)
    duals = torch.linalg.inv(q)
    preactivations = (space.slopes @ duals.T).T
    wrong = [disagreements(space, atom, z) for atom, z in zip(atoms, preactivations, strict=True)]
    far = [disagreements(space, atom, z, beyond=UNDECIDED) for atom, z in zip(atoms, preactivations, strict=True)]
    inputs = duals @ space.right
    # Record i is a sum of the rows of ∂W with the weights L·c_i, and of their noise.
    clean = 3 * (space.noise[:, None] * (space.left @ duals.T)).norm(dim=0) < EXACT * inputs.square().mean(1).sqrt()
    rare = space.rank == 1 or all(atom.zeros > space.rank for atom in atoms)
    certified = rare and max(wrong) <= 1 and max(far) == 0 and bool(clean.all())
    agree = tuple(1 - count / len(space.left) for count in wrong)
    return Factorization(inputs, space.left @ q, (certified,) * space.rank, space.rank, agree, spent)
