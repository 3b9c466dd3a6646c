"""Clipping: the whole update is scaled down to an L2 norm of at most ``clip_norm``.

Source: the clipping step of DP-FedAvg, McMahan et al., 2018, arXiv:1710.06963, "FlatClip": u·min(1, S/‖u‖₂).
Deviations: an update whose norm is not finite becomes 0: scaled, it would be NaN, which no noise covers.
Hook: ``on_update``.

What it protects: no record. It bounds how much one client can move the model, which is what noise added directly after it needs to become
a guarantee.

What it does not protect: anything, on its own. Clipping multiplies the update by one number; its direction stays, and attacks that
match directions (cosine distance) do not notice. It bounds the sensitivity, so that noise added directly after it counts:
``defenses.accounting`` reads ``clip`` followed by ``gaussian_noise`` as the Gaussian mechanism.
Broken by: every attack. One that matches directions (inverting_gradients) sees the same update, and one that matches lengths divides by
the clip norm, which it knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from simulator.defense import ClientContext, Defense, Role
from simulator.registry import register
from simulator.types import Tensors, Update


def global_norm(tensors: Tensors) -> Tensor:
    """The L2 norm of all tensors together, as one vector."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors.values()]))
    return norm


def clip_to_norm(tensors: Tensors, clip_norm: float) -> Tensors:
    """Scale all tensors by min(1, clip_norm/norm), or to 0 where the norm is not finite; ``inf`` leaves them as they are."""
    if math.isinf(clip_norm):
        return tensors
    norm = global_norm(tensors)
    scale = clip_norm / norm.clamp(min=clip_norm)  # ≤ 1, and no division by zero for a zero update
    return {name: torch.where(norm.isfinite(), tensor, 0) * scale.nan_to_num(0) for name, tensor in tensors.items()}


def require_clip_norm(clip_norm: float) -> None:
    """Raise ValueError unless ``clip_norm`` is a positive number or inf."""
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be > 0, got {clip_norm}. Use clip_norm = inf to disable clipping.")


def clipping_of_the_record(clip_norm: float, *, alone: bool) -> float | None:
    """To which norm clipping the update clips a record's gradient; None where others share the update and, with it, the factor."""
    return clip_norm if alone or math.isinf(clip_norm) else None


@register("defenses", "clip")
@dataclass(frozen=True)
class Clip(Defense):
    """Clips the whole update to an L2 norm; bounds it, hides nothing.

    Attributes:
        clip_norm: largest L2 norm that an update keeps, in the update's own unit; inf disables.
    """

    role: ClassVar[Role] = "clip"

    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)

    def clipping_and_noise(self, batch: int, *, alone: bool) -> tuple[float, float] | None:
        """Clipping alone, where the update is one record's."""
        bound = clipping_of_the_record(self.clip_norm, alone=alone)
        return None if bound is None else (bound, 0.0)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Scale the update down to ``clip_norm``."""
        return replace(update, tensors=clip_to_norm(update.tensors, self.clip_norm))
