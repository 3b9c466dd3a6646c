"""What all parties of one aggregation agree on before it starts; none of it is secret."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from defenses.channel._secagg import graph
from defenses.channel._secagg.identity import SIGNATURE_BYTES
from defenses.channel._secagg.keys import KEY_BYTES
from defenses.channel._secagg.masking import WIDTHS
from defenses.channel._secagg.messages import MAGIC, VERSION, pack_clients, pack_fields, pack_table, unpack_clients, unpack_fields
from simulator.errors import ProtocolAbort

_NUMBERS = struct.Struct("<QIQIII??")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """One aggregation of one round.

    Attributes:
        run_id: names this aggregation; the server draws it, and no key depends on its being unique but those of a standing set-up.
        round: the round within the run.
        clients: the invited clients, ascending. A client's Shamir point is its place in this list, counted from 1.
        threshold: shares that reconstruct a secret; more than half of a client's neighbors and itself.
        length: words in the vector.
        bits: the modulus is 2^bits; a word is ``bits`` wide on the wire.
        degree: neighbors of each client; 0 means that everybody is everybody's, the complete graph.
        seed: draws the graph of this round; empty for the complete one.
        quorum: clients that must be in the sum, so also answers that every stage up to the vectors needs; 0 means ``threshold``.
        active: sign keys and survivors: see ``identity``.
        standing: keys were agreed on before this round and outlive it: see ``keyring``.
    """

    run_id: str
    round: int
    clients: tuple[int, ...]
    threshold: int
    length: int
    bits: int = 32
    degree: int = 0
    seed: bytes = b""
    quorum: int = 0
    active: bool = False
    standing: bool = False

    def __post_init__(self) -> None:
        n = len(self.clients)
        if n < 2 or list(self.clients) != sorted(set(self.clients)) or not 0 <= self.clients[0] <= self.clients[-1] < 1 << 64:
            raise ProtocolAbort(f"clients must be ≥ 2 distinct ids in [0, 2^64), ascending, got {self.clients}. Sort them.")
        if self.degree:
            self._check_graph(n)
        elif not n < 2 * self.threshold <= 2 * n:
            raise ProtocolAbort(f"threshold must be above half of {n} clients and at most {n}, got {self.threshold}. Use {2 * n // 3 + 1}.")
        if self.quorum and not max(n // 2 + 1, self.threshold) <= self.quorum <= n:
            raise ProtocolAbort(f"quorum must be above half of {n} clients, ≥ threshold and at most {n}, got {self.quorum}. Use 0.")
        if not 1 <= self.length < 1 << 64:
            raise ProtocolAbort(f"length must be ≥ 1 word, got {self.length}. Count the update's coordinates.")
        if self.bits not in WIDTHS:
            raise ProtocolAbort(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {self.bits}. Use 64 where 32 round too coarsely.")
        if not 0 <= self.round < 1 << 64:
            raise ProtocolAbort(f"round must be ≥ 0, got {self.round}. Count rounds from 0 or 1.")
        if self.active and (self.degree or self.standing or 3 * self.threshold <= 2 * n):
            raise ProtocolAbort(
                f"against an active server the graph must be complete, the set-up of this round and the threshold above 2/3 of {n}, got "
                f"degree {self.degree}, standing {self.standing}, threshold {self.threshold}. Use 0, False and {2 * n // 3 + 1}."
            )

    def _check_graph(self, n: int) -> None:
        if self.degree % 2 or not 2 <= self.degree < n - 1 or not self.degree < 2 * self.threshold <= 2 * self.degree:
            raise ProtocolAbort(
                f"degree must be even and below {n - 1}, threshold above half of it and at most it, got {self.degree} and "
                f"{self.threshold}. Use graph.solve."
            )
        if len(self.seed) != graph.SEED_BYTES or not self.quorum:
            raise ProtocolAbort(
                f"a k-regular graph must have a seed of {graph.SEED_BYTES} bytes and a quorum, got {len(self.seed)} bytes and "
                f"{self.quorum}. Draw the seed anew in every round."
            )

    @cached_property
    def points(self) -> dict[int, int]:
        """The Shamir point of each client: never 0, where the secret is."""
        return {client: place for place, client in enumerate(self.clients, start=1)}

    @cached_property
    def _neighbors(self) -> dict[int, tuple[int, ...]]:
        return graph.ring_neighbors(graph.order(self.clients, self.seed), self.degree)

    def neighbors(self, client: int) -> tuple[int, ...]:
        """Those with whom ``client`` shares masks and to whom it gives shares, ascending."""
        return self._neighbors[client] if self.degree else tuple(peer for peer in self.clients if peer != client)

    def holders(self, client: int) -> tuple[int, ...]:
        """Those who hold shares of its secrets, ascending: its neighbors and itself."""
        return tuple(sorted((*self._neighbors[client], client))) if self.degree else self.clients

    @property
    def least(self) -> int:
        """Clients that must be in the sum."""
        return self.quorum or self.threshold

    @property
    def row_bytes(self) -> int:
        """Bytes that a client advertises: its two public keys, and its signature against an active server."""
        return 2 * KEY_BYTES + (SIGNATURE_BYTES if self.active else 0)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the parameters: names this aggregation in every message."""
        return hashlib.sha256(pack_fields(MAGIC, bytes([VERSION]), self.to_bytes())).digest()

    def to_bytes(self) -> bytes:
        """For the server to send to the clients, and for a client's saved state."""
        numbers = _NUMBERS.pack(
            self.round, self.threshold, self.length, self.bits, self.degree, self.quorum, self.active, self.standing
        )  # fmt: skip
        return pack_fields(self.run_id.encode(), numbers, pack_clients(self.clients), self.seed)

    @staticmethod
    def from_bytes(data: bytes) -> Parameters:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ProtocolAbort: malformed, or values that the protocol forbids.
        """
        run_id, numbers, clients, seed = unpack_fields(data, 4, origin="the parameters")
        if len(numbers) != _NUMBERS.size:
            raise ProtocolAbort(f"numbers in the parameters must be {_NUMBERS.size} bytes, got {len(numbers)}. Discard them.")
        round_, threshold, length, bits, degree, quorum, active, standing = _NUMBERS.unpack(numbers)
        return Parameters(
            run_id=run_id.decode(errors="replace"), round=round_, clients=unpack_clients(clients, origin="the parameters"),
            threshold=threshold, length=length, bits=bits, degree=degree, seed=seed, quorum=quorum, active=active, standing=standing,
        )  # fmt: skip


def run_tag(parameters: Parameters, roster: Mapping[int, bytes]) -> bytes:
    """SHA-256 of the parameters and of every client's public keys: the salt of every key and the context of every envelope.

    Two clients that were shown different keys or parameters derive different keys, so their envelopes do not open. On a k-regular
    graph nobody is shown all keys, so that the tag binds the parameters (with the seed of the graph) alone, and the keys of both
    ends enter each key that they share.
    """
    bound = {} if parameters.degree else roster
    return hashlib.sha256(pack_fields(MAGIC, bytes([VERSION]), parameters.to_bytes(), pack_table(bound))).digest()
