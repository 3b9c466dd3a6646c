"""The SIMULATED enclave: every way to talk a client or the enclave into what it must not do, and the claim of the noise inside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from clients.private import records_held
from defenses.accounting import Adversary, guarantee
from defenses.channel._enclave import policy as policy_module
from defenses.channel._enclave import sealing
from defenses.channel._enclave.policy import CODE, Policy, measurement
from defenses.channel._enclave.program import Enclave, contribution
from defenses.channel._enclave.quote import QUOTE_BYTES, TCB, Quote, hardware_key, hardware_root, signed, verified
from defenses.channel.enclave import SimulatedEnclave
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.client_dp import ClientDP
from defenses.server.adaptive_clipping import AdaptiveClipping
from defenses.server.central_dp import CentralDP
from server.enclave import EnclaveProcess
from simulator.defense import Defense
from simulator.errors import FederationError, ProtocolAbort
from simulator.types import Update, Upload
from tests.defenses.tiny import Reporter, world

RUN, NONCE, SEED = b"r" * 16, b"n" * 16, b"s" * 32
KEY = hardware_key(0, "secret")
ROOT = hardware_root(KEY)
POLICY = Policy(min_contributors=2, releases=3, max_examples=4, update_length=6, length=8, clip_norm=1.0, noise_multiplier=0.0)
ALLOWED = frozenset({measurement(POLICY)})


def quote(**changes) -> Quote:
    facts = {"debug": False, "tcb": TCB, "measurement": measurement(POLICY), "enclave_key": b"k" * 32, "nonce": NONCE, "run": RUN}
    return Quote(**{**facts, **changes})


def check(data: bytes, nonce: bytes = NONCE) -> bytes:
    return verified(data, root=ROOT, allowed=ALLOWED, nonce=nonce, run=RUN)


def numbers(client: int) -> np.ndarray:
    return np.random.default_rng(client).normal(size=8).astype(np.float32)


def sealed(enclave: Enclave, client: int, *, round: int = 1, examples: int = 2, run: bytes = RUN, vector: np.ndarray | None = None) -> bytes:
    content = contribution(examples, SEED, numbers(client) if vector is None else vector)
    return sealing.seal(content, enclave_key=enclave.public_key, run=run, round=round, client=client)


def filled(policy: Policy = POLICY, clients: int = 3) -> Enclave:
    enclave = Enclave(policy, RUN)
    for client in range(clients):
        enclave.receive(1, client, sealed(enclave, client))
    return enclave


# --- what a client demands of a quote


def test_good_quote_gives_the_key_to_seal_to() -> None:
    data = signed(quote(), KEY)
    assert len(data) == QUOTE_BYTES
    assert check(data) == b"k" * 32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"measurement": measurement(replace(POLICY, min_contributors=1))}, "another policy runs there"),
        ({"measurement": bytes(32)}, "other code"),
        ({"nonce": b"o" * 16}, "stale or a replay"),
        ({"run": b"o" * 16}, "one of another"),
        ({"debug": True}, "debug mode"),
        ({"tcb": TCB - 1}, "microcode"),
    ],
)
def test_genuine_quote_of_the_wrong_thing_is_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ProtocolAbort, match=reason):
        check(signed(quote(**changes), KEY))


def test_quote_serves_one_nonce_only() -> None:
    data = signed(quote(), KEY)
    check(data)
    with pytest.raises(ProtocolAbort, match="stale or a replay"):
        check(data, nonce=b"a fresh one     ")


def test_quote_by_another_key_is_refused() -> None:
    for key in (hardware_key(1, "secret"), hardware_key(0, "other")):
        with pytest.raises(ProtocolAbort, match="signed by the SIMULATED hardware"):
            check(signed(quote(), key))


def test_every_bit_of_a_quote_is_signed() -> None:
    data = signed(quote(), KEY)
    for place in range(0, len(data), 7):
        with pytest.raises(ProtocolAbort):
            check(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(ProtocolAbort, match="bytes"):
            check(wrong)


def test_measurement_is_of_the_code_the_policy_and_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = tuple(Path(shutil.copy(path, tmp_path / f"{place}")).rename(tmp_path / path.name) for place, path in enumerate(CODE))
    assert measurement(POLICY, same) == measurement(POLICY)
    program = next(path for path in same if path.name == "program.py")
    program.write_text(program.read_text().replace("policy.min_contributors", "1"))
    assert measurement(POLICY, same) != measurement(POLICY)
    changed = [replace(POLICY, **{name: getattr(POLICY, name) + 1}) for name in POLICY.__dataclass_fields__]
    assert len({measurement(policy) for policy in (POLICY, *changed)}) == 8
    before = measurement(POLICY)
    monkeypatch.setattr(policy_module, "version", lambda name: "0")
    assert measurement(POLICY) != before
    assert Policy.from_bytes(POLICY.to_bytes()) == POLICY


def test_all_of_our_code_that_runs_inside_is_measured() -> None:
    """The modules of ours that a fresh process has loaded after starting the enclave's program, but for empty packages."""
    import subprocess
    import sys

    script = "import sys, defenses.channel._enclave.__main__; print(*[m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('defenses', 'simulator')])"
    root = Path(policy_module.__file__).parents[3]
    loaded = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert {path for path in map(Path, loaded) if path.read_text().strip()} == set(CODE)


