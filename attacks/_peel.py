"""A chain of layers peeled from its end: what one record's gradient says about the input of each, as one linear system a layer.

Let z = W·x + b be a layer, a = f(z) what the next one takes, and δ = ∂L/∂z. Where a is known, so is z (unless f is flat there), and
W·x = z − b holds; ∂W, which is bilinear in δ and x, is linear in x where δ is known. Both are solved together, each equation in units
of its standard error, which the layers before it left; f'(z)·Wᵀδ is the δ of the next layer down. All is linear in δ: at any scale of
the update the same inputs come out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from attacks._chain import Activation, Chain, Layer
from simulator.types import Tensors

EPS = torch.finfo(torch.float32).eps
SUBNORMAL = EPS * torch.finfo(torch.float32).smallest_normal
CLEAR = 8.0
"""Standard errors by which a value must be away from where its activation is flat: nearer, it says nothing of what went in."""
DENSE = 4096
"""Unknowns up to which the normal equations are factored; beyond, conjugate gradients take over."""
DRAWS, FEW_DRAWS = 32, 2
"""Samples of the solution's error where factored, and where each takes its own share of conjugate gradients."""
REFINED = 3
STEPS = 600
TOLERANCE = 1e-8
"""Of conjugate gradients, relative, in the norm of the preconditioner."""
NEIGHBORS = 0.1
"""Assumed deviation of neighboring pixels' difference: it fills in what no equation tells, and weighs nothing elsewhere."""


class Known(NamedTuple):
    """Values with the standard error of each; infinite where nothing is known."""

    value: Tensor
    error: Tensor


class System(NamedTuple):
    """The equations of a layer's input x, in units of their standard errors, and outputs that are known to be not positive.

    Attributes:
        matrix, right: matrix·x = right, but for errors of about 1.
        below, most: below·x ≤ most.
    """

    matrix: sp.csr_matrix
    right: np.ndarray
    below: sp.csr_matrix
    most: np.ndarray


class Peeled(NamedTuple):
    """What a layer's equations say of its input.

    Attributes:
        x: the input.
        misfit: mean square of the residuals in units of their standard errors; about 1 or less where the equations hold.
        short: unknowns in excess of the equations, 0 where there are enough.
        system: the equations, where they are too few.
    """

    x: Known
    misfit: float
    short: int
    system: System | None = None


def undone(f: Activation, a: Known) -> tuple[Known, Known]:
    """z and f'(z) from a = f(z), which the client rounded before the next layer saw it."""
    a = Known(a.value, a.error.hypot(EPS * a.value) + SUBNORMAL)
    if f.flat:
        alive = a.value > CLEAR * a.error
        return Known(a.value, torch.where(alive, a.error, torch.inf)), Known(alive.double(), torch.zeros_like(a.error))
    value, clear, least = a.value, torch.ones_like(a.value, dtype=torch.bool), a.error.clamp(max=0.1)
    if f.low > -math.inf:
        value, clear = torch.maximum(value, f.low + least), clear & (a.value - f.low > CLEAR * a.error)
    if f.high < math.inf:
        value, clear = torch.minimum(value, f.high - least), clear & (f.high - a.value > CLEAR * a.error)
    slope = f.slope(value)
    return Known(f.inverse(value), torch.where(clear, a.error / slope, torch.inf)), Known(slope, f.bend(value).abs() * a.error)


def through_linear(gradient: Known, delta: Known, layer: Layer) -> Peeled:
    """The input of a linear layer: the least-squares x in ∂W = δ·xᵀ."""
    square = float(delta.value.square().sum())
    if not square:
        nothing = torch.full((layer.unknowns,), layer.mean, dtype=torch.float64)
        return Peeled(Known(nothing, torch.full_like(nothing, layer.spread)), 0.0, layer.unknowns)
    x = gradient.value.T @ delta.value / square
    weights, off = delta.value.square(), gradient.error.square() + torch.outer(delta.error.square(), x.square())
    misfit = float((gradient.value - torch.outer(delta.value, x)).square().sum() / off.sum().clamp(min=torch.finfo(off.dtype).tiny))
    return Peeled(Known(x, (weights @ off).sqrt() / square * max(1.0, misfit) ** 0.5), misfit, 0)


