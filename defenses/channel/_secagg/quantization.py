"""Real numbers to words of Z_(2^bits) and back, so that the words' modular sum is the numbers' weighted sum.

A client's vector is [w·update | w·buffers | n_i], tensors in the order of their names, with w = n_i / max_examples ≤ 1. The
weight must enter before rounding (after it, the sum could not be weighted any more), so a client far below ``max_examples`` pays a
larger relative rounding error. No sum can wrap: |word| ≤ q_max with 2·cohort·q_max < 2^bits.

Distributed DP adds integer noise to the words of the update before they are masked (:func:`to_words`, ``noise``, in units of the grid).
Noise has no bound, so that neither has a noised word: values are then taken modulo 2^bits without a check, and who adds the noise
answers for how seldom the sum wraps, by a range that leaves room. It may ask for a random rotation of the update before all that.

Source: uniform stochastic rounding as in Konečný et al. (2016), arXiv:1610.05492; that the sum cannot wrap is our requirement.
Deviations: a coordinate out of range aborts; nothing is clipped unseen.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defenses.channel._secagg.masking import Words, reduced, word_type
from defenses.channel._secagg.rotation import rotated
from simulator.errors import ProtocolAbort
from simulator.types import Tensors

Reals = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ROUNDINGS = 100
"""Attempts at a rounding that is short enough; each succeeds with probability 0.39 at least where the unrounded vector is."""


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


def to_words(
    tensors: Tensors, *, weight: float, limit: float, scale: Scale, rng: torch.Generator, noise: Integers | None = None,
    longest: float = math.inf, rotation: torch.Generator | None = None,
) -> Words:  # fmt: skip
    """``weight`` × each coordinate, in units of a step, rounded up or down at random so that the expectation is exact.

    Args:
        tensors: to be written, in the order of their names.
        weight: of this client, at most 1.
        limit: largest magnitude of a coordinate.
        scale: of all clients.
        rng: of the rounding.
        noise: added to the rounded coordinates, in steps; with it nothing is bounded, and words wrap modulo 2^bits.
        longest: L2 norm, in steps, of the rounded coordinates before the noise: rounding is repeated until it holds (conditional
            rounding, Kairouz et al., 2021, arXiv:2102.06387).
        rotation: public randomness by which to turn the vector before it is rounded; it needs noise, without which words are bounded.

    Raises:
        ProtocolAbort: a coordinate is not finite, or exceeds ``limit`` and there is no noise; or noise of another shape. The message
            bounds a coordinate's magnitude by a power of two only.
    """
    for name, tensor in tensors.items():
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        if not largest <= (limit if noise is None else sys.float_info.max):
            got = f"one above it; {2.0 ** math.ceil(math.log2(largest)):g} would hold it" if math.isfinite(largest) else "NaN or infinity"
            raise ProtocolAbort(
                f"coordinates of {name} must be at most {limit:g} in magnitude, got {got}. "
                "Clip the update, or raise the range of secure_aggregation."
            )
    flat = [tensor.detach().double().flatten().cpu() for tensor in tensors.values()]
    exact = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)
    if rotation is not None:
        exact = rotated(exact, rotation)
    exact = exact * (weight / scale.step(limit))
    floor = exact.floor()
    # Comparing with the fraction, instead of flooring exact + noise, cannot round past q_max.
    for _ in range(ROUNDINGS):
        up = torch.rand(len(exact), generator=rng, dtype=torch.float64) < exact - floor
        if math.isinf(longest) or float(torch.linalg.vector_norm(floor + up)) <= longest:
            break
    else:
        raise ProtocolAbort(
            f"rounded coordinates must have a norm of at most {longest:g} steps, got a longer one each time. Clip the update."
        )
    rounded = (floor + up).to(torch.int64)
    if noise is None:
        rounded.clamp_(-scale.q_max, scale.q_max)  # weight / step may be off by one unit in the last place
        whole = rounded.numpy()
    elif noise.shape == (len(exact),) and noise.dtype == np.int64:
        whole = rounded.numpy() + noise
    else:
        raise ProtocolAbort(f"noise must be {len(exact)} of int64, got {noise.shape} of {noise.dtype}. Draw one for each coordinate.")
    return reduced(whole.view("<u8").astype(word_type(scale.bits)), scale.bits)


def to_reals(words: Words, *, limit: float, scale: Scale, senders: int, weights: float, noisy: bool = False) -> Reals:
    """The weighted mean from the words' sum; ``weights`` is Σ n_i / max_examples, ``noisy`` whether integer noise was added.

    Raises:
        ProtocolAbort: a value that ``senders`` clients cannot sum to without noise, hence a corrupt sum.
    """
    spare = words.dtype.type(8 * words.itemsize - scale.bits)
    signed = (words << spare).view(f"<i{words.itemsize}") >> spare.astype(f"<i{words.itemsize}")  # the top bit of a word is its sign
    if not noisy and signed.size and not -senders * scale.q_max <= signed.min() <= signed.max() <= senders * scale.q_max:
        raise ProtocolAbort(f"sum must be within {senders} clients' range, got values outside. The sum is corrupt: abort the round.")
    values: Reals = signed.astype(np.float64) * (scale.step(limit) / weights)
    return values


def split_like(values: Reals, template: Tensors) -> dict[str, Tensor]:
    """Cut a vector into tensors of the template's names (sorted), shapes and types, keeping the template's order of names."""
    tensors, start = {}, 0
    for name, tensor in floating(template).items():
        part = torch.from_numpy(values[start : start + tensor.numel()].copy())
        tensors[name] = part.reshape(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
    return {name: tensors[name] for name in template if name in tensors}
