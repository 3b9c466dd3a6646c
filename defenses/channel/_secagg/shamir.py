"""Shamir's t-out-of-n secret sharing of 32-byte secrets.

Source: Shamir (1979), "How to share a secret", Communications of the ACM 22(11).
Deviations: none known. Python's integers do not run in constant time; who can time a client's arithmetic is outside the threat model.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Mapping, Sequence

from simulator.errors import ProtocolAbort

PRIME = 2**256 + 297
"""The smallest prime above 2^256: every 32-byte secret is a field element as it stands."""
SHARE_BYTES = 33


def split(secret: int, threshold: int, points: Sequence[int], *, prime: int = PRIME) -> list[int]:
    """Shares of ``secret``: a random polynomial of degree < threshold with f(0) = secret, at each of ``points``.

    All coefficients are uniform, the leading one may be 0: only so is every secret equally likely given threshold − 1 shares.
    """
    coefficients = [secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))]
    return [evaluate(coefficients, point, prime=prime) for point in points]


def evaluate(coefficients: Sequence[int], point: int, *, prime: int = PRIME) -> int:
    """Σ cₖ·pointᵏ modulo the prime, lowest coefficient first, by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


def lagrange_at_zero(points: Sequence[int], *, prime: int = PRIME) -> list[int]:
    """λᵢ = Πⱼ≠ᵢ xⱼ / (xⱼ − xᵢ), so that f(0) = Σ λᵢ·f(xᵢ). They depend on the points only: compute them once for all secrets.

    Raises:
        ProtocolAbort: two points are equal, or one is 0.
    """
    if len({point % prime for point in points} - {0}) != len(points):
        raise ProtocolAbort(f"Shamir points must be distinct and not 0, got {list(points)}. Give every client its own.")
    product = math.prod(points) % prime
    # λᵢ = Πⱼ xⱼ / (xᵢ·Πⱼ≠ᵢ (xⱼ − xᵢ)); one inversion serves all (Montgomery's trick), since it costs as much as a hundred products.
    below = [own * math.prod(other - own for other in points if other != own) % prime for own in points]
    before = list(itertools.accumulate(below, lambda a, b: a * b % prime, initial=1))
    inverse, coefficients = pow(before[-1], -1, prime), [0] * len(points)
    for i in reversed(range(len(points))):
        coefficients[i] = product * inverse * before[i] % prime
        inverse = inverse * below[i] % prime
    return coefficients


def combine(shares: Sequence[int], coefficients: Sequence[int], *, prime: int = PRIME) -> int:
    """The secret from shares and the :func:`lagrange_at_zero` coefficients of their points, in the same order."""
    return sum(share * coefficient for share, coefficient in zip(shares, coefficients, strict=True)) % prime


def split_bytes(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Shares of a 32-byte secret, 33 bytes each."""
    return [share.to_bytes(SHARE_BYTES, "big") for share in split(int.from_bytes(secret, "big"), threshold, points)]


def combine_bytes(shares: Mapping[int, bytes], coefficients: Mapping[int, int]) -> bytes:
    """The 32-byte secret from the shares of exactly the clients in ``coefficients``.

    Raises:
        ProtocolAbort: the shares are of no 32-byte secret, so at least one of them is wrong.
    """
    values = [int.from_bytes(shares[client], "big") for client in coefficients]
    secret = combine(values, list(coefficients.values()))
    if secret >= 1 << 256 or max(values) >= PRIME:
        raise ProtocolAbort(f"shares of clients {sorted(coefficients)} must combine to 32 bytes, got more. One is corrupt: abort.")
    return secret.to_bytes(32, "big")
