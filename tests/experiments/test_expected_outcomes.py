"""What the literature expects of defenses, as regression tests: through real federations, with truth and adversary kept apart.

Elsewhere: Soteria and PRECODE against an attacker who knows them (tests/attacks/test_adaptive.py), secure aggregation under repeated
known participation (tests/attacks/test_disaggregation.py, claim rounds-known), colluders bit by bit (test_collude.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from experiments import spec
from experiments.refusals import check
from experiments.result import Trial
from experiments.summary import summarize
from experiments.trial import attack_victims
from experiments.under_attack import find_victims
from simulator import config
from tests.federations import federate

BASE: dict[str, Any] = {
    "data": "digits", "model": {"name": "cnn", "width": 8, "hidden": 64}, "federation": {"clients": 12},
    "evaluation": {"candidates": 40, "shuffled_control": False}, "threat": {"candidates": True},
    "secret": "outcomes",
}  # fmt: skip
MATCHING = {"name": "adaptive_matching", "steps": 150}
NAMING = {"name": "candidate_identification"}


CLIP = {"name": "clip", "clip_norm": 0.5}
HARMLESS = {"clip": [CLIP], "central DP": [{"name": "central_dp", "clip_norm": 0.5, "noise_multiplier": 2.0}]}
NOISE = (0.01, 0.03)
"""Standard deviations on each weight, beside gradients with a norm of 1.3 to 2.3: as noise multipliers 0.004 to 0.023, at which (ε, δ)
certifies nothing. Over all 9698 weights together the larger is 1.3 to 2.3 times the gradient."""
NOISY = {"name": "gaussian_noise", "sigma": NOISE[1]}
SEEDS = (0, 1, 2)
EQUIVALENT_DB = 1.0
"""Largest change that is none: what a picture's PSNR moves when a different scale rounds differently."""


def rows(
    directory: Path, arms: list[dict[str, Any]], attacks: list[dict[str, Any]], seeds: Sequence[int] = (0,), **changes: Any
) -> dict[tuple[str, str], Any]:
    """The rows of the summary, by arm and attack."""
    return summarized(attacked(directory, arms, attacks, seeds, **changes))


def attacked(directory: Path, arms: list[dict[str, Any]], attacks: list[dict[str, Any]], seeds: Sequence[int], **changes: Any) -> list[Trial]:
    """Every attack on every arm's federation under every seed."""
    table = {**BASE, **changes, "arms": arms, "attacks": attacks}
    experiment = config.build(spec.Experiment, table)
    check(experiment)
    trials: list[Trial] = []
    for seed, arm in product(seeds, experiment.arms):
        of = experiment.world(arm, seed)
        victims = find_victims(experiment, of, federate(of, directory / f"{arm.slug}-{seed}"))
        for attack in experiment.rungs:
            trials += attack_victims(attack, victims, experiment.evaluation, of, arm.name).trials
    return trials


def summarized(trials: Sequence[Trial]) -> dict[tuple[str, str], Any]:
    """The rows of the summary, by arm and attack."""
    found = summarize(trials, (), candidates=40, control_arm="none", environment={}, version="0")
    return {(row["defense"], row["attack"]): row for row in found["rows"]}


