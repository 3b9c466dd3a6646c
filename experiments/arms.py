"""What is compared: stacks of defenses under names, with what each changes of the world; and all subsets of some layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated, Any

from simulator.config import Plugin
from simulator.defense import Defense

UNDEFENDED = "none"
"""Name of the arm without any layer."""

MOST_LAYERS = 6
"""64 arms."""


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("ε", "eps")).strip("-.") or "unnamed"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One stack of defenses under a name; the arm without any is the control.

    Attributes:
        name: in tables, and as lower-case letters, digits, dots and hyphens in the names of files.
        defenses: in the order in which they act.
        model: settings of the model that this arm changes, or with ``name`` another one: what a defense needs in order to act.
        training: settings of the recipe that this arm changes: a larger batch and more local steps are defenses, too. A record is
            compared with the control where both attack it.
        federation: settings of the federation that this arm changes: with fewer or more senders, a sum hides less or more.
        evaluation: rounds, victims and candidates of this arm, where they are not those of all: a sum is one upload a round and
            holds many of the candidates, a trained model is that of a late round.
        attacks: settings of attacks, by their names, that this arm changes: uploads of several records or local steps take longer.
        control: name of the undefended arm that this one is judged against, in leakage and accuracy; empty for the arm that changes
            nothing. An arm of few senders pays for them without any defense.
    """

    name: str
    defenses: Annotated[tuple[Defense, ...], Plugin("defenses")] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    federation: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    control: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name must not be empty, got {self.name!r}. Name the arm after its defenses.")

    @property
    def slug(self) -> str:
        """The name as a directory."""
        return slug(self.name)

    @property
    def changes(self) -> dict[tuple[str, str], Any]:
        """What the arm changes of the world beside its defenses: values by table and setting."""
        tables = {"model": self.model, "training": self.training, "federation": self.federation}
        return {(table, name): value for table, settings in tables.items() for name, value in settings.items()}


def lattice(layers: Sequence[Arm]) -> tuple[Arm, ...]:
    """Every subset of the layers as one arm, smaller ones first: their defenses one after the other, in the layers' order.

    Raises:
        ValueError: more than six layers, or two of them change the same setting of the recipe.
    """
    if len(layers) > MOST_LAYERS:
        raise ValueError(f"layers must be at most {MOST_LAYERS}, got {len(layers)}: every subset is a federation. Drop some.")
    changed = [name for layer in layers for _, name in layer.changes]
    if len(set(changed)) != len(changed):
        raise ValueError(f"layers must change different settings, got {changed}. Drop one.")
    if own := [layer.name for layer in layers if layer.control or layer.evaluation or layer.attacks]:
        raise ValueError(f"layers must have no control, evaluation and attacks of their own, got some in {own}. Subsets are judged alike.")
    subsets = [subset for size in range(len(layers) + 1) for subset in combinations(layers, size)]
    return tuple(
        Arm(
            name=" + ".join(layer.name for layer in subset) or UNDEFENDED,
            defenses=tuple(defense for layer in subset for defense in layer.defenses),
            model={name: value for layer in subset for name, value in layer.model.items()},
            training={name: value for layer in subset for name, value in layer.training.items()},
            federation={name: value for layer in subset for name, value in layer.federation.items()},
        )
        for subset in subsets
    )
