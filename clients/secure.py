"""A client's side of secure aggregation over Flower messages: the protocol's state machine with training in its third stage."""

from __future__ import annotations

import logging

from flwr.app import ConfigRecord, RecordDict
from torch import nn

from clients.local import local_upload
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.masking import Words
from defenses.channel._secagg.parameters import Parameters
from defenses.channel.secure_aggregation import SecureAggregation
from simulator import wire
from simulator.errors import ProtocolAbort
from simulator.rng import stream
from simulator.types import Broadcast
from simulator.world import World

MEMORY = "secagg"
"""Key of the client's state between two stages: each message may reach a new process."""


def secagg_reply(world: World, model: nn.Module, client: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Answer one stage; the state holds key material from the first stage to the last, and nothing after it.

    Raises:
        ProtocolAbort: the stage cannot be answered; the server learns only that this client left.
    """
    stage, payload, _ = wire.unpack_stage(content)
    memory = state.config_records.get(MEMORY)
    state.pop(MEMORY, None)  # whatever happens now, no stage is answered twice
    try:
        channel = world.channel
        if not isinstance(channel, SecureAggregation):
            raise ProtocolAbort(f"client {client} must have secure aggregation in its world, got {channel}. Refused.")
        if stage == "ideal" and channel.mode == "ideal":
            vector = private_vector(world, model, client, wire.unpack_broadcast(content), channel, world.federation.cohort_size)
            return wire.pack_stage(stage, vector.tobytes())
        if stage == "advertise" or memory is None:  # a new round ends whatever an earlier one left behind
            party = SecAggClient(_agreed(Parameters.from_bytes(payload), world, model, client, channel), client)
        else:
            party = SecAggClient.from_bytes(bytes(memory["state"]))  # type: ignore[arg-type]
        if stage == "advertise":
            answer = party.advertise()
        elif stage == "share":
            answer = party.share(payload)
        elif stage == "mask":
            broadcast = wire.unpack_broadcast(content)
            cohort = len(party.parameters.clients)
            answer = party.mask(payload, private_vector(world, model, client, broadcast, channel, cohort))
        else:
            answer = party.unmask(payload)
    except Exception as error:  # whatever it is: why may depend on the private update, so it stays here
        logging.getLogger("fedpeek").warning("client %d leaves secure aggregation: %s", client, error)
        raise ProtocolAbort("left secure aggregation") from None
    if stage != "unmask":
        state[MEMORY] = ConfigRecord({"state": party.to_bytes()})
    return wire.pack_stage(stage, answer)


def private_vector(world: World, model: nn.Module, client: int, broadcast: Broadcast, channel: SecureAggregation, cohort: int) -> Words:
    """The client's update as words modulo 2^bits, rounded with its own randomness: the same in both modes."""
    upload = local_upload(world, model, broadcast, client)
    rng = stream(world.seed, "rounding", world.secret, client, broadcast.round)
    bound = channel.largest_upload(world)
    return channel.encode(upload.update, upload.buffers, upload.num_examples, cohort=cohort, max_examples=bound, rng=rng)


def _agreed(parameters: Parameters, world: World, model: nn.Module, client: int, channel: SecureAggregation) -> Parameters:
    """The parameters, if they are those that this client's own world implies: a server cannot lower the threshold."""
    mine = channel.parameters(
        run_id=parameters.run_id, round=parameters.round, clients=parameters.clients,
        template=dict(model.named_parameters()), buffers=dict(model.named_buffers()),
    )  # fmt: skip
    if mine != parameters or len(parameters.clients) != world.federation.cohort_size:
        raise ProtocolAbort(f"client {client}: parameters must be {mine}, got {parameters}. Leave this run.")
    return parameters
