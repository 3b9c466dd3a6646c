"""Any model with one more number in it, which the server sends along and no layer reads: the norm to which clients clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from simulator.config import Plugin
from simulator.models.mlp import MLP
from simulator.registry import register
from simulator.types import Schema

CLIP_NORM = "adaptive_clip_norm"
"""Name of the buffer: the norm in a broadcast, the client's bit in an upload."""


@register("models", "clip_norm")
@dataclass(frozen=True)
class WithClipNorm:
    """Another model that carries a clipping norm among its buffers; the defense ``adaptive_clipping`` puts it there.

    Attributes:
        of: the other model.
        clip_norm: of the first round.
    """

    of: Annotated[Any, Plugin("models")] = field(default_factory=MLP)
    clip_norm: float = 0.1

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the other model and add the number."""
        model: nn.Module = self.of.build(schema, rng)
        model.register_buffer(CLIP_NORM, torch.tensor(self.clip_norm))
        return model
