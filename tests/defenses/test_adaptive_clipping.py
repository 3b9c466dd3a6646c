"""Adaptive clipping: the direction of its step, what travels, the noise's split, and the claim."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent

from clients.local import local_upload
from defenses.accounting import guarantee
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.client_dp import ClientDP
from defenses.client.clip import global_norm
from defenses.client.dp_sgd import DPSGD
from defenses.server.adaptive_clipping import AdaptiveClipping, next_clip_norm
from defenses.server.central_dp import CentralDP
from simulator import lookup
from simulator.defense import ServerContext
from simulator.models.clip_norm import CLIP_NORM
from simulator.network import network
from simulator.rng import stream
from simulator.types import Update
from tests.defenses.tiny import world as tiny
from tests.federations import federate, without_flower, world

HELD = (10,) * 4
SETTINGS = {"federation": {"clients": 5, "rounds": 4}, "training": {"batch_size": 4}}


def defended(*more: dict, **settings) -> list[dict]:
    return [{"name": "adaptive_clipping", **settings}, *more]


def test_is_registered_and_says_what_it_does_not_protect() -> None:
    assert lookup.get("defenses", "adaptive_clipping") is AdaptiveClipping
    page = sys.modules[AdaptiveClipping.__module__].__doc__ or ""
    for part in ("Source:", "Deviations:", "Hooks:", "What it does not protect:", "Broken by:"):
        assert part in page


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_norm_finds_the_median_from_both_sides(start: float) -> None:
    """Reference: 50 clients, norms log-normal with median 1 and log-std 0.5, from 0.1: .11, .66, 1.01, .95 after 1, 20, 50, 200 rounds."""
    rng, norm, path = np.random.default_rng(0), start, {}
    for round in range(1, 201):
        within = float((np.exp(0.5 * rng.standard_normal(50)) <= norm).mean())
        norm = next_clip_norm(norm, within, target=0.5, rate=0.2)
        path[round] = norm
    if start == 0.1:
        assert [path[1], path[20], path[50], path[200]] == pytest.approx([0.11, 0.66, 1.01, 0.95], abs=0.1)  # 50 random bits a round
        assert path[1] == pytest.approx(0.1 * math.exp(0.1))
    else:
        assert path[1] == pytest.approx(10 * math.exp(-0.1))
        assert path[200] == pytest.approx(1.0, abs=0.1)


def test_update_and_bit_together_cost_z() -> None:
    """1/z² = 1/z_u² + 1/(2σ_b)²: two Gaussian releases, the bit − ½ with sensitivity ½."""
    defense = AdaptiveClipping(noise_multiplier=2.0, bit_noise=3.0)
    assert 1 / defense.update_noise**2 + (0.5 / 3.0) ** 2 == pytest.approx(1 / 2.0**2)
    assert defense.update_noise > 2.0
    with pytest.raises(ValueError, match=r"bit_noise must be > noise_multiplier/2 = 1 and finite, got 1.0"):
        AdaptiveClipping(noise_multiplier=2.0, bit_noise=1.0)
    for wrong in ({"target": 1.1}, {"rate": 0.0}, {"clip_norm": math.inf, "noise_multiplier": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            AdaptiveClipping(**wrong)


def test_noise_on_the_means_has_the_stated_scale() -> None:
    defense = AdaptiveClipping(noise_multiplier=2.0, bit_noise=3.0, rate=1.0, target=0.0)
    sent = {CLIP_NORM: torch.tensor(0.5)}
    context = ServerContext(1, 10, stream(0, "noise"), sent)
    noised = defense.on_aggregate(Update("delta", {"a": torch.zeros(40_000)}), context).tensors["a"]
    assert float(noised.std()) == pytest.approx(defense.update_noise * 0.5 / 10, rel=0.02)
    after = [float(defense.on_mean_buffers({CLIP_NORM: torch.tensor(0.25)}, context)[CLIP_NORM]) for _ in range(4000)]
    shares = -np.log(np.array(after) / 0.5)
    assert shares.mean() == pytest.approx(0.25, abs=0.02)
    assert shares.std() == pytest.approx(3.0 / 10, rel=0.05)


def test_clients_clip_to_what_was_broadcast_and_answer_with_a_bit(tmp_path: Path) -> None:
    """Without noise the whole federation can be computed by hand: each upload's norm and bit, and the norm of the next round."""
    of = world(**SETTINGS, defenses=defended(clip_norm=0.5, noise_multiplier=0.0))
    bare = world(**SETTINGS)
    model, norm = network(bare.architecture, bare.data.load().schema, bare.training, bare.seed), 0.5
    record = federate(of, tmp_path)
    for seen in record.observations:
        assert float(seen.broadcast.buffers[CLIP_NORM]) == pytest.approx(norm, rel=1e-6)
        bits = []
        for upload in seen.uploads:
            (client,) = upload.senders
            own = float(global_norm(local_upload(bare, model, seen.broadcast, client).update.tensors))
            assert float(global_norm(upload.update.tensors)) == pytest.approx(min(own, norm), rel=1e-5)
            bits.append(float(upload.buffers[CLIP_NORM]))
            assert bits[-1] == float(own <= norm)
        norm = next_clip_norm(norm, float(np.mean(bits)), target=0.5, rate=0.2)
    assert norm != 0.5


