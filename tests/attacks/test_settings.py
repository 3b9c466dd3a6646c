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
