"""How far one victim is solved, and what an answer of a solver changes about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks._blend import blended
from attacks._rest import farthest, in_order, mismatch, separable, without
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Batch, Observation

SOLVED = 1e-4
"""Angle in radians between the simulated and the observed update below which float32 has nothing left to match."""

TWIN = 1e-2
"""Largest difference of a pixel between two exact images of one record."""


@dataclass(frozen=True)
class Proven:
    """One record with a proof, who gave it, and whose record it is, −1 where that is not known."""

    image: Float[Tensor, "channel height width"]
    label: int
    certificate: str
    solver: str
    client: int = -1


@dataclass(frozen=True)
class State:
    """How far one victim is solved.

    Attributes:
        view, knowledge: of what is left to attack.
        able: the solvers that apply.
        barred: solvers that are not asked all the same.
        proven: the records with a proof.
        inside: whether the proven records are still part of ``view``, since the update is no mean of single gradients.
        guess: the best guess so far of all that ``view`` holds; None before the first.
        answer: of the solver that made most of it; ``solvers`` are those of its records.
        angle, score: of the guess, see :func:`attacks._rest.mismatch`; lower is better.
        asked: the solvers that were asked about what is left.
        cpu, wall: seconds spent.
        until: CPU time of this process at which the budget ends: what is no solver's work, but can be left, ends there.
        failed: whether a solver raised or diverged, so that its part of the attack is missing.
        short: whether a solver ended with its time, or was not asked for want of it.
        extra: matching that came last and may be asked again from other starts.
        last: CPU seconds that it took.
        longer: whether it is to run longer then, since its objective had not flattened.
        gaining: whether more time for it would probably have changed the guess.
    """

    view: Observation
    knowledge: Knowledge
    able: tuple[type[Any], ...]
    proven: tuple[Proven, ...] = ()
    inside: bool = False
    guess: Batch | None = None
    answer: Reconstruction | None = None
    solvers: tuple[str, ...] = ()
    angle: float = torch.inf
    score: float = torch.inf
    asked: frozenset[type[Any]] = frozenset()
    cpu: float = 0.0
    wall: float = 0.0
    until: float = torch.inf
    failed: bool = False
    short: bool = False
    extra: type[Any] | None = None
    last: float = 0.0
    longer: bool = False
    gaining: bool = False
    barred: tuple[type[Any], ...] = ()

    @property
    def solved(self) -> bool:
        """Whether no solver can add anything."""
        return self.angle < SOLVED

    @property
    def whole(self) -> bool:
        """Whether every record is proven."""
        return self.guess is None and bool(self.proven)


def clocks() -> tuple[float, float]:
    """CPU and wall-clock seconds from which :func:`charged` counts."""
    return time.process_time(), time.perf_counter()


def charged(states: Sequence[State], began: tuple[float, float]) -> list[State]:
    """The states with their shares of the time since then."""
    if not states:
        return []
    cpu, wall = ((now - then) / len(states) for now, then in zip(clocks(), began, strict=True))
    return [replace(state, cpu=state.cpu + cpu, wall=state.wall + wall) for state in states]


def usable(answer: Reconstruction | None) -> bool:
    """Whether a solver answered with pictures; one that raised (None) or diverged did not."""
    return answer is not None and answer.inputs is not None and bool(torch.isfinite(answer.inputs).all())


def after(state: State, solver: str, answer: Reconstruction | None) -> State:
    """The state with what one solver answered: proven records are kept and taken out, and a better guess replaces the last.

    A solver that raised (None) or diverged leaves all as it was but the mark that something is missing.
    """
    if not usable(answer):
        return replace(state, failed=True)
    assert answer is not None
    assert answer.inputs is not None
    state = replace(state, short=state.short or not answer.converged)
    proofs = answer.certificate or ("",) * len(answer.labels)
    sure, rest = [i for i, proof in enumerate(proofs) if proof], [i for i, proof in enumerate(proofs) if not proof]
    clients = answer.clients or (-1,) * len(proofs)
    new = tuple(Proven(answer.inputs[i], int(answer.labels[i]), proofs[i], solver, clients[i]) for i in sure)
    if not rest:
        return replace(state, proven=new if state.inside else state.proven + new, answer=answer, angle=0.0)
    if sure and not state.inside and separable(state.view, state.knowledge):
        view, knowledge = without(state.view, state.knowledge, Batch(answer.inputs[sure], answer.labels[sure]))
        state = beside(replace(state, view=view, knowledge=knowledge, proven=state.proven + new), [item.image for item in new])
        return judged(state, solver, answer, as_told(answer.labels, rest, knowledge))
    if sure:
        state = replace(state, inside=True, proven=united(state.proven, new, state.knowledge.num_examples))
    return judged(state, solver, answer, range(len(proofs)))


def beside(state: State, proven: Sequence[Tensor]) -> State:
    """The state with what its guess says of the records that are not among the proven ones."""
    if state.guess is None or len(state.guess) <= len(proven):
        return replace(state, guess=None, score=torch.inf)
    rest = as_told(state.guess.labels, farthest(state.guess.inputs, proven).tolist(), state.knowledge)
    guess = Batch(state.guess.inputs[rest], state.guess.labels[rest])
    angle, score = mismatch(state.view, state.knowledge, guess)
    return replace(state, guess=guess, solvers=tuple(state.solvers[i] for i in rest), angle=angle, score=score)


def as_told(labels: Int[Tensor, " batch"], places: Sequence[int], knowledge: Knowledge) -> list[int]:
    """Some places of a guess, in the order in which the labels of the records that are left were told, if they were."""
    if knowledge.labels is None:
        return list(places)
    return [places[i] for i in in_order(labels[list(places)].tolist(), knowledge.labels.tolist())]


def united(one: tuple[Proven, ...], other: tuple[Proven, ...], records: int) -> tuple[Proven, ...]:
    """What either proved of the same records: of the shorter list those that have no twin in the longer."""
    long, short = (one, other) if len(one) >= len(other) else (other, one)
    free = list(long)
    for item in short:
        twin = next((i for i, its in enumerate(free) if float((its.image - item.image).abs().max()) < TWIN), None)
        if twin is None:
            long = (*long, item)
        else:
            free.pop(twin)
    return long[:records]


def judged(state: State, solver: str, answer: Reconstruction, places: Sequence[int]) -> State:
    """The state with the better records of an answer and of the guess before: those that explain what is left."""
    assert answer.inputs is not None
    guess = Batch(answer.inputs[list(places)], answer.labels[list(places)])
    angle, score = mismatch(state.view, state.knowledge, guess)
    new = replace(state, guess=guess, answer=answer, solvers=(solver,) * len(guess), angle=angle, score=score)
    if state.guess is None:
        return new
    better, other = (new, state) if score < state.score else (state, new)
    if len(guess) == 1 or len(guess) != len(state.guess) or better.solved or not separable(state.view, state.knowledge):
        return better
    return blend(better, other)


def taken(state: State, solver: str, answer: Reconstruction | None) -> State:
    """The state with an answer for all records that are not proven, whatever explains the update better.

    The failure of a solver before no longer counts: another answers. No solver is asked any more. An answer that is not usable leaves
    all as it was but the mark that something is missing.
    """
    if not usable(answer):
        return replace(state, failed=True)
    assert answer is not None
    assert answer.inputs is not None
    guess = Batch(answer.inputs, answer.labels)
    angle, score = mismatch(state.view, state.knowledge, guess)
    new = replace(state, guess=guess, answer=answer, solvers=(solver,) * len(guess), angle=angle, score=score)
    return replace(new, short=not answer.converged, failed=False, asked=frozenset(state.able), extra=None, gaining=False)


def blend(better: State, other: State) -> State:
    """The better of two states with those records of the other's guess that it gains from."""
    assert better.guess is not None
    assert other.guess is not None
    found = blended(better.view, better.knowledge, better.guess, other.guess, better.score, until=better.until)
    if found is None:
        return better
    both, taken, (angle, score) = found
    solvers = tuple(mine if twin is None else other.solvers[twin] for mine, twin in zip(better.solvers, taken, strict=True))
    return replace(better, guess=both, solvers=solvers, angle=angle, score=score)


