"""The audit: exact limits, Holm's correction, and that it catches half the noise that is claimed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from defenses.accounting import guarantee
from defenses.audit import Measured, audit, lower_limit, p_value
from defenses.bounds import reconstruction_ceiling
from defenses.client.dp_sgd import DPSGD, clipped_sum
from simulator.defense import ClientContext
from simulator.training import per_example_gradients
from simulator.types import Batch, Tensors
from tests.defenses.test_dp import per_example
from tests.defenses.tiny import TinyData, context, world

CANDIDATES = 10


@dataclass(frozen=True)
class HalvedNoise(DPSGD):
    """dp_sgd with a bug: it adds half the noise that it claims."""

    def on_gradient(self, per_example: Tensors, context: ClientContext) -> Tensors:
        honest = super().on_gradient(per_example, context)
        exact = DPSGD(self.clip_norm, 0.0).on_gradient(per_example, context)
        return {name: (honest[name] + exact[name]) / 2 for name in exact}


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def named(defense: DPSGD, trials: int, seed: int) -> int:
    """How often a matched filter names the record behind one upload of ``defense``, of 10 candidates: a real run of the mechanism.

    The likeliest candidate under Gaussian noise maximizes ⟨y, gᵢ⟩ − ‖gᵢ‖²/2, gᵢ its clipped gradient. Clipping makes the gradients of
    an untrained model nearly parallel, which would hide the difference; so the candidates are random and far apart in 400 coordinates.
    """
    numpy_rng, hits = np.random.default_rng(seed), 0
    for trial in range(trials):
        gradients = torch.from_numpy(numpy_rng.standard_normal((CANDIDATES, 400))).float()
        truth = int(numpy_rng.integers(CANDIDATES))
        seen = defense.on_gradient({"w": gradients[truth][None]}, context(batch_size=1, seed=1000 * seed + trial))["w"]
        each = torch.stack([clipped_sum({"w": candidate[None]}, defense.clip_norm)["w"] for candidate in gradients])
        hits += int((each @ seen - each.square().sum(1) / 2).argmax()) == truth
    return hits


def measured(defense: DPSGD, trials: int, seed: int = 0) -> Measured:
    found = guarantee(world(defense, rounds=1, training={"batch_size": 0}), records_held=(10,) * 4)
    assert found.claim is not None
    return Measured(defense.name, named(defense, trials, seed), trials, reconstruction_ceiling(found.claim, CANDIDATES))


def test_half_the_noise_is_caught_and_the_claimed_noise_is_not() -> None:
    """z = 1, 10 candidates, 100 trials: ceiling 0.389, success 0.35 with the noise, 0.69 with half of it."""
    for seed in range(10):
        honest, halved = audit([measured(DPSGD(1.0, 1.0), 100, seed)])[0], audit([measured(HalvedNoise(1.0, 1.0), 100, seed)])[0]
        assert honest.measured.ceiling == halved.measured.ceiling == pytest.approx(0.389144, abs=1e-6)
        assert not honest.failed
        assert halved.failed
        assert re.search(r"dp_sgd: AUDIT FAILED: \d+ of 100 .* above the ceiling of 38.9%", halved.sentence)


def test_the_claimed_noise_passes_on_a_real_model_too() -> None:
    """The tiny network's own gradients as candidates, through per_example_gradients and the hook."""
    model, parameters, _ = per_example()
    records = TinyData().load().records
    defense, hits = DPSGD(0.5, 1.0), 0
    gradients = per_example_gradients(model, parameters, {}, Batch(records.inputs[:10], records.labels[:10]))
    each = torch.stack([flat(clipped_sum({n: t[i : i + 1] for n, t in gradients.items()}, 0.5)) for i in range(10)])
    for trial in range(100):
        seen = flat(defense.on_gradient({n: t[trial % 10][None] for n, t in gradients.items()}, context(seed=trial)))
        hits += int((each @ seen - each.square().sum(1) / 2).argmax()) == trial % 10
    assert hits > 10
    claim = guarantee(world(defense, training={"batch_size": 0}), records_held=(10,) * 4).claim
    (verdict,) = audit([Measured("dp_sgd", hits, 100, reconstruction_ceiling(claim, 10))])
    assert not verdict.failed


@pytest.mark.parametrize(("z", "trials", "power"), [(1.0, 100, 1.0), (2.0, 100, 0.77), (2.0, 300, 1.0)])
def test_power_against_halved_noise(z: float, trials: int, power: float) -> None:
    """Power over binomial draws at the success of orthonormal candidates, ∫φ(x − μ)Φ(x)⁹dx; the reference uses a two-sided limit."""
    x = np.linspace(-12, 20, 20_001)
    success = float(np.trapezoid(stats.norm.pdf(x - 2 / z) * stats.norm.cdf(x) ** 9, x))
    ceiling = float(stats.norm.cdf(stats.norm.ppf(0.1) + 1 / z))
    hits = np.arange(trials + 1)
    failed = np.array([audit([Measured("row", int(k), trials, ceiling)])[0].failed for k in hits])
    found = float(stats.binom.pmf(hits, trials, success)[failed].sum())
    assert found >= power - 0.01
    assert float(stats.binom.pmf(hits, trials, ceiling)[failed].sum()) <= 0.05


