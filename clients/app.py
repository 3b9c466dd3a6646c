"""The Flower ClientApp: unpack, do one client's work, pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import nn

from clients.ckks import ckks_reply
from clients.cost import noted
from clients.enclave import enclave_reply
from clients.local import local_upload
from clients.once import answer_once
from clients.secure import secagg_reply
from defenses.channel.ckks import CKKSAggregation
from defenses.channel.enclave import SimulatedEnclave
from defenses.channel.secure_aggregation import SecureAggregation
from simulator import wire
from simulator.defense import Defense
from simulator.engine import read_world
from simulator.errors import WireError
from simulator.network import network
from simulator.world import World

app = ClientApp()

Handler = Callable[[Message, Context], Message]
Reply = Callable[[World, nn.Module, int, RecordDict, RecordDict], RecordDict]

REPLIES: Mapping[type[Defense], Reply] = {
    SecureAggregation: secagg_reply,
    CKKSAggregation: ckks_reply,
    SimulatedEnclave: enclave_reply,
}
"""How a client answers a stage of each channel's protocol, out of the world, the network, its number, the message and its state."""


@lru_cache(maxsize=4)
def _setting(world_json: str) -> tuple[World, nn.Module]:
    world = read_world({"world": world_json})
    return world, network(world.architecture, world.data.load().schema, world.training, world.seed)


def client_of(context: Context) -> tuple[int, World, nn.Module]:
    """This node's client number, its world, and the architecture that it trains."""
    torch.set_num_threads(1)  # the number of threads changes the order of sums, and so the bits
    world, model = _setting(str(context.run_config["world"]))
    return int(context.node_config["partition-id"]), world, model


def discreet(handler: Handler) -> Handler:
    """Let a failure say its type and message to the server, and no more: a traceback would show it the client's code and paths.

    What the work cost is noted here, on the client's side.
    """

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            with noted(context.run_config, context.node_config["partition-id"], message.metadata.group_id):
                return handler(message, context)
        except Exception as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)

    return handle


@app.query("hello")
@discreet
def hello(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    client, _, _ = client_of(context)
    return wire.reply(RecordDict({"hello": ConfigRecord({"client": client})}), message)


@app.train("update")
@discreet
def update(message: Message, context: Context) -> Message:
    """Train on the broadcast and upload the update in the clear, once a round."""
    client, world, model = client_of(context)
    if world.channel is not None:
        raise WireError(f"client {client} must be asked through {world.channel.name}, got a request for a plain upload. Refused.")
    broadcast = wire.unpack_broadcast(message.content)
    answer_once(world, broadcast.round, context.state)
    return wire.reply(wire.pack_upload(local_upload(world, model, broadcast, client)), message)


@app.train("channel")
@discreet
def channel(message: Message, context: Context) -> Message:
    """Answer one stage of the channel's protocol."""
    client, world, model = client_of(context)
    reply = REPLIES.get(type(world.channel)) if world.channel is not None else None
    if reply is None:
        raise WireError(f"client {client} must be asked for what its world says, got a stage of a channel that is not there. Refused.")
    return wire.reply(reply(world, model, client, message.content, context.state), message)
