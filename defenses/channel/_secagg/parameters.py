"""What all parties of one aggregation agree on before it starts; none of it is secret."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from defenses.channel._secagg.messages import MAGIC, VERSION, pack_clients, pack_fields, pack_table, unpack_clients, unpack_fields
from simulator.errors import ProtocolAbort

_NUMBERS = struct.Struct("<QIQI")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """One aggregation of one round.

    Attributes:
        run_id: names the federation's run; unique per run by convention, but no key depends on its being so.
        round: the round within the run.
        clients: the invited clients, ascending. A client's Shamir point is its place in this list, counted from 1.
        threshold: answers that every stage needs, and shares that reconstruct a secret; more than half of the invited.
        length: words in the vector.
        bits: the modulus is 2^bits; a word is ``bits`` wide.
    """

    run_id: str
    round: int
    clients: tuple[int, ...]
    threshold: int
    length: int
    bits: int = 32

    def __post_init__(self) -> None:
        n = len(self.clients)
        if n < 2 or list(self.clients) != sorted(set(self.clients)) or not 0 <= self.clients[0] <= self.clients[-1] < 1 << 64:
            raise ProtocolAbort(f"clients must be ≥ 2 distinct ids in [0, 2^64), ascending, got {self.clients}. Sort them.")
        if not n < 2 * self.threshold <= 2 * n:
            raise ProtocolAbort(f"threshold must be above half of {n} clients and at most {n}, got {self.threshold}. Use {2 * n // 3 + 1}.")
        if not 1 <= self.length < 1 << 64:
            raise ProtocolAbort(f"length must be ≥ 1 word, got {self.length}. Count the update's coordinates.")
        if self.bits not in (32, 64):
            raise ProtocolAbort(f"bits must be 32 or 64, got {self.bits}. Use 64 where 32 round too coarsely.")
        if not 0 <= self.round < 1 << 64:
            raise ProtocolAbort(f"round must be ≥ 0, got {self.round}. Count rounds from 0 or 1.")

    @cached_property
    def points(self) -> dict[int, int]:
        """The Shamir point of each client: never 0, where the secret is."""
        return {client: place for place, client in enumerate(self.clients, start=1)}

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the parameters: names this aggregation in every message."""
        return hashlib.sha256(pack_fields(MAGIC, bytes([VERSION]), self.to_bytes())).digest()

    def to_bytes(self) -> bytes:
        """For the server to send to the clients, and for a client's saved state."""
        numbers = _NUMBERS.pack(self.round, self.threshold, self.length, self.bits)
        return pack_fields(self.run_id.encode(), numbers, pack_clients(self.clients))

    @staticmethod
    def from_bytes(data: bytes) -> Parameters:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ProtocolAbort: malformed, or values that the protocol forbids.
        """
        run_id, numbers, clients = unpack_fields(data, 3, origin="the parameters")
        if len(numbers) != _NUMBERS.size:
            raise ProtocolAbort(f"numbers in the parameters must be {_NUMBERS.size} bytes, got {len(numbers)}. Discard them.")
        round_, threshold, length, bits = _NUMBERS.unpack(numbers)
        return Parameters(
            run_id=run_id.decode(errors="replace"),
            round=round_,
            clients=unpack_clients(clients, origin="the parameters"),
            threshold=threshold,
            length=length,
            bits=bits,
        )


def run_tag(parameters: Parameters, roster: Mapping[int, bytes]) -> bytes:
    """SHA-256 of the parameters and of every client's public keys: the salt of every key and the context of every envelope.

    Two clients that were shown different keys or parameters derive different keys, so their envelopes do not open.
    """
    return hashlib.sha256(pack_fields(MAGIC, bytes([VERSION]), parameters.to_bytes(), pack_table(roster))).digest()
