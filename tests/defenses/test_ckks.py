"""CKKS: what it costs, what its error is, what it refuses, and that two exact decryptions give away the secret key."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tenseal
import torch
from tenseal import sealapi

from clients.ckks import _decrypt
from clients.private import records_held
from defenses.accounting import guarantee
from defenses.channel import _frames
from defenses.channel._ckks import cipher as cipher_module
from defenses.channel._ckks import flooding, handover
from defenses.channel._ckks.cipher import Cipher, generate
from defenses.channel._ckks.scheme import Scheme
from defenses.channel.ckks import CKKSAggregation
from simulator.errors import ProtocolAbort
from simulator.network import network, tensors
from simulator.types import Update, Upload
from tests.defenses.tiny import world

COARSE = Scheme(modulus_bits=(60, 40, 60), scale_bits=40)
FINE = Scheme()
SMALL = Scheme(degree=4096, modulus_bits=(60, 49), scale_bits=40)


@pytest.fixture(scope="module")
def keys() -> dict[Scheme, tuple[Cipher, Cipher]]:
    return {scheme: tuple(Cipher(scheme, context) for context in generate(scheme)) for scheme in (COARSE, FINE, SMALL)}  # type: ignore[misc]


def values(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.01, count)


@pytest.mark.parametrize(("scheme", "bytes_each"), [(COARSE, 57.4), (FINE, 64.0), (SMALL, 32.0)])
def test_sum_has_the_predicted_error_and_size(scheme: Scheme, bytes_each: float, keys) -> None:
    public, secret = keys[scheme]
    parts = [values(scheme.slots, seed) for seed in range(8)]
    sealed = [public.encrypt(part) for part in parts]
    assert len(sealed[0]) / scheme.slots == pytest.approx(bytes_each, rel=0.02)
    assert len(sealed[0]) <= scheme.ciphertext_bytes + 12
    total = public.total([public.load(one, scheme.slots, origin="a client") for one in sealed])
    error = secret.decrypt(total, scheme.slots, origin="the server") - sum(parts)
    assert error.std() == pytest.approx(scheme.error(8), rel=0.1)
    assert np.abs(error).max() < 1e-6 * np.linalg.norm(sum(parts))
    assert scheme.error(8) == pytest.approx({COARSE: 3.51e-9, FINE: 3.35e-15, SMALL: 1.76e-9}[scheme], rel=0.01)


SPREADS = {
    "small": lambda rng, slots: rng.normal(0, 0.01, slots),
    "of 1": lambda rng, slots: rng.normal(0, 1, slots),
    "of 10": lambda rng, slots: rng.normal(0, 10, slots),
    "of 30": lambda rng, slots: rng.normal(0, 30, slots),
    "one large": lambda rng, slots: np.append(rng.normal(0, 0.01, slots - 1), 300.0),
}


@pytest.mark.parametrize("senders", [1, 8])
@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_large_numbers_have_the_error_of_float64_too(spread: Callable[[np.random.Generator, int], np.ndarray], senders: int, keys) -> None:
    """At scale 2^60 CKKS's own error is below what float64's rounding leaves of 10: 7 times it at 30. Above by a third at most."""
    public, secret = keys[FINE]
    parts = [spread(np.random.default_rng(seed), FINE.slots) for seed in range(senders)]
    exact = np.array([math.fsum(column) for column in zip(*parts, strict=True)])
    total = public.total([public.load(public.encrypt(part), FINE.slots, origin="a client") for part in parts])
    error = float(np.sqrt(np.mean((secret.decrypt(total, FINE.slots, origin="the server") - exact) ** 2)))
    stated = FINE.error(senders, rms=float(np.sqrt(np.mean(exact**2))))
    assert 0.93 * error < stated < 1.4 * error
    of, told = CKKSAggregation(), 10**5
    flooding = of.scheme.flooding(senders, told, 30, rms=float(np.sqrt(np.mean(exact**2))))
    assert told * error**2 / (2 * flooding**2) < 1.2 * 2**-30


def test_the_error_that_is_printed_counts_the_numbers_in_the_mean() -> None:
    of = world(CKKSAggregation(flooding_bits=0), training={"batch_size": 4})
    channel = of.channel
    assert isinstance(channel, CKKSAggregation)
    small, large = (channel.error_rms(of, senders=4, num_examples=8, numbers=100, rms=rms) for rms in (0.0, 30.0))
    assert small == pytest.approx(FINE.error(4) * 4 / 8)
    assert large**2 - small**2 == pytest.approx((2.5 * 2**-53 * 30.0) ** 2, rel=1e-6)  # relative to the number, whatever the weights
    unstated = channel.error_rms(of, senders=4, num_examples=8, numbers=100)
    assert unstated == channel.error_rms(of, senders=4, num_examples=8, numbers=100, rms=1.0)
    noisy = CKKSAggregation()
    assert noisy.flooding(of, 100, rms=30.0) > 3.5 * noisy.flooding(of, 100) == 3.5 * noisy.flooding(of, 100, rms=1.0)
    assert noisy.flooding(of, 100, rms=17.0) == noisy.flooding(of, 100, rms=32.0) < noisy.flooding(of, 100, rms=33.0)
    assert noisy.flooding(of, 100, rms=0.0) == noisy.flooding(of, 100, rms=0.3) == noisy.flooding(of, 100)
    assert 2 * math.log2(FINE.error(8, rms=30.0) / FINE.error(8)) == pytest.approx(2.8, abs=0.05)  # bits, as flooding's docstring says


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 5000])
def test_vector_of_any_length_comes_back(length: int, keys) -> None:
    public, secret = keys[SMALL]
    data = public.encrypt(values(length))
    assert np.allclose(secret.decrypt(data, length, origin="it"), values(length), atol=1e-7)
    assert len(public.load(data, length, origin="it")) == -(-length // 2048)


def test_server_has_no_secret_key_and_no_two_ciphertexts_are_alike(keys) -> None:
    public, secret = keys[SMALL]
    assert not public.holds_secret_key
    assert secret.holds_secret_key
    one, other = public.encrypt(values(10)), public.encrypt(values(10))
    assert one != other
    with pytest.raises(ProtocolAbort, match="must have the secret key, got a public context"):
        public.decrypt(one, 10, origin="a client")
    with pytest.raises(ValueError, match="secret_key"):  # nor does the library find one in it
        public.load(one, 10, origin="a client")[0].decrypt()


def hostile(keys) -> dict[str, bytes]:
    public, _ = keys[SMALL]
    good = public.encrypt(values(2048))
    (inner,) = _frames.unpack(good, count=1, largest=10**6, origin="it")
    rescaled = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 4096, -1, [60, 49])
    rescaled.global_scale = 2.0**30
    return {
        "truncated": good[:-1],
        "longer": good + b"x",
        "empty": b"",
        "no ciphertext": _frames.pack([b""]),
        "text": _frames.pack([b"x" * 1000]),
        "two": _frames.pack([inner, inner]),
        "cut ciphertext": _frames.pack([inner[:-100]]),
        "other scheme": _frames.pack(_frames.unpack(keys[FINE][0].encrypt(values(10)), count=1, largest=10**6, origin="it")),
        "other scale": _frames.pack([tenseal.ckks_vector(rescaled, values(2048).tolist()).serialize()]),
        "fewer numbers": _frames.pack([tenseal.ckks_vector(public._context, [1.0]).serialize()]),
        "two ciphertexts in one": _frames.pack([tenseal.ckks_vector(public._context, values(4096).tolist()).serialize()]),
        "huge": _frames.pack([bytes(10**6)]),
        "length beyond its end": (1).to_bytes(4, "little") + (2**60).to_bytes(8, "little"),
    }  # fmt: skip


@pytest.mark.parametrize("case", [
    "truncated", "longer", "empty", "no ciphertext", "text", "two", "cut ciphertext", "other scheme", "other scale", "fewer numbers",
    "two ciphertexts in one", "huge", "length beyond its end",
])  # fmt: skip
def test_bytes_that_are_no_ciphertext_of_ours_are_refused(case: str, keys) -> None:
    with pytest.raises(ProtocolAbort, match="a client"):
        keys[SMALL][0].load(hostile(keys)[case], 2048, origin="a client")


def test_context_of_another_scale_or_none_is_refused() -> None:
    public, _ = generate(SMALL)
    with pytest.raises(ProtocolAbort, match=r"scale 2\^39"):
        Cipher(replace(SMALL, scale_bits=39), public)
    with pytest.raises(ProtocolAbort):
        Cipher(SMALL, b"not a context")
    with pytest.raises(ProtocolAbort, match="at most"):
        Cipher(SMALL, bytes(1 << 25))


@pytest.mark.parametrize(("degree", "sizes"), [(4096, (59, 50)), (4096, (60, 48)), (8192, (60, 49)), (8192, (60, 49, 60))])
def test_context_of_other_moduli_or_degree_is_refused(degree: int, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolAbort, match=r"degree 4096 and the primes of \[60, 49\] bits, got CKKS with degree"):
        Cipher(SMALL, generate(Scheme(degree=degree, modulus_bits=sizes, scale_bits=40))[0])


def test_numbers_that_could_wrap_are_refused(keys) -> None:
    public, secret = keys[SMALL]
    edge = np.array([SMALL.largest * 0.9])
    assert secret.decrypt(public.encrypt(edge), 1, origin="it")[0] == pytest.approx(edge[0])
    with pytest.raises(ProtocolAbort, match="must be below"):
        public.encrypt(np.array([SMALL.largest]))
    with pytest.raises(ProtocolAbort, match="must be below"):
        public.encrypt(np.array([np.nan]))
    many = [public.load(public.encrypt(edge / 4, 4), 1, origin="it") for _ in range(4)]
    assert secret.decrypt(public.total(many), 1, origin="it")[0] == pytest.approx(edge[0])
    with pytest.raises(ProtocolAbort, match="for a sum of 4, got a larger one"):
        public.encrypt(edge / 3, 4)  # four of these wrap


def test_secret_key_is_handed_over_to_its_receiver_alone() -> None:
    (mine, my_key), (theirs, their_key), (other, _) = (handover.key_pair() for _ in range(3))
    place = {"run": b"r" * 16, "public_context": b"context"}
    envelope = handover.seal(b"the secret", private=mine, peer=their_key, **place)
    assert handover.open_(envelope, private=theirs, peer=my_key, **place) == b"the secret"
    assert b"the secret" not in envelope
    for wrong in (
        {"private": other}, {"run": b"s" * 16}, {"public_context": b"another"}, {"peer": their_key},
    ):  # fmt: skip
        with pytest.raises(ProtocolAbort, match="authentic"):
            handover.open_(envelope, **{"private": theirs, "peer": my_key, **place, **wrong})
    with pytest.raises(ProtocolAbort, match="authentic"):
        handover.open_(envelope[:-1] + bytes([envelope[-1] ^ 1]), private=theirs, peer=my_key, **place)
    with pytest.raises(ProtocolAbort, match="full order"):
        handover.seal(b"x", private=mine, peer=bytes(32), **place)


def test_who_has_no_usable_key_is_named() -> None:
    key = handover.key_pair()[1]
    assert handover.why_unusable(3, key, set()) is None
    for bad, others, reason in (
        (key[:-1], set(), "32 bytes, got 31"), (bytes(32), set(), "full order"), (key, {key}, "nobody else has"),
        ((2**255 - 19).to_bytes(32, "little"), set(), "another writing"), (key[:-1] + bytes([key[-1] | 128]), set(), "another writing"),
    ):  # fmt: skip
        assert (found := handover.why_unusable(3, bad, others)) is not None
        assert "client 3" in found
        assert reason in found


def test_roster_has_one_reading() -> None:
    roster = {4: b"d" * 32, 1: b"a" * 32}
    data = handover.pack_roster(roster)
    assert handover.unpack_roster(data) == roster
    for bad in (data[:-1], data[40:] + data[:40], data[:40] * 2):
        with pytest.raises(ProtocolAbort, match="roster"):
            handover.unpack_roster(bad)
    with pytest.raises(ProtocolAbort, match="32 bytes, got 31"):
        handover.pack_roster({0: b"x" * 31})


def upload(client: int, examples: int) -> Upload:
    rng = torch.Generator().manual_seed(client)
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in (("w", (3, 4)), ("b", (3,)))}
    buffers = {"running": torch.rand(2, generator=rng), "count": torch.tensor(7)}
    return Upload(frozenset({client}), Update("gradient", tensors), buffers, examples)


def test_decoded_sum_is_the_weighted_mean_and_a_corrupt_one_is_refused() -> None:
    defense, uploads = CKKSAggregation(), [upload(0, 3), upload(1, 5), upload(2, 1)]
    total = sum(defense.encode(one, max_examples=8) for one in uploads)
    template = {"kind": "gradient", "parameters": uploads[0].update.tensors, "buffers": uploads[0].buffers, "max_examples": 8}
    everyone = frozenset({0, 1, 2})
    mean = defense.decode(total, senders=everyone, **template)
    assert (mean.senders, mean.num_examples, list(mean.update.tensors), list(mean.buffers)) == (everyone, 9, ["w", "b"], ["running"])
    for name in ("w", "b"):
        wanted = sum(one.num_examples * one.update.tensors[name].double() for one in uploads) / 9
        assert torch.allclose(mean.update.tensors[name].double(), wanted, atol=1e-7)
    assert torch.allclose(mean.buffers["running"], sum(one.num_examples * one.buffers["running"] for one in uploads) / 9)
    for wrong in (total * 1.2, total[:-1], total * np.nan, total + np.eye(len(total))[-2] * 0.05, total - np.eye(len(total))[-2]):
        with pytest.raises(ProtocolAbort, match="sum must be"):
            defense.decode(wrong, senders=everyone, **template)
    with pytest.raises(ProtocolAbort, match="of 2 senders"):
        defense.decode(total, senders=frozenset({0, 1}), **template)
    for bad in (upload(0, 9), replace(upload(0, 3), update=Update("gradient", {"w": torch.tensor([torch.inf])}))):
        with pytest.raises(ProtocolAbort):
            defense.encode(bad, max_examples=8)


def solved_key(scheme: Scheme, public: Cipher, sums: list[bytes], told: list[np.ndarray]) -> list[int]:
    """The secret key out of two ciphertexts and what their decryptions were told to be: Li and Micciancio, 2021, for real numbers.

    A ciphertext is (c0, c1) with c0 + c1·s = m, the encoded message and its error. What is told are the real parts of m's slots, that
    is m(X) + m(1/X), exactly. In the transform that ciphertexts are kept in, place i belongs to a root of unity and place N − 1 − i to
    its inverse, so that each sum gives one equation in s at the two places, and two sums give both.
    """
    degree, scale = scheme.degree, 2.0**scheme.scale_bits
    prime = sealapi.CoeffModulus.Create(degree, list(scheme.modulus_bits))[0].value()
    encoder = sealapi.CKKSEncoder(public._context.seal_context().data)
    rows = []
    for data, numbers in zip(sums, told, strict=True):
        (vector,) = public.load(data, scheme.slots, origin="a client")
        (words,) = vector.ciphertext()
        twice = sealapi.Plaintext()
        encoder.encode((2 * numbers).tolist(), scale, twice)
        second = words.coeff_modulus_size() * degree
        c0, c1 = ([words[start + i] for i in range(degree)] for start in (0, second))
        rows.append((c1, [(twice[i] - c0[i] - c0[degree - 1 - i]) % prime for i in range(degree)]))
    (a, right), (b, other) = rows
    key = []
    for i in range(degree):
        j = degree - 1 - i
        inverse = pow(a[i] * b[j] - a[j] * b[i], -1, prime)
        key.append((right[i] * b[j] - other[i] * a[j]) * inverse % prime)
    return key


@pytest.mark.parametrize(("flooded", "found"), [(False, 8192), (True, 0)])
def test_two_exact_decryptions_give_the_server_the_secret_key_and_noise_prevents_it(flooded: bool, found: int, keys) -> None:
    public, secret = keys[COARSE]
    sums = [
        public.total([public.load(public.encrypt(values(4096, 10 * place + client)), 4096, origin="it") for client in range(3)])
        for place in range(2)
    ]
    told = [secret.decrypt(one, 4096, origin="the server") for one in sums]
    if flooded:
        sigma = COARSE.flooding(3, 2 * 4096, 30)
        told = [one + np.random.default_rng(place).normal(0, sigma, 4096) for place, one in enumerate(told)]
    true = secret._context.secret_key().data.data()
    key = solved_key(COARSE, public, sums, told)
    assert sum(guess == true[i] for i, guess in enumerate(key)) == found


def test_flooding_bounds_the_divergence() -> None:
    sigma, error, released = FINE.flooding(5, 10**6, 30), FINE.error(5), 10**6
    assert released * error**2 / (2 * sigma**2) == pytest.approx(2**-30)
    assert FINE.flooding(5, 10**6, 0) == 0


def test_one_sum_is_told_with_one_noise_whoever_is_asked_and_however_often(keys) -> None:
    """The mean over as many answers as there are clients and rounds is no closer to the exact sum than one answer."""
    of = world(CKKSAggregation())
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    public, context = generate(FINE)
    cipher, numbers = Cipher(FINE, public), of.channel.length(*tensors(model))
    vector = np.concatenate((values(numbers - 1), [1.0]))
    one = cipher.encrypt(vector)
    sums = [cipher.total([cipher.load(part, numbers, origin="it") for part in parts]) for parts in ([one] * 2, [one] * 3)]
    told = [[np.frombuffer(_decrypt(of, model, of.channel, data, context)) for _ in range(3)] for data in sums]
    assert all(np.array_equal(again, answers[0]) for answers in told for again in answers)
    errors = [answers[0] - count * vector for answers, count in zip(told, (2, 3), strict=True)]
    for error in errors:
        assert error.std() == pytest.approx(of.channel.flooding(of, numbers), rel=0.4)
    assert abs(np.corrcoef(*errors)[0, 1]) < 0.4
    other = flooding.noise(b"another key", sums[0], 10_000, std=2.0)
    assert other.std() == pytest.approx(2.0, rel=0.05)
    assert not np.array_equal(other, flooding.noise(context, sums[0], 10_000, std=2.0))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"degree": 2048}, "degree must be one of"),
        ({"modulus_bits": (60,)}, "≥ 2 sizes"),
        ({"modulus_bits": (60, 61)}, "20 to 60"),
        ({"degree": 4096}, "sum to ≤ 109"),
        ({"modulus_bits": (60, 60, 60, 60)}, "sum to ≤ 218"),
        ({"scale_bits": 105}, "16 below the data modulus"),
        ({"degree": 4096, "modulus_bits": (40, 20, 40), "scale_bits": 20}, "rms error ≤ 1e-06, got 6"),
        ({"flooding_bits": 129}, "flooding_bits"),
    ],
)
def test_settings_that_are_insecure_or_useless_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CKKSAggregation(**settings)


def test_refuses_worlds_in_which_it_cannot_act(monkeypatch: pytest.MonkeyPatch) -> None:
    defense = CKKSAggregation()
    assert defense.refuses(world(defense)) is None
    assert "cohort must be ≥ 2" in (defense.refuses(world(defense, clients=1)) or "")
    narrow = CKKSAggregation(degree=4096, modulus_bits=(60, 49), scale_bits=44, flooding_bits=0)
    assert narrow.refuses(world(narrow, clients=16_383)) is None
    assert "cohort must be below 16384, where a sum wraps" in (narrow.refuses(world(narrow, clients=16_384)) or "")
    coarse = CKKSAggregation(modulus_bits=(60, 40, 60), scale_bits=40)
    assert "flooding_bits must leave an error" in (coarse.refuses(world(coarse)) or "")
    assert replace(coarse, flooding_bits=0).refuses(world(coarse)) is None
    monkeypatch.setattr(cipher_module, "find_spec", lambda _: None)
    assert "pip install 'fedpeek[ckks]'" in (defense.refuses(world(defense)) or "")
    with pytest.raises(ProtocolAbort, match="must have the package tenseal"):
        generate(SMALL)


def test_claims_nothing() -> None:
    of = world(CKKSAggregation())
    assert guarantee(of, records_held=records_held(of)).epsilon == float("inf")
