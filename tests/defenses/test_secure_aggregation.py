"""Secure aggregation: exact sums under drop-outs, masks that hide, parties that refuse, and a rounding error that stays small."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.channel._secagg import client as client_module
from defenses.channel._secagg import envelope, keys, messages, shamir
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.encoding import ideal_sum
from defenses.channel._secagg.masking import Words, apply_masks
from defenses.channel._secagg.memory import Stage
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import Parameters, run_tag
from defenses.channel._secagg.quantization import Scale
from defenses.channel._secagg.server import SecAggServer
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.clip import clip_to_norm
from simulator.errors import ProtocolAbort
from simulator.types import LocalTraining, Update
from simulator.world import Federation, World
from tests.secagg import STAGES, assert_exact_sum, chi_squared, drop_outs, make_parameters, random_vectors, rehearse, up_to

# --- the sum -------------------------------------------------------------------------------------------------------------------------


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Parameters, dict[str, set[int]], int]:
    """A cohort, a threshold and drop-outs at every stage that leave at least the threshold."""
    n = draw(st.integers(2, 9))
    threshold = draw(st.integers(n // 2 + 1, n))
    parameters = make_parameters(n, draw(st.integers(1, 40)), threshold=threshold, bits=draw(st.sampled_from([32, 64])))
    return parameters, draw(drop_outs(parameters, most=n - threshold)), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(scenarios())
def test_sum_is_exact_under_drop_outs_at_every_stage(scenario: tuple[Parameters, dict[str, set[int]], int]) -> None:
    parameters, lost, seed = scenario
    vectors, result = assert_exact_sum(parameters, lost, seed)
    assert np.array_equal(result.total, ideal_sum({client: vectors[client] for client in result.senders}))


@pytest.mark.parametrize("stage", STAGES)
def test_fewer_than_threshold_aborts_and_names_the_counts(stage: str) -> None:
    parameters = make_parameters(6, threshold=4)
    with pytest.raises(ProtocolAbort, match=r"≥ threshold = 4 of 6 clients, got 3"):
        rehearse(parameters, random_vectors(parameters), lost={stage: set(parameters.clients[:3])})


@pytest.mark.parametrize(("n", "tolerated"), [(2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 2)])
def test_small_cohorts_count_the_owners_share(n: int, tolerated: int) -> None:
    parameters = make_parameters(n)
    result = rehearse(parameters, random_vectors(parameters), lost={"mask": set(parameters.clients[:tolerated])})
    assert len(result.senders) == n - tolerated
    with pytest.raises(ProtocolAbort, match="got"):
        rehearse(parameters, random_vectors(parameters), lost={"mask": set(parameters.clients[: tolerated + 1])})


def test_long_vectors_cross_chunk_borders() -> None:
    parameters = make_parameters(3, (1 << 18) * 2 + 5)
    vectors = random_vectors(parameters)
    result = rehearse(parameters, vectors)
    assert np.array_equal(result.total, sum(vectors.values()).astype(np.uint32))


# --- what the server sees --------------------------------------------------------------------------------------------------------------


def test_masked_vector_is_uniform_and_uncorrelated() -> None:
    parameters = make_parameters(4, 100_000)
    vectors = {client: np.full(parameters.length, client, np.uint32) for client in parameters.clients}  # as far from uniform as can be
    ramp = parameters.clients[1]
    vectors[ramp] = np.arange(parameters.length, dtype=np.uint32) * np.uint32(42_949)
    for client, message in rehearse(parameters, vectors).sent["mask"].items():
        masked = message[messages.HEADER_BYTES :]
        assert abs(chi_squared(masked) - 255) < 6 * 22.6
        if client == ramp:
            assert abs(np.corrcoef(np.frombuffer(masked, np.uint32), vectors[client])[0, 1]) < 6 / parameters.length**0.5


def test_late_vector_of_a_dropped_client_stays_masked() -> None:
    """The reason for the second mask: once the server has a client's pairwise keys, the vector must still be hidden."""
    parameters = make_parameters(4, 50_000)
    vectors = {client: np.zeros(parameters.length, np.uint32) for client in parameters.clients}
    parties, inbox = up_to("mask", parameters, vectors)
    late = parameters.clients[0]
    pairwise = [(key, -1 if late < peer else 1) for peer, key in parties[late]._memory.pair_keys.items()]
    assert len(pairwise) == 3
    vector = np.frombuffer(parties[late].mask(inbox[late], vectors[late]), np.uint32, offset=messages.HEADER_BYTES).copy()
    apply_masks(vector, pairwise)  # type: ignore[arg-type]
    assert abs(chi_squared(vector.tobytes()) - 255) < 6 * 22.6


