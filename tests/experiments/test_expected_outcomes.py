"""What the literature expects of defenses, as regression tests: through real federations, with truth and adversary kept apart.

Elsewhere: Soteria and PRECODE against an attacker who knows them (tests/attacks/test_adaptive.py), secure aggregation under repeated
known participation (tests/attacks/test_disaggregation.py), colluders bit by bit (test_collude.py).
"""

from __future__ import annotations

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
}  # fmt: skip
MATCHING = {"name": "adaptive_matching", "steps": 150}
NAMING = {"name": "candidate_identification"}


def rows(tmp_path: Path, arms: list[dict[str, Any]], attacks: list[dict[str, Any]], **changes: Any) -> dict[tuple[str, str], Any]:
    """The rows of the summary, by arm and attack."""
    table = {**BASE, **changes, "arms": arms, "attacks": attacks}
    experiment = config.build(spec.Experiment, table)
    check(experiment)
    trials: list[Trial] = []
    for arm in experiment.arms:
        of = experiment.world(arm, 0)
        victims = find_victims(experiment, of, federate(of, tmp_path / arm.slug))
        for attack in experiment.rungs:
            trials += attack_victims(attack, victims, experiment.evaluation, of, arm.name).trials
    found = summarize(trials, (), candidates=40, control_arm="none", environment={}, version="0")
    return {(row["defense"], row["attack"]): row for row in found["rows"]}


def test_small_noise_stops_matching_and_not_identification_and_clipping_and_central_dp_nothing(tmp_path: Path) -> None:
    """Noise of 0.1 on each weight is five times the gradient's norm: no picture comes back, and everybody is named."""
    arms = [
        {"name": "none"},
        {"name": "clip", "defenses": [{"name": "clip", "clip_norm": 0.5}]},
        {"name": "central DP", "defenses": [{"name": "central_dp", "clip_norm": 0.5, "noise_multiplier": 2.0}]},
        {"name": "noise", "defenses": [{"name": "gaussian_noise", "sigma": 0.1}]},
    ]
    found = rows(tmp_path, arms, [MATCHING, NAMING])
    undefended = found["none", "adaptive_matching"]["scores"]["psnr_db"]["mean"]
    for harmless in ("clip", "central DP"):
        difference = found[harmless, "adaptive_matching"]["difference_to_control"]["psnr_db"]
        assert difference["low"] > -3, harmless
        assert found[harmless, "candidate_identification"]["identified"]["rate"] == 1.0
    noisy = found["noise", "adaptive_matching"]
    assert noisy["scores"]["psnr_db"]["mean"] < undefended - 10
    assert noisy["gain"]["psnr_db"]["mean"] < 3
    assert found["noise", "candidate_identification"]["identified"]["rate"] >= 11 / 12


@pytest.mark.parametrize("colluding", [0, 11])
def test_secure_aggregation_hides_among_honest_senders_alone(tmp_path: Path, colluding: int) -> None:
    """One record of each of 12 clients: exact with 11 accomplices, far from it without."""
    arm = {"name": "secagg", "defenses": [{"name": "secure_aggregation", "mode": "quantized"}]}
    found = rows(tmp_path, [arm], [MATCHING], threat={"colluding": colluding})
    psnr = found["secagg", "adaptive_matching"]["scores"]["psnr_db"]["mean"]
    assert psnr > 25 if colluding else psnr < 20
