"""Streams of randomness: the same for the same purpose, and for those that hide something, as wide as the secret."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from scipy import stats

from simulator.rng import WORDS, secret_stream, stream


def test_a_purpose_has_one_stream_and_another_has_another() -> None:
    draws = {key: torch.rand(4, generator=stream(*key)).tolist() for key in ((0, "a"), (0, "ab", "c"), (0, "a", "bc"), (1, "a"), (0, 1), (0, "1"))}
    assert torch.rand(4, generator=stream(0, "a")).tolist() == draws[0, "a"]
    assert len({tuple(values) for values in draws.values()}) == len(draws)


def test_a_secret_stream_is_the_mersenne_twister_with_the_whole_hash_as_its_state() -> None:
    """Against numpy's Twister, set up by hand: torch's floats are the low 24 bits of each word."""
    parts = b"".join(len(text).to_bytes(4, "big") + text for text in (b"int:7", b"str:key", b"str:noise", b"int:3"))
    words = np.frombuffer(hashlib.shake_256(parts).digest(4 * WORDS), "<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": WORDS}}
    wanted = (twister.random_raw(2000) & 0xFFFFFF) / 2**24
    found = torch.rand(2000, generator=secret_stream(7, "key", "noise", 3))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-7)


def test_every_bit_of_a_secret_counts() -> None:
    """What torch keeps of a seed, its low 32 bits, may agree: the streams do not."""
    first = torch.randn(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, torch.randn(8, generator=torch.Generator().manual_seed(1 + 2**40)))  # why manual_seed is not enough
    seen = {tuple(torch.randn(4, generator=secret_stream(0, f"{secret:032x}", "noise")).tolist()) for secret in range(2000)}
    assert len(seen) == 2000


def test_its_normals_are_normal() -> None:
    drawn = torch.randn(100_000, generator=secret_stream(0, "secret", "noise"), dtype=torch.float64)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
