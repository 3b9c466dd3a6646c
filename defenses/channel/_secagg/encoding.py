"""One client's upload as a vector of words, and the words' sum as the upload that the server sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from defenses.channel._secagg.masking import Words, reduced, word_type
from defenses.channel._secagg.quantization import Integers, Scale, floating, split_like, to_reals, to_words
from defenses.channel._secagg.rotation import turned_back
from simulator.errors import ProtocolAbort
from simulator.types import Tensors, Update, Upload


def ideal_sum(vectors: Mapping[int, Words], bits: int = 64) -> Words:
    """The sum modulo 2^bits over the clients in ``vectors``: what the protocol computes, without the protocol.

    Raises:
        ProtocolAbort: no vectors, or vectors of different words or lengths.
    """
    kinds = {(vector.dtype, vector.shape) for vector in vectors.values()}
    if len(kinds) != 1:
        raise ProtocolAbort(f"vectors must be ≥ 1 and of one type and length, got {len(vectors)} of {len(kinds)}. Use one Parameters.")
    total: Words = np.zeros_like(next(iter(vectors.values())))
    for vector in vectors.values():
        np.add(total, vector, out=total)
    return reduced(total, bits)


def encode(
    update: Update, buffers: Tensors, num_examples: int, *, ranges: tuple[float, float], scale: Scale, rng: torch.Generator,
    noise: Integers | None = None, longest: float = math.inf, rotation: torch.Generator | None = None,
) -> Words:  # fmt: skip
    """A client's vector [n_i-weighted update | n_i-weighted floating-point buffers | n_i], to be masked as a whole.

    Args:
        update: what the client would have uploaded; floating-point tensors only.
        buffers: the model's buffers after training; integer ones stay home.
        num_examples: n_i, between 1 and ``scale.max_examples``.
        ranges: the largest magnitudes of the update's and of the buffers' coordinates.
        scale: the same for all clients.
        rng: of the stochastic rounding.
        noise: integers to add to the update's coordinates (not to buffers and n_i), tensors in the order of their names, in steps.
        longest: L2 norm of the update's rounded coordinates before the noise, in steps.
        rotation: public randomness by which to turn the update; a fresh generator at every client and at the server.

    Raises:
        ProtocolAbort: a coordinate that is NaN or out of range, or n_i out of bounds. Nothing is ever clipped. The message stays with
            the client: tell the server no more than that this client dropped out.
    """
    if not 1 <= num_examples <= scale.max_examples:
        raise ProtocolAbort(f"num_examples must be in [1, {scale.max_examples}], got one outside. Raise max_examples.")
    integers = sorted(set(update.tensors) - set(floating(update.tensors)))
    if integers:
        raise ProtocolAbort(f"update must be floating-point, got integer tensors {integers}. Leave them out of the update.")
    weight = num_examples / scale.max_examples
    own = to_words(
        floating(update.tensors), weight=weight, limit=ranges[0], scale=scale, rng=rng, noise=noise, longest=longest, rotation=rotation
    )
    return np.concatenate(
        (
            own,
            to_words(floating(buffers), weight=weight, limit=ranges[1], scale=scale, rng=rng),
            np.array([num_examples], word_type(scale.bits)),
        )
    )


def decode(
    total: Words, *, kind: Literal["gradient", "delta"], template: Tensors, buffer_template: Tensors, senders: frozenset[int],
    ranges: tuple[float, float], scale: Scale, noisy: bool = False, rotation: torch.Generator | None = None,
) -> Upload:  # fmt: skip
    """Means weighted by n_i over ``senders``, and Σ n_i: what a sum of their vectors says.

    Args:
        total: sum of the senders' vectors modulo 2^bits.
        kind: of the update.
        template: names, shapes and types of the update's tensors: the broadcast parameters.
        buffer_template: likewise of the buffers; integer ones are ignored.
        senders: the clients in the sum.
        ranges: as in :func:`encode`.
        scale: as in :func:`encode`.
        noisy: whether integer noise was added, so that no range can be checked.
        rotation: as in :func:`encode`; the mean is turned back.

    Raises:
        ProtocolAbort: a sum of another length or word, or one that no senders' vectors can have.
    """
    size, buffer_size = (sum(tensor.numel() for tensor in floating(tensors).values()) for tensors in (template, buffer_template))
    if total.dtype != word_type(scale.bits) or total.shape != (size + buffer_size + 1,):
        raise ProtocolAbort(
            f"sum must be {size + buffer_size + 1} words of {scale.bits} bits, got {total.size} of {8 * total.itemsize}. "
            "Use this round's Parameters."
        )
    num_examples, count = int(total[-1]), len(senders)
    if not 1 <= count <= num_examples <= count * scale.max_examples:
        raise ProtocolAbort(
            f"examples of {count} senders must be in [{count}, {count * scale.max_examples}], got {num_examples}. "
            "The sum is corrupt: abort the round."
        )
    weights = num_examples / scale.max_examples
    update = to_reals(total[:size], limit=ranges[0], scale=scale, senders=count, weights=weights, noisy=noisy)
    if rotation is not None:
        update = turned_back(torch.from_numpy(update), rotation).numpy()
    buffers = to_reals(total[size:-1], limit=ranges[1], scale=scale, senders=count, weights=weights)
    return Upload(senders, Update(kind, split_like(update, template)), split_like(buffers, buffer_template), num_examples)
