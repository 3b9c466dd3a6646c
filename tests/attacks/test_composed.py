"""The composable attack: with a preset's parts it is the preset, bit for bit, and a spec can name every part."""

from __future__ import annotations

from itertools import cycle, product
from math import inf, nan
from typing import Any, get_args, get_type_hints

import pytest
import torch

from attacks._matching.distances import DISTANCES, DistanceName
from attacks.update.matching import ComposedMatching
from attacks.update.sme import SME
from simulator import config, lookup
from simulator.rng import stream
from simulator.types import LocalTraining
from tests.attacks.victims import attack_surface, build, digits, psnr_db, smooth

ADAM: dict[str, Any] = {"steps": 20}
PLAIN: dict[str, Any] = {"client": "recipe", "tv": 0.0, "tv_final": 0.0, "statistics": 0.0}
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "inverting_gradients": (ADAM, ADAM),
    "inverting_gradients-paper": (
        ADAM, ADAM | {
            "distance": "cosine", "begin": "normal", "client": "recipe", "learning_rate": 0.025, "tv": 0.4, "tv_final": 0.4,
            "variation": "plain", "statistics": 0.0,
        },
    ),
    "sapag": (ADAM, ADAM | PLAIN | {"distance": "kernel", "optimizer": "adam", "learning_rate": 0.05}),
    "dlg": (
        {"evaluations": 40},
        PLAIN | {"steps": 40, "distance": "l2", "variable": "spectrum", "client": "masks", "keep_rate": 0.0, "optimizer": "lbfgs",
                 "precision": "float64"},
    ),
    "dlg-paper": (
        {"iterations": 3},
        PLAIN | {"steps": 3, "distance": "squared", "begin": "normal", "client": "soft_labels", "optimizer": "plain_lbfgs"},
    ),
    "cpl": (
        {"iterations": 3, "task": 0.5},
        PLAIN | {"steps": 3, "distance": "squared", "begin": "patterned", "task": 0.5, "optimizer": "plain_lbfgs"},
    ),
    "deep_image_prior": (ADAM, ADAM | {"variable": "network", "client": "recipe", "statistics": 0.0, "learning_rate": 0.003, "tv": 0.05}),
    "fedavg_matching": (
        ADAM | {"order": "mean", "unroll": 8}, ADAM | {"client": "unrolled", "learning_rate": 0.1, "statistics": 0.0},
    ),
    "sme": (ADAM | {"point": "learned"}, ADAM | {"client": "surrogate", "schedule": "cosine", "statistics": 0.0, "learning_rate": SME().learning_rate, "tv": SME().tv, "tv_final": SME().tv_final}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_with_the_parts_of_a_preset_it_is_the_preset(name: str) -> None:
    own, parts = PRESETS[name]
    preset = lookup.get("attacks", name)(**own)
    if hasattr(preset, "learning_rate") and "learning_rate" in parts:
        assert parts["learning_rate"] == preset.learning_rate
    recipe = (
        LocalTraining(batch_size=2)
        if name not in ("fedavg_matching", "sme")
        else LocalTraining(algorithm="fedavg", batch_size=1, learning_rate=0.1)
    )
    model = build("convnet", (1, 8, 8)) if name != "dlg" else smooth((1, 8, 8))
    view, knowledge = attack_surface(model, [digits(2)], recipe)
    ours = ComposedMatching(**parts)
    assert ours.supports(view, knowledge) is None
    one, other = (attack(view, knowledge, rng=stream(3, "attack")) for attack in (preset, ours))
    assert one.inputs is not None
    assert other.inputs is not None
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.labels, other.labels)
    assert one.objective == other.objective
    assert one.trace == other.trace


