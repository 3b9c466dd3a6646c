"""A client's side of the SIMULATED enclave over Flower messages: a nonce, then, if the quote is right, a sealed upload."""

from __future__ import annotations

import logging
import secrets

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from clients.local import local_upload
from defenses.channel._enclave import sealing
from defenses.channel._enclave.policy import measurement
from defenses.channel._enclave.program import SEED_BYTES
from defenses.channel._enclave.quote import NONCE_BYTES, hardware_key, hardware_root, verified
from defenses.channel.enclave import SimulatedEnclave
from simulator import wire
from simulator.errors import ProtocolAbort
from simulator.network import tensors
from simulator.rng import stream
from simulator.world import World

MEMORY = "simulated enclave"
"""Key of the client's state: the nonce, between asking for a quote and getting it."""


def enclave_reply(world: World, model: nn.Module, client: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Answer one stage: ``nonce``, or ``seal`` with the broadcast and the quote.

    Raises:
        ProtocolAbort: the stage cannot be answered; the server learns what is wrong with its enclave, and else that this client left.
    """
    memory = dict(state.config_records.get(MEMORY) or {})
    state.pop(MEMORY, None)  # a nonce is good for one quote
    stage, payload, _ = wire.unpack_stage(content)
    channel = world.channel
    if not isinstance(channel, SimulatedEnclave):
        raise ProtocolAbort(f"client {client} must have simulated_enclave in its world, got {channel}. Refused.")
    if stage == "nonce":
        nonce = secrets.token_bytes(NONCE_BYTES)
        state[MEMORY] = ConfigRecord({"nonce": nonce, "run": payload})
        return wire.pack_stage(stage, nonce)
    if stage != "seal" or not memory:
        raise ProtocolAbort(f"stage must be nonce, then seal, got {stage!r}. Refused.")
    run = memory["run"]
    root = hardware_root(hardware_key(world.seed, world.secret))
    allowed = frozenset({measurement(channel.policy(world, *tensors(model)))})
    enclave_key = verified(payload, root=root, allowed=allowed, nonce=memory["nonce"], run=run)
    try:
        broadcast = wire.unpack_broadcast(content)
        upload = local_upload(world, model, broadcast, client)
        words = stream(world.seed, "enclave noise", world.secret, client, broadcast.round)
        seed = bytes(torch.randint(256, (SEED_BYTES,), generator=words, dtype=torch.uint8).tolist())
        blob = sealing.seal(channel.encode(upload, seed), enclave_key=enclave_key, run=run, round=broadcast.round, client=client)
    except Exception as error:  # whatever it is: why may depend on the private update, so it stays here
        logging.getLogger("fedpeek").warning("client %d leaves simulated_enclave: %s", client, error)
        raise ProtocolAbort("left simulated_enclave") from None
    return wire.pack_stage(stage, blob)
