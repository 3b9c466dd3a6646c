"""The trust boundary is an import boundary, and the house is as the design says."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clients.private import private_records, splits
from experiments.disclose import architecture, disclose
from simulator import config, lookup
from simulator.adversary import Attack, ThreatModel
from simulator.defense import Defense
from simulator.transcript import read
from simulator.world import World
from tests.federations import federate, world

ROOT = Path(__file__).parents[2]
PACKAGES = ("simulator", "clients", "server", "attacks", "defenses", "experiments")


def test_import_contracts_hold() -> None:
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_top_level_code_is_exactly_the_seven_packages() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path.split("/")[0] for path in tracked} == {*PACKAGES, "tests"}


def reaches_around(source: str) -> list[str]:
    """Imports by which attack code would get past the contracts: the registry's table, importlib, whole packages of ours."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    allowed = "simulator.registry.register"
    barred = ("simulator.registry", "importlib", "sys", "gc", "inspect")
    return [name for name in found if name in ("simulator", *PACKAGES) or (name != allowed and name.startswith(tuple(f"{b}." for b in barred)))
            or name in barred]  # fmt: skip


def test_attacks_import_no_more_of_the_registry_than_their_own_decorator() -> None:
    for path in (ROOT / "attacks").rglob("*.py"):
        assert reaches_around(path.read_text()) == [], path
    assert reaches_around("from simulator.registry import registered") == ["simulator.registry.registered"]
    assert reaches_around("import importlib") == ["importlib"]


def test_no_pickle_in_our_code() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in sources if "import pickle" in path.read_text() or "cloudpickle" in path.read_text()]


@pytest.mark.parametrize("name", lookup.names("attacks"))
def test_every_attack_is_a_frozen_dataclass_with_a_line_of_description(name: str) -> None:
    cls = lookup.get("attacks", name)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert isinstance(cls(), Attack)
    assert (cls.__doc__ or "").strip().partition("\n")[0].endswith(".")


@pytest.mark.parametrize("name", lookup.names("defenses"))
def test_every_defense_says_what_it_does_not_protect(name: str) -> None:
    cls = lookup.get("defenses", name)
    assert issubclass(cls, Defense)
    module = sys.modules[cls.__module__].__doc__ or ""
    assert "does not protect" in module.lower()
    assert "Source:" in module


@pytest.mark.parametrize("labels", ["none", "counts", "exact"])
def test_knowledge_holds_no_truth_beyond_what_the_threat_model_grants(labels: str, tmp_path: Path) -> None:
    of = world(training={"batch_size": 8}, defenses=[{"name": "dp_sgd", "clip_norm": 1.0, "noise_multiplier": 1.0}], seed=31337)
    view = federate(of, tmp_path / "t").observations[0].only(0)
    truth = private_records(of, 0, 1)
    knowledge = disclose(ThreatModel(labels=labels), of, splits(of), truth, view.upload, architecture(of, splits(of)))  # type: ignore[arg-type]
    reachable = list(_reachable((view, knowledge)))
    assert not any(isinstance(item, World) for item in reachable)
    assert 31337 not in [item for item in reachable if isinstance(item, int)]
    tensors = [item for item in reachable if isinstance(item, torch.Tensor)]
    assert not any(t.shape[-3:] == truth.inputs.shape[1:] for t in tensors)
    held = [t for t in tensors if t.shape == truth.labels.shape and t.dtype == torch.int64 and torch.equal(t, truth.labels)]
    assert len(held) == (1 if labels == "exact" else 0)
    assert (knowledge.label_counts is None) == (labels == "none")


def _reachable(item: object) -> object:
    yield item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        for field in dataclasses.fields(item):
            yield from _reachable(getattr(item, field.name))
    elif isinstance(item, dict):
        for value in item.values():
            yield from _reachable(value)
    elif isinstance(item, (tuple, list, frozenset)):
        for value in item:
            yield from _reachable(value)
    elif isinstance(item, torch.nn.Module):
        yield from item.state_dict().values()


def test_transcript_tells_an_attacker_everything_needed_without_the_world(tmp_path: Path) -> None:
    federate(world(), tmp_path / "t")
    header = read(tmp_path / "t").header
    family = config.build_plugin("models", header["model"], "model")
    assert family == world().model
