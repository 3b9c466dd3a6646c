"""The k-regular graph: what it certifies against independent counts, and sums over it that stay exact under drop-outs."""

from __future__ import annotations

import itertools
import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from defenses.channel._secagg import graph, messages
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import Parameters, run_tag
from defenses.channel.secure_aggregation import SecureAggregation
from simulator.errors import ProtocolAbort
from simulator.world import Federation, World
from tests.secagg import STAGES, assert_exact_sum, chi_squared, drop_outs, make_parameters, random_vectors, rehearse, up_to

SHARES = ((0.05, 0.05), (0.1, 0.1), (0.2, 0.05), (0.2, 0.2), (0.33, 0.05), (0.33, 0.33))
PAIRS = {  # computed apart from this code, with scipy's hypergeometric tails
    100: ((30, 16), (42, 22), (48, 25), (72, 37), (68, 35), None),
    200: ((30, 16), (42, 22), (48, 31), (74, 38), (70, 49), (160, 81)),
    500: ((30, 16), (46, 25), (52, 36), (96, 50), (74, 56), (230, 118)),
    1000: ((34, 18), (52, 28), (58, 39), (112, 58), (86, 64), (310, 159)),
    10_000: ((38, 21), (60, 32), (68, 46), (134, 70), (102, 75), (472, 241)),
}


def sparse(n: int = 9, degree: int = 6, threshold: int = 4, **more) -> Parameters:
    """A small k-regular graph, too small to be certified, as only a test may make one."""
    return make_parameters(n, threshold=threshold, degree=degree, seed=os.urandom(32), quorum=n - 2, **more)