def test_no_number_of_examples_in_clear() -> None:
    secagg, lengths = SecureAggregation(bits=64), []
    for num_examples in (1, 0x1234_5678_9ABC):
        update = Update("delta", {"w": torch.zeros(20)})
        parameters = secagg.parameters(run_id="r", round=1, rounds=1, clients=(0, 1, 2), max_examples=1 << 48, template=update.tensors, buffers={})
        vector = secagg.encode(update, {}, num_examples, cohort=3, max_examples=1 << 48, rng=torch.Generator())
        log = rehearse(parameters, dict.fromkeys(parameters.clients, vector))
        crossed = [message for stage in log.sent.values() for message in stage.values()]
        if num_examples > 1:
            assert not any(num_examples.to_bytes(6, order) in message for message in crossed for order in ("little", "big"))
        assert int(log.total[-1]) == 3 * num_examples
        lengths.append(sorted(map(len, crossed)))
    assert lengths[0] == lengths[1]


def test_two_runs_never_share_a_keystream(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bytes] = []

    def record(vector: Words, masks: list[tuple[bytes, int]]) -> None:
        masks = list(masks)
        used.extend(key for key, _ in masks)
        apply_masks(vector, masks)  # type: ignore[arg-type]

    monkeypatch.setattr(client_module, "apply_masks", record)
    parameters = make_parameters(4)
    for _ in range(2):  # the very same parameters: freshness must not depend on the run's name
        rehearse(parameters, random_vectors(parameters))
    first, second = set(used[: len(used) // 2]), set(used[len(used) // 2 :])
    assert not first & second
    assert len(first) == 4 + 6  # one mask for each client and one for each pair: no two uses share a key
    assert sorted(used.count(key) for key in first) == [1] * 4 + [2] * 6


@settings(max_examples=30, deadline=None)
@given(scenarios())
def test_never_both_shares_of_one_client(scenario: tuple[Parameters, dict[str, set[int]], int]) -> None:
    parameters, lost, seed = scenario
    parties = {}
    original = SecAggClient.unmask

    def remember(self: SecAggClient, survivors: bytes) -> bytes:
        parties[self.client] = dict(self._memory.shares)
        return original(self, survivors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecAggClient, "unmask", remember)
        log = rehearse(parameters, random_vectors(parameters, seed), lost=lost)
    for client, message in log.sent["unmask"].items():
        opened = messages.unpack_table(memoryview(message)[messages.HEADER_BYTES :], width=shamir.SHARE_BYTES, origin="test")
        for owner, both in parties[client].items():
            seed_share, key_share = both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :]
            assert opened[owner] == (seed_share if owner in log.senders else key_share)
            assert (key_share if owner in log.senders else seed_share) not in message


# --- what the parties refuse -----------------------------------------------------------------------------------------------------------


def test_flipped_envelope_bit_aborts() -> None:
    parameters = make_parameters(3)
    vectors = random_vectors(parameters)
    parties, inbox = up_to("mask", parameters, vectors)
    victim = parameters.clients[0]
    state = parties[victim].to_bytes()
    start = messages.HEADER_BYTES + 4 + 8  # behind the header, the count and the first sender's id
    for position in range(start, start + envelope.ENVELOPE_BYTES, 9):
        flipped = bytearray(inbox[victim])
        flipped[position] ^= 1
        party = SecAggClient.from_bytes(state)
        with pytest.raises(ProtocolAbort, match="authentic"):
            party.mask(bytes(flipped), vectors[victim])
        assert party.stage is Stage.ABORTED
        assert not any(vars(party._memory).values())  # key material is gone
    SecAggClient.from_bytes(state).mask(inbox[victim], vectors[victim])


def test_envelope_of_another_receiver_aborts() -> None:
    parameters = make_parameters(3)
    vectors = random_vectors(parameters)
    parties, inbox = up_to("mask", parameters, vectors)
    bodies = [inbox[client][messages.HEADER_BYTES :] for client in parameters.clients]
    rows = [messages.unpack_table(body, width=envelope.ENVELOPE_BYTES, origin="test") for body in bodies]
    a, b, c = parameters.clients
    swapped = messages.frame(Kind.ENVELOPES, parameters.digest, messages.pack_table({b: rows[2][b], c: rows[0][c]}))
    with pytest.raises(ProtocolAbort, match="authentic"):
        parties[a].mask(swapped, vectors[a])


def test_reflected_envelope_aborts() -> None:
    """Both directions share one key: a client must not take its own envelope for its peer's."""
    parameters = make_parameters(2)
    parties, inbox = up_to("share", parameters, {})
    a, b = parameters.clients
    table, _ = messages.unpack_fields(parties[a].share(inbox[a])[messages.HEADER_BYTES :], 2, origin="test")
    sent = messages.unpack_table(table, width=envelope.ENVELOPE_BYTES, origin="test")
    reflected = messages.frame(Kind.ENVELOPES, parameters.digest, messages.pack_table({b: sent[b]}))
    with pytest.raises(ProtocolAbort, match="authentic"):
        parties[a].mask(reflected, random_vectors(parameters)[a])


def roster_message(parameters: Parameters, roster: Mapping[int, bytes]) -> bytes:
    return messages.frame(Kind.ROSTER, parameters.digest, messages.pack_table(roster))


def test_client_refuses_bad_rosters() -> None:
    parameters = make_parameters(4)
    parties, inbox = up_to("share", parameters, {})
    me, *peers = parameters.clients
    state = parties[me].to_bytes()
    good = messages.unpack_table(inbox[me][messages.HEADER_BYTES :], width=64, origin="test")
    stranger = os.urandom(64)
    for roster, complaint in (
        ({**good, me: stranger}, "own keys"),
        ({**good, peers[0]: good[peers[1]]}, "distinct ones"),
        ({**good, peers[0]: good[me][:32] + stranger[:32]}, "distinct ones"),
        ({**good, peers[0]: stranger[:32] * 2}, "distinct ones"),
        ({**good, 999: stranger}, "among"),
        ({peer: good[peer] for peer in peers}, "include client"),
        ({client: good[client] for client in (me, peers[0])}, "threshold = 3, got 2"),
        ({**good, peers[0]: bytes(32) + stranger[:32]}, "full order"),  # every secret with it would be zero
    ):
        with pytest.raises(ProtocolAbort, match=complaint):
            SecAggClient.from_bytes(state).share(roster_message(parameters, roster))
    SecAggClient.from_bytes(state).share(inbox[me])


def test_client_refuses_bad_survivors_and_answers_once() -> None:
    parameters = make_parameters(4)
    parties, inbox = up_to("unmask", parameters, random_vectors(parameters))
    me, *peers = parameters.clients
    state = parties[me].to_bytes()

    def ask(clients: list[int]) -> bytes:
        rows = b"".join(client.to_bytes(8, "little") for client in clients)
        return messages.frame(Kind.SURVIVORS, parameters.digest, len(clients).to_bytes(4, "little") + rows)

    for survivors, complaint in (
        ([me, peers[0]], "threshold = 3, got 2"),
        (peers, "include client"),
        ([*parameters.clients, 999], "among"),
        ([me, me, peers[0]], "ascending"),
        ([peers[0], me, peers[1]], "ascending"),
    ):
        party = SecAggClient.from_bytes(state)
        with pytest.raises(ProtocolAbort, match=complaint):
            party.unmask(ask(survivors))
        with pytest.raises(ProtocolAbort, match="next stage must be ABORTED"):
            party.unmask(inbox[me])
    party = parties[me]
    party.unmask(ask([me, *peers[:2]]))
    assert not any(vars(party._memory).values())
    with pytest.raises(ProtocolAbort, match="next stage must be DONE, got UNMASK"):
        party.unmask(ask([me, *peers[1:]]))  # a second set of survivors would open the other share
    with pytest.raises(ProtocolAbort, match="next stage must be DONE"):
        SecAggClient.from_bytes(party.to_bytes()).unmask(inbox[me])


def test_stages_run_once_and_in_order() -> None:
    parameters = make_parameters(3)
    vectors = random_vectors(parameters)
    parties, inbox = up_to("mask", parameters, vectors)
    party, me = parties[parameters.clients[0]], parameters.clients[0]
    with pytest.raises(ProtocolAbort, match="MASK, got ADVERTISE"):
        party.advertise()
    with pytest.raises(ProtocolAbort, match="MASK, got UNMASK"):
        party.unmask(inbox[me])
    party.mask(inbox[me], vectors[me])  # a refused call changes nothing
    with pytest.raises(ProtocolAbort, match="UNMASK, got MASK"):
        party.mask(inbox[me], vectors[me])  # the difference of two vectors under one mask would show
    server = SecAggServer(parameters)
    with pytest.raises(ProtocolAbort, match="ADVERTISE, got MASK"):
        server.receive_mask({})


def test_vector_of_another_kind_aborts() -> None:
    parameters = make_parameters(3)
    for vector in (np.zeros(7, np.uint32), np.zeros(8, np.uint64), np.zeros(8, np.int32)):
        parties, inbox = up_to("mask", parameters, {})
        with pytest.raises(ProtocolAbort, match="vector must be"):
            parties[parameters.clients[0]].mask(inbox[parameters.clients[0]], vector)


def test_messages_of_another_run_stage_or_length_abort() -> None:
    parameters, other = make_parameters(3), make_parameters(3, run_id="other")
    replies = {client: SecAggClient(parameters, client).advertise() for client in parameters.clients}
    me = parameters.clients[0]
    for wrong, complaint in (
        (SecAggClient(other, me).advertise(), "of run"),
        (replies[me][:-1], "must be 64 bytes"),
        (replies[me] + b"\0", "must be 64 bytes"),
        (b"", "≥ 16 bytes"),
        (roster_message(parameters, {}), "must be KEYS"),
        (b"pickle" * 20, "version"),
    ):
        with pytest.raises(ProtocolAbort, match=complaint):
            SecAggServer(parameters).receive_advertise({**replies, me: wrong})
    with pytest.raises(ProtocolAbort, match="must come from clients"):
        SecAggServer(parameters).receive_advertise({**replies, 999: replies[me]})


def test_wrong_share_of_a_mask_key_is_noticed() -> None:
    parameters = make_parameters(4)
    vectors, gone = random_vectors(parameters), parameters.clients[3]
    log = rehearse(parameters, vectors, lost={"mask": {gone}})
    server = SecAggServer(parameters)
    for stage in STAGES[:3]:
        getattr(server, f"receive_{stage}")(log.sent[stage])
    liar = parameters.clients[0]
    wrong = log.sent["unmask"][liar][:-1] + bytes([log.sent["unmask"][liar][-1] ^ 1])  # the last row is the dropped client's
    with pytest.raises(ProtocolAbort, match=f"mask key of client {gone}"):
        server.receive_unmask({**log.sent["unmask"], liar: wrong})


def test_parameters_refuse_what_does_not_protect() -> None:
    make_parameters(4, threshold=3)
    for wrong in (2, 5):
        with pytest.raises(ProtocolAbort, match="threshold must be above half of 4"):
            make_parameters(4, threshold=wrong)
    for clients in ((1,), (2, 1), (1, 1), (-1, 1)):
        with pytest.raises(ProtocolAbort, match="clients must be"):
            Parameters(run_id="r", round=1, clients=clients, threshold=2, length=1)
    parameters = make_parameters(5, bits=64)
    assert Parameters.from_bytes(parameters.to_bytes()) == parameters
    with pytest.raises(ProtocolAbort, match="one of the invited"):
        SecAggClient(parameters, 999)


def test_secrets_stay_out_of_repr() -> None:
    parties, _ = up_to("mask", make_parameters(3), {})
    party = next(iter(parties.values()))
    assert repr(party) == "SecAggClient(client=3, round=1, stage=MASK)"
    shown = repr(party) + repr(party._memory) + str(party._memory)
    assert not any(
        secret.hex() in shown or repr(secret)[2:-1] in shown for secret in (party._memory.own_key, *party._memory.pair_keys.values())
    )


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b[:40]])
def test_damaged_state_aborts(damage: Callable[[bytes], bytes]) -> None:
    parties, _ = up_to("mask", make_parameters(3), {})
    with pytest.raises(ProtocolAbort):
        SecAggClient.from_bytes(damage(next(iter(parties.values())).to_bytes()))