# --- the sealed channel


def test_sealed_blob_opens_only_as_what_it_was_sealed_as() -> None:
    private = X25519PrivateKey.generate()
    place = {"run": RUN, "round": 3, "client": 5}
    blob = sealing.seal(b"content", enclave_key=private.public_key().public_bytes_raw(), **place)
    assert len(blob) == len(b"content") + sealing.OVERHEAD_BYTES
    assert sealing.open_(blob, private=private, **place) == b"content"
    for wrong in ({"run": b"o" * 16}, {"round": 4}, {"client": 6}, {"private": X25519PrivateKey.generate()}):
        with pytest.raises(ProtocolAbort, match="unaltered, got another"):
            sealing.open_(blob, **{"private": private, **place, **wrong})
    for at in range(len(blob)):
        with pytest.raises(ProtocolAbort):
            sealing.open_(blob[:at] + bytes([blob[at] ^ 128]) + blob[at + 1 :], private=private, **place)
    for short in (b"", blob[:20], blob[:40], bytes(60)):
        with pytest.raises(ProtocolAbort):
            sealing.open_(short, private=private, **place)


def test_two_seals_of_one_content_share_nothing() -> None:
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    one, other = (sealing.seal(bytes(1000), enclave_key=key, run=RUN, round=1, client=0) for _ in range(2))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 20


# --- what the enclave refuses, and what it releases


def test_releases_the_weighted_mean_and_nothing_else() -> None:
    enclave = Enclave(POLICY, RUN)
    examples = [1, 3, 4]
    for client in (2, 0, 1):
        enclave.receive(1, client, sealed(enclave, client, examples=examples[client]))
    released = enclave.release(1)
    assert (released.contributors, released.num_examples) == ((0, 1, 2), 8)
    assert np.allclose(released.mean, sum(n * numbers(c).astype(float) for c, n in enumerate(examples)) / 8, atol=1e-12)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (lambda e: sealed(e, 3)[:-1] + bytes([sealed(e, 3)[-1] ^ 1]), "unaltered"),
        (lambda e: sealed(e, 2), "client 3's of round 1"),
        (lambda e: sealed(e, 3, round=2), "client 3's of round 1"),
        (lambda e: sealed(e, 3, run=b"o" * 16), "unaltered"),
        (lambda e: sealed(Enclave(POLICY, RUN), 3), "unaltered"),
        (lambda e: sealed(e, 3, examples=5), r"\[1, 4\]"),
        (lambda e: sealed(e, 3, examples=0), r"\[1, 4\]"),
        (lambda e: sealed(e, 3, vector=np.zeros(9, np.float32)), "8 numbers"),
        (lambda e: sealed(e, 3, vector=np.full(8, np.nan, np.float32)), "finite"),
    ],
    ids=["altered", "of another client", "of another round", "of another run", "for an enclave that restarted", "overweight", "weightless",
         "too long", "not finite"],
)  # fmt: skip
def test_blob_that_is_not_what_it_should_be_is_refused_and_spoils_nothing(blob, reason: str) -> None:
    enclave = filled()
    with pytest.raises(ProtocolAbort, match=reason):
        enclave.receive(1, 3, blob(enclave))
    assert enclave.release(1).contributors == (0, 1, 2)


