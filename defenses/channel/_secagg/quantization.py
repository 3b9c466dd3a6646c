"""Real numbers to words of Z_(2^bits) and back, so that the words' modular sum is the numbers' weighted sum.

A client's vector is [w·update | w·buffers | n_i], tensors in the order of their names, with w = n_i / max_examples ≤ 1. The
weight must enter before rounding (after it, the sum could not be weighted any more), so a client far below ``max_examples`` pays a
larger relative rounding error. No sum can wrap: |word| ≤ q_max with 2·cohort·q_max < 2^bits.

Source: uniform stochastic rounding as in Konečný et al. (2016), arXiv:1610.05492; that the sum cannot wrap is our requirement.
Deviations: a coordinate out of range aborts; nothing is clipped unseen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defenses.channel._secagg.masking import Words, word_type
from simulator.errors import ProtocolAbort
from simulator.types import Tensors

Reals = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How reals become words; the same for all parties of a round.

    Attributes:
        cohort: clients whose words may be summed.
        bits: width of a word.
        max_examples: public bound on every client's n_i.
    """

    cohort: int
    bits: int
    max_examples: int

    def __post_init__(self) -> None:
        if self.max_examples < 1 or self.cohort * self.max_examples >= 1 << self.bits:
            raise ProtocolAbort(
                f"max_examples must be ≥ 1 and below 2^{self.bits} / {self.cohort} clients, got {self.max_examples}. "
                "Set max_examples of secure_aggregation."
            )

    @property
    def q_max(self) -> int:
        """The largest |word|: ⌊(2^bits − 1) / (2·cohort)⌋, lowered to what float64 holds exactly."""
        largest = ((1 << self.bits) - 1) // (2 * self.cohort)
        spare = max(0, largest.bit_length() - 53)
        return largest >> spare << spare

    def step(self, limit: float) -> float:
        """The distance of neighboring values for a tensor whose coordinates are at most ``limit`` in magnitude."""
        return limit / self.q_max

    def rms_error(self, limit: float, *, senders: int, num_examples: int) -> float:
        """Expected rms error, per coordinate, of the weighted mean over ``senders`` with ``num_examples`` in all.

        Each client adds a rounding variance of step²/6 on average (Σ f(1 − f) for a uniform fraction f); the mean divides by
        Σ n_i / max_examples. Coordinates much smaller than a step, and exact zeros, have less.
        """
        return self.step(limit) * math.sqrt(senders / 6) * self.max_examples / num_examples


def floating(tensors: Tensors) -> dict[str, Tensor]:
    """The floating-point tensors, by name: both ends agree on the order whatever the mapping's."""
    return {name: tensors[name] for name in sorted(tensors) if tensors[name].is_floating_point()}


def to_words(tensors: Tensors, *, weight: float, limit: float, scale: Scale, rng: torch.Generator) -> Words:
    """``weight`` × each coordinate, in units of a step, rounded up or down at random so that the expectation is exact.

    Raises:
        ProtocolAbort: a coordinate is not finite or exceeds ``limit``. The message bounds its magnitude by a power of two only.
    """
    for name, tensor in tensors.items():
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        if not largest <= limit:
            got = f"one above it; {2.0 ** math.ceil(math.log2(largest)):g} would hold it" if math.isfinite(largest) else "NaN or infinity"
            raise ProtocolAbort(
                f"coordinates of {name} must be at most {limit:g} in magnitude, got {got}. "
                "Clip the update, or raise the range of secure_aggregation."
            )
    flat = [tensor.detach().double().flatten().cpu() for tensor in tensors.values()]
    exact = torch.cat(flat) * (weight / scale.step(limit)) if flat else torch.zeros(0, dtype=torch.float64)
    floor = exact.floor()
    # Comparing with the fraction, instead of flooring exact + noise, cannot round past q_max.
    up = torch.rand(len(exact), generator=rng, dtype=torch.float64) < exact - floor
    whole = (floor + up).to(torch.int64).clamp_(-scale.q_max, scale.q_max)  # weight / step may be off by one unit in the last place
    return whole.numpy().view("<u8").astype(word_type(scale.bits))


def to_reals(words: Words, *, limit: float, scale: Scale, senders: int, weights: float) -> Reals:
    """The weighted mean from the words' sum; ``weights`` is Σ n_i / max_examples.

    Raises:
        ProtocolAbort: a value that ``senders`` clients cannot sum to, hence a corrupt sum.
    """
    signed = words.view(f"<i{words.itemsize}")
    if signed.size and not -senders * scale.q_max <= signed.min() <= signed.max() <= senders * scale.q_max:
        raise ProtocolAbort(f"sum must be within {senders} clients' range, got values outside. The sum is corrupt: abort the round.")
    return signed.astype(np.float64) * (scale.step(limit) / weights)


def split_like(values: Reals, template: Tensors) -> dict[str, Tensor]:
    """Cut a vector into tensors of the template's names (sorted), shapes and types, keeping the template's order of names."""
    tensors, start = {}, 0
    for name, tensor in floating(template).items():
        part = torch.from_numpy(values[start : start + tensor.numel()].copy())
        tensors[name] = part.reshape(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
    return {name: tensors[name] for name in template if name in tensors}