def test_a_spec_can_name_every_part() -> None:
    table: dict[str, Any] = {
        "distance": "layer_cosine",
        "variable": "cosines",
        "client": "recipe",
        "optimizer": "adam",
        "tv": 0.1,
        "tv_final": 0.1,
    }
    built = config.build_plugin("attacks", {"name": "matching", **table}, "attacks")
    assert built == ComposedMatching(**table)
    assert set(get_args(DistanceName)) == set(DISTANCES)


def test_every_distance_goes_with_every_variable_and_each_optimizer() -> None:
    """They run, and the best iterate is no worse than the start."""
    view, knowledge = attack_surface(smooth((1, 8, 8)), [digits(1)], LocalTraining(batch_size=1))
    hints = {name: get_args(hint) for name, hint in get_type_hints(ComposedMatching).items()}
    pairs = list(product(hints["distance"], hints["variable"]))
    assert len(pairs) == 45
    for (distance, variable), optimizer in zip(pairs, cycle(hints["optimizer"])):
        more: dict[str, Any] = {"sigma": 0.1, "clip_norm": 1.0} if distance == "likelihood" else {}
        attack = ComposedMatching(distance=distance, variable=variable, optimizer=optimizer, steps=2, share=0.5, **PLAIN, **more)
        found = attack(view, knowledge, rng=stream(0))
        assert found.inputs is not None
        assert bool(torch.isfinite(found.inputs).all())
        assert found.objective <= found.trace[0][1]


def test_a_likelihood_is_lowest_at_the_truth() -> None:
    """Without noise in the update nothing is left of the nats where the digit is found."""
    view, knowledge = attack_surface(smooth((1, 8, 8)), [digits(1)], LocalTraining(batch_size=1))
    solved = ComposedMatching(
        distance="likelihood", sigma=0.01, variable="spectrum", optimizer="lbfgs", precision="float64", steps=300, **PLAIN
    )
    found = solved(view, knowledge, rng=stream(0))
    assert psnr_db(found.inputs, digits(1).inputs) > 40
    assert found.objective < 1e-3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"distance": "l3"}, "distance must be one of angle, "),
        ({"variable": "voxels"}, "variable must be one of pixels, spectrum, "),
        ({"optimizer": "sgd"}, "optimizer must be one of signed_adam, "),
        ({"client": "honest"}, "client must be one of recipe, "),
        ({"precision": "float16"}, "precision must be one of float32, float64"),
        ({"distance": "likelihood"}, "sigma must be > 0 and finite with likelihood"),
        ({"sigma": 0.1}, "sigma must be > 0 and finite with likelihood"),
        ({"distance": "likelihood", "sigma": inf}, "sigma must be > 0 and finite"),
        ({"clip_norm": 1.0}, "clip_norm must be > 0, and inf without likelihood"),
        ({"share": 0.0}, "share must be > 0 and ≤ 1, got 0.0"),
        ({"share": 1.5}, "share must be > 0 and ≤ 1, got 1.5"),
        ({"share": nan}, "share must be ≥ 0, got nan"),
        ({"begin": "normal", "variable": "spectrum"}, "begin must be 'uniform' unless pixels start there"),
        ({"client": "surrogate", "distance": "l2"}, "distance must be one of angle, cosine, layer_cosine for a surrogate"),
        ({"tv": 0.0}, "tv must be ≥ tv_final > 0"),
        ({"restarts": 0}, "restarts must be ≥ 1"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ComposedMatching(**settings)


def test_a_client_of_one_step_refuses_several_and_a_surrogate_a_gradient() -> None:
    several = attack_surface(smooth((1, 8, 8)), [digits(2)], LocalTraining(algorithm="fedavg", batch_size=1, learning_rate=0.1))
    one = attack_surface(smooth((1, 8, 8)), [digits(1)], LocalTraining(batch_size=1))
    assert "several local steps" in str(ComposedMatching(client="recipe").supports(*several))
    assert "must be a delta" in str(ComposedMatching(client="surrogate").supports(*one))
    assert ComposedMatching(client="unrolled").supports(*several) is None
