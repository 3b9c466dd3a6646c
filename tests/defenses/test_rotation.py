"""The random rotation before rounding: orthogonal, flattening as its bound says, turned back at the server, and harmless where words wrap."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as dense

from clients.local import local_upload
from defenses.channel._secagg.encoding import ideal_sum
from defenses.channel._secagg.quantization import Scale, to_words
from defenses.channel._secagg.rotation import hadamard, rotated, transformed, turned_back
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.distributed_dp import DistributedDP
from defenses.distributed import LARGEST_VARIANCE, reach
from experiments.disclose import noise_told
from simulator.errors import ProtocolAbort
from simulator.network import network
from simulator.rng import stream
from simulator.types import Update
from simulator.world import Federation, World
from tests.federations import equal, federate, misbehaving, world
from tests.secagg import rehearse

SIZES = (1, 2, 3, 5, 8, 47, 64, 100, 127)


def plain_world(defense: DistributedDP, clients: int, bits: int = 20, **settings) -> World:
    channel = SecureAggregation(mode="quantized", bits=bits, max_examples=1, **settings)  # type: ignore[arg-type]
    return World(data=None, model=None, federation=Federation(clients=clients), defenses=(defense, channel))


def grid(of: World, coordinates: int) -> float:
    assert isinstance(of.channel, SecureAggregation)
    return of.channel.grid(of, coordinates)


def signed(words: np.ndarray, bits: int) -> np.ndarray:
    return (words.astype(np.int64) + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


# --- the transform ---


@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_the_transform_is_the_matrix_of_walsh_and_hadamard(size: int) -> None:
    vector = torch.randn(size, generator=stream(0, "x"), dtype=torch.float64)
    before = vector.clone()
    expected = dense(size) @ vector.numpy() / math.sqrt(size)
    np.testing.assert_allclose(hadamard(vector).numpy(), expected, atol=1e-14)
    assert torch.equal(vector, before)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_its_own_length(size: int) -> None:
    matrix = torch.stack([rotated(row, stream(3, "r")) for row in torch.eye(size, dtype=torch.float64)])
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-13, rtol=0)
    vector = torch.randn(size, generator=stream(1, "x"), dtype=torch.float64)
    torch.testing.assert_close(turned_back(rotated(vector, stream(3, "r")), stream(3, "r")), vector, atol=1e-13, rtol=0)
    assert size < 64 or not torch.allclose(turned_back(rotated(vector, stream(3, "r")), stream(4, "r")), vector, atol=0.1)


@pytest.mark.parametrize("size", [64, 100])
def test_no_coordinate_has_more_than_its_share_of_the_length_whatever_the_vector(size: int) -> None:
    """Over the signs: sub-Gaussian with variance ‖x‖²/P, so its exponential moments lie below a Gaussian's."""
    share = 1 / math.sqrt(transformed(size))
    for place in (size - transformed(size), size - 1):
        one = torch.zeros(size, dtype=torch.float64)
        one[place] = 1.0
        rng = stream(place, "r")
        drawn = torch.stack([rotated(one, rng) for _ in range(300)]) / share
        assert float(drawn.square().mean(0).max()) <= 1.4  # of 300 draws: five standard errors
        for t in (0.5, 1.0):
            assert float((t * drawn).exp().mean()) <= math.exp(t * t / 2) * 1.03


# --- words ---


