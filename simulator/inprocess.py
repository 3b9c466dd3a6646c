"""Flower's Grid in one process: the default driver, without start-up cost.

Messages go through Flower's own serialization, so that types and bytes are those of the network and no party shares objects with
another. A client that raises becomes an error reply, one that exceeds the message's time to live becomes a missing reply, as on
Flower's own drivers. Clients answer one after the other, in the order in which messages were pushed.
"""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as PbMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
FIRST_NODE_ID = 1000


class InProcessGrid(Grid):
    """Delivers each message by a function call.

    Args:
        client_app: the app that every node runs.
        nodes: number of nodes; node i has ``partition-id`` i.
        run_config: what both apps read as ``context.run_config``.
    """

    def __init__(self, client_app: ClientApp, nodes: int, run_config: dict[str, Any]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1  # Message() needs a sender
        self._run = Run.create_empty(run_id=RUN_ID)
        self._app = client_app
        self._contexts = {
            FIRST_NODE_ID + i: Context(
                RUN_ID, FIRST_NODE_ID + i, {"partition-id": i, "num-partitions": nodes}, RecordDict(), dict(run_config)
            )
            for i in range(nodes)
        }
        self._replies: dict[str, Message] = {}
        self._worker = _Worker()

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        self._run = run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in list(message_ids) if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        message_id = _stamp(message)
        request = _through_the_wire(message)
        node = message.metadata.dst_node_id
        try:
            answer = self._worker.call(lambda: self._app(request, self._contexts[node]), message.metadata.ttl)
        except TimeoutError:
            self._worker = _Worker()  # the old one is left to its hung client
            return message_id
        except Exception as error:  # any failure of a client is that client's, as in Flower's engine
            logging.getLogger("flwr").debug("node %s failed", node, exc_info=True)
            answer = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=request)
        _stamp(answer)
        self._replies[message_id] = _through_the_wire(answer)
        return message_id


class _Worker:
    """One daemon thread that runs clients, so that a hung one can be given up."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Any, queue.SimpleQueue[tuple[bool, Any]]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="fedpeek-client").start()

    def _serve(self) -> None:
        while True:
            task, answer = self._tasks.get()
            try:
                answer.put((True, task()))
            except BaseException as error:  # handed to the caller, who re-raises it
                answer.put((False, error))

    def call(self, task: Any, seconds: float) -> Any:
        """Run ``task`` in the thread; raises TimeoutError if it takes longer than ``seconds``."""
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._tasks.put((task, answer))
        try:
            succeeded, value = answer.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"client must answer within {seconds} s") from None
        if not succeeded:
            raise value
        return value


def run_inprocess(server_app: ServerApp, client_app: ClientApp, nodes: int, run_config: dict[str, Any]) -> None:
    """Run the two apps to the end; an exception of the server app propagates."""
    grid = InProcessGrid(client_app, nodes, run_config)
    server_app(grid, Context(RUN_ID, 1, {}, RecordDict(), dict(run_config)))


def _stamp(message: Message) -> str:
    message_id = str(uuid.uuid4())
    message.metadata.__dict__["_message_id"] = message_id  # Flower lets only its own link set it
    return message_id


def _through_the_wire(message: Message) -> Message:
    return message_from_proto(PbMessage.FromString(message_to_proto(message).SerializeToString()))
