"""Every shipped defense is known to attacks, as what it is: a name in a set means that code acts on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from attacks._gradient import clip_limit, maybe_clipped, noise_level
from attacks._identify.versions import mixing, transformed
from attacks._intact import lossy
from attacks._learned.mechanisms import chain
from attacks._matching.stack import Stack, known_stack
from attacks.modeled import IN_THE_VIEW, KINDS, known_as
from simulator import lookup
from simulator.adversary import Knowledge
from simulator.types import LocalTraining, Observation
from tests.attacks.victims import attack_surface, digits, smooth

TINY = 1e-3
"""A clip norm far below the norm of any update here."""

TOLD: dict[str, Mapping[str, object]] = {
    "clip": {"clip_norm": TINY},
    "client_dp": {"clip_norm": TINY, "noise_multiplier": 1.0},
    "local_dp": {"clip_norm": TINY, "noise_multiplier": 1.0, "mechanism": "gaussian"},
    "central_dp": {"clip_norm": TINY, "noise_multiplier": 1.0},
    "adaptive_clipping": {"clip_norm": TINY, "noise_multiplier": 1.0},
    "distributed_dp": {"clip_norm": TINY, "noise_multiplier": 1.0},
    "simulated_enclave": {"clip_norm": TINY, "noise_multiplier": 1.0},
    "dp_sgd": {"clip_norm": TINY, "noise_multiplier": 1.0},
    "gaussian_noise": {"sigma": 0.1},
    "laplace_noise": {"scale": 0.1},
    "top_k": {"pruned": 0.5},
    "random_pruning": {"pruned": 0.5, "rescaled": False},
    "qsgd": {"levels": 4, "bucket": 0},
    "soteria": {"layer": "1", "pruned": 0.5},
    "outpost": {"pruned": 0.5, "scale": 0.1, "decay": 0.1, "iterations": "round"},
    "censor": {"rounds": 0},
    "mixup": {"alpha": 1.0},
    "instahide": {"k": 2, "c_max": 0.65},
    "ats": {"policy": "3-1-7"},
}


def told(name: str) -> tuple[Observation, Knowledge]:
    """One digit's update, for Outpost with half of each tensor zeroed as it would, and the adversary told of this defense."""
    view, knowledge = attack_surface(smooth((1, 8, 8)), [digits(1)], LocalTraining(batch_size=1))
    if name == "outpost":
        rng = torch.Generator().manual_seed(0)
        tensors = {key: tensor * (torch.rand(tensor.shape, generator=rng) > 0.5) for key, tensor in view.upload.update.tensors.items()}
        view = replace(view, uploads=(replace(view.upload, update=replace(view.upload.update, tensors=tensors)),))
    return view, replace(knowledge, defenses=((name, TOLD.get(name, {})),))


def outcomes(_: Observation, knowledge: Knowledge) -> bool:
    return len(transformed(digits(2), knowledge)[0]) > 2


def untouched(view: Observation, knowledge: Knowledge) -> bool:
    return known_stack(view, knowledge) == Stack() and chain(view, knowledge).unknown == () and noise_level(view, knowledge) == 0


ACTED_ON: dict[str, Callable[[Observation, Knowledge], Any]] = {
    "clipping": lambda view, known: clip_limit(view, *known.defenses[0]) == TINY and maybe_clipped(view, known),
    "noise": noise_level,
    "lossy": lossy,
    "latent noise": lambda view, known: known_stack(view, known).latent,
    "mixing": lambda view, known: known_stack(view, known).mixed and mixing(known),
    "transforming": outcomes,
    "in the view": untouched,
}


@pytest.mark.parametrize(
    "name", [name for name in lookup.names("defenses") if lookup.get("defenses", name).__module__.startswith("defenses.")]
)
def test_every_shipped_defense_is_known_or_needs_no_model_for_a_stated_reason(name: str) -> None:
    kinds = known_as(name)
    assert kinds, f"no attack knows {name}: model it, or state in attacks.modeled.IN_THE_VIEW why none need"
    assert ("in the view" in kinds) == bool(IN_THE_VIEW.get(name, "")) == (kinds == ("in the view",))
    found = {kind: bool(act(*told(name))) for kind, act in ACTED_ON.items() if kind in kinds}
    assert all(found.values()), found


def test_no_set_holds_a_name_that_no_defense_has() -> None:
    assert {name for names in KINDS.values() for name in names} <= set(lookup.names("defenses"))
    assert set(ACTED_ON) == set(KINDS)
    assert known_as("of_somebody_else") == ()


def test_a_defense_of_somebody_else_changes_no_attack() -> None:
    """Why it must be flagged: nothing that attacks ask sees it."""
    assert untouched(*told("gaussian_noise")) is False
    view, knowledge = told("of_somebody_else")
    assert known_stack(view, knowledge) == Stack()
    assert noise_level(view, knowledge) == 0
    assert not maybe_clipped(view, knowledge)
    assert chain(view, knowledge).unknown == ("of_somebody_else",)
