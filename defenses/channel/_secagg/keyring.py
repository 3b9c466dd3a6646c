"""One set-up for many rounds: key pairs that outlive a round, and what must not be done with them.

    long-term secret S of each pair, agreed on once → HKDF(S, salt = this round's tag) → the pair's mask of this round

Source: the idea of Ma et al. (2023), "Flamingo", IEEE S&P, arXiv:2308.09883: agree on keys once, derive each round's by a PRF.
Deviations: no decryptors and no threshold ElGamal. Their part, opening a round's pairwise masks without the long-term key, is played by
    **locked pair keys**: each client draws a recovery key for the round, locks its pair keys of this round with it (AES-256-GCM), leaves
    the lock with the server and shares the recovery key, where Bonawitz et al. share the private key. If the client drops out, t holders
    open the recovery key: the server gets this round's masks, derived one way from S, and nothing of S. So nobody needs to make new
    keys after a drop-out, and a secret that was reconstructed never concerns another round.
What it costs, against a set-up in each round: 40 bytes up per neighbor and 20 more; **forward secrecy** (whoever seizes a client later,
    and has recorded what the server saw, opens its earlier vectors: the server has its seeds, the long-term keys give the masks); and
    that the server cannot tell a wrong lock from a right one.
What it saves: the round trip of the first stage, and both X25519 agreements with every neighbor: of a client's 12 ms of CPU time for
    keys and shares among 100 clients 4 are left (complete graph), of 7 ms among 1000 clients 2 (58-regular).
No stream is ever used twice: the salt has the round, the name that the server drew for it and the round's clients and graph; a client
answers each round number once, in ascending order (:meth:`KeyRing.enter`), whatever a server repeats; and its own mask comes from a
fresh seed. A client that lost its ring makes a new one and is asked to advertise again. Never restore a client from an older copy of
its ring: it would have forgotten which rounds it entered.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from defenses.channel._secagg import keys, messages
from defenses.channel._secagg.messages import Kind
from simulator.errors import ProtocolAbort

STANDING = bytes(8)
"""Takes the place of a run's digest in an advertisement that is for no run in particular."""
_PAIR = 2 * keys.KEY_BYTES
_ROUND = struct.Struct("<q")


@dataclass(repr=False)
class KeyRing:
    """A client's keys from round to round.

    Attributes:
        envelope_private: X25519 private key of the envelopes.
        mask_private: X25519 private key of the pairwise masks; it is never shared.
        last_round: the latest round that this client entered.
        envelope_secrets: agreed on so far, by the peer's public key; a cache.
        mask_secrets: likewise.
    """

    envelope_private: bytes
    mask_private: bytes
    last_round: int = -1
    envelope_secrets: dict[bytes, bytes] = field(default_factory=dict)
    mask_secrets: dict[bytes, bytes] = field(default_factory=dict)

    @staticmethod
    def fresh() -> KeyRing:
        """A ring with new keys."""
        return KeyRing(keys.generate()[0], keys.generate()[0])

    def advertise(self) -> bytes:
        """The public halves, as a message to the server."""
        return messages.frame(Kind.KEYS, STANDING, keys.public_of(self.envelope_private) + keys.public_of(self.mask_private))

    def enter(self, round: int) -> None:
        """Note that this round is under way; it is never entered again.

        Raises:
            ProtocolAbort: this round, or a later one, was entered before: its masks would be used twice.
        """
        if round <= self.last_round:
            raise ProtocolAbort(f"round must be after {self.last_round} under keys that outlive a round, got {round}. Leave this run.")
        self.last_round = round

    def forget(self, most: int) -> None:
        """Empty a cache of more than ``most`` peers, whom a server could go on making up; agreeing again costs time only."""
        for table in (self.envelope_secrets, self.mask_secrets):
            if len(table) > most:
                table.clear()

    def to_bytes(self) -> bytes:
        """The whole ring, secrets included, for the client's own keeping between rounds."""
        secrets = [b"".join(key + value for key, value in table.items()) for table in (self.envelope_secrets, self.mask_secrets)]
        return messages.pack_fields(self.envelope_private, self.mask_private, _ROUND.pack(self.last_round), *secrets)

    @staticmethod
    def from_bytes(data: bytes) -> KeyRing:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ProtocolAbort: not a saved ring.
        """
        envelope_private, mask_private, last, *tables = messages.unpack_fields(data, 5, origin="the saved keys")
        if (
            {len(envelope_private), len(mask_private)} != {keys.KEY_BYTES}
            or len(last) != _ROUND.size
            or any(len(t) % _PAIR for t in tables)
        ):
            raise ProtocolAbort(f"saved keys must be two of {keys.KEY_BYTES} bytes, a round and pairs, got others. Make new ones.")
        cached = [{t[i : i + 32]: t[i + 32 : i + _PAIR] for i in range(0, len(t), _PAIR)} for t in tables]
        return KeyRing(envelope_private, mask_private, _ROUND.unpack(last)[0], *cached)


def unpack_advert(message: bytes, client: int) -> bytes:
    """The public keys in a standing advertisement.

    Raises:
        ProtocolAbort: not one.
    """
    body = messages.unframe(message, Kind.KEYS, STANDING, origin=f"client {client}")
    if len(body) != _PAIR:
        raise ProtocolAbort(f"KEYS from client {client} must be {_PAIR} bytes, got {len(body)}. Abort the round.")
    return bytes(body)