def merged(state: State, knowledge: Knowledge) -> Reconstruction:
    """Proven records first, then the guess of the others; in the order of the labels where those were disclosed.

    Raises:
        RuntimeError: no solver answered.
    """
    if state.answer is None:
        raise RuntimeError("at least one solver must answer, got none. See the log for their errors.")
    images, labels = [item.image for item in state.proven], [item.label for item in state.proven]
    solvers = [item.solver for item in state.proven]
    if state.guess is not None and len(images) < knowledge.num_examples:
        known = images if state.inside else []
        rest = farthest(state.guess.inputs, known)
        images, labels = [*images, *state.guess.inputs[rest]], [*labels, *state.guess.labels[rest].tolist()]
        solvers += [state.solvers[i] for i in rest]
    certificates = [*(item.certificate for item in state.proven), *[""] * (len(images) - len(state.proven))]
    clients = [*(item.client for item in state.proven), *[-1] * (len(images) - len(state.proven))]
    order = list(range(len(images)))
    if knowledge.labels is not None:
        order = in_order(labels, knowledge.labels.tolist())
    return Reconstruction(
        inputs=torch.stack([images[i] for i in order]),
        labels=torch.tensor([labels[i] for i in order]) if knowledge.labels is None else knowledge.labels,
        objective=state.angle,
        trace=state.answer.trace,
        certificate=tuple(certificates[i] for i in order),
        solver=tuple(solvers[i] for i in order),
        clients=tuple(clients[i] for i in order) if max(clients) >= 0 else (),
        seconds=state.wall,
        converged=state.solved or len(state.proven) >= knowledge.num_examples or not (state.short or state.failed or state.gaining),
    )
