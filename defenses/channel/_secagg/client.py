"""The client of one secure aggregation: stages, each exactly once, bytes in and bytes out.

    advertise() → keys;  share(roster) → shares;  mask(envelopes, vector) → masked vector;  unmask(survivors) → opened shares

With keys that outlive a round the first one falls away (``keyring``); against an active server one comes in before the last:
sign(survivors) → signature;  unmask(signatures) → opened shares (``identity``).

Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS, eprint 2017/281, its
    detailed protocol, with the lines that it marks as needed against an active adversary if the parameters say so; on the graph of
    Bell et al. (2020), eprint 2020/704, a client deals with its neighbors only.
Deviations: listed in ``defenses.channel.secure_aggregation``.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from defenses.channel._secagg import envelope, keys, messages
from defenses.channel._secagg.checks import check_members, check_vector
from defenses.channel._secagg.identity import SIGNATURE_BYTES, Identity, check_keys, check_survivors
from defenses.channel._secagg.keyring import KeyRing
from defenses.channel._secagg.masking import Words, apply_masks, pack, reduced, word_type
from defenses.channel._secagg.memory import FIELDS, Memory, Stage, check_stage
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import Parameters, run_tag
from defenses.channel._secagg.shamir import SHARE_BYTES, split_bytes
from simulator.errors import ProtocolAbort

_PLACE = struct.Struct("<QB")
_PUBLIC = 2 * keys.KEY_BYTES


class SecAggClient:
    """One client's side. After an abort, and after the last stage, it holds no key material and answers nothing more.

    The state may be saved between stages (:meth:`to_bytes`) and restored in another process. It holds secrets in the clear: keep it
    on the client, and keep only the newest: a client that is restored twice from one state would answer one stage twice.

    Args:
        parameters: of this aggregation.
        client: who this is.
        identity: signing key and directory, against an active server.
        ring: keys that outlive the round; it is entered here, so save it before anything else happens.
    """

    def __init__(self, parameters: Parameters, client: int, *, identity: Identity | None = None, ring: KeyRing | None = None) -> None:
        if client not in parameters.points:
            raise ProtocolAbort(f"client must be one of the invited {parameters.clients}, got {client}. Leave this run.")
        if parameters.active is not (identity is not None):
            raise ProtocolAbort(f"client {client}: identity must be given against an active server only. Set active of secure_aggregation.")
        self.parameters, self.client, self.identity = parameters, client, identity
        self._stage, self._memory, self._ring = Stage.ADVERTISE, Memory(), ring
        if parameters.standing:
            if ring is None:
                raise ProtocolAbort(f"client {client} must have advertised before the round, got no keys. Advertise again.")
            ring.enter(parameters.round)
            self._memory, self._stage = Memory(ring.envelope_private, ring.mask_private), Stage.SHARE

    def __repr__(self) -> str:
        return f"SecAggClient(client={self.client}, round={self.parameters.round}, stage={self._stage.name})"

    @property
    def stage(self) -> Stage:
        """What this client does next."""
        return self._stage

    def advertise(self) -> bytes:
        """Make two key pairs and return their public halves, signed if the parameters say so."""
        with self._once(Stage.ADVERTISE):
            envelope_private, envelope_public = keys.generate()
            mask_private, mask_public = keys.generate()
            self._memory, public = Memory(envelope_private, mask_private), envelope_public + mask_public
            signature = self.identity.sign_keys(self.parameters.digest, self.client, public) if self.identity else b""
            return messages.frame(Kind.KEYS, self.parameters.digest, public + signature)

    def share(self, public_keys: bytes) -> bytes:
        """Draw the seed of the own mask; share it, and what the pairwise masks come from, among the neighbors and itself.

        Raises:
            ProtocolAbort: too few clients, strangers among them, a key used twice, not this client's own keys, or a bad signature.
        """
        with self._once(Stage.SHARE):
            memory, parameters = self._memory, self.parameters
            roster = self._checked_roster(self._read(public_keys, Kind.ROSTER, width=parameters.row_bytes))
            tag, seed = run_tag(parameters, roster), secrets.token_bytes(keys.KEY_BYTES)
            ring = self._ring or KeyRing(memory.envelope_private, memory.mask_private)
            envelopes = keys.Agreement(memory.envelope_private, "env", tag, ring.envelope_secrets)
            pairs = keys.Agreement(memory.mask_private, "pair", tag, ring.mask_secrets)
            peers = {peer: public for peer, public in roster.items() if peer != self.client}
            envelope_keys = {peer: envelopes.key(public[: keys.KEY_BYTES]) for peer, public in peers.items()}
            pair_keys = {peer: pairs.key(public[keys.KEY_BYTES :]) for peer, public in peers.items()}
            recovery, locked = memory.mask_private, b""
            if parameters.standing:  # a key that outlives the round is never shared: see keyring
                recovery = secrets.token_bytes(keys.KEY_BYTES)
                locked = envelope.lock(recovery, messages.pack_table(pair_keys), tag=tag, owner=self.client)
            points = [parameters.points[owner] for owner in roster]
            halves = [split_bytes(secret, parameters.threshold, points) for secret in (seed, recovery)]
            contents = {owner: seed_share + key_share for owner, seed_share, key_share in zip(roster, *halves, strict=True)}
            sealed = {
                peer: envelope.seal(key, contents[peer], parameters=parameters, tag=tag, sender=self.client, receiver=peer)
                for peer, key in envelope_keys.items()
            }
            own_key = keys.self_mask_key(seed, tag, roster[self.client][keys.KEY_BYTES :])
            own = {self.client: contents[self.client]}
            self._memory = Memory(tag=tag, own_key=own_key, pair_keys=pair_keys, envelope_keys=envelope_keys, shares=own)
            return messages.frame(Kind.SHARES, parameters.digest, messages.pack_fields(messages.pack_table(sealed), locked))

    def mask(self, envelopes: bytes, vector: Words) -> bytes:
        """Open the envelopes of the neighbors that shared; return y = x + PRG(b) + Σ_{v above} PRG(s_v) − Σ_{v below} PRG(s_v).

        Raises:
            ProtocolAbort: too few clients, strangers among them, an envelope that does not open, or a vector of another kind.
        """
        with self._once(Stage.MASK):
            memory, parameters = self._memory, self.parameters
            check_vector(vector, parameters)
            sealed = self._read(envelopes, Kind.ENVELOPES, width=envelope.ENVELOPE_BYTES)
            self._members([*sealed, self.client], [*memory.envelope_keys, self.client], "clients that shared keys")
            opened = {
                peer: envelope.open_(
                    memory.envelope_keys[peer], sent, parameters=parameters, tag=memory.tag, sender=peer, receiver=self.client
                )
                for peer, sent in sealed.items()
            }
            masked = vector.astype(word_type(parameters.bits), copy=True)
            apply_masks(masked, [(memory.own_key, 1), *((memory.pair_keys[peer], 1 if self.client < peer else -1) for peer in sealed)])
            self._memory = Memory(tag=memory.tag if parameters.active else b"", shares={**memory.shares, **opened})
            return messages.frame(Kind.MASKED, parameters.digest, pack(reduced(masked, parameters.bits), parameters.bits))

    def sign(self, survivors: bytes) -> bytes:
        """Sign the set of survivors, the first and only one that this client is told; against an active server.

        Raises:
            ProtocolAbort: too few survivors, strangers among them, or this client not among them.
        """
        with self._once(Stage.SIGN):
            assert self.identity is not None
            alive = self._survivors(survivors)
            self._memory = Memory(tag=self._memory.tag, shares=self._memory.shares, survivors=alive)
            signature = self.identity.sign_survivors(self._memory.tag, alive)
            return messages.frame(Kind.SIGNED, self.parameters.digest, signature)

    def unmask(self, message: bytes) -> bytes:
        """Reveal one share of each neighbor: of its seed if it survived, of its pairwise masks if it dropped out; never both.

        The survivors are the only list that arrives, here or before :meth:`sign`; who dropped out follows from it, so no client can
        be named as both. Against an active server, what arrives here is the survivors' signatures of that list.

        Raises:
            ProtocolAbort: too few survivors, strangers among them, this client not among them, or too few who signed the same ones.
        """
        with self._once(Stage.UNMASK):
            shares = self._memory.shares
            alive = self._signed(message) if self.identity else self._survivors(message)
            opened = {owner: both[:SHARE_BYTES] if owner in alive else both[SHARE_BYTES:] for owner, both in shares.items()}
            self._memory = Memory()
            return messages.frame(Kind.OPENED, self.parameters.digest, messages.pack_table(opened))

    def to_bytes(self) -> bytes:
        """This client's whole state, secrets included, for the client's own keeping between two stages; not its identity or ring."""
        return messages.pack_fields(self.parameters.to_bytes(), _PLACE.pack(self.client, self._stage), *self._memory.to_fields())

    @staticmethod
    def from_bytes(data: bytes, *, identity: Identity | None = None) -> SecAggClient:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ProtocolAbort: not a saved state.
        """
        parameters, place, *packed = messages.unpack_fields(data, 2 + FIELDS, origin="the saved state")
        if len(place) != _PLACE.size or place[-1] > Stage.ABORTED:
            raise ProtocolAbort(f"saved state must name a client and a stage, got {len(place)} bytes. Start a new run.")
        client, stage = _PLACE.unpack(place)
        agreed = Parameters.from_bytes(parameters)
        restored = SecAggClient(agreed, client, identity=identity, ring=KeyRing(b"", b"") if agreed.standing else None)
        restored._stage, restored._memory, restored._ring = Stage(stage), Memory.from_fields(packed), None
        return restored

    @contextmanager
    def _once(self, stage: Stage) -> Iterator[None]:
        check_stage(self._stage, stage, f"client {self.client}")
        self._stage = Stage.ABORTED  # holds unless the stage comes to its end
        try:
            yield
        except BaseException:  # whatever it was, also Ctrl-C: no key material stays; it goes on up
            self._memory = Memory()
            raise
        self._stage = stage.following(self.parameters.active)

    def _read(self, message: bytes, kind: Kind, *, width: int) -> dict[int, bytes]:
        body = messages.unframe(message, kind, self.parameters.digest, origin="the server")
        return messages.unpack_table(body, width=width, origin="the server")

    def _checked_roster(self, rows: Mapping[int, bytes]) -> dict[int, bytes]:
        """The public keys of the neighbors and this client, once all checks hold."""
        self._members(rows, self.parameters.holders(self.client), "clients that advertised")
        roster = {client: row[:_PUBLIC] for client, row in rows.items()}
        own = keys.public_of(self._memory.envelope_private) + keys.public_of(self._memory.mask_private)
        if not hmac.compare_digest(roster[self.client], own):
            raise ProtocolAbort(f"client {self.client}: own keys must come back as sent, got others. Leave this run.")
        halves = {half for both in roster.values() for half in (both[: keys.KEY_BYTES], both[keys.KEY_BYTES :])}
        if len(halves) != 2 * len(roster):
            raise ProtocolAbort(f"public keys must be {2 * len(roster)} distinct ones, got {len(halves)}. Leave this run.")
        if self.identity:
            for client, row in rows.items():
                check_keys(self.identity.directory, self.parameters.digest, client, roster[client], row[_PUBLIC:])
        return roster

    def _survivors(self, message: bytes) -> dict[int, bytes]:
        """All survivors of the cohort, once the counts hold: of all clients, and of those with whom this one shares masks."""
        alive, shares = self._read(message, Kind.SURVIVORS, width=0), self._memory.shares
        near = [client for client in alive if client in shares] if self.parameters.degree else alive
        self._members(near, shares, "survivors")
        holders, points = set(self.parameters.holders(self.client)), self.parameters.points
        strangers = [client for client in alive if client not in points or (client in holders and client not in shares)]
        if strangers or len(alive) < self.parameters.least:
            raise ProtocolAbort(
                f"survivors must be ≥ {self.parameters.least} of {len(points)} clients, got {sorted(alive)}. Leave this run."
            )
        return alive

    def _signed(self, message: bytes) -> dict[int, bytes]:
        """The survivors that this client signed, once enough others have shown that they signed the same."""
        assert self.identity is not None
        signatures, alive = self._read(message, Kind.SIGNATURES, width=SIGNATURE_BYTES), dict(self._memory.survivors)
        if not signatures.keys() <= alive.keys() or len(signatures) < self.parameters.threshold:
            raise ProtocolAbort(
                f"signatures must be ≥ threshold = {self.parameters.threshold} and of survivors, got {len(signatures)}. Leave this run."
            )
        for client, signature in signatures.items():
            check_survivors(self.identity.directory, self._memory.tag, alive, client, signature)
        return alive

    def _members(self, members: Collection[int], allowed: Collection[int], what: str) -> None:
        check_members(members, allowed, what, client=self.client, threshold=self.parameters.threshold)
