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
"""A vector of uint32 or uint64 words, little-endian; narrower words occupy the low bits of uint32."""

WIDTHS = (16, 20, 24, 32, 64)
"""Bits that a word may have."""

_BLOCK_BYTES = 16
_CHUNK_BYTES = 1 << 18  # of keystream at a time: the sum, the zeros and the keystream stay in the second-level cache
_ZEROS = memoryview(bytes(_CHUNK_BYTES))


def word_type(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The little-endian unsigned word that holds ``bits`` bits."""
    return np.dtype("<u8" if bits > 32 else "<u4")


def reduced(vector: Words, bits: int) -> Words:
    """The vector modulo 2^bits, in place: sums may run over in the words that hold them, since 2^bits divides their modulus."""
    if bits < 8 * vector.itemsize:
        np.bitwise_and(vector, vector.dtype.type((1 << bits) - 1), out=vector)
    return vector


def packed_bytes(length: int, bits: int) -> int:
    """Bytes of a vector on the wire."""
    return -(-length * bits // 8)


def pack(vector: Words, bits: int) -> memoryview:
    """The words on the wire, ``bits`` each, little-endian; ``vector`` is reduced modulo 2^bits."""
    if bits in (32, 64):
        return vector.data.cast("B")
    if bits == 20:  # two words in five bytes
        pairs = np.zeros(-(-vector.size // 2) * 2, "<u8")
        pairs[: vector.size] = vector
        both = pairs[0::2] | pairs[1::2] << np.uint64(20)
        rows = np.ascontiguousarray(both.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :5])
    else:
        rows = np.ascontiguousarray(vector.view(np.uint8).reshape(-1, 4)[:, : bits // 8])
    return rows.data.cast("B")[: packed_bytes(vector.size, bits)]


def unpack(data: bytes | memoryview, length: int, bits: int) -> Words:
    """The inverse of :func:`pack`; for words of 32 and 64 bits a view of the data.

    Raises:
        ProtocolAbort: another number of bytes than ``length`` words have.
    """
    if len(data) != packed_bytes(length, bits):
        raise ProtocolAbort(f"vector must be {packed_bytes(length, bits)} bytes, got {len(data)}. Abort the round.")
    if bits in (32, 64):
        return np.frombuffer(data, word_type(bits))
    size = 5 if bits == 20 else bits // 8
    raw = np.zeros(-(-length * bits // (8 * size)) * size, np.uint8)
    raw[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.zeros((raw.size // size, 8 if bits == 20 else 4), np.uint8)
    rows[:, :size] = raw.reshape(-1, size)
    if bits != 20:
        return rows.view("<u4").ravel()
    both = rows.view("<u8").ravel()
    return np.stack((both, both >> np.uint64(20)), 1).ravel()[:length].astype("<u4") & np.uint32(0xFFFFF)


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
