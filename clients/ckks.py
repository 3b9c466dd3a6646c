"""A client's side of homomorphic aggregation over Flower messages: keys once a run, then encrypt, and decrypt the sum when asked."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from clients.local import local_upload
from clients.once import answer_once
from defenses.channel import _frames
from defenses.channel._ckks import flooding, handover
from defenses.channel._ckks.cipher import CONTEXT_BYTES, Cipher, generate
from defenses.channel._vectors import Reals, largest_upload
from defenses.channel.ckks import CKKSAggregation
from simulator import wire
from simulator.errors import ProtocolAbort
from simulator.network import tensors
from simulator.world import World

MEMORY = "ckks"
"""Key of the client's state: each message may reach a new process."""

LEAST_SENDERS = 2
"""Fewer behind a sum, and a client does not decrypt it."""


def ckks_reply(world: World, model: nn.Module, client: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Answer one stage: ``advertise``, ``make`` or ``hold`` of the set-up, ``encrypt`` or ``decrypt`` of a round.

    Raises:
        ProtocolAbort: the stage cannot be answered; the server learns only that this client left.
    """
    try:
        stage, payload, facts = wire.unpack_stage(content)
        channel, memory = world.channel, dict[str, Any](state.config_records.get(MEMORY) or {})
        if not isinstance(channel, CKKSAggregation):
            raise ProtocolAbort(f"client {client} must have ckks_aggregation in its world, got {channel}. Refused.")
        if stage == "advertise":
            private, public = handover.key_pair()
            state[MEMORY] = ConfigRecord({"run": payload, "private": private})
            return wire.pack_stage(stage, public)
        if stage == "make":
            return wire.pack_stage(stage, _make(channel, client, payload, memory, state))
        if stage == "hold":
            _hold(channel, payload, memory, state)
            return wire.pack_stage(stage, b"")
        if stage == "encrypt":
            broadcast = wire.unpack_broadcast(content)
            answer_once(world, broadcast.round, state)
            vector = channel.encode(local_upload(world, model, broadcast, client), max_examples=largest_upload(world))
            return wire.pack_stage(stage, Cipher(channel.scheme, memory["public"]).encrypt(vector, world.federation.cohort_size))
        if stage == "decrypt":
            round = int(facts["round"])
            last, rounds = memory.get("told", 0), world.federation.rounds
            if not last < round <= rounds:  # the noise is for so many tellings
                raise ProtocolAbort(f"round must be in {last + 1}..{rounds}, each told once, got {round}. Refused.")
            state[MEMORY] = ConfigRecord({**memory, "told": round})
            return wire.pack_stage(stage, _decrypt(world, model, channel, payload, memory["secret"]))
        if stage == "collude" and channel.secret_key == "colluder":
            return wire.pack_stage(stage, memory["secret"])
        raise ProtocolAbort(f"stage must be one of this protocol, got {stage!r}. Refused.")
    except Exception as error:  # whatever it is: why may depend on the private update, so it stays here
        logging.getLogger("fedpeek").warning("client %d leaves ckks_aggregation: %s", client, error)
        raise ProtocolAbort("left ckks_aggregation") from None


def _make(channel: CKKSAggregation, client: int, payload: bytes, memory: dict[str, Any], state: RecordDict) -> bytes:
    """Make the keys of the run; answer the public context and the secret one sealed for each client in the roster."""
    roster = handover.unpack_roster(payload)
    public, secret = generate(channel.scheme)
    envelopes = [
        handover.seal(secret, private=memory["private"], peer=key, run=memory["run"], public_context=public)
        for peer, key in sorted(roster.items())
        if peer != client
    ]
    state[MEMORY] = ConfigRecord({"run": memory["run"], "public": public, "secret": secret})
    return _frames.pack([public, *envelopes])


def _hold(channel: CKKSAggregation, payload: bytes, memory: dict[str, Any], state: RecordDict) -> None:
    """Take the keys that another one made; they must be of this client's own scheme, and fit each other."""
    maker, public, envelope = _frames.unpack(payload, count=3, largest=CONTEXT_BYTES, origin="the server")
    secret = handover.open_(envelope, private=memory["private"], peer=maker, run=memory["run"], public_context=public)
    probe = np.linspace(-1, 1, channel.scheme.slots)
    opened = Cipher(channel.scheme, secret).decrypt(Cipher(channel.scheme, public).encrypt(probe), len(probe), origin="itself")
    if not np.abs(opened - probe).max() < 16 * channel.scheme.error(1):
        raise ProtocolAbort("keys must fit each other, got a secret key of another public key. Leave this run.")
    if Cipher(channel.scheme, public).holds_secret_key:
        raise ProtocolAbort("public context must not hold the secret key, got one that does. Leave this run.")
    state[MEMORY] = ConfigRecord({"run": memory["run"], "public": public, "secret": secret})


def _decrypt(world: World, model: nn.Module, channel: CKKSAggregation, payload: bytes, secret: bytes) -> bytes:
    """Decrypt a sum and add the noise that hides CKKS's error."""
    numbers = channel.length(*tensors(model))
    total: Reals = Cipher(channel.scheme, secret).decrypt(payload, numbers, origin="the server")
    if not total[-1] > LEAST_SENDERS - 0.5:
        raise ProtocolAbort(f"sum must be of ≥ {LEAST_SENDERS} senders, got {total[-1]:.3g}. Refused: it would show an upload.")
    std = channel.flooding(world, numbers, rms=float(np.sqrt(np.mean(total**2))))
    noise = flooding.noise(secret, payload, numbers, std=std)
    told: bytes = (total + noise).astype("<f8").tobytes()
    return told
