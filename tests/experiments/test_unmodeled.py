"""A defense that no attack knows is attacked as if it were absent: its rows say so, by name."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments.conclude import conclude
from experiments.run import run
from experiments.spec import Experiment
from experiments.unmodeled import HOOKS, unmodeled
from simulator import config, registry
from simulator.defense import ClientContext, Defense, ServerContext
from simulator.types import Update


@dataclass(frozen=True)
class MyNoise(Defense):
    """Noise on the update, like gaussian_noise, under a name of its own."""

    sigma: float = 0.1

    def on_update(self, update: Update, context: ClientContext) -> Update:
        rng = context.rng
        return Update(update.kind, {name: t + self.sigma * torch.randn(t.shape, generator=rng) for name, t in update.tensors.items()})


@dataclass(frozen=True)
class MyServer(Defense):
    """What a server does after it has seen all uploads protects none of them."""

    def on_aggregate(self, update: Update, context: ServerContext) -> Update:
        return update


@dataclass(frozen=True)
class MyChannel(Defense):
    """Who sees what is in the view."""

    channel = True


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As entry points would register them."""
    for name, defense in (("my_noise", MyNoise), ("my_server", MyServer), ("my_channel", MyChannel)):
        monkeypatch.setitem(registry.registered, ("defenses", name), defense)
        monkeypatch.setattr(defense, "name", name)


def test_who_acts_before_the_view_and_is_known_to_no_attack() -> None:
    assert unmodeled(["my_noise", "clip", "my_server", "my_channel", "gaussian_noise", "my_noise"]) == ("my_noise",)
    assert unmodeled(["nobody_installed"]) == ("nobody_installed",)  # it might act
    assert unmodeled(["tests.experiments.test_unmodeled:MyNoise"]) == ("tests.experiments.test_unmodeled:MyNoise",)
    assert unmodeled([]) == ()


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_before_the_view_counts(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class One(Defense):
        pass

    monkeypatch.setitem(registry.registered, ("defenses", "one"), One)
    assert unmodeled(["one"]) == ()
    monkeypatch.setattr(One, hook, lambda self, *args: None, raising=False)
    assert unmodeled(["one"]) == ("one",)


def test_every_reader_of_a_run_is_told_by_name(tmp_path: Path) -> None:
    arms = {"none": [], "mine": ["clip", "my_noise"], "known": ["gaussian_noise"], "later": ["my_server"]}
    table = {
        "data": "digits", "model": "linear", "federation": {"clients": 3}, "attacks": ["random_guess"],
        "arms": [
            {"name": name, "defenses": [{"name": each} | ({"clip_norm": 1.0} if each == "clip" else {}) for each in stack]}
            for name, stack in arms.items()
        ],
    }  # fmt: skip
    assert run(config.build(Experiment, table), tmp_path / "run", workers=1) == []
    shown, report, warnings = conclude(tmp_path / "run")
    rows = {row["defense"]: row for row in json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]}
    assert {name: row["not_modeled"] for name, row in rows.items()} == {"none": [], "mine": ["my_noise"], "known": [], "later": []}
    assert {name for name, row in rows.items() if "defense_not_modeled" in row["flags"]} == {"mine"}
    assert warnings == []  # nothing is missing from the run
    printed = io.StringIO()
    Console(file=printed, width=400).print(shown)
    sentence = "mine: no attack here models my_noise: it was attacked as if it were absent, and the leakage may be larger."
    assert sentence in printed.getvalue()
    assert "Here: my_noise." in report.read_text(encoding="utf-8")
