"""Words of 16 to 64 bits: packed as tightly as they say, uniform when masked, summed modulo 2^bits, with or without integer noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.channel._secagg import messages
from defenses.channel._secagg.encoding import ideal_sum
from defenses.channel._secagg.masking import WIDTHS, pack, packed_bytes, reduced, unpack, word_type
from defenses.channel._secagg.quantization import Scale
from defenses.channel.secure_aggregation import SecureAggregation
from experiments.benchmarks.secure_aggregation import setting
from simulator.defense import Defense
from simulator.errors import ProtocolAbort
from simulator.types import Update
from simulator.world import Federation, World
from tests.federations import world
from tests.secagg import expected_sum, make_parameters, random_vectors, rehearse


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 33), st.integers(0, 2**32 - 1))
def test_packing_is_bits_after_bits(bits: int, length: int, seed: int) -> None:
    values = [int(v) for v in np.random.default_rng(seed).integers(0, 1 << min(bits, 63), length)]
    vector = np.array(values, word_type(bits))
    data = bytes(pack(vector, bits))
    assert len(data) == packed_bytes(length, bits) == -(-length * bits // 8)
    assert int.from_bytes(data, "little") == sum(value << bits * i for i, value in enumerate(values))  # in Python's integers
    assert unpack(data, length, bits).tolist() == values
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(ProtocolAbort, match="vector must be"):
            unpack(wrong, length, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_masked_words_are_uniform_and_sums_exact(bits: int) -> None:
    parameters = make_parameters(4, 40_000, bits=bits)
    vectors = {client: np.full(40_000, client % (1 << bits), word_type(bits)) for client in parameters.clients}
    log = rehearse(parameters, vectors, lost={"mask": {parameters.clients[0]}})
    for message in log.sent["mask"].values():
        words = unpack(message[messages.HEADER_BYTES :], 40_000, bits)
        counts = np.bincount((words >> np.uint64(bits - 8) if bits == 64 else words >> (bits - 8)).astype(int), minlength=256)
        assert abs(((counts - 156.25) ** 2).sum() / 156.25 - 255) < 6 * 22.6  # the eight highest bits
        low = np.bincount((words & words.dtype.type(255)).astype(int), minlength=256)
        assert abs(((low - 156.25) ** 2).sum() / 156.25 - 255) < 6 * 22.6
        assert len(message) == messages.HEADER_BYTES + packed_bytes(40_000, bits)
    assert log.total.tolist() == expected_sum(vectors, log.senders, bits)


def test_sums_wrap_modulo_two_to_the_bits() -> None:
    for bits in WIDTHS:
        parameters = make_parameters(3, 50, bits=bits)
        vectors = random_vectors(parameters, bits)
        assert ideal_sum(vectors, bits).tolist() == expected_sum(vectors, frozenset(vectors), bits)
        assert rehearse(parameters, vectors).total.tolist() == expected_sum(vectors, frozenset(vectors), bits)
    assert reduced(np.array([0xFFFFFFFF], np.uint32), 20)[0] == 0xFFFFF


def aggregate(secagg: SecureAggregation, updates: list[torch.Tensor], noise: list[np.ndarray | None]) -> torch.Tensor:
    n, rng = len(updates), torch.Generator().manual_seed(0)
    words = {
        i: secagg.encode(Update("delta", {"w": u}), {}, 2, cohort=n, max_examples=2, rng=rng, noise=e)
        for i, (u, e) in enumerate(zip(updates, noise, strict=True))
    }
    return secagg.decode(
        ideal_sum(words, secagg.bits_for(n, 2)), kind="delta", template={"w": updates[0].double()}, buffer_template={}, senders=frozenset(words),
        cohort=n, max_examples=2, noisy=noise[0] is not None,
    ).update.tensors["w"]  # fmt: skip


@pytest.mark.parametrize("bits", WIDTHS)
def test_integer_noise_is_added_in_units_of_the_grid(bits: int) -> None:
    secagg, n, d = SecureAggregation(bits=bits, clip_range=1.0), 4, 2000
    step = secagg.scale_for(n, 2).step(1.0)
    draw = np.random.default_rng(bits)
    updates = [torch.from_numpy(draw.uniform(-0.1, 0.1, d)) for _ in range(n)]
    noise = [draw.integers(-50, 50, d) for _ in range(n)]
    got, clear = aggregate(secagg, updates, noise), aggregate(secagg, updates, [None] * n)
    torch.testing.assert_close(got - clear, torch.from_numpy(sum(noise) * step / n), atol=1e-12, rtol=1e-9)


def test_noised_words_wrap_and_are_not_bounded() -> None:
    """One client's coordinate far out of range, which another one takes back: modulo 2^bits the mean is right."""
    secagg, d = SecureAggregation(bits=20, clip_range=1.0), 3
    zero = np.zeros(d, np.int64)
    far = torch.tensor([5.0, -7.0, 0.5], dtype=torch.float64)
    with pytest.raises(ProtocolAbort, match="at most 1 in magnitude"):
        aggregate(secagg, [far, -far], [None, None])
    step = secagg.scale_for(2, 2).step(1.0)
    torch.testing.assert_close(aggregate(secagg, [far, -far + 0.25], [zero, zero]), torch.full((d,), 0.125).double(), atol=step, rtol=0)
    wrapped = aggregate(secagg, [far, torch.zeros(d).double()], [zero, zero])
    period = step * 2**20 / 2  # of the mean of two
    assert all(
        math.isclose((value / period) % 1, (want / period) % 1, abs_tol=1e-5)
        for value, want in zip(wrapped.tolist(), (far / 2).tolist(), strict=True)
    )
    with pytest.raises(ProtocolAbort, match="NaN or infinity"):
        aggregate(secagg, [far / 0, far], [zero, zero])
    for wrong in (np.zeros(d + 1, np.int64), np.zeros(d), np.zeros(d, np.int32)):
        with pytest.raises(ProtocolAbort, match="noise must be 3 of int64"):
            aggregate(secagg, [far, far], [wrong, wrong])