def equivalent(row: dict[str, Any]) -> bool:
    """Whether the paired difference to the undefended arm is none, with its whole interval."""
    difference = row["difference_to_control"]["psnr_db"]
    return bool(-EQUIVALENT_DB < difference["low"] <= difference["high"] < EQUIVALENT_DB)


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Optimization and identification on the network of the spec `defenses`, two seeds of 12 victims each."""
    noisy = [{"name": f"noise {sigma}", "defenses": [{"name": "gaussian_noise", "sigma": sigma}]} for sigma in NOISE]
    harmless = [{"name": name, "defenses": stack} for name, stack in HARMLESS.items()]
    return rows(tmp_path_factory.mktemp("matched"), [{"name": "none"}, *harmless, *noisy], [MATCHING, NAMING], (0, 1))


@pytest.mark.slow
def test_small_noise_stops_matching_and_not_identification(matched: dict[tuple[str, str], Any]) -> None:
    """At 0.01 a picture is worse, at 0.03 it is near a floor that knows no update; everybody is named under either."""
    differences = [matched[f"noise {sigma}", "adaptive_matching"]["difference_to_control"]["psnr_db"] for sigma in NOISE]
    assert differences[0]["high"] < -2
    assert differences[1]["high"] < -9
    gains = [matched[arm, "adaptive_matching"]["gain"]["psnr_db"] for arm in ("none", *(f"noise {sigma}" for sigma in NOISE))]
    assert gains[0]["mean"] > 12 > gains[1]["mean"] > 5  # the best floor is the true class's mean
    assert gains[2]["high"] < 4
    for arm in ("none", *(f"noise {sigma}" for sigma in NOISE)):
        assert matched[arm, "candidate_identification"]["identified"]["low"] > 0.85  # 24 of 24; chance is 1 of 40


@pytest.mark.slow
@pytest.mark.parametrize("arm", HARMLESS)
def test_clipping_and_central_dp_take_nothing_from_optimization(arm: str, matched: dict[tuple[str, str], Any]) -> None:
    assert equivalent(matched[arm, "adaptive_matching"])
    assert matched[arm, "candidate_identification"]["identified"]["rate"] == 1.0


def test_clipping_and_central_dp_take_nothing_from_a_closed_form_and_small_noise_does(tmp_path: Path) -> None:
    """Reading off the first layer does not see a scale: exact to a hundredth of a dB, on the same victims."""
    arms = [{"name": name, "defenses": stack} for name, stack in {"none": [], **HARMLESS, "noise": [NOISY]}.items()]
    small = {"model": {"name": "mlp"}, "federation": {"clients": 4}}
    found = rows(tmp_path, arms, [{"name": "linear_leak"}, NAMING], (0, 1), **small)
    for arm in HARMLESS:
        difference = found[arm, "linear_leak"]["difference_to_control"]["psnr_db"]
        assert -0.01 < difference["low"] <= difference["high"] < 0.01, arm
    assert found["none", "linear_leak"]["gain"]["psnr_db"]["low"] > 30
    assert found["noise", "linear_leak"]["gain"]["psnr_db"]["high"] < 3
    for arm in ("none", *HARMLESS, "noise"):
        assert found[arm, "candidate_identification"]["identified"]["rate"] == 1.0, arm


@pytest.mark.slow
def test_secure_aggregation_hides_nothing_from_all_but_one_colluding_and_much_if_they_keep_silent(tmp_path: Path) -> None:
    """The one honest client of six, in four rounds of three seeds: what it uploads alone, what five accomplices leave of the sum, the sum.

    All three by the same attack, and paired by record. Where the accomplices tell nothing, equivalence fails by far: it is their
    knowledge that the first comparison rests on.
    """
    secagg = {"name": "secagg", "defenses": [{"name": "secure_aggregation", "mode": "quantized"}]}
    changes: dict[str, Any] = {
        "federation": {"clients": 6, "rounds": 4}, "evaluation": {"rounds": [1, 2, 3, 4], "candidates": 40, "shuffled_control": False},
    }  # fmt: skip
    told = attacked(tmp_path / "told", [{"name": "none"}, secagg], [MATCHING], SEEDS, threat={"colluding": 5}, **changes)
    untold = attacked(tmp_path / "untold", [{**secagg, "name": "silent"}], [MATCHING], SEEDS, threat={"colluding": 0}, **changes)
    found = summarized([*told, *untold])
    alone, left, whole = (found[arm, "adaptive_matching"] for arm in ("none", "secagg", "silent"))
    assert [row["scored"] for row in (alone, left, whole)] == [12, 12, 72]
    assert alone["gain"]["psnr_db"]["low"] > 5, "an attack that sees nothing is equivalent to everything"
    for row in (left, whole):
        assert (row["difference_to_control"]["pairs"], row["difference_to_control"]["undefended_missed"]) == (12, 0)
    assert equivalent(left)
    assert not equivalent(whole)
    assert whole["difference_to_control"]["psnr_db"]["high"] < -5
