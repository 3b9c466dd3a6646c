"""The host of the SIMULATED enclave: starts it, carries quotes out and blobs in, and gets one mean a round. It sees no plaintext."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import defenses
from defenses.channel import _frames
from defenses.channel._enclave import pipe
from defenses.channel._enclave.policy import Policy
from defenses.channel._enclave.program import Release
from defenses.channel._enclave.quote import hardware_key
from defenses.channel.enclave import SimulatedEnclave
from server.ask import ask, payloads
from server.curious import CuriousGrid
from simulator import wire
from simulator.errors import FederationError, ProtocolAbort
from simulator.network import network, tensors
from simulator.types import Broadcast, Upload
from simulator.world import World

PROGRAM = "defenses.channel._enclave"
HANGUP_SECONDS = 10


class EnclaveProcess:
    """The pipe to a SIMULATED enclave in a process of its own.

    Args:
        policy: what it shall release; part of its measurement.
        key: the private key of the SIMULATED hardware, on its way into it.
        run: of the federation.
        debug: whether the host may read its memory; the quote says so.
        tcb: version of the hardware's microcode; 0 is the present one.
    """

    def __init__(self, policy: Policy, key: bytes, run: bytes, *, debug: bool = False, tcb: int | None = None) -> None:
        root = str(Path(str(defenses.__file__)).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root,
            env={**os.environ, "PYTHONPATH": root},
        )  # fmt: skip
        start = [key, policy.to_bytes(), run, b"\x01" if debug else b"", b"" if tcb is None else tcb.to_bytes(2, "little")]
        pipe.send(self._process.stdin, start)  # type: ignore[arg-type]

    def attest(self, nonce: bytes) -> bytes:
        """A signed quote over a client's nonce."""
        return self._asked(b"attest", data=nonce)

    def receive(self, round: int, client: int, blob: bytes) -> None:
        """Carry a sealed contribution in.

        Raises:
            ProtocolAbort: the enclave refuses it.
        """
        self._asked(b"receive", round, client, blob)

    def release(self, round: int) -> Release:
        """The mean of a round.

        Raises:
            ProtocolAbort: the policy forbids it.
        """
        clients, examples, mean = _frames.unpack(self._asked(b"release", round), count=3, largest=pipe.LARGEST, origin="the enclave")
        contributors = struct.unpack(f"<{len(clients) // 8}Q", clients)
        return Release(contributors, struct.unpack("<Q", examples)[0], np.frombuffer(mean, "<f8").astype(np.float64))

    def memory(self) -> bytes:
        """The contributions that it holds, in the clear.

        Raises:
            ProtocolAbort: the enclave is not in debug mode.
        """
        return self._asked(b"dump")

    def close(self) -> None:
        """Hang up; the process ends, and its keys with it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(HANGUP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _asked(self, command: bytes, round: int = 0, client: int = 0, data: bytes = b"") -> bytes:
        try:
            pipe.send(self._process.stdin, [command, pipe.PLACE.pack(round, client), data])  # type: ignore[arg-type]
            answer = pipe.receive(self._process.stdout, 2)  # type: ignore[arg-type]
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise FederationError(f"simulated enclave must stay alive, got exit code {self._process.poll()}. See its errors above.")
        if answer[0]:
            raise ProtocolAbort(answer[0].decode())
        return answer[1]


@contextmanager
def enclave_channel(world: World) -> Iterator[Any]:
    """Collects through a SIMULATED enclave, which lives as long as the channel."""
    channel, run = _channel(world), SimulatedEnclave.run(world)
    template = tensors(network(world.architecture, world.data.load().schema, world.training, world.seed))
    enclave = EnclaveProcess(channel.policy(world, *template), hardware_key(world.seed, world.secret), run)

    def collect(
        grid: CuriousGrid, world: World, nodes: Mapping[int, int], clients: Sequence[int], broadcast: Broadcast
    ) -> tuple[list[Upload], dict[int, str]]:
        """One round: the one upload that the server learns, and who was lost at which stage and why."""
        lost: dict[int, str] = {}
        try:
            return [aggregate(grid, world, enclave, nodes, clients, broadcast, lost)], lost
        except ProtocolAbort as error:
            for client, reason in sorted(lost.items()):
                grid.record_lost(broadcast.round, client, reason)
            raise FederationError(f"simulated_enclave stopped in round {broadcast.round}: {error} {' '.join(lost.values())}") from error

    try:
        yield collect
    finally:
        enclave.close()


def aggregate(
    grid: CuriousGrid, world: World, enclave: EnclaveProcess, nodes: Mapping[int, int], clients: Sequence[int], broadcast: Broadcast,
    lost: dict[int, str],
) -> Upload:  # fmt: skip
    """Attest to each client, collect sealed uploads, and have their mean released.

    Raises:
        ProtocolAbort: the policy forbids it.
    """
    timeout, round = world.federation.timeout_seconds, broadcast.round

    def stage(name: str, asked: Mapping[int, bytes], sent: Broadcast | None = None) -> dict[int, bytes]:
        contents = {client: wire.pack_stage(name, payload, sent) for client, payload in asked.items()}
        return payloads(ask(grid, nodes, wire.CHANNEL, contents, round=round, timeout=timeout), name, lost)

    nonces = stage("nonce", dict.fromkeys(clients, b""))
    blobs = stage("seal", {client: enclave.attest(nonce) for client, nonce in nonces.items()}, broadcast)
    for client, blob in blobs.items():
        try:
            enclave.receive(round, client, blob)
        except ProtocolAbort as error:
            lost[client] = f"client {client} sent what cannot be used (stage seal): {error}"
    upload = _channel(world).decode(
        enclave.release(round), kind="delta" if broadcast.training.algorithm == "fedavg" else "gradient",
        parameters=broadcast.parameters, buffers=broadcast.buffers,
    )  # fmt: skip
    grid.record_aggregate(upload)
    return upload


def _channel(world: World) -> SimulatedEnclave:
    assert isinstance(world.channel, SimulatedEnclave)
    return world.channel
