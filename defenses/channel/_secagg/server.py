"""The server of one secure aggregation: it relays keys and envelopes, sums masked vectors, and removes the masks of the sum.

    receive_advertise → rosters;  receive_share → envelopes;  receive_mask → survivors;  receive_unmask → (sum, senders)

Each call takes the replies that came, by client, and returns what to send to each client that goes on. A client that is missing from
the replies has dropped out: before it shared keys it leaves the run without trace; later, its masks are removed by the others' help.
A reply that cannot be used counts as none: :meth:`SecAggServer.usable` sorts those out before a stage; a stage itself takes no bad one.
With keys that outlive a round, use_keys stands in for the first call; against an active server, receive_sign comes before the last.

Source: Bonawitz et al. (2017), CCS, eprint 2017/281; Bell et al. (2020), CCS, eprint 2020/704, for the k-regular graph.
Deviations: listed in ``defenses.channel.secure_aggregation``.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from types import MappingProxyType
from typing import Literal

import numpy as np

from defenses.channel._secagg import envelope, keys, messages
from defenses.channel._secagg.checks import check_replies, check_rows
from defenses.channel._secagg.identity import SIGNATURE_BYTES, check_keys, check_survivors
from defenses.channel._secagg.masking import Words, apply_masks, packed_bytes, reduced, unpack, word_type
from defenses.channel._secagg.memory import Stage, check_stage
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import Parameters, run_tag
from defenses.channel._secagg.shamir import PRIME, SHARE_BYTES, combine_bytes, lagrange_at_zero
from simulator.errors import ProtocolAbort


class SecAggServer:
    """The server's side. It learns the sum over the survivors, who dropped out and when, and nothing more of any vector.

    Args:
        parameters: of this aggregation.
        directory: raw Ed25519 public key of each client, where clients sign: to leave out whose signature would make others leave.
    """

    def __init__(self, parameters: Parameters, directory: Mapping[int, bytes] = MappingProxyType({})) -> None:
        self.parameters, self._directory = parameters, directory
        self._stage, self._probe = Stage.ADVERTISE, keys.generate()[0]
        self._roster: dict[int, bytes] = {}
        self._locked: dict[int, bytes] = {}
        self._sharers: tuple[int, ...] = ()
        self._senders: tuple[int, ...] = ()
        self._sum: Words = np.zeros(0, word_type(parameters.bits))

    def __repr__(self) -> str:
        return f"SecAggServer(round={self.parameters.round}, stage={self._stage.name})"

    def usable(self, replies: Mapping[int, bytes]) -> tuple[dict[int, bytes], dict[int, str]]:
        """The replies that the stage that is due can use, and what is wrong with each of the others."""
        good, bad, seen = dict[int, bytes](), dict[int, str](), set[bytes]()
        for client in sorted(replies):
            try:
                if self._stage is Stage.ADVERTISE:
                    row = self._keys(client, replies[client])
                    self.check_keys(client, row, seen)
                    seen |= halves(row)
                    if self._directory:
                        check_keys(self._directory, self.parameters.digest, client, row[: 2 * keys.KEY_BYTES], row[2 * keys.KEY_BYTES :])
                elif self._stage is Stage.SHARE:
                    self._shares(client, replies[client])
                elif self._stage is Stage.MASK:
                    self._masked(client, replies[client])
                elif self._stage is Stage.SIGN:
                    signature = bytes(self._read(replies[client], Kind.SIGNED, client, SIGNATURE_BYTES))
                    if self._directory:
                        check_survivors(self._directory, self._tag(), self._senders, client, signature)
                else:
                    self._shares_opened(client, replies[client])
            except ProtocolAbort as error:
                bad[client] = str(error)
            else:
                good[client] = replies[client]
        return good, bad

    def receive_advertise(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Public keys in; out, to each client, those of the clients that it deals with and its own.

        Raises:
            ProtocolAbort: fewer than needed, a stranger, or a malformed reply; so do the other stages.
        """
        return self.use_keys({client: self._keys(client, replies[client]) for client in sorted(replies)})

    def use_keys(self, rows: Mapping[int, bytes]) -> dict[int, bytes]:
        """Likewise with keys that clients advertised before, by client: both public keys in a row."""
        with self._once(Stage.ADVERTISE):
            check_replies(rows, self.parameters.clients, "key advertisements", self.parameters)
            self._roster = {client: rows[client] for client in sorted(rows)}
            return {client: self._frame(Kind.ROSTER, self._known_to(client)) for client in self._roster}

    def check_keys(self, client: int, row: bytes, others: Set[bytes]) -> None:
        """Find what would make every other client leave: a key that somebody has, or with which nobody can agree on a secret.

        Raises:
            ProtocolAbort: one of the two keys in the row is such a key.
        """
        own = halves(row)
        if len(own) < 2 or own & others:
            raise ProtocolAbort(f"keys of client {client} must be two that nobody else has, got others. Leave it out.")
        agreement = keys.Agreement(self._probe, "env", b"")
        for half in own:
            agreement.key(half)

    def receive_share(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Envelopes in, by sender; envelopes out, by receiver."""
        with self._once(Stage.SHARE):
            check_replies(replies, self._roster, "key shares", self.parameters)
            self._sharers = tuple(sorted(replies))
            inboxes: dict[int, dict[int, bytes]] = {receiver: {} for receiver in self._sharers}
            for sender in self._sharers:
                rows, self._locked[sender] = self._shares(sender, replies[sender])
                for receiver in rows.keys() & inboxes.keys():
                    inboxes[receiver][sender] = rows[receiver]
            return {receiver: self._frame(Kind.ENVELOPES, inbox) for receiver, inbox in inboxes.items()}

    def receive_mask(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Masked vectors in, summed; the set of those who sent one out."""
        with self._once(Stage.MASK):
            check_replies(replies, self._sharers, "masked vectors", self.parameters)
            parameters = self.parameters
            self._senders = tuple(sorted(replies))
            self._sum = np.zeros(parameters.length, word_type(parameters.bits))
            for sender in self._senders:
                np.add(self._sum, self._masked(sender, replies[sender]), out=self._sum)
            survivors = self._frame(Kind.SURVIVORS, dict.fromkeys(self._senders, b""))
            return dict.fromkeys(self._senders, survivors)

    def receive_sign(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Signatures of the survivors in, all of them out, to those who signed; against an active server only."""
        with self._once(Stage.SIGN):
            check_replies(replies, self._senders, "signatures", self.parameters)
            signatures = {client: bytes(self._read(replies[client], Kind.SIGNED, client, SIGNATURE_BYTES)) for client in replies}
            return dict.fromkeys(sorted(replies), self._frame(Kind.SIGNATURES, signatures))

    def receive_unmask(self, replies: Mapping[int, bytes]) -> tuple[Words, frozenset[int]]:
        """Opened shares in; the exact sum modulo 2^bits over ``senders`` out.

        A client that sent its vector and then dropped out is still a sender.
        """
        with self._once(Stage.UNMASK):
            check_replies(replies, self._senders, "opened shares", self.parameters, least=self.parameters.threshold)
            apply_masks(self._sum, self._masks_left(self._opened(replies)))
            total, self._sum = reduced(self._sum, self.parameters.bits), np.zeros(0, self._sum.dtype)
            return total, frozenset(self._senders)

    def _opened(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """The secret of each client that shared: its seed if it sent a vector, else what its pairwise masks come from."""
        parameters, held = self.parameters, {}
        responders = {owner: [c for c in parameters.holders(owner) if c in replies][: parameters.threshold] for owner in self._sharers}
        for client in sorted(set().union(*responders.values())):
            held[client] = self._shares_opened(client, replies[client])
        weights: dict[tuple[int, ...], dict[int, int]] = {}  # on the complete graph one set of responders serves all
        found = {}
        for owner, chosen in responders.items():
            if len(chosen) < parameters.threshold:
                raise ProtocolAbort(f"shares of client {owner} must be ≥ {parameters.threshold}, got {len(chosen)}. Skip this round.")
            key = tuple(chosen)
            if key not in weights:
                weights[key] = dict(zip(chosen, lagrange_at_zero([parameters.points[client] for client in chosen]), strict=True))
            found[owner] = combine_bytes({client: held[client][owner] for client in chosen}, weights[key])
        return found

    def _masks_left(self, secrets: Mapping[int, bytes]) -> Iterator[tuple[bytes, Literal[1, -1]]]:
        """The masks that are still in the sum, with the sign that removes them: every sender's own, and those shared with the dropped."""
        tag = self._tag()
        public = {client: row[keys.KEY_BYTES : 2 * keys.KEY_BYTES] for client, row in self._roster.items()}
        senders = set(self._senders)
        for sender in self._senders:
            yield keys.self_mask_key(secrets[sender], tag, public[sender]), -1
        for dropped in sorted(set(self._sharers) - set(self._senders)):
            alive = [peer for peer in self.parameters.neighbors(dropped) if peer in senders]
            shared = self._unlocked(dropped, secrets[dropped], tag) if self.parameters.standing else {}
            if not self.parameters.standing:
                if not hmac.compare_digest(keys.public_of(secrets[dropped]), public[dropped]):
                    raise ProtocolAbort(f"mask key of client {dropped} must fit its public key, got another. A share is corrupt: abort.")
                agreement = keys.Agreement(secrets[dropped], "pair", tag)
                shared = {peer: agreement.key(public[peer]) for peer in alive}
            for sender in alive:
                yield shared[sender], -1 if sender < dropped else 1

    def _tag(self) -> bytes:
        return run_tag(self.parameters, {client: row[: 2 * keys.KEY_BYTES] for client, row in self._roster.items()})

    def _unlocked(self, dropped: int, recovery: bytes, tag: bytes) -> dict[int, bytes]:
        rows = messages.unpack_table(
            envelope.unlock(recovery, self._locked[dropped], tag=tag, owner=dropped), width=keys.KEY_BYTES, origin=f"client {dropped}"
        )
        check_rows(rows, self._known_to(dropped).keys() - {dropped}, dropped)
        return rows

    def _keys(self, client: int, reply: bytes) -> bytes:
        return bytes(self._read(reply, Kind.KEYS, client, self.parameters.row_bytes))

    def _shares(self, client: int, reply: bytes) -> tuple[dict[int, bytes], bytes]:
        """A client's envelopes by receiver, and its locked pair keys."""
        body = messages.unframe(reply, Kind.SHARES, self.parameters.digest, origin=f"client {client}")
        sealed, locked = messages.unpack_fields(bytes(body), 2, origin=f"client {client}")
        rows = messages.unpack_table(sealed, width=envelope.ENVELOPE_BYTES, origin=f"client {client}")
        peers = self._known_to(client).keys() - {client}
        check_rows(rows, peers, client)
        if len(locked) != (envelope.locked_bytes(len(peers)) if self.parameters.standing else 0):
            raise ProtocolAbort(f"lock of client {client} must hold {len(peers)} pair keys, got {len(locked)} bytes. Leave it out.")
        return rows, locked

    def _masked(self, client: int, reply: bytes) -> Words:
        parameters = self.parameters
        body = self._read(reply, Kind.MASKED, client, packed_bytes(parameters.length, parameters.bits))
        return unpack(body, parameters.length, parameters.bits)

    def _shares_opened(self, client: int, reply: bytes) -> dict[int, bytes]:
        """The share of each owner's secret that a client opens."""
        body = messages.unframe(reply, Kind.OPENED, self.parameters.digest, origin=f"client {client}")
        rows = messages.unpack_table(body, width=SHARE_BYTES, origin=f"client {client}")
        check_rows(rows, set(self.parameters.holders(client)) & set(self._sharers), client)
        if any(int.from_bytes(share, "big") >= PRIME for share in rows.values()):
            raise ProtocolAbort(f"shares from client {client} must be below the prime, got one that is not. Leave it out.")
        return rows

    def _known_to(self, client: int) -> dict[int, bytes]:
        """The rows of the roster that concern ``client``."""
        return {holder: self._roster[holder] for holder in self.parameters.holders(client) if holder in self._roster}

    @contextmanager
    def _once(self, stage: Stage) -> Iterator[None]:
        check_stage(self._stage, stage, "server")
        self._stage = Stage.ABORTED  # holds unless the stage comes to its end
        yield
        self._stage = stage.following(self.parameters.active)

    def _frame(self, kind: Kind, rows: Mapping[int, bytes]) -> bytes:
        return messages.frame(kind, self.parameters.digest, messages.pack_table(rows))

    def _read(self, reply: bytes, kind: Kind, client: int, size: int) -> memoryview:
        body = messages.unframe(reply, kind, self.parameters.digest, origin=f"client {client}")
        if len(body) != size:
            raise ProtocolAbort(f"{kind.name} from client {client} must be {size} bytes, got {len(body)}. Abort the round.")
        return body


def halves(row: bytes) -> set[bytes]:
    """The two public keys in a row."""
    return {row[: keys.KEY_BYTES], row[keys.KEY_BYTES : 2 * keys.KEY_BYTES]}
