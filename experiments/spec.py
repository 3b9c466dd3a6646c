"""An experiment as data: one world, several arms of defenses, the attacks on each, and how they are judged.

:func:`load` reads it from TOML; :func:`experiments.refusals.check` refuses what cannot run, before anything is written.

Long for one file: a third of it says what each setting means, which ``fedpeek list settings`` prints.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments.arms import Arm, lattice
from experiments.ladder import rungs
from simulator import config
from simulator.adversary import ThreatModel
from simulator.config import Plugin
from simulator.errors import SpecError, did_you_mean
from simulator.types import LocalTraining
from simulator.world import Federation, Split, Tampering, World

DEMO = "demo"


BY_ARM = ("rounds", "victims", "candidates")
"""Settings of the evaluation that an arm may change."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is attacked and how it is judged.

    Attributes:
        rounds: the rounds under attack; round 1 attacks the initial model, later rounds the trained one.
        victims: at most this many clients' uploads are attacked in each round; 0 means all.
        candidates: records among which the true one must be the nearest to count as identified; 0 means all that the threat
            model does not rule out, as many for each victim.
        shuffled_control: also run each attack on a shuffled update, as a floor; doubles the cost of attacking.
        shuffled_attacks: names of the attacks that this is done with; none means all. Of one that was trained on public records it
            shows what these alone say.
        shuffled_victims: at most this many victims of an arm and seed, as a sample that is compared with the attack on the same ones and is
            no floor of the others; 0 means all.
        tested_rounds: accuracy is the mean over the models after so many rounds, the last ones: one model's varies from round to round.
        by_round: one row for each attacked round instead of one for all of them; shows the initial beside the trained model.
        delta: δ of the printed (ε, δ) guarantee; must be below 1 / number of records.
    """

    rounds: tuple[int, ...] = (1,)
    victims: int = 0
    candidates: int = 100
    shuffled_control: bool = True
    shuffled_attacks: tuple[str, ...] = ()
    shuffled_victims: int = 0
    tested_rounds: int = 1
    by_round: bool = False
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not self.rounds or min(self.rounds) < 1:
            raise ValueError(f"rounds must be numbers ≥ 1, got {list(self.rounds)}. Round 1 is the initial model.")
        if len(set(self.rounds)) != len(self.rounds):
            raise ValueError(f"rounds must differ, got {list(self.rounds)}. A repeated round adds no information.")
        if self.victims < 0 or self.candidates < 0 or self.candidates == 1:
            raise ValueError(f"victims must be ≥ 0 and candidates 0 or ≥ 2, got {self.victims} and {self.candidates}. Use 0 for all.")
        if self.shuffled_victims < 0:
            raise ValueError(f"shuffled_victims must be ≥ 0, got {self.shuffled_victims}. Use 0 for all.")
        if self.tested_rounds < 1:
            raise ValueError(f"tested_rounds must be ≥ 1, got {self.tested_rounds}. 1 tests the last model alone.")
        if not self.shuffled_control and (self.shuffled_attacks or self.shuffled_victims):
            raise ValueError("shuffled_control must be true with shuffled_attacks or shuffled_victims, got false. Set it, or drop them.")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}. 1e-5 is usual.")


    def shuffled(self, attack: str, victims: int) -> int:
        """Of so many victims, those on whose shuffled updates the attack runs, too."""
        asked = self.shuffled_control and (not self.shuffled_attacks or attack in self.shuffled_attacks)
        return min(self.shuffled_victims or victims, victims) if asked else 0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that ``fedpeek run`` needs; see ``fedpeek list specs`` for examples.

    Attributes:
        data: the data set, a name or a table with ``name`` and its settings.
        model: the network that is trained, a name or a table with ``name`` and its settings.
        arms: the stacks of defenses that are compared.
        layers: instead of arms: every subset of them is one, from no defense to all of them, each in this order.
        attacks: those that run on each arm; none means the ladder of attackers that the threat model allows (:attr:`rungs`).
        seeds: one federation for each arm and seed; a seed fixes victims and initial weights, the same in every arm.
        name: of the experiment: it names the directory of a run that is given none.
        description: in a sentence, for ``fedpeek list specs``.
        split: how the data set is divided into the clients' records, test records and public ones.
        federation: who takes part, for how long, and who holds what.
        training: the recipe that the server broadcasts.
        threat: who attacks, and what it is told beyond its view.
        tampering: what an active server plants in the model that it broadcasts.
        evaluation: what is attacked and how it is judged.
        secret: keys the randomness of the defenses, and who is in a Poisson sample, together with the seed; drawn for each run unless the
            spec gives it. The resolved spec holds it, so that running that file again gives the same bits.
        driver: what runs the federation: ``inprocess`` this process, ``simulation`` Flower's engine on Ray, ``deployment`` a SuperLink and
            SuperNodes; the observations are the same.
    """

    data: Annotated[Any, Plugin("data")]
    model: Annotated[Any, Plugin("models")]
    attacks: Annotated[tuple[Any, ...], Plugin("attacks")] = ()
    arms: tuple[Arm, ...] = ()
    layers: tuple[Arm, ...] = ()
    name: str = "experiment"
    description: str = ""
    split: Split = field(default_factory=Split)
    federation: Federation = field(default_factory=Federation)
    training: LocalTraining = field(default_factory=LocalTraining)
    threat: ThreatModel = field(default_factory=ThreatModel)
    tampering: Tampering = field(default_factory=Tampering)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seeds: tuple[int, ...] = (0,)
    secret: str = ""
    driver: Literal["inprocess", "simulation", "deployment"] = "inprocess"

    def __post_init__(self) -> None:
        if self.layers and self.arms not in ((), lattice(self.layers)):
            raise ValueError(f"arms must not be given beside layers, got {[arm.name for arm in self.arms]}. Every subset of layers is one.")
        if self.layers:
            object.__setattr__(self, "arms", lattice(self.layers))
        for what, values in (("seeds", self.seeds), ("arms", self.arms)):
            if not values:
                raise ValueError(f"{what} must hold at least one, got none. Add one to the spec.")
        names = [attack.name for attack in self.attacks]
        if len(set(names)) != len(names):
            raise ValueError(f"attacks must differ, got {names}. Run the other settings in a second experiment, or with `fedpeek attack`.")
        slugs = [arm.slug for arm in self.arms]
        if len(set(slugs)) != len(slugs):
            raise ValueError(f"arm names must differ, got {[arm.name for arm in self.arms]}. Rename one.")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}. A repeated seed adds no information.")

    @cached_property
    def rungs(self) -> tuple[Any, ...]:
        """The attacks that run on each arm."""
        return self.attacks or rungs(self.threat, defended=any(arm.defenses for arm in self.arms))

    def asked(self, arm: Arm) -> tuple[Any, ...]:
        """The attacks that run on this arm, with the settings of them that it changes.

        Raises:
            SpecError: the arm names an attack that does not run, or a setting that it does not have or refuses.
        """
        names = [attack.name for attack in self.rungs]
        if unknown := [name for name in arm.attacks if name not in names]:
            raise SpecError(
                f"arm {arm.name!r}, attacks must be among {', '.join(names)}, got {unknown[0]!r}. {did_you_mean(unknown[0], names)}"
            )
        return tuple(
            config.build_plugin("attacks", {**config.dump(attack), **own}, f"arm {arm.name!r}, attacks.{attack.name}")
            if (own := arm.attacks.get(attack.name))
            else attack
            for attack in self.rungs
        )

    @property
    def control(self) -> Arm | None:
        """The undefended arm, against which every other is judged that names none of its own; one that is judged like all if there is."""
        undefended = [arm for arm in self.arms if not (arm.defenses or arm.changes or arm.control)]
        return next((arm for arm in undefended if not arm.evaluation), undefended[0] if undefended else None)

    @property
    def controls(self) -> dict[str, str]:
        """Name of each arm's control, by the arm's name; a control is its own. Without any undefended arm, arms that name none lack one."""
        undefended, named = self.control, {arm.control for arm in self.arms if arm.control}
        usual = undefended.name if undefended else ""
        found = {arm.name: arm.name if arm.name in named else arm.control or usual for arm in self.arms}
        return {arm: control for arm, control in found.items() if control}

    def judged(self, arm: Arm) -> Evaluation:
        """How the arm is judged: the evaluation with the rounds, victims and candidates that it changes.

        Raises:
            SpecError: the arm changes something else, or to a value that is refused.
        """
        if other := sorted(set(arm.evaluation) - set(BY_ARM)):
            raise SpecError(
                f"arm {arm.name!r}, evaluation: an arm's own settings must be among {', '.join(BY_ARM)}, got {other}. "
                "The rest is the same for all: set it in [evaluation]."
            )
        return config.build(Evaluation, {**config.dump(self.evaluation), **arm.evaluation}, f"arm {arm.name!r}, evaluation.")

    def recipe(self, arm: Arm) -> LocalTraining:
        """The recipe with what the arm changes.

        Raises:
            SpecError: the arm names a setting that the recipe does not have, or a value that it refuses.
        """
        return config.build(LocalTraining, {**config.dump(self.training), **arm.training}, f"arm {arm.name!r}, training.")

    def federation_of(self, arm: Arm) -> Federation:
        """The federation with what the arm changes.

        Raises:
            SpecError: the arm names a setting that a federation does not have, or a value that it refuses.
        """
        return config.build(Federation, {**config.dump(self.federation), **arm.federation}, f"arm {arm.name!r}, federation.")

    def world(self, arm: Arm, seed: int) -> World:
        """The world of one arm and seed; it keeps the tensors of the attacked rounds, or of all where the adversary may use them."""
        federation = self.federation_of(arm)
        kept = federation.record_rounds or (() if self.threat.rounds == "all" else tuple(sorted(self.judged(arm).rounds)))
        tested = max(federation.record_models, self.judged(arm).tested_rounds)
        return World(
            data=self.data, model=self._model(arm), split=self.split,
            federation=replace(federation, record_rounds=kept, record_models=tested),
            training=self.recipe(arm), defenses=arm.defenses, tampering=self.tampering, seed=seed, secret=self.secret,
        )  # fmt: skip

    def _model(self, arm: Arm) -> Any:
        if not arm.model:
            return self.model
        table = dict(arm.model) if "name" in arm.model else {**config.dump(self.model), **arm.model}
        return config.build_plugin("models", table, f"arm {arm.name!r}, model")