def test_sums_over_whoever_is_left_are_turned_back() -> None:
    """Five clients of whom two drop out late: the sum of rotated words, by the protocol's messages, is the mean of the three."""
    n, d, bits = 5, 300, 24
    of = plain_world(DistributedDP(clip_norm=1.0, noise_multiplier=1e-3), n, bits, threshold=3, dropout=0.4)
    own, channel = of.defenses
    assert isinstance(own, DistributedDP)
    assert isinstance(channel, SecureAggregation)
    draw = stream(0, "updates")
    updates = [torch.randn(d, generator=draw, dtype=torch.float64) for _ in range(n)]
    updates = [update / update.norm() for update in updates]
    limit = channel.range_for(of, d)
    assert limit < 0.6  # where an update as it is would need 1
    words = {
        i: channel.encode(
            Update("delta", {"w": u}), {}, 1, cohort=n, max_examples=1, rng=draw, limit=limit, rotation=channel.rotation_for(of, 1),
            noise=own.integer_noise(of, (d,), draw), longest=own.longest_rounded(of, d),
        )
        for i, u in enumerate(updates)
    }  # fmt: skip
    template = {"w": torch.zeros(d, dtype=torch.float64)}
    parameters = channel.parameters(run_id="r", round=1, rounds=1, clients=range(n), max_examples=1, template=template, buffers={})
    log = rehearse(parameters, words, lost={"mask": {1}, "unmask": {4}})
    assert log.total.tolist() == ideal_sum({i: words[i] for i in log.senders}, bits).tolist()

    def decoded(round: int) -> torch.Tensor:
        return channel.decode(
            log.total, kind="delta", template=template, buffer_template={}, senders=log.senders, cohort=n, max_examples=1, noisy=True,
            limit=limit, rotation=channel.rotation_for(of, round),
        ).update.tensors["w"]  # fmt: skip

    mean = torch.stack([updates[i] for i in log.senders]).mean(0)
    noise = own.share(of) / math.sqrt(len(log.senders))
    assert log.senders == frozenset({0, 2, 3, 4})
    assert float((decoded(1) - mean).std()) == pytest.approx(noise, rel=4 / math.sqrt(2 * d))
    assert float((decoded(2) - mean).std()) > 10 * noise  # another round's rotation


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_rotated_words_are_as_short_as_the_noise_is_made_for_whatever_wraps(bits: int) -> None:
    """A vector of one large coordinate, and one of halves of steps: the norm after rounding holds for each, and is what the claim counts."""
    d, n = 1000, 4
    of = plain_world(DistributedDP(), n, bits)
    own, step = of.defenses[0], grid(of, d)
    assert isinstance(own, DistributedDP)
    one, flat = torch.zeros(d, dtype=torch.float64), torch.full((d,), step / 2, dtype=torch.float64)
    one[0], flat[0] = 1.0, math.sqrt(1 - (d - 1) * step**2 / 4)
    scale = Scale(cohort=n, bits=bits, max_examples=1)
    for vector in (one, flat):
        for seed in range(5):
            words = to_words(
                {"w": vector}, weight=1.0, limit=step * scale.q_max, scale=scale, rng=stream(seed, "rounding"),
                noise=np.zeros(d, np.int64), longest=own.longest_rounded(of, d), rotation=stream(seed, "r"),
            )  # fmt: skip
            assert np.linalg.norm(signed(words, bits).astype(float)) <= own.release(of, d).l2
    assert own.release(of, d).l2 == own.longest_rounded(of, d)
    longer = {"w": 2 * one}
    with pytest.raises(ProtocolAbort, match="norm of at most"):
        to_words(
            longer, weight=1.0, limit=step * scale.q_max, scale=scale, rng=stream(0, "rounding"), noise=np.zeros(d, np.int64),
            longest=own.longest_rounded(of, d), rotation=stream(0, "r"),
        )  # fmt: skip


def test_sums_leave_their_range_as_seldom_as_they_may() -> None:
    """At a chance of 1e-3 a coordinate: the sum of clients that all hold the same one coordinate, with all their noise, before the modulus."""
    n, bits, chance = 4, 16, 1e-3
    for d in (1 << 15, 40_000):
        of = plain_world(DistributedDP(wrap_chance=chance), n, bits)
        own = of.defenses[0]
        assert isinstance(own, DistributedDP)
        step, one, rng = grid(of, d), torch.zeros(d, dtype=torch.float64), stream(d, "noise")
        one[7] = 1.0
        whole = n * rotated(one, stream(d, "r")).numpy() / step + sum(own.integer_noise(of, (d,), rng) for _ in range(n))
        beyond = float((np.abs(whole) > n * Scale(cohort=n, bits=bits, max_examples=1).q_max).mean())
        assert beyond <= chance  # a Gaussian of that variance: 1e-4
        assert float(np.abs(whole).max()) > 0.9 * n * Scale(cohort=n, bits=bits, max_examples=1).q_max  # and no room is idle


