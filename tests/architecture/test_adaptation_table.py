"""The table of docs/architecture.md on which attack adapts to which defense names what attacks know, and no defense is left out of it."""

from __future__ import annotations

import re
from pathlib import Path

from attacks import modeled
from simulator import lookup

TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("## Which attack adapts to which defense")[2].partition("## Words")[0]
ROWS = {line[2:4]: line.split(" | ") for line in SECTION.splitlines() if re.match(r"\| A\d:", line)}
DEFENSES = {name: set(re.findall(r"`(\w+)`", row[2])) for name, row in ROWS.items()}


def test_every_name_is_a_defense_or_an_attack_of_the_registry() -> None:
    assert list(ROWS) == [f"A{number}" for number in range(1, 8)]
    for name, row in ROWS.items():
        assert DEFENSES[name] <= set(lookup.names("defenses")), name
        assert set(re.findall(r"`(\w+)`", row[1])) <= set(lookup.names("attacks")), name


def test_what_is_said_of_a_defense_is_what_attacks_take_it_for() -> None:
    assert DEFENSES["A1"] == {*modeled.LOSSY, *modeled.MIXING}
    assert DEFENSES["A2"] == {*modeled.NOISY, *modeled.NOISY_SUMS, "outpost", "qsgd"}
    assert {*modeled.MIXING, *modeled.TRANSFORMING, *modeled.LATENT} <= DEFENSES["A4"]
    assert not DEFENSES["A5"] & {*modeled.MIXING, *modeled.TRANSFORMING}
    assert set(lookup.names("defenses")) - set(re.findall(r"`(\w+)`", SECTION)) == {"clip"}  # "clipping", which is of several
