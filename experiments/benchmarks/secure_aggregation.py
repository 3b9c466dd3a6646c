"""Wall seconds of secure aggregation, all clients and the server in one process on one thread.

Run ``OMP_NUM_THREADS=1 python -m experiments.benchmarks.secure_aggregation [--json]``. Absolute figures depend on the machine and
its load; ``mask_share`` does not: masking speed as a share of the raw AES-256-CTR rate of the same run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.masking import Words, apply_masks
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.server import SecAggServer
from defenses.channel.secure_aggregation import SecureAggregation, ideal_sum

CELLS = ((10, 1_000_000, 1.0), (50, 100_000, 3.0))
"""Clients, words, and the most wall seconds that we accept."""


@dataclass(frozen=True)
class Timing:
    """One aggregation. Client stages are summed over all clients.

    Attributes:
        seconds: by stage, in the order in which they ran.
        upload_bytes: of one client that took part in every stage.
    """

    clients: int
    words: int
    dropped: int
    threshold: int
    target_seconds: float
    wall_seconds: float
    seconds: Mapping[str, float]
    upload_bytes: int


def aggregate(clients: int, words: int, dropped: int, target_seconds: float) -> Timing:
    """Run one aggregation; the ``dropped`` last clients share their keys and are lost before they send a vector."""
    parameters = Parameters(
        run_id="benchmark", round=1, clients=tuple(range(clients)), threshold=SecureAggregation().threshold_for(clients), length=words
    )
    draw = np.random.default_rng(0)
    vectors = {client: draw.integers(0, 1 << 32, words, dtype=np.uint32) for client in parameters.clients}
    seconds: dict[str, float] = {}
    upload: list[int] = []

    def lap(name: str, act: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = act()
        seconds[name] = time.perf_counter() - start
        if name.startswith("client"):
            upload.append(len(result[0]))
        return result

    start = time.perf_counter()
    server, parties = SecAggServer(parameters), {client: SecAggClient(parameters, client) for client in parameters.clients}
    replies = lap("client advertise", lambda: {client: party.advertise() for client, party in parties.items()})
    inbox = lap("server roster", lambda: server.receive_advertise(replies))
    replies = lap("client share", lambda: {client: party.share(inbox[client]) for client, party in parties.items()})
    inbox = lap("server envelopes", lambda: server.receive_share(replies))
    alive = parameters.clients[: clients - dropped]
    replies = lap("client mask", lambda: {client: parties[client].mask(inbox[client], vectors[client]) for client in alive})
    inbox = lap("server sum", lambda: server.receive_mask(replies))
    replies = lap("client unmask", lambda: {client: parties[client].unmask(inbox[client]) for client in alive})
    total, senders = lap("server unmask", lambda: server.receive_unmask(replies))
    wall = time.perf_counter() - start
    if not np.array_equal(total, ideal_sum({client: vectors[client] for client in senders})):
        raise AssertionError("the sum must be exact, got another. Fix the protocol before timing it.")
    return Timing(clients, words, dropped, parameters.threshold, target_seconds, wall, seconds, sum(upload))


def keystream_rate(size: int = 64 << 20, repeats: int = 3) -> float:
    """Raw AES-256-CTR keystream, GB/s: the best of a few passes over one buffer of ``size`` bytes."""
    zeros, buffer = bytes(size), bytearray(size + 16)

    def once() -> float:
        stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
        start = time.perf_counter()
        stream.update_into(zeros, buffer)
        return time.perf_counter() - start

    return size / min(once() for _ in range(repeats)) / 1e9


def masking_rate(words: int = 10_000_000, repeats: int = 3) -> float:
    """Masks applied to 32-bit words, GB/s: the best of a few passes of one mask over one vector."""
    vector: Words = np.zeros(words, "<u4")

    def once() -> float:
        start = time.perf_counter()
        apply_masks(vector, [(bytes(32), 1)])
        return time.perf_counter() - start

    return vector.nbytes / min(once() for _ in range(repeats)) / 1e9


def table(timings: Iterable[Timing]) -> str:
    """The timings as text, one block each."""
    lines = []
    for timing in timings:
        verdict = "ok" if timing.wall_seconds <= timing.target_seconds else "TOO SLOW"
        lines.append(
            f"n={timing.clients} d={timing.words} dropped={timing.dropped} t={timing.threshold}: {timing.wall_seconds:.2f} s "
            f"(target {timing.target_seconds:g} s, {verdict}), {timing.upload_bytes} B up per client"
        )
        lines += [f"    {name:<17} {value * 1e3:8.1f} ms" for name, value in timing.seconds.items()]
    return "\n".join(lines)


def main() -> None:
    """Time every cell without drop-outs and with one fifth of the clients lost."""
    raw, masking = keystream_rate(), masking_rate()
    timings = [aggregate(n, d, dropped, target) for n, d, target in CELLS for dropped in (0, n // 5)]
    if "--json" in sys.argv:
        rates = {"aes_256_ctr_gb_per_second": raw, "masking_gb_per_second": masking, "mask_share": masking / raw}
        print(json.dumps({**rates, "timings": [asdict(timing) for timing in timings]}, indent=2))
    else:
        print(f"AES-256-CTR {raw:.1f} GB/s, masking {masking:.1f} GB/s ({masking / raw:.2f} of it; ≥ 0.28 wanted)")
        print(table(timings))
    sys.exit(any(timing.wall_seconds > timing.target_seconds for timing in timings))


if __name__ == "__main__":
    main()