@pytest.mark.parametrize(("n", "shares", "pair"), [(n, *row) for n, pairs in PAIRS.items() for row in zip(SHARES, pairs, strict=True)])
def test_solver_finds_the_smallest_certified_pair(n: int, shares: tuple[float, float], pair: tuple[int, int] | None) -> None:
    plan = graph.solve(n, *shares)
    assert plan is not None
    assert plan.certified
    if pair is None:  # nothing below the complete graph, on which t is above n/2 since a client holds its own share
        assert (plan.degree, plan.threshold) == (n - 1, n // 2 + 1)
        return
    assert (plan.degree, plan.threshold) == pair
    if plan.threshold > plan.degree // 2 + 1:
        assert not graph.certify(n, plan.degree, plan.threshold - 1, plan.corrupt, plan.dropped).certified


@pytest.mark.parametrize(
    ("n", "degree", "threshold", "corrupt", "dropped"), [(100, 48, 25, 20, 5), (1000, 58, 39, 200, 50), (500, 96, 50, 100, 100)]
)
def test_bits_agree_with_scipy(n: int, degree: int, threshold: int, corrupt: int, dropped: int) -> None:
    plan = graph.certify(n, degree, threshold, corrupt, dropped)
    leak = n * hypergeom.sf(threshold - 1, n - 1, corrupt, degree) + n * ((corrupt + dropped) / n) ** (degree // 2)
    stuck = n * hypergeom.cdf(threshold - 1, n - 1, n - 1 - dropped, degree)
    assert plan.security_bits == pytest.approx(-math.log2(leak), abs=1e-6)
    if stuck > 0:
        assert plan.correctness_bits == pytest.approx(-math.log2(stuck), abs=1e-6)
    else:
        assert math.isinf(plan.correctness_bits)


@pytest.mark.parametrize(("n", "shares"), [(100, (0.05, 0.05)), (100, (0.2, 0.05)), (1000, (0.2, 0.05)), (500, (0.2, 0.2))])
@pytest.mark.parametrize("rounds", [2, 8, 1000])
def test_a_run_of_many_rounds_is_certified_as_a_whole(n: int, shares: tuple[float, float], rounds: int) -> None:
    """A union over rounds, each with a graph of its own: log2 of their number is what one round must have above 40 and 30 bits."""
    plan = graph.solve(n, *shares, rounds)
    assert plan is not None
    assert plan.certified
    assert plan.rounds == rounds
    once = graph.certify(n, plan.degree, plan.threshold, plan.corrupt, plan.dropped)
    assert once.security_bits == pytest.approx(plan.security_bits + math.log2(rounds), abs=1e-6)
    assert once.correctness_bits == pytest.approx(plan.correctness_bits + math.log2(rounds), abs=1e-6)
    smaller = graph.certify(n, plan.degree, plan.threshold - 1, plan.corrupt, plan.dropped, rounds=rounds)
    assert plan.threshold == plan.degree // 2 + 1 or not smaller.certified
    assert f"over {rounds} rounds together" in str(plan)
    assert "in one round" in str(once)


def test_a_pair_that_is_enough_for_one_round_is_refused_for_a_hundred() -> None:
    defense = SecureAggregation(graph="k-regular", degree=48, threshold=25)

    def refusal(rounds: int) -> str | None:
        return defense.refuses(World(data=None, model=None, federation=Federation(clients=100, rounds=rounds), defenses=(defense,)))

    assert refusal(1) is None  # 41.4 bits
    assert refusal(2) is None
    assert "40 bits of security and 30 of correctness over all 100 rounds together, got k = 48, t = 25" in (refusal(100) or "")
    more = SecureAggregation(graph="k-regular")
    in_one, in_all = more.plan_for(100, 1), more.plan_for(100, 100)
    assert in_one is not None
    assert in_all is not None
    assert in_one.degree < in_all.degree
    sizes = {"template": {}, "buffers": {}, "clients": range(100), "run_id": "r", "round": 1, "max_examples": 2, "seed": bytes(32)}
    assert more.parameters(rounds=100, **sizes).degree == in_all.degree


def test_tails_are_exact_counts() -> None:
    """Every way to draw 4 of 9 of which 3 are marked, listed."""
    draws = list(itertools.combinations(range(9), 4))
    ways, counts = graph._neighbors(9, 3, 4)
    assert ways == len(draws)
    assert counts == [sum(sum(one < 3 for one in draw) == i for draw in draws) for i in range(5)]
    assert graph._bits(counts[3], ways) == pytest.approx(-math.log2(Fraction(6, 126)))


@pytest.mark.parametrize("n", [2, 10, 64])
def test_small_cohorts_get_the_complete_graph(n: int) -> None:
    """Without the guard, c = m = 0 would "certify" k = 2, t = 2 for 10 clients."""
    plan = graph.solve(n, 0.05, 0.0)
    assert plan is not None
    assert (plan.degree, plan.threshold) == (n - 1, 2 * n // 3 + 1)
    few = graph.solve(100, 0.015, 0.05)
    assert few is not None
    assert few.complete


def test_what_cannot_be_certified_is_refused() -> None:
    assert graph.solve(100, 0.5, 0.5) is None
    assert graph.solve(100, 0.7, 0.35) is None

    def refusal(clients: int = 100, **more) -> str:
        defense = SecureAggregation(graph="k-regular", **more)
        return defense.refuses(World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense,))) or ""

    assert refusal() == refusal(degree=48, threshold=25) == ""
    for wrong in (
        {"degree": 46, "threshold": 24},
        {"degree": 3, "threshold": 3},  # as many shares as Flower lets one ask for in any cohort
        {"degree": 48, "threshold": 24},
        {"degree": 100, "threshold": 60},
        {"corrupt": 0.5, "dropout": 0.5},
    ):
        assert "must reach 40 bits of security and 30 of correctness over all 1 rounds together" in refusal(**wrong)
    with pytest.raises(ValueError, match="set together with threshold"):
        SecureAggregation(graph="k-regular", degree=48)
    with pytest.raises(ValueError, match="degree must be 0 on the complete graph"):
        SecureAggregation(degree=48, threshold=25)


@pytest.mark.parametrize(
    ("clients", "shares", "cure"),
    [
        (8, (0.2, 0.05), "a cohort of 65"),  # by the guard for small cohorts
        (64, (0.2, 0.05), "a cohort of 65"),
        (100, (0.33, 0.33), "a cohort of 154"),  # nothing below the complete graph is certified
        (100, (0.015, 0.05), "a cohort of 134"),  # 2 clients that collude
        (100, (0.0, 0.05), "other shares (with these no cohort up to 1024 has one)"),
    ],
)
def test_who_asks_for_a_sparse_graph_never_gets_the_complete_one(clients: int, shares: tuple[float, float], cure: str) -> None:
    plan = graph.solve(clients, *shares)
    assert plan is not None
    assert plan.complete
    defense = SecureAggregation(graph="k-regular", corrupt=shares[0], dropout=shares[1])
    reason = defense.refuses(World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense,))) or ""
    assert f"graph must be certified with fewer than {clients - 1} neighbors to be k-regular" in reason
    assert reason.endswith(f"Use graph = 'complete', or {cure}.")
    assert defense.plan_for(clients, 1) is None
    with pytest.raises(ProtocolAbort, match="graph must be certified, got no k-regular one"):
        defense.parameters(run_id="r", round=1, rounds=1, clients=range(clients), max_examples=2, template={}, buffers={}, seed=bytes(32))


