"""What runs inside the SIMULATED enclave: open, clip, add up, and release one noised mean a round.

A contribution is n_i (4 bytes), 32 bytes of seed and the vector in float32. The noise is drawn from the seeds of all contributors
together, so that the host can neither guess nor choose it, and the same world gives the same bits; a real enclave asks its chip.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from defenses.channel._enclave import sealing
from defenses.channel._enclave.policy import Policy
from simulator.errors import ProtocolAbort

SEED_BYTES = 32
_HEAD = struct.Struct(f"<I{SEED_BYTES}s")
HEAD_BYTES = _HEAD.size
"""What a contribution holds before its vector."""


def contribution(num_examples: int, seed: bytes, vector: npt.NDArray[np.float32]) -> bytes:
    """What a client seals."""
    return _HEAD.pack(num_examples, seed) + vector.astype("<f4").tobytes()


@dataclass(frozen=True)
class Contribution:
    """What a client sent, inside."""

    num_examples: int
    seed: bytes
    vector: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Release:
    """All that leaves: whose mean it is, over how many examples, and the mean."""

    contributors: tuple[int, ...]
    num_examples: int
    mean: npt.NDArray[np.float64]


class Enclave:
    """The state of one enclave; it dies with its process, and with it the private key. Clients seal to one of them only."""

    def __init__(self, policy: Policy, run: bytes) -> None:
        self._policy, self._run = policy, run
        self._private = X25519PrivateKey.generate()
        self._round = 0
        self._held: dict[int, Contribution] = {}
        self._released = self._count = 0

    @property
    def public_key(self) -> bytes:
        """To which clients seal, raw."""
        return self._private.public_key().public_bytes_raw()

    def receive(self, round: int, client: int, blob: bytes) -> None:
        """Take a client's sealed contribution to a round.

        Raises:
            ProtocolAbort: the round is over, the client has contributed, or the blob is not what its place says it is.
        """
        if round <= self._released:
            raise ProtocolAbort(f"round must be > {self._released}, the last one released, got {round}. Rounds are released once.")
        if round < self._round:
            raise ProtocolAbort(f"round must be ≥ {self._round}, the one that is open, got {round}. Rounds only go forward.")
        held = self._held if round == self._round else {}
        if client in held:
            raise ProtocolAbort(f"client {client} must contribute once a round, got a second blob. Leave it out.")
        content = sealing.open_(blob, private=self._private, run=self._run, round=round, client=client)
        found = self._parsed(content, client)
        self._round, self._held = round, {**held, client: found}

    def _parsed(self, content: bytes, client: int) -> Contribution:
        policy = self._policy
        if len(content) != _HEAD.size + 4 * policy.length:
            raise ProtocolAbort(f"contribution of client {client} must hold {policy.length} numbers, got {len(content)} bytes.")
        num_examples, seed = _HEAD.unpack_from(content)
        vector = np.frombuffer(content, "<f4", offset=_HEAD.size).astype(np.float64)
        if not 1 <= num_examples <= policy.max_examples:
            raise ProtocolAbort(f"num_examples of client {client} must be in [1, {policy.max_examples}], got one outside.")
        if not np.isfinite(vector).all():
            raise ProtocolAbort(f"contribution of client {client} must be finite, got NaN or infinity.")
        norm = float(np.linalg.norm(vector[: policy.update_length]))
        if policy.noise_multiplier and norm > policy.clip_norm:
            vector[: policy.update_length] *= policy.clip_norm / norm
        return Contribution(num_examples, seed, vector)

    def release(self, round: int) -> Release:
        """The mean of a round, once, over enough clients.

        Raises:
            ProtocolAbort: it has been released, is not open, or too few contributed; nothing leaves, and the round stays open.
        """
        policy = self._policy
        if round <= self._released:
            raise ProtocolAbort(f"round must be > {self._released}, the last one released, got {round}. Rounds are released once.")
        if round != self._round or len(self._held) < policy.min_contributors:
            count = len(self._held) if round == self._round else 0
            raise ProtocolAbort(f"contributors must be ≥ {policy.min_contributors} by policy, got {count}. Nothing is released.")
        if self._count >= policy.releases:
            raise ProtocolAbort(f"releases must be ≤ {policy.releases} by policy, got one more asked for. Nothing is released.")
        clients = sorted(self._held)
        total, weights, examples = np.zeros(policy.length), 0.0, 0
        for client in clients:
            weight = self._held[client].num_examples / policy.max_examples
            total += weight * self._held[client].vector
            weights, examples = weights + weight, examples + self._held[client].num_examples
        if policy.noise_multiplier:
            total[: policy.update_length] += policy.noise_multiplier * policy.clip_norm * self._noise(clients)
        self._released, self._held, self._count = round, {}, self._count + 1
        return Release(tuple(clients), examples, total / weights)

    def _noise(self, clients: list[int]) -> npt.NDArray[np.float64]:
        """Standard normal numbers from the seeds of all contributors."""
        seeds = b"".join(struct.pack("<Q", client) + self._held[client].seed for client in clients)
        digest = hashlib.sha256(b"fedpeek SIMULATED enclave noise" + struct.pack("<Q", self._round) + seeds).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return rng.standard_normal(self._policy.update_length)

    def dump(self) -> list[bytes]:
        """The vectors in memory: what a host reads of an enclave in debug mode."""
        return [self._held[client].vector.tobytes() for client in sorted(self._held)]