def through_convolution(
    layer: Layer, weight: Tensor, bias: Tensor, gradient: Known | None, *, z: Known, delta: Known, prior: sp.csr_matrix, deadline: float
) -> Peeled:
    """The input of a convolution from both sets of equations; ``prior`` holds rows that are expected to be 0 ± 1.

    Of a frozen layer, linear ones included, there is no gradient and only W·x = z − b.
    """
    channels, places = weight.shape[0], layer.columns.shape[1]
    square = layer.mean**2 + layer.spread**2
    known = torch.isfinite(z.error)
    typical = float(z.value[known].abs().mean()) if bool(known.any()) else 0.0
    z_error = torch.hypot(z.error, EPS * z.value.abs().clamp(min=typical))
    slopes, slope_errors = delta.value.view(channels, places), delta.error.view(channels, places)
    summed = EPS**2 * slopes.square().sum(1) * square  # the client's own sums round
    outputs = (z.value - bias.repeat_interleave(places))[known]
    right, matrix = (outputs / z_error[known]).numpy(), sp.diags((1 / z_error[known]).numpy()) @ layer.forward(weight)[known.numpy()]
    if gradient is not None:
        off = (gradient.error.square() + (slope_errors.square().sum(1) * square + summed)[:, None]).sqrt()
        off = off.clamp(min=EPS * float(off.mean()) or 1.0).flatten()  # channels that are dead throughout say nothing, exactly
        right = np.concatenate([right, (gradient.value.flatten() / off).numpy()])
        matrix = sp.vstack([matrix, sp.diags((1 / off).numpy()) @ layer.backward(slopes)]).tocsr()
    centered = right - matrix @ np.full(layer.unknowns, layer.mean)
    x, errors = least_squares(matrix, centered, prior, layer.call.inputs.shape[1], deadline)
    misfit = float(np.square(centered - matrix @ x).sum()) / max(1, len(right) - layer.unknowns)
    found = Known(torch.from_numpy(x) + layer.mean, torch.from_numpy(errors) * max(1.0, misfit) ** 0.5)
    short = max(0, layer.unknowns - layer.equations(int(known.sum())))
    if not short:
        return Peeled(found, misfit, 0)
    cut = (~known if layer.after.flat else torch.zeros_like(known)).numpy()
    clear = 2 * CLEAR * float(z_error[known].max()) if bool(known.any()) else math.inf  # so near to 0 an output is no equation
    below, most = layer.forward(weight)[cut], clear - bias.repeat_interleave(places).numpy()[cut]
    return Peeled(found, misfit, short, System(matrix.tocsr(), right, below, most))


def least_squares(
    matrix: sp.csr_matrix, right: np.ndarray, prior: sp.csr_matrix, channels: int, deadline: float
) -> tuple[np.ndarray, np.ndarray]:
    """The solution of the weighted equations under the prior, and its standard errors from samples of its distribution."""
    rows, unknowns = sp.vstack([matrix, prior]).tocsr(), matrix.shape[1]
    right = np.concatenate([right, np.zeros(prior.shape[0])])
    rng = np.random.default_rng(0)
    if unknowns > DENSE:
        sides = np.concatenate([right[:, None], rng.standard_normal((len(right), FEW_DRAWS))], 1)
        x = _by_conjugate_gradients(rows, sides, channels, deadline)
        squares = np.square(x[:, 1:]).mean(1)
        return x[:, 0], np.sqrt(np.maximum(squares, squares.mean()))  # so few samples say little of a single value
    in_time(deadline)
    normal = torch.from_numpy((rows.T @ rows).toarray())
    factor, failed = torch.linalg.cholesky_ex(normal)
    shift = float(normal.diagonal().mean()) * torch.finfo(normal.dtype).eps
    while bool(failed):
        shift *= 10
        normal.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(normal)
    x = np.zeros(unknowns)
    for _ in range(REFINED):  # forming the normal equations lost digits
        left = torch.from_numpy(rows.T @ (right - rows @ x))
        x = x + torch.cholesky_solve(left[:, None], factor)[:, 0].numpy()
    draws = torch.from_numpy(rng.standard_normal((unknowns, DRAWS)))
    spread = torch.linalg.solve_triangular(factor.T, draws, upper=True)
    return x, spread.square().mean(1).sqrt().numpy()


