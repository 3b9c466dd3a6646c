"""The estimate of a run: which arms stand for all, what is extrapolated from them, and that a slow attack does not hold it up."""

from __future__ import annotations

import pytest

from experiments import timing
from experiments.timing import Sample, in_turn, kind_of
from simulator.errors import FedpeekError
from tests.experiments.test_resuming import tiny

CLIP = "clip"


def arms() -> list[dict[str, object]]:
    noise = [{"name": f"noise {sigma}", "defenses": [{"name": "gaussian_noise", "sigma": sigma}]} for sigma in (0.1, 0.2, 0.3)]
    larger = {"name": "large", "training": {"batch_size": 2}}
    return [*noise, {"name": "clip", "defenses": [CLIP]}, larger, {"name": "none"}]


def test_the_control_comes_first_and_then_one_arm_of_each_world() -> None:
    spec = tiny(arms=arms())
    assert [arm.name for arm in in_turn(spec)] == ["none", "noise 0.1", "large", "clip"]
    assert kind_of(spec.arms[0]) == kind_of(spec.arms[2]) != kind_of(spec.arms[3])


def test_time_is_extrapolated_from_the_arms_of_the_same_world(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny(arms=arms(), seeds=[0, 1], attacks=["random_guess", "linear_leak"], federation={"clients": 4, "rounds": 10})
    samples = {
        "none": Sample(setup=1.0, round=0.5, attacks={"random_guess": 0.0, "linear_leak": 1.0}, rest=2.0),
        "noise 0.1": Sample(setup=1.0, round=0.5, attacks={"random_guess": 0.0, "linear_leak": 3.0}, rest=2.0),
        "large": Sample(setup=1.0, round=5.0, attacks={"random_guess": 1.0}, rest=2.0),
    }

    def timed(_: object, arm: object, *args: object, **settings: object) -> Sample:
        if arm.name not in samples:  # type: ignore[attr-defined]
            raise FedpeekError("it does not run")
        return samples[arm.name]  # type: ignore[attr-defined]

    monkeypatch.setattr(timing, "timed", timed)
    found = timing.sample(spec, limit=60.0)
    runs = 2 * 4  # the uploads, and as many shuffled
    noise, large, none = 8 + 3 * runs, 1 + 50 + 2 + runs * (1 + 2), 8 + runs
    assert found.seconds == pytest.approx((noise, noise, noise, 8 + 2 * runs, large, none))
    assert (found.kinds, found.sampled) == (4, 3)
    wall = 2 * sum(found.seconds) / 3
    assert f"About {wall / 60:.0f} min on 3 workers" in found.sentence(2, 3)
    assert "in 3 of 4 kinds of arms" in found.sentence(2, 3)
    samples.clear()
    with pytest.raises(FedpeekError, match="must run before .* got none .* it does not run"):
        timing.sample(spec, limit=60.0)