# --- primitives ------------------------------------------------------------------------------------------------------------------------


def test_shamir_by_hand() -> None:
    """f(x) = 5 + 3x + 2x² modulo 11: f(1) = 10, f(2) = 19 = 8, f(4) = 49 = 5.

    λ at 0 for the points 1, 2, 4: 2·4 / (1·3) = 8/3 = 8·4 = 10; 1·4 / (−1·2) = −2 = 9; 1·2 / (−3·−2) = 1/3 = 4.
    10·10 + 9·8 + 4·5 = 192 = 17·11 + 5.
    """
    assert [shamir.evaluate([5, 3, 2], x, prime=11) for x in (1, 2, 4)] == [10, 8, 5]
    assert shamir.lagrange_at_zero([1, 2, 4], prime=11) == [10, 9, 4]
    assert shamir.combine([10, 8, 5], [10, 9, 4], prime=11) == 5


def test_field_is_the_smallest_prime_above_two_to_the_256() -> None:
    def is_prime(number: int, rounds: int = 20) -> bool:
        """Miller–Rabin."""
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        draw = random.Random(0)
        for _ in range(rounds):
            x = pow(draw.randrange(2, number - 1), odd, number)
            if x not in (1, number - 1) and all((x := x * x % number) != number - 1 for _ in range(twos - 1)):
                return False
        return True

    assert [k for k in range(1, 298) if is_prime(2**256 + k)] == [297]
    assert shamir.PRIME == 2**256 + 297


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_any_t_shares_give_the_secret(secret: bytes) -> None:
    shares = dict(enumerate(shamir.split_bytes(secret, 3, range(1, 6)), start=1))
    for points in itertools.permutations(shares, 3):
        weights = dict(zip(points, shamir.lagrange_at_zero(points), strict=True))
        assert shamir.combine_bytes(shares, weights) == secret
    two = [int.from_bytes(shares[point]) for point in (1, 2)]
    assert shamir.combine(two, shamir.lagrange_at_zero([1, 2])) != int.from_bytes(secret)  # t − 1 do not


