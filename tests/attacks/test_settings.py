"""Settings that no attack takes."""

from __future__ import annotations

from dataclasses import fields
from math import nan

import pytest

from attacks.update.hybrid import Hybrid
from attacks.update.learning_to_invert import LearningToInvert
from attacks.update.levenberg_marquardt import LevenbergMarquardt
from simulator import lookup

BUDGETED = [name for name in lookup.names("attacks") if "seconds" in {field.name for field in fields(lookup.get("attacks", name))}]


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("seconds", [0, -1, nan])
def test_a_budget_must_be_positive(name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=rf"^seconds must be [>≥] 0, got {seconds}\. .*\d"):
        lookup.get("attacks", name)(seconds=seconds)


def test_every_other_setting_that_must_be_positive_is_refused_by_name() -> None:
    for attack, names in (
        (Hybrid, ("steps", "cg_steps", "restarts", "learning_rate", "tv", "tv_final")),
        (LevenbergMarquardt, ("restarts", "iterations", "memory_mb", "deviation")),
        (LearningToInvert, [field.name for field in fields(LearningToInvert)]),
    ):
        for name in names:
            with pytest.raises(ValueError, match=rf"^{name} must be > 0, got 0\. The default is {getattr(attack, name):g}\.$"):
                attack(**{name: 0})
    assert LevenbergMarquardt().seconds > 0


FALLING = [
    (name, weight)
    for name in lookup.names("attacks")
    for weight in ("tv", "nats")
    if {weight, f"{weight}_final"} <= {field.name for field in fields(lookup.get("attacks", name))} and name not in ("hybrid", "gifd")
]
"""Of gifd the two weights are those of two searches, and hybrid has no run without."""


def test_which_weights_fall() -> None:
    assert {"fedavg_matching", "inverting_gradients", "deep_image_prior", "sme", "grad_inversion", "adaptive_matching"} <= dict(
        FALLING
    ).keys()
    assert ("adaptive_matching", "nats") in FALLING


@pytest.mark.parametrize(("name", "weight"), FALLING)
def test_a_weight_falls_and_reaches_no_zero(name: str, weight: str) -> None:
    attack = lookup.get("attacks", name)
    for first, last in ((0.1, 0.2), (0.1, 0.0), (0.0, 0.1)):
        with pytest.raises(ValueError, match=f"^{weight} must be ≥ {weight}_final > 0, or both 0, got {first} and {last}"):
            attack(**{weight: first, f"{weight}_final": last})
    attack(**{weight: 0.0, f"{weight}_final": 0.0})
