"""Randomness as a value: one independent stream for each purpose, the same bits on every machine and driver."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

WORDS = 624
"""Of a Mersenne Twister's state (Matsumoto and Nishimura, 1998)."""

LEFT, NEXT, STATE = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * WORDS)
"""Where ``torch.Generator.get_state`` of the CPU holds them, each word in eight bytes; a test compares with numpy's Twister."""


def stream(seed: int, *purpose: object) -> torch.Generator:
    """Return the generator that belongs to ``purpose`` under ``seed``.

    The purpose is hashed with its parts length-prefixed, so that ("ab", "c") and ("a", "bc") differ. Streams of different
    purposes are independent; an attack is only ever handed its own, so it cannot replay the defender's noise.
    """
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(_named(seed, *purpose)).digest()[:8], "big") >> 1)


def secret_stream(seed: int, secret: str, *purpose: object) -> torch.Generator:
    """Return a generator that nobody without ``secret`` can set up again: for noise and samples that hide something.

    torch's seed has 32 effective bits: it can be searched, and two of 77 000 streams collide. Here all 624 words of its Mersenne
    Twister come from SHAKE-256. The Twister is no cryptographic generator: who sees some 20 000 of its bits can go on from there, so
    noise stays simulation grade.
    """
    words = np.frombuffer(hashlib.shake_256(_named(seed, secret, *purpose)).digest(4 * WORDS), "<u4")
    rng = torch.Generator().manual_seed(0)
    state = rng.get_state().numpy()
    state[LEFT] = np.frombuffer(np.int32(1).tobytes(), np.uint8)  # words left until all are renewed: before the first draw
    state[NEXT] = 0
    state[STATE] = np.frombuffer(words.astype("<u8").tobytes(), np.uint8)
    return rng.set_state(torch.from_numpy(state))


def _named(*parts: object) -> bytes:
    texts = [f"{type(part).__name__}:{part}".encode() for part in parts]
    return b"".join(len(text).to_bytes(4, "big") + text for text in texts)