def test_client_contributes_once_and_rounds_are_released_once_and_go_forward() -> None:
    enclave = filled()
    with pytest.raises(ProtocolAbort, match="second blob"):
        enclave.receive(1, 0, sealed(enclave, 0))
    enclave.release(1)
    with pytest.raises(ProtocolAbort, match="released once"):
        enclave.release(1)
    with pytest.raises(ProtocolAbort, match="released once"):
        enclave.receive(1, 3, sealed(enclave, 3))
    for client in range(2):
        enclave.receive(5, client, sealed(enclave, client, round=5))
    with pytest.raises(ProtocolAbort, match="only go forward"):
        enclave.receive(4, 2, sealed(enclave, 2, round=4))
    assert enclave.release(5).contributors == (0, 1)


def test_no_more_rounds_are_released_than_the_claim_counts() -> None:
    enclave = filled()
    for round in (1, 2, 3, 4):
        for client in range(2 if round > 1 else 0):
            enclave.receive(round, client, sealed(enclave, client, round=round))
        if round < 4:
            enclave.release(round)
    with pytest.raises(ProtocolAbort, match="≤ 3 by policy"):
        enclave.release(4)


def test_round_that_is_left_behind_is_gone() -> None:
    enclave = filled()
    enclave.receive(2, 0, sealed(enclave, 0, round=2))
    with pytest.raises(ProtocolAbort, match="got 0"):
        enclave.release(1)


@pytest.mark.parametrize("clients", [0, 1])
def test_fewer_contributors_than_the_policy_get_nothing_released(clients: int) -> None:
    enclave = filled(clients=clients)
    with pytest.raises(ProtocolAbort, match=f"≥ 2 by policy, got {clients}"):
        enclave.release(1)
    for client in range(clients, 2):  # the round stays open
        enclave.receive(1, client, sealed(enclave, client))
    assert enclave.release(1).contributors == (0, 1)


def test_noise_lies_on_the_clipped_sum_and_spares_the_buffers() -> None:
    policy = Policy(min_contributors=2, releases=3, max_examples=4, update_length=20000, length=20002, clip_norm=0.5, noise_multiplier=3.0)
    vector = np.concatenate((np.ones(20000), [7.0, 8.0])).astype(np.float32)

    def mean(multiplier: float, seed: bytes = SEED, norm: float = 0.5) -> np.ndarray:
        enclave = Enclave(replace(policy, noise_multiplier=multiplier, clip_norm=norm), RUN)
        for client, examples in enumerate((1, 4)):
            blob = sealing.seal(contribution(examples, seed, vector), enclave_key=enclave.public_key, run=RUN, round=1, client=client)
            enclave.receive(1, client, blob)
        return enclave.release(1).mean

    clipped = mean(1e-12)
    assert np.linalg.norm(clipped[:20000]) == pytest.approx(0.5)
    assert np.allclose(mean(0.0)[:20000], 1), "without noise it does not clip"
    noise = (mean(3.0) - clipped)[:20000]
    assert noise.std() == pytest.approx(3.0 * 0.5 / (5 / 4), rel=0.02)
    assert abs(noise.mean()) < 4 * noise.std() / np.sqrt(20000)
    assert list(mean(3.0)[-2:]) == [7.0, 8.0]
    assert np.array_equal(mean(3.0), mean(3.0)), "the seeds decide"
    assert abs(np.corrcoef(noise, (mean(3.0, b"t" * 32) - clipped)[:20000])[0, 1]) < 0.04


