"""Against an active server: every honest client refuses other keys, other rounds' signatures and two sets of survivors."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from defenses.channel._secagg import graph, identity, keys, messages, shamir
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.memory import Stage
from defenses.channel._secagg.messages import Kind
from defenses.channel.secure_aggregation import SecureAggregation
from simulator.errors import ProtocolAbort
from simulator.world import Federation, World
from tests.secagg import expected_sum, make_parameters, people_of, random_vectors, rehearse, up_to

ROW = 2 * keys.KEY_BYTES + identity.SIGNATURE_BYTES


def roster_of(message: bytes) -> dict[int, bytes]:
    return messages.unpack_table(message[messages.HEADER_BYTES :], width=ROW, origin="test")


@pytest.mark.parametrize("restart", [False, True])
def test_sum_is_exact_with_drop_outs_at_every_stage(restart: bool) -> None:
    parameters = make_parameters(16, active=True)
    a, b, c, d, e, *_ = parameters.clients
    vectors = random_vectors(parameters)
    lost = {"advertise": {a}, "share": {b}, "mask": {c}, "sign": {d}, "unmask": {e}}
    result = rehearse(parameters, vectors, lost=lost, restart=restart)
    assert result.senders == frozenset(parameters.clients) - {a, b, c}
    assert result.total.tolist() == expected_sum(vectors, result.senders, 32)


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "sign", "unmask"])
def test_fewer_than_threshold_aborts(stage: str) -> None:
    parameters = make_parameters(6, active=True)
    with pytest.raises(ProtocolAbort, match=r"≥ threshold = 5 of 6 clients, got 4"):
        rehearse(parameters, random_vectors(parameters), lost={stage: set(parameters.clients[:2])})


def test_replaced_keys_are_refused_by_every_honest_client() -> None:
    """The server puts itself between one client and all others; without signatures each of the others would go on."""
    parameters = make_parameters(6, active=True)
    parties, inbox = up_to("share", parameters, {})
    victim = parameters.clients[2]
    good = roster_of(inbox[victim])
    own_keys = keys.generate()[1] + keys.generate()[1]
    forged = Ed25519PrivateKey.generate().sign(b"anything")
    for row in (
        own_keys + good[victim][64:],
        own_keys + forged,
        own_keys + bytes(64),
        good[victim][:64] + good[parameters.clients[0]][64:],
    ):
        message = messages.frame(Kind.ROSTER, parameters.digest, messages.pack_table({**good, victim: row}))
        for client in parameters.clients:
            party = SecAggClient.from_bytes(parties[client].to_bytes(), identity=parties[client].identity)
            with pytest.raises(ProtocolAbort, match="signed by it for this round|own keys"):
                party.share(message)
            assert party.stage is Stage.ABORTED
            assert not any(vars(party._memory).values())

    passive = make_parameters(6)
    parties, inbox = up_to("share", passive, {})
    rows = messages.unpack_table(inbox[victim][messages.HEADER_BYTES :], width=64, origin="test")
    parties[passive.clients[0]].share(messages.frame(Kind.ROSTER, passive.digest, messages.pack_table({**rows, victim: own_keys})))


@pytest.mark.parametrize("other", [{"round": 2}, {"run_id": "another"}, {"threshold": 6}, {"length": 9}])
def test_signature_of_another_round_is_refused(other: dict) -> None:
    """Keys that a client signed for one round, with whatever the server knows of their private halves, in another."""
    parameters, before = make_parameters(6, active=True), make_parameters(6, active=True, **other)
    people, victim = people_of(parameters), parameters.clients[3]
    old = SecAggClient(before, victim, identity=people[victim]).advertise()[messages.HEADER_BYTES :]
    parties, inbox = up_to("share", parameters, {})
    replayed = messages.frame(Kind.ROSTER, parameters.digest, messages.pack_table({**roster_of(inbox[victim]), victim: old}))
    for client in parameters.clients:
        with pytest.raises(ProtocolAbort, match="signed by it for this round|own keys"):
            parties[client].share(replayed)


def test_two_sets_of_survivors_are_refused_by_every_honest_client() -> None:
    """Told that client A dropped out, one group would open A's mask key, told that it survived, the other its seed: both, its vector."""
    parameters = make_parameters(6, active=True)
    parties, _ = up_to("sign", parameters, random_vectors(parameters))
    everybody = parameters.clients
    told = {client: everybody if client in everybody[:3] else everybody[1:] for client in everybody}
    signed = {
        client: parties[client].sign(messages.frame(Kind.SURVIVORS, parameters.digest, messages.pack_clients(told[client])))
        for client in everybody
    }
    signatures = {client: message[messages.HEADER_BYTES :] for client, message in signed.items()}
    for client in everybody:
        for chosen in (everybody, everybody[:3], everybody[1:]):
            party = SecAggClient.from_bytes(parties[client].to_bytes(), identity=parties[client].identity)
            table = messages.pack_table({signer: signatures[signer] for signer in chosen})
            with pytest.raises(ProtocolAbort, match="signed the same survivors|threshold = 5|of survivors"):
                party.unmask(messages.frame(Kind.SIGNATURES, parameters.digest, table))
            assert not any(vars(party._memory).values())
        with pytest.raises(ProtocolAbort, match="next stage must be UNMASK, got SIGN"):  # one set, once
            parties[client].sign(messages.frame(Kind.SURVIVORS, parameters.digest, messages.pack_clients(everybody)))

    passive = make_parameters(6)  # the same two stories where nobody signs: each is believed, and opens another secret of A's
    parties, _ = up_to("unmask", passive, random_vectors(passive))
    opened = []
    for story in (passive.clients, passive.clients[1:]):
        party = SecAggClient.from_bytes(parties[passive.clients[3]].to_bytes())
        answer = party.unmask(messages.frame(Kind.SURVIVORS, passive.digest, messages.pack_clients(story)))
        opened.append(messages.unpack_table(answer[messages.HEADER_BYTES :], width=shamir.SHARE_BYTES, origin="test"))
    assert {owner for owner, share in opened[0].items() if share != opened[1][owner]} == {passive.clients[0]}


