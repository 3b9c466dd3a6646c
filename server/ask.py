"""Asking a cohort of clients: send one message to each, wait, and say who answered, who failed, and who was silent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from simulator import wire
from simulator.errors import FederationError, WireError

POLL_SECONDS = 0.05
DEAD_WORKER = "ActorDiedError"
"""Flower's simulation engine puts a dead Ray worker back into its pool, where it fails every later message."""


@dataclass(frozen=True)
class Answers:
    """What came back: contents by client, and a reason for each client that did not answer as asked."""

    contents: Mapping[int, RecordDict]
    lost: Mapping[int, str]


def ask(
    grid: Grid, nodes: Mapping[int, int], message_type: str, contents: Mapping[int, RecordDict], *, round: int, timeout: float
) -> Answers:
    """Send ``contents[client]`` to each client and wait for the answers, at most ``timeout`` seconds.

    Args:
        grid: where the messages go; the tap, so that all of it is recorded.
        nodes: Flower's node id of each client.
        message_type: Flower's message type.
        contents: what to send, by client; one new RecordDict each.
        round: becomes the messages' group id.
        timeout: seconds; also the messages' time to live.

    Raises:
        FederationError: a simulation worker died: every later answer of it would be an error too.
    """
    seconds = min(timeout, 12 * 3600.0)  # Flower's own limit
    clients = {nodes[client]: client for client in contents}
    messages = [Message(content, nodes[client], message_type, ttl=seconds, group_id=str(round)) for client, content in contents.items()]
    answered: dict[int, RecordDict] = {}
    lost: dict[int, str] = {}
    started = time.monotonic()
    pending = set(grid.push_messages(messages))
    while pending:
        for message in grid.pull_messages(pending):
            pending.discard(message.metadata.reply_to_message_id)
            client = clients[message.metadata.src_node_id]
            if message.has_error():
                lost[client] = f"client {client} failed: {message.error.reason or f'error code {message.error.code}'}"
            else:
                answered[client] = message.content
        if not pending or time.monotonic() - started > seconds:
            break
        time.sleep(POLL_SECONDS)
    if any(DEAD_WORKER in reason for reason in lost.values()):
        raise FederationError(f"simulation workers must stay alive, got a dead one in round {round}: {lost}. Give each client more memory.")
    for client in contents:
        if client not in answered and client not in lost:
            lost[client] = f"client {client} did not answer within {timeout:g} s"
    return Answers({client: answered[client] for client in sorted(answered)}, lost)


def payloads(answers: Answers, stage: str, lost: dict[int, str]) -> dict[int, bytes]:
    """What each client answered in a stage of a channel's protocol; who did not is added to ``lost``, with the stage."""
    lost.update({client: f"{reason} (stage {stage})" for client, reason in answers.lost.items()})
    found = {}
    for client, content in answers.contents.items():
        try:
            answered, payload, _ = wire.unpack_stage(content)
            if answered != stage:
                raise WireError(f"answer must be of the stage that was asked for, got one of {answered!r}. Check the client.")
            found[client] = payload
        except WireError as error:
            lost[client] = f"client {client} sent what cannot be used (stage {stage}): {error}"
    return found


def find_clients(grid: Grid, expected: int, timeout: float) -> list[int]:
    """Wait until ``expected`` nodes are connected; return their ids.

    Raises:
        FederationError: fewer came within ``timeout`` seconds.
    """
    started = time.monotonic()
    while len(nodes := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() - started > timeout:
            raise FederationError(
                f"nodes must be ≥ {expected}, got {len(nodes)} within {timeout:g} s. Start more, or lower federation.clients."
            )
        time.sleep(0.5)
    return nodes
