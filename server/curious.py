"""The tap of the honest-but-curious server: it sees all that crosses, writes it down, and changes nothing.

It wraps any Flower Grid, so whatever strategy drives the round, what it records is what arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from simulator import wire
from simulator.events import broadcast_event, released_tensors, upload_event
from simulator.transcript import Transcript
from simulator.types import Broadcast, Tensors, Upload


class CuriousGrid(Grid):
    """A Grid that records every message which passes through it.

    Args:
        grid: the real one.
        transcript: where to write; None records nothing.
    """

    def __init__(self, grid: Grid, transcript: Transcript | None) -> None:
        self._grid, self._transcript = grid, transcript
        self._clients: dict[int, int] = {}
        self._broadcast: Broadcast | None = None
        self._sent_model = RecordDict()
        self._round = 0
        self.upload_bytes = 0
        self.download_bytes = 0

    @property
    def run(self) -> Any:
        return self._grid.run

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(self._sent(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._received(self._grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._received(self._grid.send_and_receive(self._sent(messages), timeout=timeout))

    @property
    def trusted_party(self) -> Grid:
        """The Grid beneath the tap: where the ideal functionality of a channel is simulated, out of the server's sight."""
        return self._grid

    def record_broadcast(self, broadcast: Broadcast) -> None:
        """Record what the server sent in a round; once, since every client of a round gets the same."""
        if self._broadcast is None or broadcast.round != self._broadcast.round:
            self._broadcast, self._round = broadcast, broadcast.round
            if self._transcript is not None:
                self._transcript.append("broadcast", self._round, *broadcast_event(broadcast))

    def record_aggregate(self, upload: Upload) -> None:
        """Record what the server computed together with the clients: the output of secure aggregation."""
        if self._transcript is not None:
            facts, tensors = upload_event(upload)
            self._transcript.append("upload", self._round, facts | {"accepted": True}, tensors)  # whoever fails the round afterwards

    def record_released(self, round: int, parameters: Tensors, buffers: Tensors) -> None:
        """Record the model that the server holds after the last round."""
        if self._transcript is not None:
            self._transcript.append("released", round, {}, released_tensors(parameters, buffers))

    def record_lost(self, round: int, client: int, reason: str) -> None:
        """Record that a client's answer did not come, or was refused."""
        if self._transcript is not None:
            self._transcript.append("lost", round, {"client": client, "reason": reason})

    def _sent(self, messages: Iterable[Message]) -> list[Message]:
        batch = list(messages)
        for message in batch:
            self.download_bytes += wire.content_bytes(message)
            if message.metadata.group_id.isdecimal():  # Flower's name for the round: a protocol's first stages precede its broadcast
                self._round = int(message.metadata.group_id)
            if wire.RECIPE in message.content and (self._broadcast is None or wire.round_of(message) != self._broadcast.round):
                self.record_broadcast(wire.unpack_broadcast(message.content))
                self._sent_model = message.content
            self._record_sent(message)
        return batch

    def _received(self, messages: Iterable[Message]) -> list[Message]:
        batch = list(messages)
        for message in batch:
            node = message.metadata.src_node_id
            if message.has_content() and message.metadata.message_type == wire.HELLO:
                self._clients[node] = wire.hello_client(message.content, -1)
            elif message.has_content():
                self.upload_bytes += wire.content_bytes(message)
            if self._transcript is not None:
                self._record_reply(message, node)
        return batch

    def _record_sent(self, message: Message) -> None:
        """What went to which client; a model equal to the round's broadcast is not written again."""
        if wire.RECIPE not in message.content:
            self._append("sent", message, message.metadata.dst_node_id)
        elif self._transcript is not None and wire.same_model(message.content, self._sent_model):
            facts, tensors = wire.facts_of_content(wire.without_model(message.content))
            client = self._clients.get(message.metadata.dst_node_id, -1)
            facts |= {"client": client, "type": message.metadata.message_type, "model": "the broadcast"}
            self._transcript.append("sent", self._round, facts, tensors)
        else:  # a model of this client's own: an honest server never sends one
            self._append("sent", message, message.metadata.dst_node_id)

    def _record_reply(self, message: Message, node: int) -> None:
        is_upload = message.has_content() and message.metadata.message_type == wire.TRAIN
        upload = wire.received_upload(message.content, self._clients.get(node, node)) if is_upload else None
        if upload is None:
            self._append("received", message, node)
        elif self._transcript is not None:  # as it arrived: what the server refuses is marked as lost
            self._transcript.append("upload", self._round, *upload)

    def _append(self, kind: str, message: Message, node: int) -> None:
        if self._transcript is not None:
            facts, tensors = wire.facts_of(message)
            facts |= {"client": self._clients.get(node, -1), "type": message.metadata.message_type}
            self._transcript.append(kind, self._round, facts, tensors)