def accepted_sets(n: int, t: int, c: int) -> bool:
    """Whether two sets of survivors can both gather t signatures: each of the c signs both, each other client one of them."""
    return any(c + first >= t and c + (n - c - first) >= t for first in range(n - c + 1))


@pytest.mark.parametrize(("n", "t"), [(9, 7), (10, 8), (6, 5), (100, 67), (100, 80), (3, 3)])
def test_certificate_counts_the_colluders_that_sign_twice(n: int, t: int) -> None:
    for c in range(n):
        assert (graph.certify(n, n - 1, t, c, 0, active=True).security_bits == 0) is accepted_sets(n, t, c), c
        assert (graph.certify(n, n - 1, t, c, 0).security_bits == 0) is (c >= t)
    certain, refused = 2 * t - n - 1, 2 * t - n
    for c, complaint in ((certain, None), (refused, f"corrupt must leave fewer than {refused} of {n} clients that collude with an active")):
        if c >= n:
            continue
        defense = SecureAggregation(active=True, threshold=t, corrupt=c / n, dropout=0.0)
        reason = defense.refuses(World(data=None, model=None, federation=Federation(clients=n), defenses=(defense,)))
        assert (complaint in (reason or "")) if complaint else reason is None


def test_with_too_many_colluders_two_sets_of_survivors_are_both_accepted() -> None:
    """c = 2t − n of 9 with t = 7: one group opens the victim's seed, the other its mask key, which the certificate must not allow."""
    parameters = make_parameters(9, active=True)
    parties, _ = up_to("sign", parameters, random_vectors(parameters))
    everybody, victim = parameters.clients, parameters.clients[5]
    colluding, one, other = everybody[:5], everybody[5:7], everybody[7:]
    opened = {}
    for group, told in ((one, everybody), (other, tuple(client for client in everybody if client != victim))):
        survivors = messages.frame(Kind.SURVIVORS, parameters.digest, messages.pack_clients(told))
        signers = {
            client: SecAggClient.from_bytes(parties[client].to_bytes(), identity=parties[client].identity)
            for client in (*colluding, *group)
        }
        signatures = {client: party.sign(survivors)[messages.HEADER_BYTES :] for client, party in signers.items()}
        assert len(signatures) == parameters.threshold
        table = messages.frame(Kind.SIGNATURES, parameters.digest, messages.pack_table(signatures))
        opened[group] = [party.unmask(table) for party in signers.values()]
    shares = {
        group: {messages.unpack_table(each[messages.HEADER_BYTES :], width=33, origin="test")[victim] for each in replies}
        for group, replies in opened.items()
    }
    assert all(len(found) == parameters.threshold for found in shares.values())  # enough shares of each of the two secrets
    assert not shares[one] & shares[other]


def test_survivors_signed_in_another_round_are_refused() -> None:
    parameters = make_parameters(6, active=True)
    vectors = random_vectors(parameters)
    earlier = rehearse(parameters, vectors)  # the very same parameters: the keys of the run are in the signature
    parties, _ = up_to("unmask", parameters, vectors)
    for client in parameters.clients:
        with pytest.raises(ProtocolAbort, match="signed the same survivors"):
            parties[client].unmask(earlier.received["unmask"][client])


def test_who_is_not_in_the_directory_cannot_sign() -> None:
    people = people_of(make_parameters(4, active=True))
    one, two = list(people)[:2]
    digest, public = os.urandom(32), os.urandom(64)
    signature = people[one].sign_keys(digest, one, public)
    identity.check_keys(people[two].directory, digest, one, public, signature)
    for wrong in ((digest, two, public), (os.urandom(32), one, public), (digest, one, os.urandom(64)), (digest, 999, public)):
        with pytest.raises(ProtocolAbort, match="signed by it"):
            identity.check_keys(people[two].directory, *wrong, signature)
    with pytest.raises(ProtocolAbort, match="same survivors"):  # a signature of keys is none of survivors
        identity.check_survivors(people[two].directory, digest, [one], one, signature)


def test_refuses_what_an_active_server_could_use() -> None:
    def refusal(clients: int = 9, **more) -> str:
        defense = SecureAggregation(active=True, **more)
        return defense.refuses(World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense,))) or ""

    assert refusal() == refusal(threshold=7) == ""
    assert "threshold must be above 2/3 of the cohort of 9 against an active server, got 6" in refusal(threshold=6)
    assert "could draw graphs until one suits it" in refusal(clients=100, graph="k-regular")
    assert "its keys are signed for a round" in refusal(setup="once")
    assert "identities must be 9 different ones" in refusal(identities=("00" * 32,))
    assert "32 bytes in hexadecimal" in refusal(clients=2, identities=("00", "zz"))
    for wrong in ({"threshold": 6}, {"standing": True}):
        with pytest.raises(ProtocolAbort, match="against an active server"):
            make_parameters(9, active=True, **wrong)
    with pytest.raises(ProtocolAbort, match="identity must be given"):
        SecAggClient(make_parameters(9, active=True), 3)