def test_the_range_is_the_papers_but_for_what_is_said() -> None:
    """2^bits·g/2 = 4·√(n²S²/d + n(g²/4 + share²)): for a power of two of coordinates and no drop-out, at 4 standard deviations."""
    four = 2 * math.exp(-8)
    assert reach(four) == pytest.approx(4)
    assert reach(1e-12) == pytest.approx(7.53, abs=5e-3)
    for n, d, bits in ((10, 1 << 16, 20), (100, 1 << 16, 20), (100, 1 << 23, 24)):
        of = plain_world(DistributedDP(wrap_chance=four, colluding=0), n, bits, threshold=n, dropout=0.0)
        spread = math.sqrt(n**2 / d + 1)
        papers = 4 * spread / 2 ** (bits - 1) / math.sqrt(1 - 4 * n / 2 ** (2 * bits))
        assert grid(of, d) == pytest.approx(papers, rel=n * 2.0 ** (2 - bits))


@pytest.mark.parametrize("bits", [32, 64])
def test_words_are_no_finer_than_the_noise_can_be_drawn_on(bits: int) -> None:
    of = plain_world(DistributedDP(), 10, bits)
    own = of.defenses[0]
    assert isinstance(own, DistributedDP)
    assert (own.share(of) / grid(of, 1000)) ** 2 == pytest.approx(LARGEST_VARIANCE)
    drawn = own.integer_noise(of, (1000,), stream(0, "noise"))
    assert drawn is not None
    assert float(np.square(drawn.astype(float)).mean()) == pytest.approx(LARGEST_VARIANCE, rel=0.2)


# --- the whole way ---


def test_both_modes_see_the_clipped_mean_bit_for_bit(tmp_path: Path) -> None:
    """Without noise what is left is rounding; one of four clients drops out, in the protocol and beneath it."""
    settings = {"federation": {"clients": 4}, "training": {"batch_size": 4}}

    def act(client, request, answer):
        if client == 2:
            raise RuntimeError("gone")
        return answer()

    seen = {}
    for mode in ("quantized", "protocol"):
        channel = {"name": "secure_aggregation", "mode": mode, "bits": 32, "clip_range": 0.25}
        own = {"name": "distributed_dp", "clip_norm": 0.2, "noise_multiplier": 0.0}
        seen[mode] = federate(of := world(**settings, defenses=[own, channel]), tmp_path / mode, misbehaving(act)).observations
    assert all(equal(*pair) for pair in zip(seen["quantized"], seen["protocol"], strict=True))
    clipped = world(**settings, defenses=[{"name": "clip", "clip_norm": 0.2}])
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    for each in seen["protocol"]:
        assert each.upload.senders == frozenset({0, 1, 3})
        uploads = [local_upload(clipped, model, each.broadcast, client).update.tensors for client in sorted(each.upload.senders)]
        for name, got in each.upload.update.tensors.items():
            torch.testing.assert_close(got, sum(u[name] for u in uploads) / 3, atol=1e-7, rtol=1e-6)


def test_the_rotation_is_the_rounds_and_no_secret() -> None:
    of = plain_world(DistributedDP(), 4)
    own, channel = of.defenses
    assert isinstance(channel, SecureAggregation)
    vector = torch.ones(64, dtype=torch.float64)
    first, again, second = (rotated(vector, channel.rotation_for(of, round) or torch.Generator()) for round in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    bare = plain_world(DistributedDP(rotate=False), 4)
    assert channel.rotation_for(bare, 1) is None
    assert channel.range_for(bare, 64) == channel.clip_range
    assert own.rotation(of, 1) is not None


def test_what_cannot_be_rotated_is_refused() -> None:
    for wrong in (0.0, 0.1, -1.0, math.nan):
        with pytest.raises(ValueError, match="wrap_chance must be > 0"):
            DistributedDP(wrap_chance=wrong)
    endless = DistributedDP(clip_norm=math.inf, noise_multiplier=0.0)
    assert "clip_norm must be finite" in str(endless.no_words(plain_world(endless, 4)))
    assert "≥ 2 steps either way, got 1" in str(DistributedDP().no_words(plain_world(DistributedDP(), 20_000, 16)))
    assert DistributedDP().no_words(plain_world(DistributedDP(), 4, 16)) is None


def test_the_attacker_is_told_what_a_client_adds() -> None:
    """A client adds z·S/√h for the h honest clients that must answer: more than z·S/√n."""
    of = plain_world(DistributedDP(clip_norm=2.0, noise_multiplier=0.5), 30)
    told = noise_told(of.defenses[0], of)["noise_std"]
    assert told == pytest.approx(DistributedDP(clip_norm=2.0, noise_multiplier=0.5).share(of))
    assert isinstance(told, float)
    assert told > 1.0 / 30**0.5