def test_plain_sums_have_no_integers_to_add_noise_to() -> None:
    class Noisy(Defense):
        def integer_noise(self, world, shape, rng):
            return np.zeros(shape, np.int64)

    def refusal(**more) -> str | None:
        defense = SecureAggregation(**more)
        return defense.refuses(World(data=None, model=None, federation=Federation(clients=4), defenses=(Noisy(), defense)))

    assert "mode must be quantized or protocol with integer noise, got plain" in (refusal(mode="plain") or "")
    assert refusal(mode="quantized") is None
    assert refusal() is None


@pytest.mark.parametrize(("clients", "bits"), [(100, 32), (1000, 32)])
def test_the_timed_settings_take_four_bytes_and_round_below_a_ten_thousandth(clients: int, bits: int) -> None:
    """Upload and precision together: what the benchmark measures is what a user may set."""
    timed = setting(clients, "k-regular")
    assert timed.bits_for(clients, 2) == bits
    error = timed.rounding_rms(cohort=clients, senders=clients, num_examples=clients, max_examples=2)
    assert error <= 1e-4 * 1e-3 / clients**0.5
    assert SecureAggregation(graph="k-regular").bits_for(clients, 2) == 64


def test_a_client_with_one_example_at_most_needs_no_room_for_a_smaller_weight() -> None:
    """n_i / max_examples is 1 for certain: 50 clients at the default range round below a ten-thousandth with 4 bytes."""
    for secagg, told in ((SecureAggregation(), 1), (SecureAggregation(max_examples=1), 600)):
        for clients, bits in ((50, 32), (65, 32), (66, 64)):
            assert secagg.bits_for(clients, told) == secagg.scale_for(clients, told).bits == bits
            coarse = Scale(cohort=clients, bits=32, max_examples=1).rms_error(8.0, senders=clients, num_examples=clients)
            assert (coarse <= 1e-4 * 1e-3 / clients**0.5) is (bits == 32)
    assert [SecureAggregation().bits_for(clients, 2) for clients in (32, 33, 50)] == [32, 64, 64]
    of = world(federation={"clients": 50, "rounds": 1}, model={"name": "linear"}, defenses=["secure_aggregation"])
    assert of.training.batch_size == 1
    assert of.channel.upload_bytes(1000, of) < 4.2 * 1000 + 131 * 49 + 200
    assert of.channel.parameters(
        run_id="r", round=1, rounds=1, clients=range(50), max_examples=of.channel.largest_upload(of), template={}, buffers={}
    ).bits == 32  # fmt: skip
