"""A client's side of secure aggregation over Flower messages: the protocol's state machine with training in its third stage."""

from __future__ import annotations

import hmac
import logging
import math
import os

from flwr.app import ConfigRecord, RecordDict
from torch import nn

from clients.local import local_upload
from clients.once import answer_once, fresh
from defenses.channel._secagg import identity as identities
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.identity import Identity
from defenses.channel._secagg.keyring import KeyRing
from defenses.channel._secagg.masking import Words, pack
from defenses.channel._secagg.messages import unpack_fields
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.quantization import Integers
from defenses.channel.secure_aggregation import SecureAggregation
from simulator import wire
from simulator.errors import ProtocolAbort
from simulator.rng import secret_stream
from simulator.types import Broadcast
from simulator.world import World

MEMORY, RING = "secagg", "secagg-keys"
"""Keys of the client's state between two stages (each message may reach a new process), and of its keys between two rounds."""

OWN_IDENTITY = "FEDPEEK_IDENTITY"
"""Environment variable with the client's raw Ed25519 private key in hexadecimal, where ``identities`` are given."""


def secagg_reply(world: World, model: nn.Module, client: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Answer one stage; the state holds a round's key material from its first stage to its last, and nothing of it after.

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
        if channel.mode != "protocol":
            if stage != channel.mode:
                raise ProtocolAbort(f"client {client}: stage must be {channel.mode}, got {stage}. Refused.")
            broadcast = wire.unpack_broadcast(content)
            answer_once(world, broadcast.round, state)
            return _to_trusted_party(world, model, client, broadcast, channel)
        if stage == "advertise" and channel.setup == "once":
            ring = KeyRing.fresh()
            state[RING] = ConfigRecord({"ring": ring.to_bytes()})
            return wire.pack_stage(stage, ring.advertise())
        party, payload, ring_used = _party(world, model, client, channel, stage, payload, memory, state)
        if stage == "mask":
            broadcast = wire.unpack_broadcast(content)
            if broadcast.round != party.parameters.round:
                raise ProtocolAbort(f"model must be of round {party.parameters.round}, as the keys are, got {broadcast.round}. Refused.")
            answer_once(world, broadcast.round, state)
            answer = party.mask(payload, private_vector(world, model, client, broadcast, channel, len(party.parameters.clients)))
        else:
            answer = {"advertise": lambda _: party.advertise(), "share": party.share, "sign": party.sign, "unmask": party.unmask}[stage](
                payload
            )
        if ring_used is not None:  # once more, with the secrets that it has agreed on meanwhile
            state[RING] = ConfigRecord({"ring": ring_used.to_bytes()})
    except Exception as error:  # whatever it is: why may depend on the private update, so it stays here
        logging.getLogger("fedpeek").warning("client %d leaves secure aggregation: %s", client, error)
        raise ProtocolAbort("left secure aggregation") from None
    if stage != "unmask":
        state[MEMORY] = ConfigRecord({"state": party.to_bytes()})
    return wire.pack_stage(stage, answer)


def private_vector(world: World, model: nn.Module, client: int, broadcast: Broadcast, channel: SecureAggregation, cohort: int) -> Words:
    """The client's update as words modulo 2^bits, rounded and noised with its own randomness: the same in both modes."""
    upload = local_upload(world, model, broadcast, client)
    rng = secret_stream(world.seed, world.secret, "rounding", client, broadcast.round)
    size = sum(tensor.numel() for tensor in upload.update.tensors.values())
    return channel.encode(
        upload.update, upload.buffers, upload.num_examples, cohort=cohort, max_examples=channel.largest_upload(world), rng=rng,
        noise=_noise(world, size, client, broadcast.round), longest=_longest(world, size), limit=channel.range_for(world, size),
        rotation=channel.rotation_for(world, broadcast.round),
    )  # fmt: skip


def _noise(world: World, size: int, client: int, round: int) -> Integers | None:
    """The integer noise of all defenses on so many coordinates, or None."""
    total: Integers | None = None
    for place, defense in enumerate(world.defenses):
        rng = secret_stream(world.seed, world.secret, "integer-noise", client, round, place)
        drawn = defense.integer_noise(world, (size,), rng)
        if drawn is not None:
            total = drawn if total is None else total + drawn
    return total


def _longest(world: World, size: int) -> float:
    """The norm that the rounded update must keep to, in units of the grid: what the integer noise is calibrated to."""
    return min((defense.longest_rounded(world, size) for defense in world.defenses), default=math.inf)


def _to_trusted_party(world: World, model: nn.Module, client: int, broadcast: Broadcast, channel: SecureAggregation) -> RecordDict:
    """What a client hands to the party that it trusts instead of running the protocol: its words, or its plain upload."""
    if channel.mode == "plain":
        return wire.pack_upload(local_upload(world, model, broadcast, client))
    cohort = world.federation.cohort_size
    vector = private_vector(world, model, client, broadcast, channel, cohort)
    return wire.pack_stage("quantized", bytes(pack(vector, channel.bits_for(cohort, channel.largest_upload(world)))))


def _party(
    world: World, model: nn.Module, client: int, channel: SecureAggregation, stage: str, payload: bytes, memory: ConfigRecord | None,
    state: RecordDict,
) -> tuple[SecAggClient, bytes, KeyRing | None]:  # fmt: skip
    """The state machine that answers this stage, what is left of the message, and the keys that it uses; a first stage makes a new one."""
    own = _identity(world, client, channel) if channel.active else None
    first = "advertise" if channel.setup == "each round" else "share"
    if stage != first:
        if memory is None:
            raise ProtocolAbort(f"client {client}: stage must be {first}, got {stage}. Start a new run.")
        return SecAggClient.from_bytes(bytes(memory["state"]), identity=own), payload, None  # type: ignore[arg-type]
    if first == "advertise":
        agreed = _agreed(Parameters.from_bytes(payload), world, model, client, channel)
        fresh(world, agreed.round, state)
        return SecAggClient(agreed, client, identity=own), payload, None
    parameters, roster = unpack_fields(payload, 2, origin="the server")
    if RING not in state.config_records:
        raise ProtocolAbort(f"client {client} must have advertised before, got no keys. Advertise again.")
    ring = KeyRing.from_bytes(bytes(state.config_records[RING]["ring"]))  # type: ignore[arg-type]
    agreed = _agreed(Parameters.from_bytes(parameters), world, model, client, channel)
    fresh(world, agreed.round, state)
    ring.forget(2 * world.federation.clients)
    party = SecAggClient(agreed, client, ring=ring)
    state[RING] = ConfigRecord({"ring": ring.to_bytes()})  # entered: whatever comes of it, this round is not entered again
    return party, roster, ring


def _identity(world: World, client: int, channel: SecureAggregation) -> Identity:
    known = identities.directory(world, channel.identities)
    private = bytes.fromhex(os.environ.get(OWN_IDENTITY, "")) if channel.identities else identities.simulated(world, client)
    if len(private) != 32 or not hmac.compare_digest(identities.public_of(private), known[client]):
        raise ProtocolAbort(f"client {client}: {OWN_IDENTITY} must be the private key of its identity, got another or none. Set it.")
    return Identity(private, known)


def _agreed(parameters: Parameters, world: World, model: nn.Module, client: int, channel: SecureAggregation) -> Parameters:
    """The parameters, if they are those that this client's own world implies: a server can lower neither threshold nor degree."""
    n, everybody = world.federation.cohort_size, world.federation.clients
    if len(parameters.clients) != n or parameters.clients[-1] >= everybody:  # before a graph is solved for as many as a server names
        raise ProtocolAbort(f"client {client}: clients must be {n} of {everybody}, got {len(parameters.clients)}. Leave this run.")
    mine = channel.parameters(
        run_id=parameters.run_id, round=parameters.round, rounds=world.federation.rounds, clients=parameters.clients,
        max_examples=channel.largest_upload(world), seed=parameters.seed, template=dict(model.named_parameters()),
        buffers=dict(model.named_buffers()),
    )  # fmt: skip
    if mine != parameters:
        raise ProtocolAbort(f"client {client}: parameters must be {mine}, got {parameters}. Leave this run.")
    return parameters
