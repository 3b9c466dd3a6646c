"""Levenberg–Marquardt on the residual of a simulated update, from low to full resolution.

Source: Levenberg, 1944; Marquardt, 1963; the damping follows the gain ratio (Madsen, Nielsen and Tingleff, 2004, section 3.2). Steps are
    measured in the modes of :mod:`attacks._second_order.modes`. The normal equations are factored in float32 where they are large and
    then serve conjugate gradients on the exact ones as preconditioner, for as many iterations as they can: one factor costs
    as much as hundreds of products.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._second_order.linear import Vector, conjugate_gradients, damped_factor, gram, solve
from attacks._second_order.modes import Modes, modes
from attacks._second_order.residual import Images, Residual, in_single_precision
from simulator.progress import tick

SOLVED = 3e-6
"""Relative residual of an update that is explained; float32 updates leave about 1e-7."""
FINISHED = 1e-14
"""Relative residual below which float64 has nothing left to explain."""

DAMPING = 1e-2
"""First damping, in units of the mean squared sensitivity to a mode."""
LEAST_DAMPING = 1e-16
SINGLE_DAMPING = 1e-6
"""Least damping at which a float32 factor is tried."""
IN_DOUBLE = 640
"""Unknowns up to which everything is done in float64: no slower."""
SKETCHED = 6
"""Equations per unknown beyond which the Jacobian is sketched down to as many."""
REUSE_STEPS = 40
"""Steps of conjugate gradients that an old factor gets before a new one is formed."""
FREE_STEPS = 80
"""Steps of conjugate gradients without any factor, for more unknowns than can be factored."""
INNER_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Fit:
    """Where a run ended: the records, the relative residual, the iterations, and whether they stopped by themselves."""

    images: Images
    residual: float
    iterations: int
    converged: bool
    trace: tuple[float, ...]


def cutoffs(height: int, width: int) -> list[int]:
    """Resolutions to solve at, one after the other: quarter, half and full."""
    full = max(height, width)
    return [*sorted({size for size in (full // 4, full // 2) if size >= 3}), full]


def sketch_size(unknowns: int, equations: int) -> int | None:
    """Buckets for the Jacobian's coordinates, or None where they are few enough."""
    return SKETCHED * unknowns if equations > SKETCHED * unknowns else None


def explicit_bytes(unknowns: int, equations: int) -> int:
    """Memory of the Jacobian and of the normal equations with their factor."""
    size = 4 if unknowns > IN_DOUBLE else 8
    return size * unknowns * (min(equations, SKETCHED * unknowns) + 4 * unknowns)


class _Stage:
    """The unknowns of one resolution at one iterate: gradient, products with the normal matrix, and its factor."""

    def __init__(self, residual: Residual, basis: Modes, explicit: bool) -> None:
        self.residual, self.explicit = residual, explicit
        self.rows = basis.scaled
        self.normal: Tensor | None = None
        self.mean = 0.0

    def at(self, images: Images, r: Tensor) -> tuple[Vector, Callable[[Vector], Vector]]:
        """Jᵀr and v ↦ JᵀJ·v in the modes."""
        push, pull = self.residual.products(images)

        def down(v: Images) -> Vector:
            return (v.flatten(1) @ self.rows.T).flatten()

        return down(pull(r)), lambda v: down(pull(push(self.up(v, images))))

    def up(self, v: Vector, like: Images) -> Images:
        """Coefficients of modes as images."""
        return (v.view(len(like), -1) @ self.rows).view(like.shape)

    def form(self, images: Images) -> None:
        """The normal equations at ``images``."""
        unknowns = len(images) * len(self.rows)
        exact = unknowns <= IN_DOUBLE
        of = self.residual if exact else in_single_precision(self.residual)
        size = sketch_size(unknowns, len(self.residual.victim.target))
        self.normal = gram(of.jacobian(images, self.rows, sketch=size))
        self.mean = float(self.normal.diagonal().mean())


def _damped(normal: Callable[[Vector], Vector], shift: float, v: Vector) -> Vector:
    return normal(v) + shift * v