def test_fewer_shares_leave_every_secret_possible() -> None:
    """For t − 1 shares and any candidate there is one polynomial: the missing share that it predicts leads to the candidate."""
    t, points = 4, [1, 2, 3, 4]
    known = shamir.split(int.from_bytes(os.urandom(32)), t, points[: t - 1])
    weights = shamir.lagrange_at_zero(points)
    for candidate in (0, 1, shamir.PRIME - 1, *(int.from_bytes(os.urandom(32)) for _ in range(20))):
        missing = (candidate - shamir.combine(known, weights[:-1])) * pow(weights[-1], -1, shamir.PRIME) % shamir.PRIME
        assert shamir.combine([*known, missing], weights) == candidate


def test_fewer_shares_are_equally_likely_under_every_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exhaustive in the field of 7 elements: over all coefficients, any two of t = 3 shares take each of 49 pairs of values once."""
    for secret in range(7):
        seen = []
        for coefficients in itertools.product(range(7), repeat=2):
            drawn = iter(coefficients)
            monkeypatch.setattr(shamir.secrets, "randbelow", lambda below, drawn=drawn: next(drawn) if below == 7 else None)
            seen.append(tuple(shamir.split(secret, 3, [2, 5], prime=7)))
        assert sorted(seen) == sorted(itertools.product(range(7), repeat=2))


@pytest.mark.parametrize("points", [[0, 1], [1, 1], [1, 2, shamir.PRIME + 1]])
def test_bad_points_abort(points: list[int]) -> None:
    with pytest.raises(ProtocolAbort, match="distinct and not 0"):
        shamir.lagrange_at_zero(points)


def test_keystream_is_aes_256_ctr_from_zero() -> None:
    """FIPS-197 C.3 fixes AES-256; counter mode from 0 is checked against one-shot encryption, beyond one chunk."""
    fips = Cipher(algorithms.AES(bytes(range(32))), modes.ECB()).encryptor()
    assert fips.update(bytes.fromhex("00112233445566778899aabbccddeeff")).hex() == "8ea2b7ca516745bfeafc49904b496089"
    key = os.urandom(32)
    vector = np.zeros(300_000, "<u4")
    apply_masks(vector, [(key, 1)])
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    counters = b"".join(i.to_bytes(16, "big") for i in range(vector.nbytes // 16))
    assert vector.tobytes() == ecb.update(counters)
    apply_masks(vector, [(key, -1)])
    assert not vector.any()


def test_masks_take_full_keys_only() -> None:
    for size in (0, 16, 24, 31, 33):
        with pytest.raises(ProtocolAbort, match="32 bytes"):
            apply_masks(np.zeros(4, np.uint32), [(bytes(size), 1)])


def test_pair_keys_agree_and_uses_are_apart() -> None:
    (private_a, public_a), (private_b, public_b) = keys.generate(), keys.generate()
    tag = os.urandom(32)
    key = keys.Agreement(private_a, "pair", tag).key(public_b)
    secret = X25519PrivateKey.from_private_bytes(private_b).exchange(X25519PublicKey.from_public_bytes(public_a))
    info = b"pair" + b"".join(sorted((public_a, public_b)))
    assert key == keys.Agreement(private_b, "pair", tag).key(public_a) == HKDF(SHA256(), 32, salt=tag, info=info).derive(secret)
    assert key != keys.Agreement(private_a, "env", tag).key(public_b)
    assert key != keys.Agreement(private_a, "pair", os.urandom(32)).key(public_b)
    assert keys.self_mask_key(secret, tag, public_a) != keys.self_mask_key(secret, tag, public_b)


def test_run_tag_covers_parameters_and_keys() -> None:
    parameters = make_parameters(2)
    a, b = parameters.clients
    roster = {a: os.urandom(64), b: os.urandom(64)}
    others = [
        run_tag(make_parameters(2, run_id="test2"), roster),
        run_tag(make_parameters(2, 9), roster),
        run_tag(make_parameters(2, bits=64), roster),
        run_tag(parameters, {a: roster[b], b: roster[a]}),
        run_tag(parameters, {a: roster[a]}),
    ]
    assert len({run_tag(parameters, roster), *others}) == 6
    assert run_tag(parameters, dict(reversed(roster.items()))) == run_tag(parameters, roster)


# --- quantization and the defense --------------------------------------------------------------------------------------------------------

SHAPES = {"z.weight": (40, 30), "a.bias": (11,), "scalar": ()}
BUFFERS = {
    "bn.running_var": torch.tensor([0.5, 300.0]),
    "bn.num_batches_tracked": torch.tensor(7),
    "bn.running_mean": torch.tensor([-2.0, 3.0]),
}


def random_update(seed: int, std: float = 1e-3, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Update:
    rng = torch.Generator().manual_seed(seed)
    return Update("delta", {name: std * torch.randn(shape, generator=rng) for name, shape in shapes.items()})


def federate(
    secagg: SecureAggregation, updates: list[Update], counts: list[int], *, lost: int = 0, max_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The aggregate through encode, the ideal sum and decode; and the float64 weighted mean."""
    cohort, alive = len(updates), range(lost, len(updates))
    rng = torch.Generator().manual_seed(0)
    words = {i: secagg.encode(updates[i], {}, counts[i], cohort=cohort, max_examples=max_examples, rng=rng) for i in alive}
    upload = secagg.decode(
        ideal_sum(words),
        kind="delta",
        template={name: tensor.double() for name, tensor in updates[0].tensors.items()},
        buffer_template={},
        senders=frozenset(alive),
        cohort=cohort,
        max_examples=max_examples,
    )
    total = sum(counts[i] for i in alive)
    assert upload.num_examples == total
    assert upload.senders == frozenset(alive)
    exact = [sum(counts[i] * updates[i].tensors[name].double() for i in alive) / total for name in updates[0].tensors]
    flat = [np.concatenate([t.numpy().ravel() for t in tensors]) for tensors in (list(upload.update.tensors.values()), exact)]
    return flat[0], flat[1]