def test_with_secure_aggregation_the_server_sees_the_share_of_bits_alone(tmp_path: Path) -> None:
    sum_only = {"name": "secure_aggregation", "mode": "quantized"}
    plain, hidden = (
        federate(world(**SETTINGS, defenses=defended(*more, clip_norm=0.5, noise_multiplier=0.0)), tmp_path / str(len(more))).observations
        for more in ((), (sum_only,))
    )
    for one, other in zip(plain, hidden, strict=True):
        assert float(other.upload.buffers[CLIP_NORM]) == pytest.approx(
            np.mean([float(u.buffers[CLIP_NORM]) for u in one.uploads]), abs=1e-4
        )
        assert float(one.broadcast.buffers[CLIP_NORM]) == pytest.approx(float(other.broadcast.buffers[CLIP_NORM]), rel=1e-4)


def test_messages_change_nothing(tmp_path: Path) -> None:
    of = world(**SETTINGS, defenses=defended())
    federate(of, tmp_path)
    parameters, buffers = without_flower(of)
    assert torch.isfinite(buffers[CLIP_NORM])
    assert all(torch.isfinite(tensor).all() for tensor in parameters.values())


def test_it_claims_what_central_noise_does_against_outsiders_only() -> None:
    here = tiny(AdaptiveClipping(noise_multiplier=10.0, bit_noise=6.0), rounds=100, clients=30)
    outside = guarantee(here, records_held=(2,) * 30, adversary="outsider")
    assert outside.epsilon == pytest.approx(4.3772, abs=1e-3)
    assert guarantee(here, records_held=(2,) * 30).epsilon == math.inf
    unequal = AdaptiveClipping(noise_multiplier=2.0).claim(
        tiny(rounds=3, min_clients=4, training={"algorithm": "fedavg"}), (10, 10, 10, 30)
    )
    assert unequal is not None
    assert unequal.event == SelfComposedDpEvent(GaussianDpEvent(pytest.approx(2.0 / (4 * 0.5))), 3)
    assert AdaptiveClipping(noise_multiplier=0.0).claim(tiny(), HELD) is None


def test_its_bit_spoils_claims_whose_noise_comes_later() -> None:
    """The bit is of the update before client_dp's noise, and leaves in the clear; after dp_sgd it is post-processing."""
    assert guarantee(tiny(ClientDP(), AdaptiveClipping()), records_held=HELD).epsilon < math.inf
    spoiled = guarantee(tiny(AdaptiveClipping(), ClientDP()), records_held=HELD)
    assert spoiled.epsilon == math.inf
    assert "adaptive_clipping reports on the update beside it" in spoiled.sentence
    assert guarantee(tiny(DPSGD(), AdaptiveClipping()), records_held=HELD).unit == "record"
    for stack in ((CentralDP(), AdaptiveClipping()), (AdaptiveClipping(), CentralDP())):
        assert guarantee(tiny(*stack), records_held=HELD, adversary="outsider").epsilon == math.inf


def test_it_refuses_what_central_dp_refuses() -> None:
    assert "BatchNorm" in str(AdaptiveClipping().refuses(tiny(AdaptiveClipping(), batch_norm=True)))
    assert "must be there once, got 2" in str(AdaptiveClipping().refuses(tiny(AdaptiveClipping(), AdaptiveClipping(0.2))))
    assert AdaptiveClipping().refuses(tiny(AdaptiveClipping(), clients=25)) is None


def test_noise_on_the_bits_must_be_small_beside_the_cohort() -> None:
    """σ_b/n = 0.2 of a share of bits is a step of e^0.04; with four clients and the default it would be 1.25, the noise of a random walk."""
    assert "bit_noise must be at most 0.2 of the cohort of 24, got 5" in str(AdaptiveClipping().refuses(tiny(AdaptiveClipping(), clients=24)))
    assert AdaptiveClipping(noise_multiplier=0.0).refuses(tiny(AdaptiveClipping(noise_multiplier=0.0))) is None


def test_nothing_may_round_after_a_norm_that_adapts() -> None:
    """The norm may shrink to 1e-30 while the grid stays: then one rounding is worth any number of clipped updates."""
    defense = AdaptiveClipping()
    for mode, rounds in (("quantized", True), ("protocol", True), ("plain", False)):
        here = tiny(defense, SecureAggregation(mode=mode), clients=25)
        assert (defense.refuses(here) is not None) == rounds
        assert (guarantee(here, records_held=(2,) * 25, adversary="outsider").epsilon == math.inf) == rounds
    narrow = tiny(defense, clients=25, training={"upload_dtype": "float16"})
    assert "upload_dtype must be float32" in str(defense.refuses(narrow))


def test_an_attacker_knows_which_norm_was_broadcast(tmp_path: Path) -> None:
    """An update at that norm may have been scaled; a shorter one was not."""
    from attacks._gradient import maybe_clipped
    from clients.private import private_records, splits
    from experiments.disclose import architecture, disclose
    from simulator.adversary import ThreatModel

    found = {}
    for norm in (0.01, 1e4):
        of = world(**SETTINGS, defenses=defended(clip_norm=norm, noise_multiplier=0.0))
        view = federate(of, tmp_path / str(norm)).observations[0].only(0)
        (client,) = view.upload.senders
        parts = splits(of)
        told = disclose(ThreatModel(), of, parts, private_records(of, client, 1), view.upload, architecture(of, parts))
        found[norm] = maybe_clipped(view, told)
    assert found == {0.01: True, 1e4: False}
