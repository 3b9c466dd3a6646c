"""Seconds of secure aggregation, all clients and the server in one process on one thread, and what its graphs certify.

Run ``OMP_NUM_THREADS=1 python -m experiments.benchmarks.secure_aggregation [--json | --small | --graph]``. Absolute figures depend on
the machine and its load; ``mask_share`` does not: masking speed as a share of the raw AES-256-CTR rate of the same run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from defenses.channel._secagg import graph
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.encoding import ideal_sum
from defenses.channel._secagg.identity import Identity, derived_private, public_of
from defenses.channel._secagg.keyring import KeyRing, unpack_advert
from defenses.channel._secagg.masking import Words, apply_masks
from defenses.channel._secagg.server import SecAggServer
from defenses.channel.secure_aggregation import SecureAggregation


def setting(clients: int, graph: Literal["complete", "k-regular"] = "complete") -> SecureAggregation:
    """The channel as it is timed: with a range at which words have 32 bits and rounding stays below 1e-4 of a typical mean.

    At the default range of 8 words have 64 bits beyond 32 clients, or 65 with one example each.
    """
    return SecureAggregation(clip_range=2.0 if clients <= 100 else 0.25, graph=graph)


CELLS = (
    (10, 1_000_000, setting(10), 1.0),
    (50, 100_000, setting(50), 3.0),
    (100, 1_000_000, setting(100), 12.0),
    (100, 1_000_000, setting(100, "k-regular"), 6.0),
    (1000, 100_000, setting(1000, "k-regular"), 30.0),
)
"""Clients, words, settings, and the most seconds that we accept."""
SHARES = ((0.05, 0.05), (0.1, 0.1), (0.2, 0.05), (0.2, 0.2), (0.33, 0.05), (0.33, 0.33))
"""Corrupt clients and drop-outs of the table of graphs, as shares of the cohort."""


@dataclass(frozen=True)
class Timing:
    """One aggregation. Client stages are summed over all clients.

    Attributes:
        plan: the graph, and what is certified of it.
        seconds: CPU seconds by stage, in the order in which they ran.
        upload_bytes: of the first client, which took part in every stage.
        bytes_per_word: upload of the client that sent most, for each word of its vector.
    """

    clients: int
    words: int
    dropped: int
    plan: str
    target_seconds: float
    wall_seconds: float
    cpu_seconds: float
    seconds: Mapping[str, float]
    upload_bytes: int
    bytes_per_word: float


def aggregate(clients: int, words: int, dropped: int, target_seconds: float, settings: SecureAggregation) -> Timing:
    """Run one aggregation; the ``dropped`` last clients share their keys and are lost before they send a vector.

    With keys that outlive a round, what is timed is a second round: the keys are there and the secrets agreed on.

    Raises:
        AssertionError: the sum is not the sum.
    """
    ids, rings = range(clients), {client: KeyRing.fresh() for client in range(clients)} if settings.setup == "once" else {}
    template = {"vector": torch.empty(words - 1)}
    parameters = settings.parameters(
        run_id="benchmark", round=1, rounds=1, clients=ids, max_examples=2, template=template, buffers={}, seed=bytes(32)
    )  # fmt: skip
    people = {client: derived_private(b"", client) for client in ids} if settings.active else {}
    directory = {client: public_of(private) for client, private in people.items()}
    draw = np.random.default_rng(0)
    vectors = {client: draw.integers(0, 1 << 32, words, dtype=np.uint32) for client in parameters.clients}
    seconds: dict[str, float] = {}
    upload = dict.fromkeys(ids, 0)

    def lap(name: str, act: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = act()
        seconds[name] = time.process_time() - start
        if name.startswith("client"):
            for client, message in result.items():
                upload[client] += len(message)
        return result

    if rings:
        first, adverts = replace(parameters, round=0), {client: unpack_advert(ring.advertise(), client) for client, ring in rings.items()}
        for client, roster in SecAggServer(first).use_keys(adverts).items():
            SecAggClient(first, client, ring=rings[client]).share(roster)
    start, cpu = time.perf_counter(), time.process_time()
    server = SecAggServer(parameters)
    parties = {
        client: SecAggClient(
            parameters, client, ring=rings.get(client), identity=Identity(people[client], directory) if people else None
        )
        for client in ids
    }  # fmt: skip
    if rings:
        inbox = lap("server roster", lambda: server.use_keys({c: unpack_advert(ring.advertise(), c) for c, ring in rings.items()}))
    else:
        replies = lap("client advertise", lambda: {client: party.advertise() for client, party in parties.items()})
        inbox = lap("server roster", lambda: server.receive_advertise(replies))
    replies = lap("client share", lambda: {client: party.share(inbox[client]) for client, party in parties.items()})
    inbox = lap("server envelopes", lambda: server.receive_share(replies))
    alive = parameters.clients[: clients - dropped]
    replies = lap("client mask", lambda: {client: parties[client].mask(inbox[client], vectors[client]) for client in alive})
    inbox = lap("server sum", lambda: server.receive_mask(replies))
    if people:
        replies = lap("client sign", lambda: {client: parties[client].sign(inbox[client]) for client in alive})
        inbox = lap("server signatures", lambda: server.receive_sign(replies))
    replies = lap("client unmask", lambda: {client: parties[client].unmask(inbox[client]) for client in alive})
    total, senders = lap("server unmask", lambda: server.receive_unmask(replies))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if not np.array_equal(total, ideal_sum({client: vectors[client] for client in senders})):
        raise AssertionError("the sum must be exact, got another. Fix the protocol before timing it.")
    plan, most = str(settings.plan_for(clients, rounds=1)), max(upload.values()) / words
    return Timing(clients, words, dropped, plan, target_seconds, wall, cpu, seconds, upload[0], most)


def keystream_rate(size: int = 64 << 20, repeats: int = 3) -> float:
    """Raw AES-256-CTR keystream, GB per CPU second: the best of a few passes over one buffer of ``size`` bytes."""
    zeros, buffer = bytes(size), bytearray(size + 16)

    def once() -> float:
        stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
        start = time.process_time()
        stream.update_into(zeros, buffer)
        return time.process_time() - start

    return size / min(once() for _ in range(repeats)) / 1e9


def masking_rate(words: int = 10_000_000, repeats: int = 3) -> float:
    """Masks applied to 32-bit words, GB per CPU second: the best of a few passes of one mask over one vector."""
    vector: Words = np.zeros(words, "<u4")

    def once() -> float:
        start = time.process_time()
        apply_masks(vector, [(bytes(32), 1)])
        return time.process_time() - start

    return vector.nbytes / min(once() for _ in range(repeats)) / 1e9


def table(timings: Iterable[Timing]) -> str:
    """The timings as text, one block each."""
    lines = []
    for timing in timings:
        verdict = "ok" if timing.cpu_seconds <= timing.target_seconds else "TOO SLOW"
        lines.append(
            f"n={timing.clients} d={timing.words} dropped={timing.dropped}, {timing.plan}\n    {timing.cpu_seconds:.2f} CPU s, "
            f"{timing.wall_seconds:.2f} s of wall time (target {timing.target_seconds:g} s, {verdict}), "
            f"{timing.upload_bytes} B up per client, at most {timing.bytes_per_word:.3f} B a word"
        )
        lines += [f"    {name:<17} {value * 1e3:8.1f} ms" for name, value in timing.seconds.items()]
    return "\n".join(lines)


def graphs() -> str:
    """The smallest certified pairs (k, t) and their bits of security and correctness, as a table."""
    lines = ["n (corrupt, dropped)  k, t; bits of security, correctness"]
    for clients in (50, 100, 200, 500, 1000, 10_000):
        for corrupt, dropout in SHARES:
            plan = graph.solve(clients, corrupt, dropout)
            lines.append(f"{clients} ({corrupt:g}, {dropout:g})  {plan or 'none: refused'}")
    return "\n".join(lines)


def main() -> None:
    """Time every cell without drop-outs and with as many as its graph stands, at most one in ten."""
    if "--graph" in sys.argv:
        print(graphs())
        return
    raw, masking = keystream_rate(), masking_rate()
    cells = CELLS[:2] if "--small" in sys.argv else CELLS
    timings = [
        aggregate(n, d, dropped, target, settings)
        for n, d, settings, target in cells
        for dropped in (0, n // 10 if settings.graph == "complete" else int(n * settings.dropout))
    ]
    if "--json" in sys.argv:
        rates = {"aes_256_ctr_gb_per_second": raw, "masking_gb_per_second": masking, "mask_share": masking / raw}
        print(json.dumps({**rates, "timings": [asdict(timing) for timing in timings]}, indent=2))
    else:
        print(f"AES-256-CTR {raw:.1f} GB/s, masking {masking:.1f} GB/s ({masking / raw:.2f} of it; ≥ 0.28 wanted)")
        print(table(timings))
    sys.exit(any(timing.cpu_seconds > timing.target_seconds for timing in timings))


if __name__ == "__main__":
    main()
