"""The estimate of a run: which arms stand for all, what is extrapolated from them, and that a slow attack does not hold it up."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import pytest

from experiments import stopwatch, timing
from experiments.timing import Sample, in_turn, kind_of
from simulator import progress
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


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [
        (math.inf, 20.0),  # a tenth in 2 s
        (12.0, 12.0),  # its budget ends it before
        (2.5, 10.0),  # likewise, of four records one after the other
        (4.0, stopwatch.LONGEST_SECONDS),  # it took that long, whatever its budget says
    ],
)
def test_a_slow_attack_is_ended_and_extrapolated_from_its_progress_and_its_budget(
    monkeypatch: pytest.MonkeyPatch, budget: float, seconds: float
) -> None:
    now, stopped = [100.0], threading.Event()

    def slow(*_: object) -> None:
        progress.tick("slow", 0, 100, "")
        now[0] += 2.0
        progress.tick("slow", 10, 100, "")
        now[0] += stopwatch.LONGEST_SECONDS
        assert stopped.wait(10), "nothing ends it"

    monkeypatch.setattr(stopwatch, "_clock", lambda: now[0])
    monkeypatch.setattr(stopwatch, "attack_victims", slow)
    monkeypatch.setattr(stopwatch.isolated, "stop", stopped.set)
    attack, heard = SimpleNamespace(name="slow", seconds=budget), list[tuple[object, ...]]()
    victims = [SimpleNamespace(knowledge=SimpleNamespace(num_examples=4))]
    found = stopwatch.attack_seconds(attack, victims, None, None, lambda *tick: heard.append(tick))  # type: ignore[arg-type]
    assert found == (pytest.approx(seconds), True)
    assert heard == [("slow", 0, 100, ""), ("slow", 10, 100, "")]


def test_a_quick_attack_takes_what_it_took_and_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stopped = [100.0], threading.Event()
    monkeypatch.setattr(stopwatch, "_clock", lambda: now[0])
    monkeypatch.setattr(stopwatch, "attack_victims", lambda *_: now.__setitem__(0, 101.5))
    monkeypatch.setattr(stopwatch.isolated, "stop", stopped.set)
    victims = [SimpleNamespace(knowledge=SimpleNamespace(num_examples=1))]
    assert stopwatch.attack_seconds(SimpleNamespace(name="quick"), victims, None, None, timing._nothing) == (1.5, False)  # type: ignore[arg-type]
    assert not stopped.is_set()