def _by_conjugate_gradients(rows: sp.csr_matrix, sides: np.ndarray, channels: int, deadline: float) -> np.ndarray:
    """The least-squares solutions for several right-hand sides, preconditioned by the blocks of single channels.

    A channel's gradient is the same matrix for all channels and sees no other: those blocks hold half of the equations exactly.
    """
    unknowns, count = rows.shape[1], sides.shape[1]
    size, by_column, transposed = unknowns // channels, rows.tocsc(), rows.T.tocsr()
    parts = [by_column[:, first : first + size] for first in range(0, unknowns, size)]
    blocks = torch.from_numpy(np.stack([(part.T @ part).toarray() for part in parts]))
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(blocks))  # products are many times faster than triangular solutions

    def precondition(r: np.ndarray) -> np.ndarray:
        found: np.ndarray = (inverses @ torch.from_numpy(r).reshape(channels, size, count)).view(unknowns, count).numpy()
        return found

    x, r = np.zeros((unknowns, count)), transposed @ sides
    z = precondition(r)
    p, rho = z, (r * z).sum(0)
    first = rho.clip(min=np.finfo(rho.dtype).tiny)
    for _ in range(STEPS):
        in_time(deadline)
        image = transposed @ (rows @ p)
        alpha = rho / (p * image).sum(0).clip(min=np.finfo(rho.dtype).tiny)
        x, r = x + alpha * p, r - alpha * image
        z = precondition(r)
        before, rho = rho, (r * z).sum(0)
        if (rho <= TOLERANCE**2 * first).all():
            break
        p = z + rho / before.clip(min=np.finfo(rho.dtype).tiny) * p
    return x


def prior_of(layer: Layer, scale: Tensor | None = None) -> sp.csr_matrix:
    """Rows that say that inputs lie around their mean and, for the image, near to their neighbors; ``scale`` is a pixel's unit."""
    around = sp.identity(layer.unknowns, format="csr") / layer.spread
    if scale is None:
        return around
    places = np.arange(layer.unknowns).reshape(scale.shape)
    pairs = [(places[:, 1:], places[:, :-1]), (places[:, :, 1:], places[:, :, :-1])]
    one, other = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    row, unit = np.arange(len(one)), NEIGHBORS * float(scale.abs().mean())
    values = np.concatenate([np.full(len(one), 1 / unit), np.full(len(one), -1 / unit)])
    near = sp.csr_matrix((values, (np.concatenate([row, row]), np.concatenate([one, other]))), shape=(len(one), layer.unknowns))
    return sp.vstack([around, near]).tocsr()


def in_time(deadline: float) -> None:
    """Raise where CPU time is over: half a solution has no error that could be stated.

    Raises:
        TimeoutError: it is.
    """
    if time.process_time() > deadline:
        raise TimeoutError("a layer's system must be solved within the attack's seconds, got no end of it. Raise seconds")


def peel(model: Chain, parameters: Tensors, gradient: Mapping[str, Known], *, deadline: float = math.inf) -> list[tuple[Layer, Peeled]]:
    """The input of every layer, from the last to the first; ``parameters`` are those of :func:`attacks._chain.weights`.

    Raises:
        TimeoutError: ``deadline``, a reading of the clock of CPU time, came first.
    """
    found: list[tuple[Layer, Peeled]] = []
    z = delta = gradient[model.layers[-1].call.bias]
    for place in range(len(model.layers) - 1, -1, -1):
        layer = model.layers[place]
        weight = parameters[layer.call.weight].double().flatten(1)
        of_weight = None if layer.frozen else Known(*(tensor.flatten(1) for tensor in gradient[layer.call.weight]))
        if layer.linear and of_weight is not None:
            delta = gradient.get(layer.call.bias, delta)
            peeled = through_linear(of_weight, delta, layer)
        else:
            bias = parameters.get(layer.call.bias, torch.zeros(len(weight))).double()
            prior = prior_of(layer, None if place else model.scale)
            peeled = through_convolution(layer, weight, bias, of_weight, z=z, delta=delta, prior=prior, deadline=deadline)
        found.append((layer, peeled))
        if place:
            matrix = layer.forward(weight)
            back = torch.from_numpy(matrix.T @ delta.value.numpy())
            blur = torch.from_numpy(matrix.multiply(matrix).T @ delta.error.square().numpy())
            z, slope = undone(model.layers[place - 1].after, peeled.x)
            error = blur * slope.value.square() + back.square() * slope.error.square() + (EPS * back * slope.value).square()
            delta = Known(back * slope.value, error.sqrt())
    return found