def descend(
    residual: Residual, images: Images, basis: Modes, *, iterations: int, deadline: float, explicit: bool, last: bool, task: str
) -> Fit:
    """Iterate at one resolution until the residual is solved, stalls, or the time is over."""
    stage = _Stage(residual, basis, explicit)
    r = residual(images)
    value, damping, factor, trace = float(r.norm()), DAMPING, None, [float(r.norm())]
    fresh, slow, count, converged = False, 0, 0, False
    for count in range(1, iterations + 1):
        slope, normal = stage.at(images, r)
        accepted = False
        for _ in range(10):
            if time.process_time() > deadline or not bool(torch.isfinite(slope).all()):
                return Fit(images, value, count, False, tuple(trace))
            if explicit and factor is None:
                if not fresh:
                    stage.form(images)
                    fresh = True
                assert stage.normal is not None
                floor = SINGLE_DAMPING if stage.normal.dtype == torch.float32 else LEAST_DAMPING
                factor = damped_factor(stage.normal, max(damping, floor) * stage.mean)
                if factor is None:
                    damping = max(5 * damping, floor)
                    continue
            if not explicit:
                stage.mean = float(slope @ normal(slope) / slope.square().sum())
            shift = damping * stage.mean
            found = conjugate_gradients(
                partial(_damped, normal, shift),
                -slope,
                steps=REUSE_STEPS if explicit else FREE_STEPS,
                tolerance=INNER_TOLERANCE,
                precondition=None if factor is None else partial(solve, factor),
            )
            if explicit and not fresh and found.residual > INNER_TOLERANCE:
                factor = None  # too old to guide: form a new one here
                continue
            trial = images + stage.up(found.x, images)
            r_trial = residual(trial)
            after = float(r_trial.norm())
            if after < value:
                predicted = float(-(slope @ found.x) - found.x @ normal(found.x) / 2)
                gain = (value**2 - after**2) / 2 / max(predicted, 1e-300)
                damping = max(LEAST_DAMPING, damping / 20) if gain > 0.75 else damping * (0.5 if gain > 0.3 else 2)
                accepted = True
                break
            if value < SOLVED and fresh:
                break
            damping *= 5
            factor = None if fresh else factor
        if not accepted:
            converged = True
            break
        fall, images, r, value, fresh = after / value, trial, r_trial, after, False
        if stage.normal is not None and stage.normal.dtype == torch.float64:
            factor = None  # small: a new one costs less than steps with the old
        trace.append(value)
        tick(task, count, iterations, f"residual {value:.1e}")
        slow = slow + 1 if fall > (0.99 if last else 0.85) else 0
        if value < FINISHED or (value < SOLVED and fall > 0.9) or slow >= (4 if last else 2):
            converged = True
            break
    return Fit(images, value, count, converged, tuple(trace))


def fit(residual: Residual, start: Images, *, iterations: int, deadline: float, memory_bytes: int, task: str, coarse: bool = True) -> Fit:
    """From ``start`` through all resolutions, or at the last alone."""
    channels, height, width = start.shape[1:]
    every = modes((channels, height, width))
    images, steps = start.double(), 0
    trace: list[float] = []
    for cutoff in cutoffs(height, width) if coarse else [max(height, width)]:
        basis = every.below(cutoff)
        explicit = explicit_bytes(len(start) * len(basis.basis), len(residual.victim.target)) <= memory_bytes
        last = cutoff == max(height, width)
        found = descend(residual, images, basis, iterations=iterations, deadline=deadline, explicit=explicit, last=last, task=task)
        images, steps = found.images, steps + found.iterations
        trace += found.trace
    return Fit(images, found.residual, steps, found.converged, tuple(trace))


def gray_start(rng: torch.Generator, shape: tuple[int, ...], deviation: float) -> Float[Tensor, "batch channel height width"]:
    """Gray plus a smooth random picture of this deviation."""
    batch, channels, height, width = shape
    rows = modes((channels, height, width)).scaled
    noise = torch.randn(batch, len(rows), generator=rng, dtype=torch.float64) @ rows
    noise = noise / noise.std() if noise.numel() > 1 else noise
    return 0.5 + deviation * noise.view(shape)