def specs() -> dict[str, Path]:
    """The example specs that ship with fedpeek, by name."""
    return {Path(str(item)).stem: Path(str(item)) for item in files("experiments.specs").iterdir() if str(item).endswith(".toml")}


def find(spec: str) -> Path:
    """The file of a spec: the one of that name; else the example NAME for ``NAME``, ``NAME.toml`` or ``specs/NAME.toml``.

    Raises:
        SpecError: there is neither.
    """
    path, examples = Path(spec), specs()
    if path.is_file():
        return path
    name = path.stem if path.suffix == ".toml" and path.parent.name in ("", "specs") else spec
    if name not in examples:
        what = "which is a directory" if path.is_dir() else "and there is no such file"
        raise SpecError(
            f"spec must be a TOML file or an example's name, got {spec!r}, {what}. {did_you_mean(name, examples, 'fedpeek list specs')}"
        )
    return examples[name]


def load(spec: str | None, assignments: Sequence[str] = ()) -> Experiment:
    """Read a spec: a TOML file, the name of an example, or None for the demo; then apply ``--set`` assignments in order.

    Raises:
        SpecError: there is no such spec, it is not TOML, or a setting is wrong.
    """
    path = find(DEMO if spec is None else spec)
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"spec must be TOML, got {path} ({error}). Correct that line.") from error
    for assignment in assignments:
        table = config.override(table, assignment)
    return config.build(Experiment, table)