# --- the process


@pytest.fixture(scope="module")
def process() -> Iterator[EnclaveProcess]:
    enclave = EnclaveProcess(POLICY, KEY, RUN)
    yield enclave
    enclave.close()


def test_process_attests_to_its_own_key_takes_blobs_and_keeps_its_memory(process: EnclaveProcess) -> None:
    key = check(process.attest(NONCE))
    for client in range(3):
        content = contribution(2, SEED, numbers(client))
        process.receive(1, client, sealing.seal(content, enclave_key=key, run=RUN, round=1, client=client))
    with pytest.raises(ProtocolAbort, match="Memory is closed"):
        process.memory()
    with pytest.raises(ProtocolAbort, match="unaltered"):
        process.receive(1, 3, bytes(200))
    released = process.release(1)
    assert np.allclose(released.mean, sum(numbers(client).astype(float) for client in range(3)) / 3, atol=1e-12)
    with pytest.raises(ProtocolAbort, match="released once"):
        process.release(1)


def test_debug_enclave_is_open_to_its_host_which_is_why_clients_refuse_it() -> None:
    enclave = EnclaveProcess(POLICY, KEY, RUN, debug=True)
    try:
        with pytest.raises(ProtocolAbort, match="debug mode"):
            check(enclave.attest(NONCE))
        key = enclave.attest(NONCE)[35:67]
        blob = sealing.seal(contribution(2, SEED, numbers(0)), enclave_key=key, run=RUN, round=1, client=0)
        enclave.receive(1, 0, blob)
        assert np.array_equal(np.frombuffer(enclave.memory()), numbers(0).astype(float))
    finally:
        enclave.close()


def test_enclave_that_died_is_reported() -> None:
    enclave = EnclaveProcess(POLICY, KEY, RUN)
    enclave._process.kill()
    enclave._process.wait()
    with pytest.raises(FederationError, match="must stay alive"):
        enclave.attest(NONCE)
    enclave._process.stdout.close()  # type: ignore[union-attr]


# --- the defense


def test_codec_gives_the_upload_back() -> None:
    defense, of = SimulatedEnclave(min_contributors=2), world(clients=3, training={"batch_size": 4})
    tensors, buffers = {"w": torch.arange(6.0).reshape(2, 3)}, {"mean": torch.tensor([1.0]), "count": torch.tensor(3)}
    policy = defense.policy(of, tensors, buffers)
    assert (policy.update_length, policy.length, policy.max_examples, policy.min_contributors, policy.releases) == (6, 7, 4, 2, 1)
    enclave = Enclave(policy, RUN)
    for client in range(2):
        content = defense.encode(Upload(frozenset({client}), Update("delta", tensors), buffers, 2), SEED)
        enclave.receive(1, client, sealing.seal(content, enclave_key=enclave.public_key, run=RUN, round=1, client=client))
    upload = defense.decode(enclave.release(1), kind="delta", parameters=tensors, buffers=buffers)
    assert (upload.senders, upload.num_examples, list(upload.buffers)) == (frozenset({0, 1}), 4, ["mean"])
    assert torch.equal(upload.update.tensors["w"], tensors["w"])
    assert SimulatedEnclave().policy(of, tensors, buffers).min_contributors == 3


