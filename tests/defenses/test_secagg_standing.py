"""One set-up for many rounds: no stream twice, no long-term secret shared, no need for new keys after a drop-out."""

from __future__ import annotations

import numpy as np
import pytest

from defenses.channel._secagg import client as client_module
from defenses.channel._secagg import envelope, messages
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.keyring import KeyRing, unpack_advert
from defenses.channel._secagg.masking import Words, apply_masks
from defenses.channel._secagg.memory import Stage
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import run_tag
from defenses.channel._secagg.shamir import SHARE_BYTES, combine_bytes, lagrange_at_zero
from simulator.errors import ProtocolAbort
from tests.secagg import Rehearsal, expected_sum, make_parameters, random_vectors, rehearse, start, up_to


def standing(round: int, n: int = 5, **more):
    return make_parameters(n, round=round, run_id=f"round {round}", standing=True, **more)


def fresh_rings(parameters) -> dict[int, KeyRing]:
    return {client: KeyRing.fresh() for client in parameters.clients}


def test_rounds_give_exact_sums_with_one_set_up_whoever_drops_out() -> None:
    rings, agreed = fresh_rings(standing(1)), []
    clients = standing(1).clients
    for round, gone in ((1, {}), (2, {"mask": {clients[0]}}), (3, {"share": {clients[1]}}), (4, {"unmask": {clients[0]}})):
        parameters = standing(round)
        vectors = random_vectors(parameters, round)
        result = rehearse(parameters, vectors, lost=gone, rings=rings)
        assert result.total.tolist() == expected_sum(vectors, result.senders, 32)
        rings = {client: KeyRing.from_bytes(ring.to_bytes()) for client, ring in rings.items()}  # another process
        agreed.append({client: dict(ring.mask_secrets) for client, ring in rings.items()})
    assert agreed[1] == agreed[3]  # also with client 0, whose masks of round 2 were opened: nobody made new keys
    assert all(len(secrets) == 4 for secrets in agreed[3].values())


def test_no_stream_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[list[bytes]] = []

    def record(vector: Words, masks: list[tuple[bytes, int]]) -> None:
        masks = list(masks)
        used[-1].extend(key for key, _ in masks)
        apply_masks(vector, masks)  # type: ignore[arg-type]

    monkeypatch.setattr(client_module, "apply_masks", record)
    rings = fresh_rings(standing(1))
    for round in range(1, 6):
        used.append([])
        rehearse(standing(round), random_vectors(standing(round)), rings=rings)
    distinct = [set(keys_) for keys_ in used]
    assert all(len(keys_) == 5 + 10 for keys_ in distinct)  # a mask for each client and one for each pair
    assert len(set().union(*distinct)) == 5 * 15  # none of them in two rounds


def test_a_round_is_entered_once_and_in_order() -> None:
    """Whatever the server repeats: two vectors under the same pairwise masks would show their difference once both seeds are open."""
    parameters = standing(3)
    rings = fresh_rings(parameters)
    rehearse(parameters, random_vectors(parameters), rings=rings)
    for round in (3, 2, 0):
        with pytest.raises(ProtocolAbort, match=f"round must be after 3 .* got {round}"):
            start(standing(round), rings)
    ring = KeyRing.from_bytes(rings[parameters.clients[0]].to_bytes())  # a restart does not forget it
    with pytest.raises(ProtocolAbort, match="round must be after 3"):
        SecAggClient(parameters, parameters.clients[0], ring=ring)
    start(standing(4), rings)
    with pytest.raises(ProtocolAbort, match="must have advertised"):
        SecAggClient(standing(5), parameters.clients[0])


def opened_of(log: Rehearsal, parameters, owner: int) -> bytes:
    """What the server reconstructs of ``owner`` from the shares that were opened."""
    chosen = sorted(log.sent["unmask"])[: parameters.threshold]
    rows = {c: messages.unpack_table(log.sent["unmask"][c][messages.HEADER_BYTES :], width=SHARE_BYTES, origin="test") for c in chosen}
    weights = dict(zip(chosen, lagrange_at_zero([parameters.points[c] for c in chosen]), strict=True))
    return combine_bytes({c: rows[c][owner] for c in chosen}, weights)