@pytest.mark.parametrize(("n", "lost"), [(2, 0), (8, 0), (10, 2), (30, 5), (100, 10)])
def test_rounding_error_is_small_and_as_reported(n: int, lost: int) -> None:
    secagg, max_examples = SecureAggregation(), 600
    counts = [int(count) for count in np.random.default_rng(n).integers(30, max_examples, n, endpoint=True)]
    updates = [random_update(i, shapes={"w": (20_000,)}) for i in range(n)]
    got, exact = federate(secagg, updates, counts, lost=lost, max_examples=max_examples)
    rms = float(np.sqrt(((got - exact) ** 2).mean()))
    assert rms <= 1e-4 * exact.std()
    if secagg.bits_for(n, max_examples) == 32:  # with 64 bits, what is left is float64's own rounding
        expected = secagg.rounding_rms(cohort=n, senders=n - lost, num_examples=sum(counts[lost:]), max_examples=max_examples)
        assert rms == pytest.approx(expected, rel=0.05)


def test_rounding_is_unbiased() -> None:
    """A coordinate of a third of a step rounds up one time in three; rounding to nearest would always give 0."""
    secagg = SecureAggregation(clip_range=1.0, bits=32)
    step = Scale(cohort=2, bits=32, max_examples=1).step(1.0)
    update = Update("delta", {"w": torch.full((90_000,), step / 3, dtype=torch.float64)})
    words = secagg.encode(update, {}, 1, cohort=2, max_examples=1, rng=torch.Generator().manual_seed(1))[:-1]
    assert set(np.unique(words)) == {0, 1}
    assert words.mean() == pytest.approx(1 / 3, abs=6 * (2 / 9 / 90_000) ** 0.5)


