"""Randomness as a value: one independent stream for each purpose, the same bits on every machine and driver."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *purpose: object) -> torch.Generator:
    """Return the generator that belongs to ``purpose`` under ``seed``.

    The purpose is hashed with its parts length-prefixed, so that ("ab", "c") and ("a", "bc") differ. Streams of different
    purposes are independent; an attack is only ever handed its own, so it cannot replay the defender's noise.
    """
    digest = hashlib.sha256()
    for part in (seed, *purpose):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
