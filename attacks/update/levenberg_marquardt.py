"""Second-order gradient matching for smooth networks: exact to rounding, and able to prove it.

The update is a smooth function of the records with, usually, many more equations than unknowns. Its residual is solved by
Levenberg–Marquardt, which near a solution doubles the right digits in every iteration where first-order attacks and L-BFGS crawl.

Source: Levenberg, 1944, and Marquardt, 1963, as in Nocedal and Wright, 2006, section 10.3, on the objective of Zhu et al., 2019,
    arXiv:1906.08935, equation 4. Labels as in Zhao et al., 2020, arXiv:2001.02610: recovered first, not optimized.
Deviations: steps are measured in cosine modes weighted by the spectrum of natural images, from a gray start and from low to full
    resolution, where Zhu et al. start pixels from noise. Measured: claims B11-1 to -4 and B12-sigmoid, B12-softplus. Large normal equations
    are factored in float32 and reused as a preconditioner. Tensors are weighed by their own norms. upload.buffers (BatchNorm statistics
    after training) are not used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks._dropout import layers as dropping_layers
from attacks._gradient import maybe_clipped, unusable
from attacks._matching.priors import box
from attacks._matching.simulate import Victim, prepare
from attacks._rest import in_order
from attacks._second_order.apart import set_apart
from attacks._second_order.marquardt import SOLVED, Fit, explicit_bytes, fit, gray_start
from attacks._second_order.proof import RADIUS, error_bound
from attacks._second_order.residual import Residual
from attacks._second_order.smoothness import is_smooth
from attacks._settings import must_be_positive
from attacks.update.labels import unrecoverable
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Batch, Observation

PROOF = "unique match"


@register("attacks", "levenberg_marquardt")
@dataclass(frozen=True)
class LevenbergMarquardt:
    """Gauss–Newton steps with damping on the residual of the update, for networks without kinks.

    Attributes:
        seconds: CPU seconds for each victim.
        restarts: starts at most; a solved one ends the search, else the lowest residual wins.
        iterations: for each start and resolution, at most.
        deviation: of the smooth random picture that is added to gray as the first start, in units of the pixel range. Records of one
            class must start apart. Later starts are ten times as far away; every second only sets records that share a class apart.
        memory_mb: up to which the Jacobian is formed; beyond, conjugate gradients do without, and nothing can be certified.
    """

    seconds: float = 60.0
    restarts: int = 6
    iterations: int = 60
    deviation: float = 0.02
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        must_be_positive(self, "restarts", "iterations", "memory_mb", "seconds", "deviation")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse networks with kinks, empty updates, and labels that cannot be had."""
        reason = unusable(view, knowledge) or unrecoverable(view, knowledge)
        if reason is not None:
            return reason
        if not any(bool(tensor.any()) for tensor in view.upload.update.tensors.values()):
            return "the update must not be zero everywhere, got nothing to match"
        if not is_smooth(knowledge, view.broadcast):
            return "the network must be smooth, got kinks (ReLU, max-pooling) that second-order steps do not see"
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Solve the residual from several starts; certify what is solved."""
        return self.improve(view, knowledge, None, rng=rng)

    def improve(self, view: Observation, knowledge: Knowledge, guess: Batch | None, *, rng: torch.Generator) -> Reconstruction:
        """The same with another attack's guess as the first start: near a solution a few iterations end at rounding."""
        began, deadline = time.perf_counter(), time.process_time() + self.seconds
        victim, unscaled = prepare(view, knowledge), maybe_clipped(view, knowledge)
        if not bool(victim.target.any()):
            raise ValueError("the update must not be zero everywhere, got nothing to match")
        shape = (len(victim.labels), *victim.shape)
        best: tuple[Fit, Victim] | None = None
        for number in range(self.restarts):
            known = reordered(victim, rng) if number else victim
            deviation = self.deviation if number == 0 else min(0.25, 10 * self.deviation)
            start, given = gray_start(rng, shape, deviation), number == 0 and guess is not None
            if given and guess is not None:
                start = guess.inputs[in_order(guess.labels.tolist(), victim.labels.tolist())]
            mixed = number % 2 == 1 and best is not None and known is victim and len(set(victim.labels.tolist())) < len(victim.labels)
            if mixed and best is not None:
                start = set_apart(Residual(known, unscaled), best[0].images, victim.labels, rng, deadline=deadline)
            found = fit(
                Residual(known, unscaled),
                start,
                iterations=self.iterations,
                deadline=deadline,
                memory_bytes=self.memory_mb * 2**20,
                task="levenberg_marquardt",
                coarse=not (mixed or given),
            )
            if best is None or found.residual < best[0].residual:
                best = found, known
            if best[0].residual < SOLVED or time.process_time() > deadline:
                break
        assert best is not None
        found, known = best
        return Reconstruction(
            inputs=box(torch.nan_to_num(found.images, nan=0.5)).float(),
            labels=known.labels,
            objective=found.residual,
            trace=tuple(enumerate(found.trace)),
            certificate=(PROOF if self.proves(Residual(known, unscaled), found.images, rng) else "",) * len(known.labels),
            seconds=time.perf_counter() - began,
            converged=found.converged,
        )

    def proves(self, residual: Residual, images: Tensor, rng: torch.Generator) -> bool:
        """Whether the records are pictures, explain the update to rounding, and nothing else nearby does; no mask may be unknown."""
        if dropping_layers(residual.victim.model):
            return False
        if explicit_bytes(images.numel(), len(residual.victim.target)) > self.memory_mb * 2**20:
            return False
        if not bool(((images > -RADIUS) & (images < 1 + RADIUS)).all()):
            return False
        return error_bound(residual, images, rng=rng) <= RADIUS


def reordered(victim: Victim, rng: torch.Generator) -> Victim:
    """Other labels for the local steps where there are several: which records meet in one is not known."""
    if len(victim.order) == 1:
        return victim
    return replace(victim, labels=victim.labels[torch.randperm(len(victim.labels), generator=rng)])
