"""The server of one secure aggregation: it relays keys and envelopes, sums masked vectors, and removes the masks of the sum.

    receive_advertise → roster;  receive_share → envelopes;  receive_mask → survivors;  receive_unmask → (sum, senders)

Each call takes the replies that came, by client, and returns what to send to each client that goes on. A client that is missing from
the replies has dropped out: before it shared keys it leaves the run without trace; later, its masks are removed by the others' help.

Source: Bonawitz et al. (2017), CCS, eprint 2017/281, without the lines that it marks as needed against an active adversary.
Deviations: listed in ``defenses.channel.secure_aggregation``.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np

from defenses.channel._secagg import envelope, keys, messages
from defenses.channel._secagg.client import Stage, check_stage
from defenses.channel._secagg.masking import Words, apply_masks, word_type
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import Parameters, run_tag
from defenses.channel._secagg.shamir import SHARE_BYTES, combine_bytes, lagrange_at_zero
from simulator.errors import ProtocolAbort


class SecAggServer:
    """The server's side. It learns the sum over the survivors, who dropped out and when, and nothing more of any vector."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self._stage = Stage.ADVERTISE
        self._roster: dict[int, bytes] = {}
        self._sharers: tuple[int, ...] = ()
        self._senders: tuple[int, ...] = ()
        self._sum: Words = np.zeros(0, word_type(parameters.bits))

    def __repr__(self) -> str:
        return f"SecAggServer(round={self.parameters.round}, stage={self._stage.name})"

    def receive_advertise(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Public keys in; the roster of all of them out, the same for every client.

        Raises:
            ProtocolAbort: fewer than the threshold, a stranger, or a malformed reply; so do the other stages.
        """
        with self._once(Stage.ADVERTISE):
            self._check_replies(replies, self.parameters.clients, "key advertisements")
            self._roster = {client: bytes(self._read(replies[client], Kind.KEYS, client, 2 * keys.KEY_BYTES)) for client in sorted(replies)}
            roster = messages.frame(Kind.ROSTER, self.parameters.digest, messages.pack_table(self._roster))
            return dict.fromkeys(self._roster, roster)

    def receive_share(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Envelopes in, by sender; envelopes out, by receiver."""
        with self._once(Stage.SHARE):
            self._check_replies(replies, self._roster, "key shares")
            self._sharers = tuple(sorted(replies))
            sent = {}
            for sender in self._sharers:
                sent[sender] = self._table(replies[sender], Kind.SHARES, sender, envelope.ENVELOPE_BYTES)
                self._check_rows(sent[sender], self._roster.keys() - {sender}, sender)
            inboxes = {
                receiver: messages.pack_table({sender: rows[receiver] for sender, rows in sent.items() if sender != receiver})
                for receiver in self._sharers
            }
            return {receiver: messages.frame(Kind.ENVELOPES, self.parameters.digest, inbox) for receiver, inbox in inboxes.items()}

    def receive_mask(self, replies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Masked vectors in, summed; the set of those who sent one out."""
        with self._once(Stage.MASK):
            self._check_replies(replies, self._sharers, "masked vectors")
            self._senders, word = tuple(sorted(replies)), word_type(self.parameters.bits)
            self._sum = np.zeros(self.parameters.length, word)
            for sender in self._senders:
                masked = self._read(replies[sender], Kind.MASKED, sender, self.parameters.length * word.itemsize)
                np.add(self._sum, np.frombuffer(masked, word), out=self._sum)
            survivors = messages.frame(Kind.SURVIVORS, self.parameters.digest, messages.pack_clients(self._senders))
            return dict.fromkeys(self._senders, survivors)

    def receive_unmask(self, replies: Mapping[int, bytes]) -> tuple[Words, frozenset[int]]:
        """Opened shares in; the exact sum modulo 2^bits over ``senders`` out.

        A client that sent its vector and then dropped out is still a sender.
        """
        with self._once(Stage.UNMASK):
            self._check_replies(replies, self._senders, "opened shares")
            # One set of responders for all secrets, so that its Lagrange coefficients are computed once.
            responders = sorted(replies)[: self.parameters.threshold]
            opened = {}
            for client in responders:
                opened[client] = self._table(replies[client], Kind.OPENED, client, SHARE_BYTES)
                self._check_rows(opened[client], self._sharers, client)
            points = [self.parameters.points[client] for client in responders]
            weights = dict(zip(responders, lagrange_at_zero(points), strict=True))
            secrets = {owner: combine_bytes({client: opened[client][owner] for client in responders}, weights) for owner in self._sharers}
            apply_masks(self._sum, self._masks_left(secrets))
            total, self._sum = self._sum, np.zeros(0, self._sum.dtype)
            return total, frozenset(self._senders)

    def _masks_left(self, secrets: Mapping[int, bytes]) -> Iterator[tuple[bytes, Literal[1, -1]]]:
        """The masks that are still in the sum, with the sign that removes them: every sender's own, and those shared with the dropped."""
        tag = run_tag(self.parameters, self._roster)
        public = {client: both[keys.KEY_BYTES :] for client, both in self._roster.items()}
        for sender in self._senders:
            yield keys.self_mask_key(secrets[sender], tag, public[sender]), -1
        for dropped in sorted(set(self._sharers) - set(self._senders)):
            if not hmac.compare_digest(keys.public_of(secrets[dropped]), public[dropped]):
                raise ProtocolAbort(f"mask key of client {dropped} must fit its public key, got another. A share is corrupt: abort.")
            agreement = keys.Agreement(secrets[dropped], "pair", tag)
            for sender in self._senders:
                yield agreement.key(public[sender]), -1 if sender < dropped else 1

    @contextmanager
    def _once(self, stage: Stage) -> Iterator[None]:
        check_stage(self._stage, stage, "server")
        self._stage = Stage.ABORTED  # holds unless the stage comes to its end
        yield
        self._stage = Stage(stage + 1)

    def _check_replies(self, replies: Mapping[int, bytes], allowed: Collection[int], what: str) -> None:
        strangers = sorted(set(replies) - set(allowed))
        if strangers:
            raise ProtocolAbort(f"{what} must come from clients {sorted(allowed)}, got some from {strangers}. Drop them.")
        if len(replies) < self.parameters.threshold:
            raise ProtocolAbort(
                f"{what} must be ≥ threshold = {self.parameters.threshold} of {len(self.parameters.clients)} clients, "
                f"got {len(replies)}. Skip this round, or wait longer for clients."
            )

    def _check_rows(self, rows: Mapping[int, bytes], wanted: Collection[int], client: int) -> None:
        if rows.keys() != set(wanted):
            raise ProtocolAbort(f"rows from client {client} must be for clients {sorted(wanted)}, got {sorted(rows)}. Abort the round.")

    def _table(self, reply: bytes, kind: Kind, client: int, width: int) -> dict[int, bytes]:
        body = messages.unframe(reply, kind, self.parameters.digest, origin=f"client {client}")
        return messages.unpack_table(body, width=width, origin=f"client {client}")

    def _read(self, reply: bytes, kind: Kind, client: int, size: int) -> memoryview:
        body = messages.unframe(reply, kind, self.parameters.digest, origin=f"client {client}")
        if len(body) != size:
            raise ProtocolAbort(f"{kind.name} from client {client} must be {size} bytes, got {len(body)}. Abort the round.")
        return body
