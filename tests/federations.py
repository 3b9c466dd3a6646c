"""Small federations for tests: build a world, run it in process, compare it with a loop that knows nothing of Flower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from clients import app as client_module
from clients.local import local_upload
from server.app import app as server_app
from server.strategy import cohort, step
from simulator import config, engine
from simulator.network import network, tensors
from simulator.transcript import Record, read
from simulator.types import Broadcast, Observation, Tensors
from simulator.world import World

SMALL: dict[str, Any] = {"data": "digits", "model": {"name": "mlp"}, "federation": {"clients": 4, "rounds": 2}}


def world(**settings: Any) -> World:
    """A small world, with some settings replaced; tables are merged."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for key, value in settings.items():
        table[key] = {**table[key], **value} if isinstance(value, dict) and isinstance(table.get(key), dict) else value
    return config.build(World, table)


def federate(of: World, directory: Path, client_app: ClientApp = client_module.app) -> Record:
    """Run the world in process and read what the server saw."""
    engine.run(of, directory, server_app, client_app)
    return read(directory)


def without_flower(of: World) -> tuple[Tensors, Tensors]:
    """The model after all rounds, computed by plain function calls: no messages, no tap, no transcript."""
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    parameters, buffers = tensors(model)
    for round in range(1, of.federation.rounds + 1):
        broadcast = Broadcast(round, parameters, buffers, of.training)
        uploads = [local_upload(of, model, broadcast, client) for client in cohort(of, round)]
        parameters, buffers = step(of, broadcast, uploads)
    return parameters, buffers


def misbehaving(act: Callable[[int, Message, Callable[[], Message]], Message]) -> ClientApp:
    """The real client app, with ``act(client, request, answer)`` between each request and its answer."""
    app = ClientApp()

    def through(handler: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            return act(int(context.node_config["partition-id"]), message, lambda: handler(message, context))

        return handle

    app.query("hello")(client_module.hello)
    app.train("update")(through(client_module.update))
    app.train("channel")(through(client_module.channel))
    return app


def equal(left: Observation, right: Observation) -> bool:
    """Whether two observations are the same to the bit."""
    pairs = [(left.broadcast.parameters, right.broadcast.parameters), (left.broadcast.buffers, right.broadcast.buffers)]
    if left.broadcast.training != right.broadcast.training or len(left.uploads) != len(right.uploads):
        return False
    for mine, theirs in zip(left.uploads, right.uploads, strict=True):
        if (mine.senders, mine.num_examples, mine.update.kind) != (theirs.senders, theirs.num_examples, theirs.update.kind):
            return False
        pairs += [(mine.update.tensors, theirs.update.tensors), (mine.buffers, theirs.buffers)]
    return all(a.keys() == b.keys() and all(_same_bits(a[name], b[name]) for name in a) for a, b in pairs)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
