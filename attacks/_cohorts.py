"""The sums of several rounds, combined so that one client of the attacked round is left alone.

Least squares whose errors are correlated (universal kriging): what a client's update changes from round to round grows with the
distance of the models and is alike along one direction. :mod:`attacks.update.gradient_disaggregation` says what it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._gradient import FLOAT32
from attacks._rounds import change_of_gradient, drift
from simulator.adversary import Knowledge
from simulator.types import Observation, Tensors

CURVED = 0.3
"""Share of a gradient's change that is taken to be quadratic in the distance of the models; an assumption."""

SOLVED = 1e-6
"""Largest error of Pᵀc = e_i."""

WHOLE = 0.01
"""How near to a whole number a client's examples must come out."""


@dataclass(frozen=True)
class Alone:
    """One client's share of the attacked round.

    Attributes:
        client: who.
        weights: of the rounds' sums, the attacked one first.
        examples: behind its update.
        error: expected norm of the update's error, relative to the update.
    """

    client: int
    weights: Float[Tensor, " rounds"]
    examples: int
    error: float


def aggregates(view: Observation, knowledge: Knowledge) -> list[Observation]:
    """The attacked round and the others that show one upload, which may be of one sender."""
    others = [seen for seen in knowledge.history if len(seen.uploads) == 1 and seen.upload.update.kind == view.upload.update.kind]
    return [view, *sorted(others, key=lambda seen: abs(seen.broadcast.round - view.broadcast.round))]


def participation(rounds: Sequence[Observation]) -> tuple[Float[Tensor, "rounds clients"], list[int]]:
    """Who took part in which round, and the clients in the order of the columns."""
    clients = sorted(frozenset().union(*(seen.upload.senders for seen in rounds)))
    rows = [[float(client in seen.upload.senders) for client in clients] for seen in rounds]
    return torch.tensor(rows, dtype=torch.float64), clients


def covariance(matrix: Float[Tensor, "rounds clients"], moved: Float[Tensor, "rounds rounds"]) -> Float[Tensor, "rounds rounds"]:
    """Covariance of the rounds' errors up to a factor.

    Two rounds share the drift of the clients that took part in both, as far as their models moved the same way: linear in the move,
    and a part that is quadratic.
    """
    farthest = float(moved.diagonal().max())
    alike = moved / farthest if farthest else moved
    kernel = (1 - CURVED) * alike + CURVED * alike.square()
    return (matrix @ matrix.T) * kernel + FLOAT32.eps**2 * torch.diag(matrix.sum(1))


def inner_products(rounds: Sequence[Observation]) -> Float[Tensor, "rounds rounds"]:
    """Inner products of the rounds' sums, in float64."""
    products = torch.zeros(len(rounds), len(rounds), dtype=torch.float64)
    totals = torch.tensor([float(seen.upload.num_examples) for seen in rounds], dtype=torch.float64)
    for name in rounds[0].upload.update.tensors:
        rows = torch.stack([seen.upload.update.tensors[name].double().flatten() for seen in rounds]) * totals[:, None]
        products += rows @ rows.T
    return products


def spread(
    matrix: Float[Tensor, "rounds clients"], errors: Float[Tensor, "rounds rounds"], products: Float[Tensor, "rounds rounds"]
) -> float | None:
    """The factor of :func:`covariance` by what no constant updates explain; None where as many rounds as unknowns leave nothing."""
    free = unexplained(matrix)
    if not free.shape[1]:
        return None
    ratio = torch.linalg.pinv(free.T @ errors @ free, hermitian=True) @ (free.T @ products @ free)
    return float(ratio.trace().clamp_min(0) / free.shape[1])


def unexplained(matrix: Float[Tensor, "rounds clients"]) -> Float[Tensor, "rounds free"]:
    """A basis of the combinations of rounds in which every client cancels."""
    left, values, _ = torch.linalg.svd(matrix)
    free: Tensor = left[:, int((values > 1e-9 * values[0]).sum()) :]
    return free


def combination(
    matrix: Float[Tensor, "rounds clients"], errors: Float[Tensor, "rounds rounds"], target: Float[Tensor, " clients"]
) -> Float[Tensor, " rounds"] | None:
    """The weights c with Pᵀc = target of least error cᵀKc; None where there are none."""
    particular: Tensor = torch.linalg.lstsq(matrix.T, target[:, None], driver="gelsd").solution[:, 0]
    if float((matrix.T @ particular - target).abs().max()) > SOLVED:
        return None
    free = unexplained(matrix)  # what may be added
    if free.shape[1]:
        system, right = free.T @ errors @ free, free.T @ (errors @ particular)
        particular = particular - free @ (torch.linalg.pinv(system, hermitian=True) @ right)
    return particular


def separate(view: Observation, knowledge: Knowledge) -> tuple[list[Alone], list[Observation]]:
    """The senders of the attacked round that can be told apart, ascending, and the rounds that their weights are of."""
    rounds = aggregates(view, knowledge)
    matrix, clients = participation(rounds)
    errors = covariance(matrix, drift([seen.broadcast for seen in rounds], view.broadcast))
    products, totals = inner_products(rounds), torch.tensor([float(seen.upload.num_examples) for seen in rounds], dtype=torch.float64)
    factor, found = spread(matrix, errors, products), list[Alone]()
    for place, client in enumerate(clients):
        if client not in view.upload.senders:
            continue
        weights = combination(matrix, errors, torch.eye(len(clients), dtype=torch.float64)[place])
        if weights is None:
            continue
        examples = float(weights @ totals)
        if abs(examples - round(examples)) < WHOLE and round(examples) >= 1:
            size = float((weights @ products @ weights).clamp_min(1e-300).sqrt())
            scale = rehearsed(knowledge, rounds) * size if factor is None else factor**0.5
            found.append(Alone(client, weights, round(examples), scale * float((weights @ errors @ weights).clamp_min(0).sqrt()) / size))
    return found, rounds


def rehearsed(knowledge: Knowledge, rounds: Sequence[Observation]) -> float:
    """The factor where the rounds do not tell it: how much the gradient of random pictures changes to the farthest model."""
    moved = drift([seen.broadcast for seen in rounds], rounds[0].broadcast).diagonal()
    there = rounds[int(moved.argmax())].broadcast
    return change_of_gradient(knowledge, rounds[0].broadcast, there, rng=torch.Generator().manual_seed(0))


def mixed(item: Alone, rounds: Sequence[Observation], *, buffers: bool = False) -> Tensors:
    """Σ_t c_t·N_t·u_t/examples: the mean update of the client that the weights leave alone, or its buffers."""
    factors = [float(weight) * seen.upload.num_examples / item.examples for weight, seen in zip(item.weights, rounds, strict=True)]
    shown = [seen.upload.buffers if buffers else seen.upload.update.tensors for seen in rounds]
    return {
        name: torch.stack([factor * tensors[name].double() for factor, tensors in zip(factors, shown, strict=True)]).sum(0).float()
        for name in shown[0]
    }
