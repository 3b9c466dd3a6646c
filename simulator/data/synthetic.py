"""Procedural images: always there, of any size and number, and nobody's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from simulator.dataset import DataSet
from simulator.registry import register
from simulator.rng import stream
from simulator.types import Batch, Schema

CYCLES = (2.0, 4.0)
"""Light and dark stripes across an image, least and most: wide enough for 8 pixels to show them."""


@register("data", "synthetic")
@dataclass(frozen=True)
class Synthetic:
    """Colored stripes whose direction is the class, with a soft spot anywhere: drawn from a seed, learnable by every model.

    Attributes:
        records: number of images; classes take turns, so they are balanced.
        size: height and width in pixels.
        channels: 1 for gray, 3 for color.
        classes: number of directions, evenly over the half circle.
        seed: of the drawing; another seed gives other images of the same kind.
    """

    records: int = 2000
    size: int = 32
    channels: int = 3
    classes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("records", "size", "channels", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}. Change it in the table of the data set.")

    def load(self) -> DataSet:
        """Draw the records: record i is of class i modulo classes."""
        return _draw(self)


@cache
def _draw(settings: Synthetic) -> DataSet:
    rng = stream(settings.seed, "synthetic")
    n, channels = settings.records, settings.channels

    def uniform(low: float, high: float, width: int = 1) -> Tensor:
        """(records, width, 1, 1), uniform in [low, high)."""
        return low + (high - low) * torch.rand(n, width, 1, 1, generator=rng)

    labels = torch.arange(n) % settings.classes
    pixels = torch.linspace(-0.5, 0.5, settings.size)
    y, x = pixels[:, None], pixels[None, :]

    jitter = uniform(-0.15, 0.15)  # a fraction of the step between two classes, so that they never overlap
    angle = math.pi * (labels[:, None, None, None] + jitter) / settings.classes
    phase, cycles = uniform(0, 2 * math.pi), uniform(*CYCLES)
    stripes = torch.sin(2 * math.pi * cycles * (x * torch.cos(angle) + y * torch.sin(angle)) + phase)

    distance = (x - uniform(-0.4, 0.4)) ** 2 + (y - uniform(-0.4, 0.4)) ** 2
    spot = torch.exp(-distance / (2 * 0.12**2))

    background, ink, light = uniform(0.3, 0.7, channels), uniform(0.1, 0.3, channels), uniform(-0.5, 0.5, channels)
    inputs = (background + ink * stripes + light * spot).clamp(0, 1)
    degrees = (round(180 * k / settings.classes) for k in range(settings.classes))
    return DataSet(
        Batch(inputs, labels),
        Schema((channels, settings.size, settings.size), tuple(f"{k}: stripes at {angle}°" for k, angle in enumerate(degrees))),
        source=f"drawn by fedpeek from seed {settings.seed}",
        license="none needed",
    )
