"""A client's side of the SIMULATED enclave over Flower messages: a nonce, then, if the quote is right, a sealed upload."""

from __future__ import annotations

import logging
import secrets

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from clients.local import local_upload
from clients.once import answer_once
from defenses.channel._enclave import sealing
from defenses.channel._enclave.policy import measurement
from defenses.channel._enclave.program import SEED_BYTES
from defenses.channel._enclave.quote import NONCE_BYTES, hardware_key, hardware_root, verified
from defenses.channel.enclave import SimulatedEnclave
from simulator import wire
from simulator.errors import ProtocolAbort
from simulator.network import tensors
from simulator.rng import secret_stream
from simulator.world import World

MEMORY = "simulated enclave"
"""Key of the client's state: the nonce, between asking for a quote and getting it."""

SEALED = "simulated enclave, sealed"
"""Key of the client's state: the enclave that it seals to."""


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
        state[MEMORY] = ConfigRecord({"nonce": nonce})
        return wire.pack_stage(stage, nonce)
    if stage != "seal" or not memory:
        raise ProtocolAbort(f"stage must be nonce, then seal, got {stage!r}. Refused.")
    run = channel.run(world)
    root = hardware_root(hardware_key(world.seed, world.secret))
    allowed = frozenset({measurement(channel.policy(world, *tensors(model)))})
    enclave_key = verified(payload, root=root, allowed=allowed, nonce=memory["nonce"], run=run)
    broadcast = wire.unpack_broadcast(content)
    _pin(state, run=run, key=enclave_key)
    answer_once(world, broadcast.round, state)
    try:
        upload = local_upload(world, model, broadcast, client)
        words = secret_stream(world.seed, world.secret, "enclave noise", client, broadcast.round)
        seed = bytes(torch.randint(256, (SEED_BYTES,), generator=words, dtype=torch.uint8).tolist())
        blob = sealing.seal(channel.encode(upload, seed), enclave_key=enclave_key, run=run, round=broadcast.round, client=client)
    except Exception as error:  # whatever it is: why may depend on the private update, so it stays here
        logging.getLogger("fedpeek").warning("client %d leaves simulated_enclave: %s", client, error)
        raise ProtocolAbort("left simulated_enclave") from None
    return wire.pack_stage(stage, blob)


def _pin(state: RecordDict, *, run: bytes, key: bytes) -> None:
    """Hold the enclave to the first one that this client sealed to: a restarted one forgets what it released.

    Raises:
        ProtocolAbort: another run, or another enclave.
    """
    before = state.config_records.get(SEALED)
    if before is not None and (bytes(before["run"]), bytes(before["key"])) != (run, key):  # type: ignore[arg-type]
        raise ProtocolAbort("enclave must be the one of the first upload, got another: it would have forgotten what it released. Refused.")
    state[SEALED] = ConfigRecord({"run": run, "key": key})