def test_the_limit_is_clopper_pearsons() -> None:
    for k, n in ((0, 10), (1, 10), (7, 10), (10, 10), (69, 100)):
        other = stats.binomtest(k, n, alternative="greater").proportion_ci(0.95, method="exact").low
        assert lower_limit(k, n) == pytest.approx(float(other), abs=1e-12)


def test_one_row_fails_exactly_where_its_limit_passes_the_ceiling() -> None:
    for k in range(101):
        (verdict,) = audit([Measured("row", k, 100, 0.389)])
        assert verdict.failed == (verdict.low > 0.389)


def test_many_rows_are_held_to_holms_levels() -> None:
    """20 rows that are right on the ceiling: some row alone fails in two of three audits; together in at most one of twenty."""
    rng = np.random.default_rng(0)
    draws = rng.binomial(100, 0.3, (300, 20))
    alone = sum(any(audit([Measured("row", int(k), 100, 0.3)])[0].failed for k in row) for row in draws[:60])
    together = sum(any(v.failed for v in audit([Measured("row", int(k), 100, 0.3) for k in row])) for row in draws)
    assert alone > 20
    assert together <= 0.05 * 300 + 8
    verdicts = audit([Measured("a", 55, 100, 0.3), Measured("b", 39, 100, 0.3), Measured("c", 30, 100, 0.3)])
    assert [v.failed for v in verdicts] == [True, False, False]
    assert audit([Measured("b", 39, 100, 0.3)])[0].failed
    assert verdicts[0].p_value == pytest.approx(3 * stats.binom.sf(54, 100, 0.3))


def test_a_row_fails_exactly_where_its_limit_passes_its_ceiling_among_any_others() -> None:
    """Random tables: the limit and the corrected p-value are two ways to say the same, also for rows after one that passed."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        rows = []
        for place in range(int(rng.integers(1, 7))):
            trials, ceiling = int(rng.choice([1, 2, 5, 20, 60])), float(rng.choice([0.03, 0.04, 0.2, 0.5, 0.9, 1.0]))
            rows.append(Measured(str(place), int(rng.binomial(trials, min(1.0, ceiling * rng.uniform(0.8, 3)))), trials, ceiling))
        verdicts = audit(rows)
        assert [v.measured for v in verdicts] == rows
        for verdict in verdicts:
            assert verdict.failed == (verdict.low > verdict.measured.ceiling) == (verdict.p_value < 0.05)
            if verdict.fails_from is not None and verdict.measured.successes >= verdict.fails_from:
                assert verdict.failed
    two = audit([Measured("a", 1, 1, 0.03), Measured("b", 1, 1, 0.04)])  # p = 0.03 fails at 0.025; then 0.04 is not looked at
    assert not any(v.failed or v.low > v.measured.ceiling for v in two)


def test_rows_that_cannot_fail_cost_the_others_nothing() -> None:
    """Three hits of three beside a ceiling of 0.4 have p = 0.064: ten such rows may not hide the one that can fail (Tarone, 1990)."""
    tiny, telling = Measured("tiny", 3, 3, 0.4), Measured("telling", 40, 100, 0.3)
    alone = audit([telling])[0]
    *others, found = audit([*[tiny] * 10, telling])
    assert alone.failed
    assert (found.failed, found.p_value, found.low) == (True, alone.p_value, alone.low)
    assert not any(verdict.failed for verdict in others)
    assert "cannot fail at 3 trials beside a ceiling of 40.0%" in others[0].sentence
    (passing,) = audit([Measured("row", 30, 100, 0.3)])
    assert passing.fails_from == min(k for k in range(101) if stats.binom.sf(k - 1, 100, 0.3) < 0.05) == 39
    assert "fails from 39.0% on" in passing.sentence


# --- ceilings of their own ---

RISING = (0.36, 0.52, 0.65, 0.81)


def own(successes: int, ceilings: tuple[float, ...], **more: int) -> Measured:
    return Measured("row", successes, len(ceilings), float(np.mean(ceilings)), own=ceilings, **more)


def test_unequal_ceilings_are_judged_by_their_own_distribution() -> None:
    """Against the sum over all 2⁸ outcomes, and scipy's distribution where it has one (from 1.15 on)."""
    ceilings = (0.05, 0.2, 0.36, 0.5, 0.52, 0.65, 0.81, 0.97)
    outcomes = np.array(list(product((0, 1), repeat=8)))
    chances = np.where(outcomes == 1, ceilings, 1 - np.array(ceilings)).prod(1)
    for k in range(9):
        assert p_value(own(k, ceilings), k) == pytest.approx(float(chances[outcomes.sum(1) >= k].sum()), rel=1e-12)
    many = RISING * 50
    same = Measured("row", 3, 200, 0.3, own=(0.3,) * 200)
    for k in (0, 1, 80, 117, 140, 200):
        if hasattr(stats, "poisson_binom"):
            assert p_value(own(k, many), k) == pytest.approx(float(stats.poisson_binom.sf(k - 1, many)), rel=1e-6, abs=1e-15)
        assert p_value(same, k) == pytest.approx(float(stats.binom.sf(k - 1, 200, 0.3)), rel=1e-9)