def test_noise_inside_is_a_guarantee_against_the_server_which_noise_after_it_is_not() -> None:
    def epsilon(*defenses, adversary="server") -> float:
        of = world(*defenses, rounds=3)
        return guarantee(of, records_held=records_held(of), delta=1e-5, adversary=adversary).epsilon

    inside = SimulatedEnclave(clip_norm=0.5, noise_multiplier=2.0)
    mu = np.sqrt(3) / 2.0
    of = world(inside, rounds=3)
    found = guarantee(of, records_held=records_held(of), delta=1e-5)
    assert (found.adversary, found.unit, found.accountant) == ("server", "client", "exact")
    assert "sees every upload" not in found.sentence
    assert "a SIMULATED enclave that is sound, and sees one noised mean a round" in found.sentence
    assert found.epsilon == pytest.approx(_gaussian_epsilon(mu, 1e-5), rel=1e-6)
    assert epsilon(SimulatedEnclave()) == float("inf")
    assert epsilon(CentralDP(0.5, 2.0)) == float("inf")
    assert epsilon(SecureAggregation(), CentralDP(0.5, 2.0)) == float("inf")
    assert epsilon(CentralDP(0.5, 2.0), SimulatedEnclave()) == float("inf")
    assert epsilon(inside, adversary="outsider") == found.epsilon


def test_what_holds_against_a_server_that_sees_every_upload_is_kept_beside_a_smaller_figure_that_does_not() -> None:
    """Noise at the client bounds who opens the enclave, too, at a larger ε; where it is the smaller one, it says all that there is to say."""

    def found(*defenses: Defense, adversary: Adversary = "server") -> list[tuple[float, bool]]:
        of = world(*defenses)
        one = guarantee(of, records_held=records_held(of), adversary=adversary)
        for each in (one, *one.others):
            assert each.sentence.split(" Adjacency")[0] in one.sentence
        return [(round(each.epsilon, 2), "sees every upload" in each.sentence.split("Adjacency")[0]) for each in (one, *one.others)]

    enclave = SimulatedEnclave(noise_multiplier=2.0)
    weak, strong = (round(_gaussian_epsilon(1 / z, 1e-5), 2) for z in (1.0, 4.0))
    assert found(ClientDP(noise_multiplier=1.0), enclave) == [(1.99, False), (weak, True)]
    assert found(ClientDP(noise_multiplier=4.0), enclave) == [(strong, True)]
    assert found(ClientDP(noise_multiplier=1.0), enclave, adversary="outsider") == [(1.99, False)]  # to whom both are one and the same


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("reporter", [Reporter(), AdaptiveClipping(noise_multiplier=0.0)])
def test_a_report_beside_the_update_has_no_noise_wherever_in_the_stack_it_is_made(reporter: Defense, place: int) -> None:
    """The noise is added inside, after every hook of a client's."""
    stack = [SimulatedEnclave(noise_multiplier=2.0)]
    stack.insert(place, reporter)  # type: ignore[arg-type]
    of = world(*stack)
    found = guarantee(of, records_held=records_held(of))
    assert found.epsilon == float("inf")
    assert f"{reporter.name} reports on the update beside it, without the noise of simulated_enclave" in found.sentence


def _gaussian_epsilon(mu: float, delta: float) -> float:
    from scipy.optimize import brentq
    from scipy.stats import norm

    return brentq(lambda e: norm.cdf(-e / mu + mu / 2) - np.exp(e) * norm.cdf(-e / mu - mu / 2) - delta, 0, 100)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"min_contributors": 1}, "0 or ≥ 2"), ({"noise_multiplier": -1}, "noise_multiplier"), ({"clip_norm": 0.0}, "clip_norm"),
     ({"clip_norm": float("inf"), "noise_multiplier": 1.0}, "clip_norm")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SimulatedEnclave(**settings)


def test_refuses_worlds_in_which_it_cannot_act() -> None:
    plain, noisy = SimulatedEnclave(), SimulatedEnclave(noise_multiplier=1.0)
    assert plain.refuses(world(plain)) is None
    assert "cohort must be ≥ 2" in (plain.refuses(world(plain, clients=1)) or "")
    assert "min_contributors must be ≤ the cohort of 4" in (SimulatedEnclave(min_contributors=5).refuses(world()) or "")
    assert plain.refuses(world(plain, batch_norm=True)) is None
    assert "BatchNorm" in (noisy.refuses(world(noisy, batch_norm=True)) or "")