@pytest.mark.parametrize("clients", [65, 69, 100])
def test_the_cohort_that_a_refusal_names_is_accepted(clients: int) -> None:
    larger = graph.next_sparse(clients - 1, 0.2, 0.05)
    assert larger == clients
    defense = SecureAggregation(graph="k-regular")
    assert defense.refuses(World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense,))) is None
    plan = defense.plan_for(clients, 1)
    assert plan is not None
    assert not plan.complete


@pytest.mark.parametrize(
    ("more", "clients", "complaint"),
    [
        (
            {"corrupt": 0.9},
            6,
            "corrupt must leave fewer than 5 of 6 clients that collude with a semi-honest server at threshold = 5, got 0.9",
        ),
        ({"corrupt": 0.5, "threshold": 51}, 100, None),
        ({"corrupt": 0.51, "threshold": 51}, 100, "corrupt must leave fewer than 51 of 100"),
        ({"dropout": 0.5}, 6, "dropout must leave threshold = 5 of 6 clients, got 0.5 of them, 3, lost"),
        ({"dropout": 0.05, "threshold": 20}, 20, "dropout must leave threshold = 20 of 20"),
        ({"dropout": 0.0, "threshold": 20}, 20, None),
    ],
)
def test_complete_graph_is_certified_or_refused(more: dict, clients: int, complaint: str | None) -> None:
    defense = SecureAggregation(**more)
    reason = defense.refuses(World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense,)))
    assert (complaint in (reason or "")) if complaint else reason is None
    assert (defense.plan_for(clients, 1) is None) is bool(complaint)


@pytest.mark.parametrize("n", [*range(2, 40), 64, 100, 1000])
@pytest.mark.parametrize("active", [False, True])
def test_defaults_are_certified_in_every_cohort(n: int, active: bool) -> None:
    defense = SecureAggregation(active=active)
    assert defense.refuses(World(data=None, model=None, federation=Federation(clients=n), defenses=(defense,))) is None
    plan = defense.plan_for(n, 1)
    assert plan is not None
    assert plan.certified


def test_a_client_without_a_certificate_does_not_start() -> None:
    with pytest.raises(ProtocolAbort, match="graph must be certified"):
        SecureAggregation(corrupt=0.9).parameters(run_id="r", round=1, rounds=1, clients=range(6), max_examples=2, template={}, buffers={})


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 60), st.integers(1, 20), st.binary(min_size=32, max_size=32))
def test_graph_is_regular_symmetric_and_without_loops(n: int, half: int, seed: bytes) -> None:
    degree = 2 * min(half, (n - 2) // 2)
    neighbors = graph.ring_neighbors(graph.order(range(n), seed), degree)
    for client, own in neighbors.items():
        assert len(set(own)) == degree
        assert client not in own
        assert all(client in neighbors[peer] for peer in own)


def test_graph_depends_on_every_seed_and_on_nothing_else() -> None:
    orders = {tuple(graph.order(range(100), bytes([i]) * 32)) for i in range(50)}
    assert len(orders) == 50
    first = np.array([graph.order(range(10), os.urandom(32))[0] for _ in range(2000)])
    assert np.bincount(first, minlength=10).std() < 3 * math.sqrt(2000 * 0.1 * 0.9)  # each client as often as any other
    parameters = sparse()
    other = Parameters.from_bytes(parameters.to_bytes())
    assert [other.neighbors(c) for c in other.clients] == [parameters.neighbors(c) for c in parameters.clients]


def test_tag_binds_the_graph() -> None:
    one, two = sparse(), sparse()
    assert run_tag(one, {}) != run_tag(two, {})
    assert one.digest != two.digest  # so a message of one graph is refused on another


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Parameters, dict[str, set[int]], int]:
    n = draw(st.integers(9, 16))
    parameters = sparse(n, length=draw(st.integers(1, 40)), bits=draw(st.sampled_from([16, 20, 24, 32, 64])), standing=draw(st.booleans()))
    lost = draw(drop_outs(parameters, most=2))
    if parameters.standing:
        lost["share"] |= lost.pop("advertise")
    return parameters, lost, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(scenarios())