def test_encode_decode_restores_names_shapes_types_and_buffers() -> None:
    secagg, rng = SecureAggregation(), torch.Generator().manual_seed(0)
    updates = [random_update(0), random_update(1)]
    words = {i: secagg.encode(update, BUFFERS, 5 * (i + 1), cohort=2, max_examples=16, rng=rng) for i, update in enumerate(updates)}
    backwards = {name: torch.zeros(SHAPES[name]) for name in reversed(SHAPES)}  # the order of names is nobody's business
    parameters = secagg.parameters(run_id="r", round=1, rounds=1, clients=(0, 1), max_examples=16, template=backwards, buffers=BUFFERS)
    assert parameters.length == len(words[0]) == 1200 + 11 + 1 + 4 + 1
    total, senders = (result := rehearse(parameters, words)).total, result.senders
    upload = secagg.decode(total, kind="delta", template=backwards, buffer_template=BUFFERS, senders=senders, cohort=2, max_examples=16)
    assert (upload.senders, upload.num_examples, upload.update.kind) == (frozenset({0, 1}), 15, "delta")
    assert list(upload.update.tensors) == list(backwards)
    for name, tensor in upload.update.tensors.items():
        assert (tensor.shape, tensor.dtype) == (SHAPES[name], torch.float32)
        torch.testing.assert_close(tensor, (updates[0].tensors[name] + 2 * updates[1].tensors[name]) / 3, atol=2e-7, rtol=0)
    assert set(upload.buffers) == {"bn.running_var", "bn.running_mean"}  # only floating-point buffers travel
    for name, tensor in upload.buffers.items():
        torch.testing.assert_close(tensor, BUFFERS[name], atol=1e-5, rtol=0)


