"""Exact recovery of one image from a vision transformer with a learned position embedding, by one linear system.

Tokens are z_t = W·x_t + b + p_t, so that ∂p_t = ∂L/∂z_t =: δ_t, which every upload holds. With one record ∂W = Σ_t δ_t·x_tᵀ is then
linear in the patches x_t: as long as the δ_t are independent, the patches are the least-squares solution, whatever the attention,
normalization, dropout or loss behind it, and at any scale that clipping left.

Behind pre-norm blocks every δ_t is orthogonal to the vector of ones, so that at most width − 1 of them are independent, and float32 blurs
the weakest combinations: those few are found by Gauss–Newton on the whole update, all others staying what the linear system says.

Source: Lu et al., 2022, arXiv:2112.14087 (APRIL), section 3.2: ∂p_t is the gradient of the tokens, and a linear system follows.
Deviations: the system is that of the patch embedding and not of the first attention, which must have no normalization before it; that one
    solves for tokens and needs as many rows as this. Certificates. Weak combinations are completed.
    Measured: claims april-wide (fewer tokens than width) and april-vit (as many). A FedAvg delta of one step is a difference of rounded
    parameters, which is the less exact the smaller the learning rate, and may not be certified.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._embedding import Embedding, embedding
from attacks._gradient import maybe_clipped, mean_gradient, several_steps, unusable
from attacks._matching.priors import box
from attacks._matching.simulate import prepare
from attacks._second_order.linear import gram
from attacks._second_order.marquardt import IN_DOUBLE
from attacks._second_order.proof import RADIUS
from attacks._second_order.residual import DIRECTIONS, Residual, in_single_precision
from attacks._second_order.smoothness import is_smooth
from attacks._settings import must_be_positive
from attacks.update.labels import known_or_recovered, unrecoverable
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

LINEAR, COMPLETED = "token gradients", "unique match"

KEPT = 0.4
"""Share of the error that a proof allows, up to which the linear system is trusted; half of it would leave nothing to the rest."""

REFRESHED, ITERATIONS, STALLED = 2, 20, 0.99
"""Derivatives, steps with one and the same, at most, and the fall of the residual beyond which another step gains nothing."""

EXPLAINED = 1e-4
"""Relative residual of the whole update up to which the errors of the linear system are the explanation; seen up to 6e-5."""

HOLDS = 1e-3
"""Relative error of the linear system beyond which it is noise, or another system, that was solved: nothing is completed."""

MEMORY = 2**30
"""Bytes of the derivatives of an update, beyond which nothing is completed."""


class System(NamedTuple):
    """The linear system ∂W = Δᵀ·X, solved as far as its rounding allows.

    Attributes:
        patches: the solution of least norm in the directions that are kept.
        free: combinations of tokens that the system does not tell, orthonormal.
        spread: what an error of the system of norm 1 becomes in ``patches``, in each kept combination of tokens.
        kept: those combinations, orthonormal.
        noise: norm of the system's error: its residual, or the rounding of its two sides if that is more.
        error: norm of what that leaves in ``patches``, the kept combinations alone.
        residual: relative to ∂W.
        checked: whether there are more equations than unknowns, so that a residual shows where the system does not hold.
    """

    patches: Float[Tensor, "tokens values"]
    free: Float[Tensor, "free tokens"]
    spread: Float[Tensor, " kept"]
    kept: Float[Tensor, "kept tokens"]
    noise: float
    error: float
    residual: float
    checked: bool


def linear_system(delta: Float[Tensor, "tokens width"], weight: Float[Tensor, "width values"], rounding: float, allowed: float) -> System:
    """Solve for the patches; combinations of tokens are kept, strongest first, while their joint error stays below ``allowed``."""
    left, values, right = torch.linalg.svd(delta, full_matrices=True)
    alive = int((values > rounding * values[0]).sum())
    beyond = len(weight) - alive  # equations that no patches can meet, whatever is kept
    unexplained = float((right[alive:] @ weight).norm()) * math.sqrt(len(weight) / beyond) if beyond else 0.0
    for count in range(alive, 0, -1):
        sides = right[:count] @ weight
        patches = left[:, :count] @ (sides / values[:count, None])
        size = float(weight.norm()) + float(delta.norm()) * float(torch.linalg.matrix_norm(patches, 2))
        noise = max(rounding * size, unexplained)
        error = noise / math.sqrt(len(weight)) * float(values[:count].reciprocal().norm())
        few = noise / math.sqrt(weight.numel()) <= float(values[count - 1])  # no error larger than the patches' own deviation of about 1
        if error <= allowed or (few and noise > HOLDS * float(weight.norm())):
            break
    residual = float((weight - right[:count].T @ sides).norm() / weight.norm())
    return System(patches, left[:, count:].T, values[:count].reciprocal(), left[:, :count].T, noise, error, residual, beyond > 0)


def completed(
    residual: Residual, entrance: Embedding, system: System, *, deadline: float, prove: bool
) -> tuple[Float[Tensor, "1 channel height width"], float]:
    """The image with its free combinations found, and a bound on its root mean square error; infinite where nothing is proven.

    Let J be the derivative of the update along the free unknowns v and K along the kept ones. Where the residual is least,
    J⁺·(noise + K·δ) is the error of v, with δ the error of the linear system. Rows of J⁺K take one backward pass each.
    """
    image = entrance.image(system.patches)
    every = torch.eye(entrance.values, dtype=torch.float64)
    rows, kept = (
        torch.cat([entrance.direction(torch.outer(u, e)).flatten(1) for u in some for e in every]) for some in (system.free, system.kept)
    )
    single = in_single_precision(residual)
    r = residual(image)
    for _ in range(REFRESHED):
        jacobian = single.jacobian(image, rows).double()
        inverse = torch.linalg.solve(gram(jacobian), jacobian)
        for _ in range(ITERATIONS):
            trial = image - (inverse @ r @ rows).view(image.shape)
            after = residual(trial)
            fall = float(after.norm() / r.norm())
            if not fall < 1 or time.process_time() > deadline:
                break
            image, r = trial, after
            if fall > STALLED:
                break
    if not prove or not float(r.norm()) < EXPLAINED or time.process_time() > deadline:
        return image, math.inf
    pull = single.products(image.float())[1]
    mixed = torch.vmap(lambda row: pull(row).flatten(), chunk_size=DIRECTIONS)(inverse.float()).double() @ kept.T
    spread = system.spread.repeat_interleave(entrance.values)
    linear = system.noise / math.sqrt(entrance.call.outputs.shape[1] * entrance.values)  # of one number of the system
    error = math.hypot(linear * float((mixed * spread).norm()), torch.finfo(residual.victim.target.dtype).eps * float(inverse.norm()))
    weakest = torch.linalg.eigh(gram(jacobian))[1][:, 0]
    other = linear * spread * torch.randn(len(spread), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 2 * (error * weakest @ rows + other @ kept).view(image.shape)
    drift = (single.jacobian(image + step, rows).double() - jacobian) @ inverse.T
    return image, error if float(torch.linalg.matrix_norm(drift, 2)) < 1 / 2 else math.inf


@register("attacks", "april")
@dataclass(frozen=True)
class April:
    """One image from a vision transformer, by the linear system that the gradient of its position embedding makes of the patches.

    Attributes:
        seconds: CPU seconds to complete what the linear system does not tell.
    """

    seconds: float = 20.0

    def __post_init__(self) -> None:
        must_be_positive(self, "seconds")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse batches, deltas of several steps, and models without a position embedding or with more tokens than width."""
        reason = unusable(view, knowledge) or several_steps(view, knowledge) or unrecoverable(view, knowledge)
        if reason is not None:
            return reason
        if knowledge.num_examples != 1:
            return f"the batch must be 1 record, got {knowledge.num_examples}: the position embedding's gradient is a mean over records"
        found = embedding(knowledge, view.broadcast)
        if isinstance(found, str):
            return found
        width = found.call.outputs.shape[1]
        if (found.tokens - width + 1) * found.values > IN_DOUBLE:
            return f"the tokens must be about as few as their width of {width}, got {found.tokens}: their gradients cannot be independent"
        if not bool(view.upload.update.tensors[found.place].any()):
            return "the position embedding's gradient must not be zero everywhere, got nothing to solve"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Solve the linear system; complete it where rounding hides a combination of tokens."""
        start, deadline = time.perf_counter(), time.process_time() + self.seconds
        found = embedding(knowledge, view.broadcast)
        if isinstance(found, str):
            raise ValueError(found)
        gradient = mean_gradient(view, knowledge)
        width = found.call.outputs.shape[1]
        delta = gradient[found.place].double().view(-1, width)[found.first : found.first + found.tokens]
        weight = gradient[found.call.weight].double().flatten(1)
        pixel = float(found.scale.abs().min()) * math.sqrt(found.scale.numel())
        rounding = torch.finfo(view.upload.update.tensors[found.place].dtype).eps
        system = linear_system(delta, weight, rounding, KEPT * RADIUS * pixel)
        image, proof, error = found.image(system.patches), LINEAR, system.error
        unknowns = len(system.free) * found.values
        if unknowns and found.whole and system.noise <= HOLDS * float(weight.norm()):
            residual = Residual(prepare(view, knowledge), maybe_clipped(view, knowledge))
            proof, rest = COMPLETED, math.inf
            if unknowns <= IN_DOUBLE and 8 * unknowns * len(residual.victim.target) <= MEMORY:
                image, rest = completed(residual, found, system, deadline=deadline, prove=is_smooth(knowledge, view.broadcast))
            error = math.hypot(error, rest)
        inside = bool(((image > -RADIUS) & (image < 1 + RADIUS)).all())
        certain = system.checked and found.whole and inside and 2 * error / pixel <= RADIUS
        return Reconstruction(
            inputs=box(torch.nan_to_num(image, nan=0.5)).float(),
            labels=known_or_recovered(view, knowledge),
            objective=system.residual,
            certificate=(proof if certain else "",),
            seconds=time.perf_counter() - start,
            converged=time.process_time() < deadline,
        )