def test_sum_is_exact_under_drop_outs_at_every_stage(scenario: tuple[Parameters, dict[str, set[int]], int]) -> None:
    """Any two may drop out: 5 of the 7 who hold a client's shares are left, and 4 are needed."""
    parameters, lost, seed = scenario
    assert_exact_sum(parameters, lost, seed)


def test_clients_deal_with_their_neighbors_only() -> None:
    parameters = sparse(16, length=20_000)
    log = rehearse(parameters, {client: np.zeros(20_000, np.uint32) for client in parameters.clients})
    for client in parameters.clients:
        roster = messages.unpack_table(log.received["share"][client][messages.HEADER_BYTES :], width=64, origin="test")
        assert set(roster) == {client, *parameters.neighbors(client)}
        assert len(roster) == 7
        assert abs(chi_squared(log.sent["mask"][client][messages.HEADER_BYTES :]) - 255) < 6 * 22.6


@pytest.mark.parametrize("stage", STAGES[:3])
def test_more_drop_outs_than_certified_abort(stage: str) -> None:
    parameters = sparse()
    with pytest.raises(ProtocolAbort, match=r"≥ quorum = 7 of 9 clients, got 6"):
        rehearse(parameters, random_vectors(parameters), lost={stage: set(parameters.clients[:3])})


def test_too_few_holders_abort() -> None:
    parameters = sparse()
    victim = parameters.clients[0]
    gone = set(parameters.holders(victim)[:4])
    with pytest.raises(ProtocolAbort, match="shares of client .* must be ≥ 4, got 3"):
        rehearse(parameters, random_vectors(parameters), lost={"unmask": gone})


def test_client_refuses_a_thinned_neighborhood_or_sum() -> None:
    parameters = sparse()
    parties, inbox = up_to("unmask", parameters, random_vectors(parameters))
    me = parameters.clients[0]
    near, far = parameters.neighbors(me), [c for c in parameters.clients if c not in parameters.holders(me)]
    state = parties[me].to_bytes()

    def ask(clients: list[int]) -> bytes:
        return SecAggClient.from_bytes(state).unmask(messages.frame(Kind.SURVIVORS, parameters.digest, messages.pack_clients(clients)))

    for survivors, complaint in (
        ([me, *near[:2], *far], "threshold = 4, got 3"),
        ([me, *near[:4], far[0]], "≥ 7 of 9 clients"),  # a sum over fewer than certified
        ([*near, *far], "include client"),
        ([*parameters.clients, 999], "≥ 7 of 9 clients"),
    ):
        with pytest.raises(ProtocolAbort, match=complaint):
            ask(survivors)
    ask(list(parameters.clients))

    parties, inbox = up_to("share", parameters, {})
    roster = messages.unpack_table(inbox[me][messages.HEADER_BYTES :], width=64, origin="test")
    foreign = {**roster, far[0]: os.urandom(64)}  # not its neighbor on this graph
    with pytest.raises(ProtocolAbort, match="among"):
        parties[me].share(messages.frame(Kind.ROSTER, parameters.digest, messages.pack_table(foreign)))


@pytest.mark.parametrize(
    "wrong",
    [{"degree": 5}, {"degree": 8}, {"threshold": 3}, {"threshold": 7}, {"seed": b""}, {"quorum": 0}, {"quorum": 4}, {"active": True}],
)
def test_parameters_refuse_graphs_that_do_not_protect(wrong: dict) -> None:
    settings_ = {"threshold": 4, "degree": 6, "seed": bytes(32), "quorum": 7}
    make_parameters(9, **settings_)
    with pytest.raises(ProtocolAbort, match="must be|must have"):
        make_parameters(9, **{**settings_, **wrong})