def test_ideal_and_protocol_give_the_same_bits() -> None:
    secagg, updates = SecureAggregation(), [random_update(i) for i in range(5)]
    words = {i: secagg.encode(u, {}, i + 1, cohort=5, max_examples=5, rng=torch.Generator().manual_seed(i)) for i, u in enumerate(updates)}
    again = {i: secagg.encode(u, {}, i + 1, cohort=5, max_examples=5, rng=torch.Generator().manual_seed(i)) for i, u in enumerate(updates)}
    parameters = secagg.parameters(run_id="r", round=3, rounds=3, clients=range(5), max_examples=5, template=updates[0].tensors, buffers={})
    for lost in (set[int](), {2}):
        result = rehearse(parameters, words, lost={"mask": lost})
        assert np.array_equal(result.total, ideal_sum({i: word for i, word in again.items() if i not in lost}))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("n", [2, 3, 7, 1000])
def test_extremes_cannot_wrap(bits: int, n: int) -> None:
    secagg = SecureAggregation(bits=bits)  # type: ignore[arg-type]
    scale = secagg.scale_for(n, 3)
    assert 2 * n * scale.q_max < 1 << bits
    assert float(scale.q_max) == scale.q_max
    extreme = Update("gradient", {"w": torch.tensor([8.0, -8.0])})
    word = secagg.encode(extreme, {}, 3, cohort=n, max_examples=3, rng=torch.Generator())
    total = (word.astype(object) * n % (1 << bits)).astype(word.dtype)
    upload = secagg.decode(
        total, kind="gradient", template=extreme.tensors, buffer_template={}, senders=frozenset(range(n)), cohort=n, max_examples=3
    )
    torch.testing.assert_close(upload.update.tensors["w"], extreme.tensors["w"])


@pytest.mark.parametrize(
    ("value", "complaint"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (8.01, "16 would hold it"), (-100.0, "128 would")]
)
def test_out_of_range_is_refused_not_clipped(value: float, complaint: str) -> None:
    update = Update("delta", {"w": torch.tensor([0.0, value])})
    with pytest.raises(ProtocolAbort, match=complaint) as caught:
        SecureAggregation().encode(update, {}, 1, cohort=2, max_examples=1, rng=torch.Generator())
    assert "8.01" not in str(caught.value)  # the private coordinate stays out of messages and logs