def test_what_is_reconstructed_of_a_dropped_client_opens_this_round_alone() -> None:
    first, second = standing(1), standing(2)
    rings, gone = fresh_rings(first), first.clients[0]
    log = rehearse(first, random_vectors(first), lost={"mask": {gone}}, rings=rings)
    recovery = opened_of(log, first, gone)
    ring = rings[gone]
    assert recovery not in (ring.mask_private, ring.envelope_private, *ring.mask_secrets.values(), *ring.envelope_secrets.values())
    crossed = [message for stage in log.sent.values() for message in stage.values()]
    for secret in (ring.mask_private, *ring.mask_secrets.values()):
        assert not any(secret in message for message in crossed)
    again = rehearse(second, random_vectors(second), rings=rings)

    def locked(of: Rehearsal) -> bytes:
        return messages.unpack_fields(of.sent["share"][gone][messages.HEADER_BYTES :], 2, origin="test")[1]

    def tag_of(parameters) -> bytes:
        return run_tag(parameters, {c: unpack_advert(rings[c].advertise(), c) for c in parameters.clients})

    envelope.unlock(recovery, locked(log), tag=tag_of(first), owner=gone)
    for of, tag in ((again, tag_of(second)), (again, tag_of(first)), (log, tag_of(second))):
        with pytest.raises(ProtocolAbort, match="must open"):
            envelope.unlock(recovery, locked(of), tag=tag, owner=gone)


def test_wrong_share_of_a_recovery_key_is_noticed() -> None:
    parameters = standing(1, 4)
    vectors, gone, rings = random_vectors(parameters), parameters.clients[3], fresh_rings(standing(1, 4))
    log = rehearse(parameters, vectors, lost={"mask": {gone}}, rings=rings)
    server = start(parameters, _unentered(rings))[0]
    for stage in ("share", "mask"):
        getattr(server, f"receive_{stage}")(log.sent[stage])
    liar = parameters.clients[0]
    wrong = log.sent["unmask"][liar][:-1] + bytes([log.sent["unmask"][liar][-1] ^ 1])
    with pytest.raises(ProtocolAbort, match=f"pair keys of client {gone} must open"):
        server.receive_unmask({**log.sent["unmask"], liar: wrong})


def _unentered(rings: dict[int, KeyRing]) -> dict[int, KeyRing]:
    return {client: KeyRing(ring.envelope_private, ring.mask_private) for client, ring in rings.items()}


def test_a_client_that_lost_its_keys_makes_new_ones() -> None:
    rings = fresh_rings(standing(1))
    rehearse(standing(1), random_vectors(standing(1)), rings=rings)
    newcomer = standing(1).clients[2]
    rings[newcomer] = KeyRing.fresh()
    vectors = random_vectors(standing(2))
    result = rehearse(standing(2), vectors, rings=rings)
    assert np.array_equal(result.total, sum(vectors.values()))


def test_messages_and_saved_keys_are_checked() -> None:
    ring = KeyRing.fresh()
    assert "private" not in repr(ring)
    with pytest.raises(ProtocolAbort, match="64 bytes"):
        unpack_advert(ring.advertise()[:-1], 0)
    with pytest.raises(ProtocolAbort, match="of run"):
        unpack_advert(messages.frame(Kind.KEYS, b"r" * 32, bytes(64)), 0)
    for damaged in (ring.to_bytes()[:-1], b"", ring.to_bytes() + b"\0"):
        with pytest.raises(ProtocolAbort):
            KeyRing.from_bytes(damaged)


def test_restored_between_stages() -> None:
    parameters = standing(1)
    vectors = random_vectors(parameters)
    result = rehearse(parameters, vectors, restart=True)
    assert np.array_equal(result.total, sum(vectors.values()))
    parties, _ = up_to("unmask", parameters, vectors)
    assert {party.stage for party in parties.values()} == {Stage.UNMASK}
