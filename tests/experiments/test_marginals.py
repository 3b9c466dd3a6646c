"""Every subset of the layers is an arm, and a layer's worth is the difference of the arms that differ by it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from experiments import spec
from experiments.arms import Arm
from experiments.marginals import marginals, table
from experiments.refusals import check
from simulator import config
from simulator.errors import SpecError

LAYERS = [
    {"name": "clip", "defenses": ["clip"]},
    {"name": "noise", "defenses": ["gaussian_noise"]},
    {"name": "batch", "training": {"batch_size": 4}},
]


def experiment(**changes: Any) -> spec.Experiment:
    return config.build(spec.Experiment, {"data": "digits", "model": "mlp", "layers": LAYERS, **changes})


def row(defense: str, rate: float, psnr: float, accuracy: float, size: float) -> dict[str, Any]:
    return {
        "defense": defense, "attack": "a", "answered": "inputs", "identified": {"rate": rate, "low": rate - 0.03, "high": rate + 0.04},
        "scores": {"psnr_db": {"mean": psnr, "low": None, "high": None}}, "accuracy": accuracy,
        "accuracy_by_seed": {"0": accuracy - 0.01, "1": accuracy + 0.01, "2": accuracy}, "cost": {"upload_bytes": size, "client_seconds": None},
    }  # fmt: skip


def test_every_subset_is_an_arm_in_the_order_of_the_layers() -> None:
    found = experiment()
    assert [arm.name for arm in found.arms] == [
        "none", "clip", "noise", "batch", "clip + noise", "clip + batch", "noise + batch", "clip + noise + batch",
    ]  # fmt: skip
    assert [defense.name for defense in found.arms[-1].defenses] == ["clip", "gaussian_noise"]
    assert found.arms[-1].training == {"batch_size": 4}
    assert found.control is found.arms[0]
    check(found)
    assert config.build(spec.Experiment, config.dump(found)) == found


def test_arms_beside_layers_and_illegal_stacks_are_refused() -> None:
    with pytest.raises(SpecError, match="arms must not be given beside layers"):
        experiment(arms=[{"name": "other"}])
    with pytest.raises(SpecError, match="layers must be at most 6, got 7"):
        experiment(layers=[{"name": str(i)} for i in range(7)])
    with pytest.raises(SpecError, match="must change different settings"):
        experiment(layers=[LAYERS[2], {**LAYERS[2], "name": "again"}])
    with pytest.raises(SpecError, match="clip must come before noise"):
        check(experiment(layers=[LAYERS[1], LAYERS[0]]))


def test_a_layer_is_worth_what_changes_with_it_alone() -> None:
    """Two layers that each halve what is left: alone 50 points, on top of the other 25, on average 37.5."""
    rows = [row("none", 1.0, 40, 0.9, 100), row("a", 0.5, 30, 0.8, 100), row("b", 0.5, 20, 0.9, 300), row("a + b", 0.25, 15, 0.7, 300)]
    first, second = marginals([Arm(name="a"), Arm(name="b")], rows)
    assert first["alone"]["identified"] == pytest.approx({"mean": -0.5, "low": -0.55, "high": -0.45})  # 3-4-5 triangles
    assert first["on_top_of_all"]["identified"]["mean"] == pytest.approx(-0.25)
    assert first["mean"]["identified"] == pytest.approx({"mean": -0.375, "low": -0.425, "high": -0.325})
    assert first["mean"]["psnr_db"] == {"mean": pytest.approx((-10 - 5) / 2), "low": None, "high": None}
    assert first["on_top_of_all"]["accuracy"] == pytest.approx({"mean": -0.2, "low": -0.2, "high": -0.2})  # the same on every seed
    for each in rows:
        del each["accuracy_by_seed"]["2"]
    assert marginals([Arm(name="a"), Arm(name="b")], rows)[0]["alone"]["accuracy"] == pytest.approx({"mean": -0.1, "low": None, "high": None})
    assert second["alone"]["upload_bytes"] == pytest.approx(3.0)
    assert second["mean"]["client_seconds"] is None
    text = io.StringIO()
    Console(file=text, width=140).print(table([first, second]))
    printed = text.getvalue().replace("\u00a0", " ")
    assert "−50.0 % [−55.0, −45.0]" in printed
    assert [line.split("]")[1].split()[0] for line in printed.splitlines() if "]" in line][:3] == ["−10.0", "−7.5", "−5.0"]
    assert "×3.00" in printed


def test_a_layer_that_changes_chance_is_worth_what_is_left_above_it() -> None:
    """Everybody named before; in a sum of 50 of 100, where half are met by chance, three quarters: half of it is taken away."""
    summed = row("sum", 0.75, 20, 0.9, 100)
    summed["identified"]["chance"] = 0.5
    (found,) = marginals([Arm(name="sum")], [row("none", 1.0, 40, 0.9, 100), summed])
    assert found["alone"]["identified"]["mean"] == pytest.approx(-0.5)


def test_who_was_named_is_said_by_the_identifier() -> None:
    rows = [row("none", 0.9, 40, 0.9, 100), row("a", 0.1, 30, 0.8, 100)]
    rows += [{**row(name, 1.0, 60, 0.9, 100), "attack": "candidate_identification", "answered": "candidates"} for name in ("none", "a")]
    (found,) = marginals([Arm(name="a")], rows)
    assert found["alone"]["identified"]["mean"] == 0.0
    assert found["alone"]["psnr_db"]["mean"] == pytest.approx(-10)


def test_pictures_that_name_more_than_the_identifier_count() -> None:
    """It does not model every defense: whom pictures name nine times in ten is not hidden because it names one."""
    rows = [row("none", 1.0, 40, 0.9, 100), row("a", 0.9, 30, 0.8, 100)]
    rows += [{**row(n, rate, 60, 0.9, 100), "attack": "identifier", "answered": "candidates"} for n, rate in (("none", 1.0), ("a", 0.1))]
    (found,) = marginals([Arm(name="a")], rows)
    assert found["alone"]["identified"]["mean"] == pytest.approx(-0.1)


def test_an_arm_that_did_not_run_leaves_its_differences_out() -> None:
    rows = [row("none", 1.0, 40, 0.9, 100), row("a", 0.5, 30, 0.8, 100), row("b", 0.5, 20, 0.9, 300)]
    first, _ = marginals([Arm(name="a"), Arm(name="b")], rows)
    assert first["on_top_of_all"]["identified"] is None
    assert first["mean"]["identified"]["mean"] == pytest.approx(-0.5)