def test_bad_counts_types_and_sums_are_refused() -> None:
    secagg, update = SecureAggregation(), Update("delta", {"w": torch.zeros(3)})

    def encode(update: Update, count: int, *, max_examples: int = 10) -> Words:
        return secagg.encode(update, {}, count, cohort=3, max_examples=max_examples, rng=torch.Generator())

    for count in (0, 11, -1):
        with pytest.raises(ProtocolAbort, match="num_examples must be in"):
            encode(update, count)
    for bound in (0, 1 << 31):
        with pytest.raises(ProtocolAbort, match="max_examples must be"):
            encode(update, 1, max_examples=bound)
    with pytest.raises(ProtocolAbort, match="floating-point"):
        encode(Update("delta", {"w": torch.zeros(3, dtype=torch.int64)}), 1)

    def decode(total: Words) -> object:
        senders = frozenset({0, 1})
        return secagg.decode(total, kind="delta", template=update.tensors, buffer_template={}, senders=senders, cohort=3, max_examples=10)

    good = encode(update, 5) + encode(update, 6)
    decode(good)
    for total, complaint in (
        (good[1:], "4 words"),
        (good.astype(np.uint64), "words of 32"),
        (np.array([0, 0, 0, 21], np.uint32), "examples of 2 senders"),
        (np.array([0, 0, 0, 1], np.uint32), "examples of 2 senders"),
        (np.array([0, 1 << 31, 0, 11], np.uint32), "range"),
    ):
        with pytest.raises(ProtocolAbort, match=complaint):
            decode(total)
    with pytest.raises(ProtocolAbort, match="one type and length"):
        ideal_sum({0: good, 1: good[1:]})


def test_who_clips_below_the_range_stays_in_the_round() -> None:
    """The remedy that the page names: no coordinate exceeds the norm of its vector."""
    far = Update("delta", {"w": torch.tensor([1e4, 0.0, -3.0])})
    with pytest.raises(ProtocolAbort, match="coordinates of w must be at most 8 in magnitude"):
        SecureAggregation().encode(far, {}, 1, cohort=2, max_examples=1, rng=torch.Generator())
    near = Update("delta", clip_to_norm(far.tensors, 7.9))
    assert len(SecureAggregation().encode(near, {}, 1, cohort=2, max_examples=1, rng=torch.Generator())) == 4


def test_setting_of_max_examples_has_precedence() -> None:
    update = Update("delta", {"w": torch.ones(2)})
    arguments = {"cohort": 2, "rng": torch.Generator()}
    fixed = SecureAggregation(max_examples=50).encode(update, {}, 20, max_examples=1, **arguments)  # type: ignore[arg-type]
    assert np.array_equal(fixed[-1:], [20])


@pytest.mark.parametrize(
    ("settings_", "clients", "complaint"),
    [
        ({}, 1, "cohort must be ≥ 2"),
        ({"threshold": 9}, 8, "at most the cohort of 8, got 9"),
        ({"threshold": 4}, 8, "above half of the cohort of 8, got 4"),
    ],
)
def test_refuses_worlds_where_it_cannot_act(settings_: dict[str, int], clients: int, complaint: str) -> None:
    defense = SecureAggregation(**settings_)  # type: ignore[arg-type]
    world = World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense,))
    assert complaint in (defense.refuses(world) or "")


def test_refuses_half_precision_uploads() -> None:
    defense = SecureAggregation()
    half = World(data=None, model=None, defenses=(defense,), training=LocalTraining(upload_dtype="float16"))
    assert (defense.refuses(half) or "").startswith("upload_dtype must be float32 for secure aggregation, got float16")


def test_accepts_worlds_where_it_can_act() -> None:
    defense = SecureAggregation()
    for clients in (2, 3, 8, 100):
        world = World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense,))
        assert defense.refuses(world) is None
        assert world.channel is defense
    twice = World(data=None, model=None, defenses=(defense, defense))
    assert "at most 1 channel" in (defense.refuses(twice) or "")


@pytest.mark.parametrize(
    "wrong", [{"clip_range": 0.0}, {"clip_range": float("inf")}, {"buffer_range": -1.0}, {"threshold": -1}, {"max_examples": -1}]
)
def test_bad_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SecureAggregation(**wrong)  # type: ignore[arg-type]