def test_unequal_ceilings_keep_their_level_and_find_what_the_highest_one_would_hide() -> None:
    """40 trials: the audit fails as soon as, and no sooner than, so many successes have a chance below 5 %."""
    row = own(0, RISING * 10)
    from_here = next(k for k in range(41) if audit([own(k, RISING * 10)])[0].failed)
    assert audit([row])[0].fails_from == from_here == 29
    assert p_value(row, from_here) < 0.05 <= p_value(row, from_here - 1)
    rng = np.random.default_rng(0)
    drawn = (rng.random((20_000, 40)) < RISING * 10).sum(1)
    assert float((drawn >= from_here).mean()) == pytest.approx(p_value(row, from_here), abs=0.005)
    assert audit([Measured("row", 0, 40, 0.81)])[0].fails_from == 37  # which is what its highest ceiling would ask for
    apart = (0.1, 0.9) * 20
    assert [audit([one])[0].fails_from for one in (own(0, apart), Measured("row", 0, 40, 0.5))] == [24, 26]  # so would their mean


def test_a_limit_above_the_mean_of_unequal_ceilings_is_a_failure_among_any_rows() -> None:
    rng = np.random.default_rng(1)
    failures = 0
    for _ in range(200):
        rows = []
        for _ in range(int(rng.integers(1, 5))):
            ceilings = tuple(rng.uniform(0.02, 0.6, int(rng.choice([2, 5, 20, 60]))))
            rows.append(own(int(sum(rng.random(len(ceilings)) < np.array(ceilings) * rng.uniform(0.8, 1.6))), ceilings))
        for verdict in audit(rows):
            failures += verdict.failed
            assert verdict.failed == (verdict.p_value < 0.05)
            assert verdict.failed or verdict.low <= verdict.measured.ceiling or verdict.measured.successes < 2
            if verdict.fails_from is not None and verdict.measured.successes >= verdict.fails_from:
                assert verdict.failed
    assert failures > 20


def test_rows_that_cannot_fail_are_told_by_the_product_of_their_ceilings() -> None:
    """0.1·0.4 < 0.05 < 0.1·0.6, whatever the mean."""
    assert audit([own(2, (0.1, 0.4))])[0].failed
    (verdict,) = audit([own(2, (0.1, 0.6))])
    assert not verdict.failed
    assert verdict.sentence == "row: 2 of 2 (100.0%) named, cannot fail at 2 trials beside ceilings of 10.0% to 60.0%, 35.0% on average."


def test_the_sentence_on_unequal_ceilings_says_their_range_what_was_counted_and_how_likely_it_is() -> None:
    (kept,), (broken,) = (audit([own(k, RISING * 10, left_out=40)]) for k in (24, 36))
    counted = "named in those of 80 trials whose ceiling is below 1"
    assert kept.sentence == (
        f"row: 24 of 40 (60.0%) {counted}, within ceilings of 36.0% to 81.0%, 58.5% on average (p = {kept.p_value:.2g}); fails from 72.5% on."
    )
    assert broken.sentence == (
        f"row: AUDIT FAILED: 36 of 40 (90.0%) {counted}, more than ceilings of 36.0% to 81.0%, 58.5% on average, allow "
        f"(p = {broken.p_value:.2g}): the implementation is broken or claims too much."
    )
    (equal,) = audit([Measured("row", 30, 100, 0.3, left_out=20)])
    assert "30 of 100 (30.0%) named in those of 120 trials whose ceiling is below 1, at least 22.5% with confidence, within the" in equal.sentence


@pytest.mark.parametrize(
    ("ceiling", "each", "message"),
    [(0.3, (0.2, 0.4, 0.3), "for each of 2 trials, got"), (0.6, (0.2, 1.2), "in \\[0, 1\\] for each"), (0.4, (0.2, 0.4), "must be the mean")],
)
def test_own_ceilings_must_be_one_for_each_trial_with_the_stated_mean(ceiling: float, each: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Measured("row", 1, 2, ceiling, own=each)


def test_without_a_claim_nothing_can_fail() -> None:
    (verdict,) = audit([Measured("none", 100, 100, 1.0)])
    assert not verdict.failed
    assert "nothing is claimed" in verdict.sentence
    assert audit([]) == []


@pytest.mark.parametrize(("k", "n", "ceiling"), [(5, 4, 0.5), (-1, 4, 0.5), (0, 0, 0.5), (1, 4, 1.5), (1, 4, math.nan)])
def test_counts_must_be_counts(k: int, n: int, ceiling: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        Measured("row", k, n, ceiling)
