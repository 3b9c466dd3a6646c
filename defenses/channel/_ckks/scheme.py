"""The parameters of CKKS, what they cost, and what they cost in accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_BITS = {4096: 109, 8192: 218, 16384: 438}
"""Bits of the whole coefficient modulus at which ternary secrets give 128 bits of security, by degree (homomorphicencryption.org, 2018)."""
LARGEST_ERROR = 1e-6
"""Rms error of one decrypted coordinate up to which parameters are accepted: a thousandth of a typical update's coordinate."""
FLOAT64 = 2.5 * 2.0**-53
"""Rms error of a number that was encoded in float64, in units of the numbers' root mean square; measured over degrees and distributions."""
FRAME_BYTES = 4096
"""Allowance for what surrounds the polynomials of a serialized ciphertext."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """CKKS (Cheon et al., 2017) for sums: fresh ciphertexts are added and decrypted, never multiplied.

    Attributes:
        degree: N of the ring Z[X]/(X^N + 1); a ciphertext holds N/2 real numbers.
        modulus_bits: sizes of the primes of the coefficient modulus; the last is used for keys only.
        scale_bits: a number x is held as the integer x·2^scale_bits.
    """

    degree: int = 8192
    modulus_bits: tuple[int, ...] = (60, 60, 60)
    scale_bits: int = 60

    def __post_init__(self) -> None:
        if self.degree not in MAX_BITS:
            raise ValueError(f"degree must be one of {sorted(MAX_BITS)}, got {self.degree}. The default is 8192.")
        if len(self.modulus_bits) < 2 or not all(20 <= bits <= 60 for bits in self.modulus_bits):
            raise ValueError(f"modulus_bits must be ≥ 2 sizes of 20 to 60 bits, got {list(self.modulus_bits)}. The default is 60, 60, 60.")
        if sum(self.modulus_bits) > MAX_BITS[self.degree]:
            raise ValueError(
                f"modulus_bits must sum to ≤ {MAX_BITS[self.degree]} at degree {self.degree} for 128 bits of security, "
                f"got {sum(self.modulus_bits)}. Drop a prime or raise degree."
            )
        if not 20 <= self.scale_bits <= sum(self.modulus_bits[:-1]) - 16:
            raise ValueError(
                f"scale_bits must be in 20..{sum(self.modulus_bits[:-1]) - 16}, 16 below the data modulus, got {self.scale_bits}. "
                "Lower it or add a prime."
            )
        if self.error(1) > LARGEST_ERROR:
            raise ValueError(
                f"scale_bits must give an rms error ≤ {LARGEST_ERROR:g}, got {self.error(1):.1e} with {self.scale_bits}. "
                "Raise it; 40 gives about 1e-9."
            )

    @property
    def slots(self) -> int:
        """Real numbers in one ciphertext."""
        return self.degree // 2

    @property
    def ciphertext_bytes(self) -> int:
        """The most that a serialized ciphertext takes: two polynomials of N coefficients of 8 bytes for each data prime."""
        return 2 * self.degree * 8 * (len(self.modulus_bits) - 1) + FRAME_BYTES

    def coded_bytes(self, length: int) -> float:
        """What the ciphertexts of ``length`` numbers take at as many bits a coefficient as its prime has; SEAL takes up to 8 bytes."""
        return self.chunks(length) * 2 * self.degree * sum(self.modulus_bits[:-1]) / 8

    @property
    def public_key_bytes(self) -> float:
        """What a public key takes at as many bits a coefficient as its prime has; a secret key takes half."""
        return 2 * self.degree * sum(self.modulus_bits) / 8

    @property
    def largest(self) -> float:
        """The largest magnitude of a sum that does not wrap."""
        return 2.0 ** (sum(self.modulus_bits[:-1]) - len(self.modulus_bits) + 1 - self.scale_bits - 1)

    def chunks(self, length: int) -> int:
        """Ciphertexts for a vector of ``length`` numbers."""
        return -(-length // self.slots)

    def error(self, ciphertexts: int, *, rms: float = 0.0) -> float:
        """Expected rms error of one number in the sum of so many fresh ciphertexts, in the numbers' unit.

        Encrypting under the key modulus and dividing by its last prime rounds both polynomials, (1 + 2N/3)/12 for each coefficient
        with a ternary secret; encoding rounds once more, 1/12. A slot adds up N coefficients, and its real part has half of that.
        Encoding is a Fourier transform in float64, besides, whose own rounding is a share of the numbers (:data:`FLOAT64`).

        Args:
            ciphertexts: in the sum.
            rms: root mean square of the numbers of the sum; 0 leaves out float64's rounding, which counts from 3 on at scale 2^60.
        """
        coefficient = (2 + 2 * self.degree / 3) / 12
        return math.hypot(math.sqrt(ciphertexts * self.degree / 2 * coefficient) / 2.0**self.scale_bits, FLOAT64 * rms)

    def flooding(self, ciphertexts: int, released: int, bits: int, *, rms: float = 0.0) -> float:
        """Standard deviation of the noise that hides the error of decrypted numbers; 0 with ``bits`` = 0.

        Gaussian noise of σ on ``released`` numbers whose errors have rms e leaves a divergence of released·e²/(2σ²) between what is
        told and what would be told without any error; σ makes it 2^−bits. ``rms`` is as in :meth:`error`.
        """
        return self.error(ciphertexts, rms=rms) * math.sqrt(released / 2) * 2.0 ** (bits / 2) if bits else 0.0
