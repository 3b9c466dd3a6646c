"""Names of other packages: a broken one stops who uses it and nobody else, and none takes a name that is taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from simulator import config, lookup
from simulator.errors import SpecError
from simulator.models.conv import LeNet
from simulator.registry import registered

GOOD = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Guess:
    \"\"\"A guess of another package.

    Attributes:
        tries: how often it guesses.
    \"\"\"

    tries: int = 3
"""


def ship(folder: Path, distribution: str, points: str, **modules: str) -> None:
    """Install a package, as importlib.metadata sees it."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ship(
        tmp_path,
        "other",
        "[fedpeek.attacks]\nother_guess = other_good:Guess\nbroken_guess = other_broken:Guess\nabsent_guess = other_good:Nothing\n"
        "dlg = other_good:Guess\n",
        other_good=GOOD,
        other_broken="raise RuntimeError('no such driver')\n",
    )
    ship(tmp_path, "second", "[fedpeek.attacks]\ntwice = second_good:Guess\n", second_good=GOOD)
    ship(tmp_path, "third", "[fedpeek.attacks]\ntwice = third_good:Guess\n", third_good=GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    for kind in get_args(lookup.Kind):
        lookup.names(kind)  # discovers what is in the tree, once and for all
    before = dict(registered)
    lookup._entries.cache_clear()
    yield
    lookup._entries.cache_clear()
    registered.clear()
    registered.update(before)


def test_an_entry_point_is_found_by_its_name() -> None:
    assert lookup.get("attacks", "other_guess").__module__ == "other_good"
    assert config.build_plugin("attacks", {"name": "other_guess", "tries": 5}, "attack").tries == 5
    assert lookup.get("attacks", "other_guess") is lookup.get("attacks", "other_guess")


def test_a_broken_one_stops_only_who_uses_it() -> None:
    with pytest.raises(SpecError) as refused:
        lookup.get("attacks", "broken_guess")
    assert str(refused.value) == (
        "entry point fedpeek.attacks:broken_guess must be importable, got RuntimeError: no such driver. Uninstall or repair other."
    )
    with pytest.raises(SpecError, match="fedpeek.attacks:absent_guess must be importable, got AttributeError"):
        lookup.get("attacks", "absent_guess")
    assert lookup.get("attacks", "idlg").__module__.startswith("attacks.")
    with pytest.raises(SpecError, match="Did you mean 'broken_guess'"):
        lookup.get("attacks", "broken_gues")


def test_a_taken_name_is_refused_and_not_dropped() -> None:
    with pytest.raises(
        SpecError, match=r"'dlg' in attacks must be unique, got it from attacks.update.dlg and from other_good:Guess of other"
    ):
        lookup.get("attacks", "dlg")
    with pytest.raises(SpecError, match=r"'twice' in attacks must be unique, got it from (second|third)_good .* of (second|third)"):
        lookup.get("attacks", "twice")


def test_a_list_warns_of_them_and_shows_the_rest() -> None:
    done = CliRunner().invoke(app, ["list", "attacks"])
    assert done.exit_code == 0
    names = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert {"other_guess", "idlg"} <= set(names)
    assert not {"broken_guess", "dlg", "twice"} & set(names)
    assert done.stderr.count("warning") == 4
    assert "warning entry point fedpeek.attacks:broken_guess must be importable" in done.stderr
    told = CliRunner().invoke(app, ["list", "attacks", "other_guess"]).stdout
    assert "tries    3        how often it guesses." in told


@pytest.mark.parametrize(("kind", "word"), [("attacks", "attack"), ("defenses", "defense"), ("data", "data set"), ("models", "model")])
def test_errors_speak_of_one(kind: lookup.Kind, word: str) -> None:
    for name, what in (("nothing_like_it", "name must be registered"), ("nowhere:X", "path must be importable")):
        with pytest.raises(SpecError, match=f"^{word} {what}"):
            lookup.get(kind, name)


def test_an_unknown_setting_names_its_owner() -> None:
    with pytest.raises(SpecError, match=r"^setting model.width must be one of lenet's, got 'width'"):
        config.build(LeNet, {"width": 16}, "model.")
