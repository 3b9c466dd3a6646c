"""Masks: AES-256-CTR keystreams added to a vector of words modulo 2^bits.

A keystream read as words of a power-of-two modulus is uniform as it stands: no rejection, no rounding. Every key masks one
vector only, so the counter starts at 0; the keys' full 256 bits reach the cipher.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from simulator.errors import ProtocolAbort

Words = npt.NDArray[np.unsignedinteger[Any]]
"""A vector of uint32 or uint64 words, little-endian."""

_BLOCK_BYTES = 16
_CHUNK_BYTES = 1 << 20  # of keystream at a time: the sum and the keystream stay in the second-level cache
_ZEROS = memoryview(bytes(_CHUNK_BYTES))


def word_type(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The little-endian unsigned word of 32 or 64 bits."""
    return np.dtype({32: "<u4", 64: "<u8"}[bits])


def apply_masks(vector: Words, masks: Iterable[tuple[bytes, Literal[1, -1]]]) -> None:
    """Add (sign +1) or subtract (−1) the keystream of each key, in place, modulo the word.

    All keystreams pass over one chunk of the vector before the next chunk, so that a long vector crosses memory once.

    Raises:
        ProtocolAbort: a key is not 32 bytes.
    """
    streams = [(_keystream(key), np.add if sign > 0 else np.subtract) for key, sign in masks]
    words_per_chunk = min(_CHUNK_BYTES // vector.itemsize, max(1, vector.size))
    buffer = bytearray(words_per_chunk * vector.itemsize + _BLOCK_BYTES)  # update_into asks for room for one more block
    words = np.frombuffer(buffer, vector.dtype, words_per_chunk)
    for start in range(0, vector.size, words_per_chunk):
        chunk = vector[start : start + words_per_chunk]
        zeros, mask = _ZEROS[: chunk.nbytes], words[: chunk.size]
        for stream, accumulate in streams:
            stream.update_into(zeros, buffer)
            accumulate(chunk, mask, out=chunk)


def _keystream(key: bytes) -> Any:
    if len(key) != 32:
        raise ProtocolAbort(f"mask key must be 32 bytes, got {len(key)}. Derive it with keys.derive.")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()
