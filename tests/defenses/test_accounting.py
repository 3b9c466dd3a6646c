"""ε against published and independently computed values; and every way in which it must fail closed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from inspect import signature
from typing import ClassVar

import dp_accounting
import pytest
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    UnsupportedDpEvent,
)
from dp_accounting.rdp import RdpAccountant
from torch import nn

from clients.local import local_upload
from defenses.accounting import guarantee
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.client_dp import ClientDP
from defenses.client.clip import Clip
from defenses.client.dp_sgd import DPSGD
from defenses.client.gaussian_noise import GaussianNoise
from defenses.client.local_dp import LocalDP
from defenses.privacy_loss import epsilon, gaussian_dp_delta, gaussian_dp_epsilon, gaussian_mu, pld, unknown
from defenses.server.central_dp import CentralDP
from experiments.claims.privacy import moments_epsilon
from simulator.defense import Claim, ClientContext, Defense
from simulator.errors import SpecError
from simulator.network import network, tensors
from simulator.types import Batch, Broadcast, Update
from simulator.world import World
from tests.defenses.tiny import world

HELD = (10, 10, 10, 10)


def releases(z: float, q: float, count: int) -> DpEvent:
    return SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(z)) if q < 1 else GaussianDpEvent(z), count)


# --- numbers ---


@pytest.mark.parametrize(
    ("z", "q", "count", "exact", "rdp"),
    [
        (1.0, 0.01, 1000, 1.8282, 2.1014),
        (1.1, 256 / 60000, 14062, 2.3817, 2.5966),
        (1.0, 1, 1, 4.3772, 4.7285),
        (10, 1, 100, 4.3772, 4.7285),
        (1.0, 1, 100, 91.8173, 96.1163),
        (0.5, 0.1, 20, 15.5968, 18.16),
        (2.0, 0.1, 100, 2.3374, 2.5806),
        (0.5, 0.01, 100, 6.4762, 8.034),
        (0.3, 0.01, 100, 26.8347, 32.089),
        (0.2, 0.01, 100, 75.097, 87.988),
        (0.3, 0.1, 50, 72.9694, 99.104),
    ],
)
def test_epsilon_of_the_reference_table(z: float, q: float, count: int, exact: float, rdp: float) -> None:
    """Values at discretization 1e-4; ours at 1e-3 is an upper bound that exceeds them by 0.4 % at most."""
    value, accountant = epsilon(releases(z, q, count), 1e-5)
    assert accountant == ("PLD" if q < 1 else "exact")
    assert exact * (1 - 1e-5) <= value <= exact * 1.004
    if q == 1:  # the closed form beside dp-accounting's own privacy loss distribution
        assert value == pytest.approx(pld(releases(z, q, count)).get_epsilon(1e-5), rel=0.004)
    assert RdpAccountant().compose(releases(z, q, count)).get_epsilon(1e-5) == pytest.approx(rdp, rel=1e-3)


@pytest.mark.parametrize(
    ("mu", "exact"),
    [
        (0.1, 0.340669),
        (0.5, 1.993091),
        (1, 4.377178),
        (2, 9.997256),
        (5, 33.103732),
        (10, 91.817290),
        (20, 284.391849),
        (100, 5425.509846),
    ],
)
def test_gaussian_dp_epsilon_of_the_reference_table(mu: float, exact: float) -> None:
    assert gaussian_dp_epsilon(mu, 1e-5) == pytest.approx(exact, abs=2e-6)
    assert gaussian_dp_delta(mu, exact) == pytest.approx(1e-5, rel=1e-4)
    assert dp_accounting.get_epsilon_gaussian(1 / mu, 1e-5) == pytest.approx(exact, abs=2e-6)


def test_gaussian_dp_epsilon_is_zero_where_delta_covers_everything() -> None:
    assert gaussian_dp_epsilon(1e-6, 1e-5) == 0.0


def test_gaussian_dp_epsilon_agrees_with_opacus() -> None:
    from opacus.accountants.analysis import gdp

    for mu in (0.5, 1.0, 3.0):
        assert gdp.eps_from_mu(mu=mu, delta=1e-5) == pytest.approx(gaussian_dp_epsilon(mu, 1e-5), rel=1e-5)


def test_rdp_agrees_with_opacus() -> None:
    from opacus.accountants.analysis import rdp

    orders = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))
    for z, q, count, reference in ((1.0, 0.01, 1000, 2.1014), (1.0, 1.0, 100, 96.1163), (2.0, 0.1, 100, 2.5806)):
        curve = rdp.compute_rdp(q=q, noise_multiplier=z, steps=count, orders=orders)
        theirs, _ = rdp.get_privacy_spent(orders=orders, rdp=curve, delta=1e-5)
        ours = RdpAccountant(orders).compose(releases(z, q, count)).get_epsilon(1e-5)
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert ours == pytest.approx(reference, rel=1e-3)
        assert epsilon(releases(z, q, count), 1e-5)[0] < ours


@pytest.mark.parametrize(("z", "q", "count", "theirs"), [(1.0, 0.01, 1000, 1.8384), (2.0, 0.1, 100, 2.3476)])
def test_pld_agrees_with_the_prv_accountant_of_opacus(z: float, q: float, count: int, theirs: float) -> None:
    """Another library, another method (Gopi et al., 2021); its upper end lies 0.01 above by its own error bound."""
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(z, q, count)]
    other = prv.get_epsilon(delta=1e-5)
    assert other == pytest.approx(theirs, abs=1e-3)
    assert epsilon(releases(z, q, count), 1e-5)[0] == pytest.approx(other - 0.01, abs=5e-3)


def test_little_noise_on_sampled_releases_falls_back_to_a_labelled_rdp_bound() -> None:
    value, accountant = epsilon(releases(0.05, 0.01, 1), 1e-5)
    assert accountant == "RDP"
    assert math.isfinite(value)


@pytest.mark.parametrize("z", [0.05, 0.01, 0.001])
def test_plain_gaussian_noise_is_accounted_exactly_however_little_it_is(z: float) -> None:
    """An upper bound by RDP is within a tenth of it."""
    value, accountant = epsilon(releases(z, 1, 1), 1e-5)
    assert accountant == "exact"
    assert value < RdpAccountant([1 + i / 1000 for i in range(1, 2000)]).compose(releases(z, 1, 1)).get_epsilon(1e-5) < 1.1 * value


def test_long_compositions_of_sampled_releases_fall_back_too() -> None:
    assert epsilon(releases(0.15, 0.1, 1000), 1e-5)[1] == "RDP"


def test_heterogeneous_releases_compose() -> None:
    """Precisions 1/z² add up: 0.36 + 2·0.32 = 1 is one release with z = 1."""
    event = ComposedDpEvent([GaussianDpEvent(1 / 0.6), SelfComposedDpEvent(GaussianDpEvent(math.sqrt(2) / 0.8), 2)])
    assert gaussian_mu(event) == pytest.approx(1.0)
    assert epsilon(event, 1e-5)[0] == pytest.approx(4.377178, abs=1e-3)
    assert gaussian_mu(releases(1.0, 0.1, 3)) is None


@pytest.mark.parametrize("z", [2.0, 4.0])
def test_more_noise_fewer_releases_and_larger_delta_cost_less(z: float) -> None:
    value = epsilon(releases(z, 1, 10), 1e-5)[0]
    assert epsilon(releases(2 * z, 1, 10), 1e-5)[0] < value
    assert epsilon(releases(z, 1, 5), 1e-5)[0] < value
    assert epsilon(releases(z, 1, 10), 1e-3)[0] < value


@pytest.mark.parametrize(("rate", "z", "steps"), [(0.01, 4.0, 10_000), (256 / 60_000, 0.7, 16_406), (0.2, 1.0, 50)])
def test_moments_accountant_is_renyi_dp_over_integer_orders(rate: float, z: float, steps: int) -> None:
    """Of the claims `dp-sgd-*`, by dp-accounting: Rényi DP of integer orders, turned into ε as in Abadi et al."""
    orders = list(range(2, 257))
    accountant = RdpAccountant(orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(releases(z, rate, steps))
    expected = min(rdp + math.log(1e5) / (order - 1) for order, rdp in zip(orders, accountant._rdp, strict=True))
    assert moments_epsilon(rate, z, steps, 1e-5) == pytest.approx(expected, rel=1e-6)


# --- guarantees ---


def test_dp_sgd_is_certified_for_each_record() -> None:
    found = guarantee(world(DPSGD(noise_multiplier=10.0), rounds=100, training={"batch_size": 0}), records_held=HELD)
    assert found.epsilon == pytest.approx(4.377178, abs=1e-5)
    assert (found.adversary, found.unit, found.accountant, found.delta) == ("server", "record", "exact", 1e-5)
    assert found.claim is not None
    for part in ("ε = 4.377", "δ = 1e-05", "record", "honest-but-curious server", "zero-out", "no amplification", "closed form of Gaussian DP"):
        assert part in found.sentence


def test_dp_sgd_is_certified_for_the_client_with_the_fewest_records() -> None:
    here = world(DPSGD(noise_multiplier=10.0), rounds=100, training={"batch_size": 5})
    equal, unequal = (guarantee(here, records_held=held).epsilon for held in (HELD, (5, 10, 10, 10)))
    assert unequal == pytest.approx(4.3772, abs=1e-3)  # all its records in all 100 rounds
    assert equal < unequal


def test_client_dp_is_certified_for_each_client_and_sampling_does_not_amplify() -> None:
    for cohort in (0, 1):
        found = guarantee(world(ClientDP(noise_multiplier=10.0), rounds=100, cohort=cohort), records_held=HELD)
        assert found.epsilon == pytest.approx(4.3772, abs=1e-3)
        assert found.unit == "client"


def test_clip_directly_followed_by_noise_is_the_gaussian_mechanism() -> None:
    found = guarantee(world(Clip(2.0), GaussianNoise(20.0), rounds=100), records_held=HELD)
    assert found.epsilon == pytest.approx(4.3772, abs=1e-3)
    assert found.unit == "client"
    assert found.adjacency.startswith("zero-out")
    same = guarantee(world(ClientDP(2.0, 10.0), rounds=100), records_held=HELD)
    assert same.epsilon == found.epsilon
    assert same.claim == found.claim


def test_the_best_claim_is_the_guarantee_and_channels_do_not_spoil_it() -> None:
    found = guarantee(world(ClientDP(noise_multiplier=1.0), ClientDP(noise_multiplier=3.0), SecureAggregation()), records_held=HELD)
    assert found.claim is not None
    assert gaussian_mu(found.claim.event) == pytest.approx(1 / 3)


def test_an_outsider_is_bounded_by_central_dp_the_server_is_not() -> None:
    here = world(CentralDP(noise_multiplier=10.0), rounds=100)
    outside = guarantee(here, records_held=HELD, adversary="outsider")
    assert outside.epsilon == pytest.approx(4.3772, abs=1e-3)
    assert outside.adversary == "outsider"
    assert "released model" in outside.sentence
    inside = guarantee(here, records_held=HELD)
    assert inside.epsilon == math.inf
    assert "after the server has seen the uploads" in inside.sentence


def test_what_holds_against_the_server_holds_against_an_outsider() -> None:
    here = world(ClientDP(noise_multiplier=2.0), rounds=3)
    inside, outside = guarantee(here, records_held=HELD), guarantee(here, records_held=HELD, adversary="outsider")
    assert inside.epsilon == outside.epsilon < math.inf


# --- fail closed ---


@dataclass(frozen=True)
class Round(Defense):
    """Acts on the update without private data."""

    name = "round"

    def on_update(self, update: Update, context: ClientContext) -> Update:
        return update


@dataclass(frozen=True)
class Peek(Round):
    """Acts on the update with private data."""

    name = "peek"
    looks_again: ClassVar[bool] = True


@dataclass(frozen=True)
class Mix(Defense):
    name = "mix"

    def on_batch(self, batch: Batch, context: ClientContext) -> Batch:
        return batch


@dataclass(frozen=True)
class ClipSubclass(Clip):
    """Might do anything in its override."""


@dataclass(frozen=True)
class Claims(Defense):
    name = "claims"
    event: DpEvent
    unit: str = "client"
    adversary: str = "server"

    def claim(self, world: World, records_held: object) -> Claim:
        return Claim(self.event, self.adversary, self.unit, "zero-out (…)", "…")  # type: ignore[arg-type]


GAUSSIAN = GaussianDpEvent(1.0)


@pytest.mark.parametrize(
    ("stack", "why"),
    [
        ((), "no defense is in place"),
        ((Clip(),), "adds no noise"),
        ((GaussianNoise(10.0),), "no clip directly before it"),
        ((GaussianNoise(10.0), Clip()), "no clip directly before it"),
        ((Clip(math.inf), GaussianNoise(10.0)), "no clip directly before it"),
        ((Clip(), Round(), GaussianNoise(10.0)), "no clip directly before it"),
        ((Clip(), GaussianNoise(0.0)), "sigma = 0"),
        ((ClipSubclass(), GaussianNoise(10.0)), "no clip directly before it"),
        ((CentralDP(),), "after the server has seen the uploads"),
        ((CentralDP(), SecureAggregation()), "after the server has seen the uploads"),
        ((SecureAggregation(),), "the sum is exact"),
        ((Clip(), SecureAggregation()), "the sum is exact"),
        ((DPSGD(noise_multiplier=0.0),), "claims nothing"),
        ((ClientDP(noise_multiplier=0.0),), "claims nothing"),
        ((Round(),), "claims nothing"),
        ((Mix(), DPSGD()), "mix changes the batch"),
        ((DPSGD(), Mix()), "mix changes the batch"),
        ((DPSGD(), DPSGD(2.0)), "at most 1, got 2"),
        ((Claims(NoOpDpEvent()),), "NoOpDpEvent"),
        ((Claims(NonPrivateDpEvent()),), "NonPrivateDpEvent"),
        ((Claims(UnsupportedDpEvent()),), "UnsupportedDpEvent"),
        ((Claims(ComposedDpEvent([])),), "no release at all"),
        ((Claims(ComposedDpEvent([GAUSSIAN, NonPrivateDpEvent()])),), "NonPrivateDpEvent"),
        ((Claims(ComposedDpEvent([GAUSSIAN, NoOpDpEvent()])),), "NoOpDpEvent"),
        ((Claims(SelfComposedDpEvent(GAUSSIAN, 0)),), "0 releases"),
        ((Claims(GaussianDpEvent(0.0)),), "noise multiplier"),
        ((Claims(GaussianDpEvent(-1.0)),), "noise multiplier"),
        ((Claims(GaussianDpEvent(math.inf)),), "noise multiplier"),
        ((Claims(GaussianDpEvent(math.nan)),), "noise multiplier"),
        ((Claims(PoissonSampledDpEvent(0.0, GAUSSIAN), unit="record"),), "sampling probability"),
        ((Claims(PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0)), unit="record"),), "does not know"),
        ((Claims(PoissonSampledDpEvent(0.1, GAUSSIAN), unit="client"),), "the server draws the cohort"),
        ((Claims(GAUSSIAN, adversary="outsider"),), "after the server has seen the uploads"),
        ((Claims(GAUSSIAN, adversary="somebody"),), "after the server has seen the uploads"),
    ],
    ids=lambda value: "+".join(f"{type(d).__name__}" for d in value) if isinstance(value, tuple) else None,
)
def test_everything_else_is_infinite_and_says_why(stack: tuple[Defense, ...], why: str) -> None:
    found = guarantee(world(*stack), records_held=HELD)
    assert found.epsilon == math.inf
    assert found.sentence.startswith("ε = ∞ against the honest-but-curious server")
    assert ("sees every upload" in found.sentence) is not any(defense.channel for defense in stack)
    assert why in found.sentence
    assert (found.unit, found.accountant, found.claim) == ("none", "none", None)


@pytest.mark.parametrize("stack", [(DPSGD(),), (ClientDP(),), (Clip(), GaussianNoise(1.0))])
def test_batch_norm_statistics_void_every_guarantee(stack: tuple[Defense, ...]) -> None:
    assert guarantee(world(*stack), records_held=HELD).epsilon < math.inf
    found = guarantee(world(*stack, batch_norm=True), records_held=HELD)
    assert found.epsilon == math.inf
    assert "BatchNorm" in found.sentence


def test_a_claim_that_is_known_is_taken() -> None:
    found = guarantee(world(Claims(PoissonSampledDpEvent(0.1, GAUSSIAN), unit="record")), records_held=HELD)
    assert 0 < found.epsilon < math.inf
    assert found.accountant != "exact"
    assert unknown(SelfComposedDpEvent(GAUSSIAN, 3)) is None


def test_a_guarantee_survives_beside_one_that_is_void() -> None:
    found = guarantee(world(Mix(), DPSGD(), ClientDP()), records_held=HELD)
    assert found.unit == "client"


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1 / 40, 0.5, math.nan])
def test_delta_must_be_below_one_over_records(delta: float) -> None:
    with pytest.raises(SpecError, match=r"delta must be > 0 and < 1/records = 0\.025"):
        guarantee(world(ClientDP()), records_held=HELD, delta=delta)


@pytest.mark.parametrize("held", [(), (10,), (10, 10, 10, -1), (0, 0, 0, 0)])
def test_records_held_must_count_every_client(held: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="records_held must be one count"):
        guarantee(world(ClientDP()), records_held=held)


def test_hooks_are_handed_nothing_private() -> None:
    """The reason why what follows a mechanism is post-processing: ``private`` is there for those who say that they look again."""
    assert {field.name for field in fields(ClientContext)} == {"client", "round", "batch_size", "rng", "step", "private", "pool", "lasting", "buffers"}


@pytest.mark.parametrize("mechanism", [ClientDP(), DPSGD()])
def test_a_defense_that_looks_again_after_a_mechanism_ends_its_guarantee(mechanism: Defense) -> None:
    assert guarantee(world(mechanism), records_held=HELD).epsilon < math.inf
    peeking = guarantee(world(mechanism, Peek()), records_held=HELD)
    assert peeking.epsilon == math.inf
    assert "looks at the private batch again" in peeking.sentence
    before = guarantee(world(Peek(), mechanism), records_held=HELD)
    assert (before.epsilon < math.inf) == (type(mechanism) is ClientDP)  # a record's noise comes before every on_step


def test_what_follows_a_mechanism_is_post_processing() -> None:
    alone = guarantee(world(ClientDP()), records_held=HELD)
    assert alone == guarantee(world(ClientDP(), Round()), records_held=HELD)


# --- several units ---


def test_guarantees_for_different_units_are_kept_side_by_side() -> None:
    """ε for a record says nothing of a client's: the smaller figure does not hide the other, and both bound an attack."""
    found = guarantee(world(DPSGD(1.0, 1.0), ClientDP(1.0, 0.95), rounds=1, training={"batch_size": 0}), records_held=HELD)
    assert found.unit == "record"
    assert [other.unit for other in found.others] == ["client"]
    assert found.epsilon < found.others[0].epsilon
    assert "for each record" in found.sentence
    assert "for each client" in found.sentence
    assert [claim.unit for claim in found.claims] == ["record", "client"]
    neighbors = guarantee(world(ClientDP(1.0, 1.0), LocalDP(1.0, 0.4)), records_held=HELD)
    assert [one.adjacency.split()[0] for one in (neighbors, *neighbors.others)] == ["zero-out", "replace-one"]
    assert guarantee(world(ClientDP(1.0, 1.0), ClientDP(1.0, 3.0)), records_held=HELD).others == ()


def test_whether_a_client_answers_cannot_depend_on_a_record() -> None:
    """The answer to a broadcast is seen by everybody and no noise covers it: the hook is handed a shape."""
    assert list(signature(Defense.on_broadcast).parameters) == ["self", "broadcast", "model", "shape", "context"]
    seen = []

    @dataclass(frozen=True)
    class Looks(Defense):
        name = "looks"

        def on_broadcast(self, broadcast: Broadcast, model: nn.Module, shape: tuple[int, ...], context: ClientContext) -> None:
            seen.append((shape, context.batch_size, context.private, context.pool))

    for sampling in ("shuffled", "poisson"):
        of = world(Looks(), training={"batch_size": 2, "sampling": sampling})
        model = network(of.architecture, of.data.load().schema, of.training, of.seed)
        for client in range(4):
            local_upload(of, model, Broadcast(1, *tensors(model), of.training), client)
    assert set(seen) == {((1, 4, 4), 2, None, None)}
