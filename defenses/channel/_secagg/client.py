"""The client of one secure aggregation: four stages, each exactly once, bytes in and bytes out.

    advertise() → keys;  share(roster) → shares;  mask(envelopes, vector) → masked vector;  unmask(survivors) → opened shares

Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS, eprint 2017/281, its
    detailed protocol without the lines that it marks as needed against an active adversary.
Deviations: listed in ``defenses.channel.secure_aggregation``.
"""

from __future__ import annotations

import enum
import hmac
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from defenses.channel._secagg import envelope, keys, messages
from defenses.channel._secagg.masking import Words, apply_masks, word_type
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import Parameters, run_tag
from defenses.channel._secagg.shamir import SHARE_BYTES, split_bytes
from simulator.errors import ProtocolAbort


class Stage(enum.IntEnum):
    """What a party does next."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    UNMASK = 3
    DONE = 4
    ABORTED = 5


@dataclass(frozen=True, repr=False)
class Memory:
    """What a client remembers between two stages; every stage makes a new one without what is spent.

    Attributes:
        envelope_private: X25519 private key of the envelopes; spent once the envelope keys are derived.
        mask_private: X25519 private key of the pairwise masks; spent once the vector is masked.
        seed: seed of the client's own mask; spent likewise.
        roster: public keys of the clients that advertised: envelope key, then mask key.
        envelope_keys: the key shared with each other client.
        shares: by owner: a share of its seed, then a share of its mask key.
    """

    envelope_private: bytes = b""
    mask_private: bytes = b""
    seed: bytes = b""
    roster: Mapping[int, bytes] = field(default_factory=dict)
    envelope_keys: Mapping[int, bytes] = field(default_factory=dict)
    shares: Mapping[int, bytes] = field(default_factory=dict)


_TABLES = {"roster": 2 * keys.KEY_BYTES, "envelope_keys": keys.KEY_BYTES, "shares": envelope.CONTENT_BYTES}
_PLACE = struct.Struct("<QB")


class SecAggClient:
    """One client's side. After an abort, and after the last stage, it holds no key material and answers nothing more.

    The state may be saved between stages (:meth:`to_bytes`) and restored in another process. It holds secrets in the clear: keep it
    on the client, and keep only the newest: a client that is restored twice from one state would answer one stage twice.
    """

    def __init__(self, parameters: Parameters, client: int) -> None:
        if client not in parameters.points:
            raise ProtocolAbort(f"client must be one of the invited {parameters.clients}, got {client}. Leave this run.")
        self.parameters = parameters
        self.client = client
        self._stage = Stage.ADVERTISE
        self._memory = Memory()

    def __repr__(self) -> str:
        return f"SecAggClient(client={self.client}, round={self.parameters.round}, stage={self._stage.name})"

    @property
    def stage(self) -> Stage:
        """What this client does next."""
        return self._stage

    def advertise(self) -> bytes:
        """Make two key pairs and return their public halves."""
        with self._once(Stage.ADVERTISE):
            envelope_private, envelope_public = keys.generate()
            mask_private, mask_public = keys.generate()
            self._memory = Memory(envelope_private=envelope_private, mask_private=mask_private)
            return messages.frame(Kind.KEYS, self.parameters.digest, envelope_public + mask_public)

    def share(self, all_public_keys: bytes) -> bytes:
        """Draw the seed of the own mask; share it and the mask key among all who advertised, this client included.

        Raises:
            ProtocolAbort: too few clients, strangers among them, a key used twice, or not this client's own keys.
        """
        with self._once(Stage.SHARE):
            memory, parameters = self._memory, self.parameters
            roster = self._read(all_public_keys, Kind.ROSTER, width=_TABLES["roster"])
            self._check_roster(roster)
            tag, seed = run_tag(parameters, roster), secrets.token_bytes(keys.KEY_BYTES)
            points = [parameters.points[owner] for owner in roster]
            halves = [split_bytes(secret, parameters.threshold, points) for secret in (seed, memory.mask_private)]
            contents = {owner: seed_share + key_share for owner, seed_share, key_share in zip(roster, *halves, strict=True)}
            agreement = keys.Agreement(memory.envelope_private, "env", tag)
            envelope_keys = {peer: agreement.key(public[: keys.KEY_BYTES]) for peer, public in roster.items() if peer != self.client}
            sealed = {
                peer: envelope.seal(key, contents[peer], parameters=parameters, tag=tag, sender=self.client, receiver=peer)
                for peer, key in envelope_keys.items()
            }
            own = {self.client: contents[self.client]}
            self._memory = Memory(mask_private=memory.mask_private, seed=seed, roster=roster, envelope_keys=envelope_keys, shares=own)
            return messages.frame(Kind.SHARES, parameters.digest, messages.pack_table(sealed))

    def mask(self, envelopes: bytes, vector: Words) -> bytes:
        """Open the envelopes of the clients that shared; return y = x + PRG(b) + Σ_{v above} PRG(s_v) − Σ_{v below} PRG(s_v).

        Raises:
            ProtocolAbort: too few clients, strangers among them, an envelope that does not open, or a vector of another kind.
        """
        with self._once(Stage.MASK):
            memory, parameters = self._memory, self.parameters
            self._check_vector(vector)
            sealed = self._read(envelopes, Kind.ENVELOPES, width=envelope.ENVELOPE_BYTES)
            self._check_members([*sealed, self.client], memory.roster, "clients that shared keys")
            tag = run_tag(parameters, memory.roster)
            opened = {
                peer: envelope.open_(memory.envelope_keys[peer], sent, parameters=parameters, tag=tag, sender=peer, receiver=self.client)
                for peer, sent in sealed.items()
            }
            public = {peer: both[keys.KEY_BYTES :] for peer, both in memory.roster.items()}
            agreement = keys.Agreement(memory.mask_private, "pair", tag)
            own = keys.self_mask_key(memory.seed, tag, public[self.client])
            masked = vector.astype(word_type(parameters.bits), copy=True)
            apply_masks(masked, [(own, 1), *((agreement.key(public[peer]), 1 if self.client < peer else -1) for peer in sealed)])
            self._memory = Memory(shares={**memory.shares, **opened})
            return messages.frame(Kind.MASKED, parameters.digest, masked.data.cast("B"))

    def unmask(self, survivors: bytes) -> bytes:
        """Reveal one share of each client: of its seed if it survived, of its mask key if it dropped out; never both.

        The survivors are the only list that arrives; who dropped out follows from it, so no client can be named as both.

        Raises:
            ProtocolAbort: too few survivors, strangers among them, or this client not among them.
        """
        with self._once(Stage.UNMASK):
            shares, alive = self._memory.shares, self._read(survivors, Kind.SURVIVORS, width=0)
            self._check_members(alive, shares, "survivors")
            opened = {owner: both[:SHARE_BYTES] if owner in alive else both[SHARE_BYTES:] for owner, both in shares.items()}
            self._memory = Memory()
            return messages.frame(Kind.OPENED, self.parameters.digest, messages.pack_table(opened))

    def to_bytes(self) -> bytes:
        """This client's whole state, secrets included, for the client's own keeping between two stages."""
        parts = [getattr(self._memory, entry.name) for entry in fields(Memory)]
        packed = [part if isinstance(part, bytes) else messages.pack_table(part) for part in parts]
        return messages.pack_fields(self.parameters.to_bytes(), _PLACE.pack(self.client, self._stage), *packed)

    @staticmethod
    def from_bytes(data: bytes) -> SecAggClient:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ProtocolAbort: not a saved state.
        """
        names = [entry.name for entry in fields(Memory)]
        origin = "the saved state"
        parameters, place, *packed = messages.unpack_fields(data, 2 + len(names), origin=origin)
        if len(place) != _PLACE.size or place[-1] > Stage.ABORTED:
            raise ProtocolAbort(f"saved state must name a client and a stage, got {len(place)} bytes. Start a new run.")
        client, stage = _PLACE.unpack(place)
        remembered: dict[str, Any] = {
            name: messages.unpack_table(part, width=_TABLES[name], origin=origin) if name in _TABLES else part
            for name, part in zip(names, packed, strict=True)
        }
        restored = SecAggClient(Parameters.from_bytes(parameters), client)
        restored._stage, restored._memory = Stage(stage), Memory(**remembered)
        return restored

    @contextmanager
    def _once(self, stage: Stage) -> Iterator[None]:
        check_stage(self._stage, stage, f"client {self.client}")
        self._stage = Stage.ABORTED  # holds unless the stage comes to its end
        try:
            yield
        except BaseException:
            self._memory = Memory()
            raise
        self._stage = Stage(stage + 1)

    def _read(self, message: bytes, kind: Kind, *, width: int) -> dict[int, bytes]:
        body = messages.unframe(message, kind, self.parameters.digest, origin="the server")
        return messages.unpack_table(body, width=width, origin="the server")

    def _check_roster(self, roster: Mapping[int, bytes]) -> None:
        self._check_members(roster, self.parameters.points, "clients that advertised")
        own = keys.public_of(self._memory.envelope_private) + keys.public_of(self._memory.mask_private)
        if not hmac.compare_digest(roster[self.client], own):
            raise ProtocolAbort(f"client {self.client}: own keys must come back as sent, got others. Leave this run.")
        halves = {half for both in roster.values() for half in (both[: keys.KEY_BYTES], both[keys.KEY_BYTES :])}
        if len(halves) != 2 * len(roster):
            raise ProtocolAbort(f"public keys must be {2 * len(roster)} distinct ones, got {len(halves)}. Leave this run.")

    def _check_members(self, members: Mapping[int, bytes] | list[int], allowed: Mapping[int, object], what: str) -> None:
        """Own presence, no repetition, no strangers, and at least the threshold, which is above half of the invited."""
        distinct = set(members)
        if len(distinct) != len(members) or self.client not in distinct or not distinct <= allowed.keys():
            raise ProtocolAbort(
                f"{what} must be distinct, include client {self.client} and be among {sorted(allowed)}, got {sorted(members)}. "
                "Leave this run."
            )
        if len(distinct) < self.parameters.threshold:
            raise ProtocolAbort(f"{what} must be ≥ threshold = {self.parameters.threshold}, got {len(distinct)}. Leave this run.")

    def _check_vector(self, vector: Words) -> None:
        wanted = word_type(self.parameters.bits)
        if vector.dtype != wanted or vector.shape != (self.parameters.length,):
            raise ProtocolAbort(
                f"vector must be {wanted} of shape ({self.parameters.length},), got {vector.dtype} of shape {vector.shape}. "
                "Use SecureAggregation.encode."
            )


def check_stage(current: Stage, wanted: Stage, who: str) -> None:
    """Let a party go through its stages in order, each once.

    Raises:
        ProtocolAbort: another stage is due.
    """
    if current is not wanted:
        raise ProtocolAbort(f"{who}: next stage must be {current.name}, got {wanted.name}. Call each stage once, in order.")
