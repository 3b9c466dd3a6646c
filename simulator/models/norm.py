"""The two normalizations of hidden layers that the ResNets offer."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

Norm = Literal["batch", "group"]


def norm_layer(kind: Norm, channels: int, groups: int = 8) -> nn.Module:
    """BatchNorm, or GroupNorm (Wu and He, 2018, arXiv:1803.08494) with so many groups, or the most of their divisors that fit the channels.

    BatchNorm couples the records of a batch and its running statistics travel with each upload, which is a leak of its own;
    per-example gradients (DP-SGD) do not exist under it. GroupNorm normalizes each record by itself and sends no statistics.
    """
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(groups, channels), channels)
