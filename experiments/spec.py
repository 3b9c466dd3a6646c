"""An experiment as data: one world, several arms of defenses, the attacks on each, and how they are judged.

:func:`load` reads it from TOML, :func:`check` refuses what cannot run, before anything is written.

Longer than our usual: a setting and the reason to refuse it are read together.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from clients.private import partition, records_held, splits
from defenses.accounting import guarantee
from defenses.channel.ckks import CKKSAggregation
from defenses.client.distributed_dp import DistributedDP
from experiments.collude import understated
from experiments.ladder import rungs
from experiments.stack import misplaced
from server.active import refusal
from simulator import config
from simulator.adversary import ThreatModel
from simulator.config import Plugin
from simulator.defense import Defense
from simulator.errors import SpecError, did_you_mean
from simulator.types import LocalTraining
from simulator.world import Federation, Split, Tampering, World

DEMO = "demo"

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
        defenses: in the order in which they act.
        training: settings of the recipe that this arm changes: a larger batch and more local steps are defenses, too. A record is
            compared with the control where both attack it.
        federation: settings of the federation that this arm changes: with fewer or more senders, a sum hides less or more.
    """

    name: str
    defenses: Annotated[tuple[Defense, ...], Plugin("defenses")] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    federation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name must not be empty, got {self.name!r}. Name the arm after its defenses.")

    @property
    def slug(self) -> str:
        """The name as a directory."""
        return slug(self.name)


def lattice(layers: Sequence[Arm]) -> tuple[Arm, ...]:
    """Every subset of the layers as one arm, smaller ones first: their defenses one after the other, in the layers' order.

    Raises:
        ValueError: more than six layers, or two of them change the same setting of the recipe.
    """
    if len(layers) > MOST_LAYERS:
        raise ValueError(f"layers must be at most {MOST_LAYERS}, got {len(layers)}: every subset is a federation. Drop some.")
    changed = [name for layer in layers for name in (*layer.training, *layer.federation)]
    if len(set(changed)) != len(changed):
        raise ValueError(f"layers must change different settings, got {changed}. Drop one.")
    subsets = [subset for size in range(len(layers) + 1) for subset in combinations(layers, size)]
    return tuple(
        Arm(
            name=" + ".join(layer.name for layer in subset) or UNDEFENDED,
            defenses=tuple(defense for layer in subset for defense in layer.defenses),
            training={name: value for layer in subset for name, value in layer.training.items()},
            federation={name: value for layer in subset for name, value in layer.federation.items()},
        )
        for subset in subsets
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is attacked and how it is judged.

    Attributes:
        rounds: the rounds under attack; round 1 attacks the initial model, later rounds the trained one.
        victims: at most this many clients' uploads are attacked in each round; 0 means all.
        candidates: records among which the true one must be the nearest to count as identified; 0 means all there are.
        shuffled_control: also run each attack on a shuffled update, as a floor; doubles the cost of attacking.
        by_round: one row for each attacked round instead of one for all of them; shows the initial beside the trained model.
        delta: δ of the printed (ε, δ) guarantee; must be below 1 / number of records.
    """

    rounds: tuple[int, ...] = (1,)
    victims: int = 0
    candidates: int = 100
    shuffled_control: bool = True
    by_round: bool = False
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not self.rounds or min(self.rounds) < 1:
            raise ValueError(f"rounds must be numbers ≥ 1, got {list(self.rounds)}. Round 1 is the initial model.")
        if len(set(self.rounds)) != len(self.rounds):
            raise ValueError(f"rounds must differ, got {list(self.rounds)}. A repeated round adds no information.")
        if self.victims < 0 or self.candidates < 0 or self.candidates == 1:
            raise ValueError(f"victims must be ≥ 0 and candidates 0 or ≥ 2, got {self.victims} and {self.candidates}. Use 0 for all.")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}. 1e-5 is usual.")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that ``fedpeek run`` needs; see ``fedpeek list specs`` for examples.

    Attributes:
        arms: the stacks of defenses that are compared.
        layers: instead of arms: every subset of them is one, from no defense to all of them, each in this order.
        attacks: on each arm; none means :attr:`rungs`, the ladder of attackers that the threat model allows.
        seeds: one federation for each arm and seed; a seed fixes victims and initial weights, the same in every arm.
        secret: see :class:`simulator.world.World`; drawn for each run unless the spec gives it. The resolved spec holds it, so that
            running that file again gives the same bits.
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

    @property
    def control(self) -> Arm | None:
        """The undefended arm, against which every other is judged."""
        return next((arm for arm in self.arms if not (arm.defenses or arm.training or arm.federation)), None)

    def recipe(self, arm: Arm) -> LocalTraining:
        """The recipe with what the arm changes.

        Raises:
            SpecError: the arm names a setting that the recipe does not have, or a value that it refuses.
        """
        return config.build(LocalTraining, {**config.dump(self.training), **arm.training}, f"arm {arm.name!r}, training.")

    def world(self, arm: Arm, seed: int) -> World:
        """The world of one arm and seed; it keeps the tensors of the attacked rounds, or of all where the adversary may use them."""
        table = {**config.dump(self.federation), **arm.federation}
        federation = config.build(Federation, table, f"arm {arm.name!r}, federation.")
        kept = federation.record_rounds or (() if self.threat.rounds == "all" else tuple(sorted(self.evaluation.rounds)))
        return World(
            data=self.data, model=self.model, split=self.split, federation=replace(federation, record_rounds=kept),
            training=self.recipe(arm), defenses=arm.defenses, tampering=self.tampering, seed=seed, secret=self.secret,
        )  # fmt: skip


def specs() -> dict[str, Path]:
    """The example specs that ship with fedpeek, by name."""
    return {Path(str(item)).stem: Path(str(item)) for item in files("experiments.specs").iterdir() if str(item).endswith(".toml")}


def load(spec: str | None, assignments: Sequence[str] = ()) -> Experiment:
    """Read a spec: a TOML file, the name of an example, or None for the demo; then apply ``--set`` assignments in order.

    Raises:
        SpecError: there is no such spec, it is not TOML, or a setting is wrong.
    """
    path = Path(spec) if spec is not None else specs()[DEMO]
    if spec is not None and not path.is_file():
        if spec not in specs():
            raise SpecError(f"spec must be a TOML file or an example's name, got {spec!r}. {did_you_mean(spec, specs())}")
        path = specs()[spec]
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"spec must be TOML, got {path} ({error}). Correct that line.") from error
    for assignment in assignments:
        table = config.override(table, assignment)
    return config.build(Experiment, table)


def check(experiment: Experiment) -> None:
    """Refuse an experiment that cannot run.

    Raises:
        SpecError: the first reason, as must be / got / do.
    """
    federation, evaluation = experiment.federation, experiment.evaluation
    for arm in experiment.arms:
        if (reason := experiment.recipe(arm).without_effect()) is not None:
            raise SpecError(f"arm {arm.name!r}, training: {reason}" if arm.training else f"training: {reason}")
    if max(evaluation.rounds) > federation.rounds:
        raise SpecError(
            f"evaluation.rounds must be ≤ federation.rounds = {federation.rounds}, got {list(evaluation.rounds)}. "
            "Train longer or attack earlier."
        )
    missing = set(evaluation.rounds) - set(federation.record_rounds)
    if federation.record_rounds and missing:
        raise SpecError(
            f"federation.record_rounds must hold the attacked rounds, got none of {sorted(missing)}. Add them or leave it empty."
        )
    if federation.record_rounds and not all(1 <= round <= federation.rounds for round in federation.record_rounds):
        raise SpecError(
            f"federation.record_rounds must lie in 1..{federation.rounds}, got {list(federation.record_rounds)}. Drop the others."
        )
    for attack in experiment.rungs:
        check_budget(attack)
    _check_knowledge(experiment)
    _check_tampering(experiment)
    for arm in experiment.arms:
        for seed in experiment.seeds:
            _check_data(experiment.world(arm, seed))
    for arm in experiment.arms:
        if (reason := misplaced(arm.defenses)) is not None:
            raise SpecError(f"arm {arm.name!r}: {reason}")
        world = experiment.world(arm, experiment.seeds[0])
        if experiment.threat.colluding and isinstance(world.channel, CKKSAggregation) and world.channel.secret_key == "clients":
            raise SpecError(
                f"arm {arm.name!r}, ckks_aggregation: threat.colluding must be 0 with secret_key = 'clients', got "
                f"{experiment.threat.colluding}. A single client that colludes gives the server the key: set secret_key = 'colluder'."
            )
        for defense in arm.defenses:
            reason = defense.refuses(world) or (understated(world, experiment.threat.colluding) if defense.channel else None)
            if reason is not None:
                raise SpecError(f"arm {arm.name!r}, {defense.name}: {reason}")
            if isinstance(defense, DistributedDP) and experiment.threat.colluding > defense.colluding:
                raise SpecError(
                    f"arm {arm.name!r}: colluding of distributed_dp must be ≥ threat.colluding = {experiment.threat.colluding}, got "
                    f"{defense.colluding}: a sum without their noise has less than it claims. Set it."
                )
        guarantee(world, records_held=records_held(world), delta=evaluation.delta)  # refuses a δ that means nothing


def check_budget(attack: Any) -> None:
    """Refuse an attack whose budget of CPU seconds lets it do nothing; users' own attacks may not check theirs.

    Raises:
        SpecError: ``seconds`` is not above 0.
    """
    seconds = getattr(attack, "seconds", None)
    if isinstance(seconds, int | float) and not seconds > 0:
        raise SpecError(f"seconds of {attack.name} must be > 0, got {seconds}. It is a victim's budget of CPU seconds; inf is none.")


def _check_data(world: World) -> None:
    records = len(world.data.load().records)
    private = records - int(records * world.split.test) - int(records * world.split.public)
    if world.federation.clients > private:
        raise SpecError(
            f"federation.clients must be ≤ the {private} private records of {world.data.name}, got {world.federation.clients}. "
            "Use fewer clients or smaller split.test and split.public."
        )
    fewest = min(records_held(world))
    if world.training.batch_size > fewest:
        client = min(range(world.federation.clients), key=lambda i: len(partition(world)[i]))
        raise SpecError(
            f"training.batch_size must be ≤ what every client holds, got {world.training.batch_size} with {fewest} records "
            f"at client {client} (seed {world.seed}). Lower it, or use 0 for all a client holds."
        )


def _check_knowledge(experiment: Experiment) -> None:
    """What the adversary is told must exist, and must leave enough records among which the true one can hide."""
    world = experiment.world(experiment.arms[0], experiment.seeds[0])
    parts, threat, wanted = splits(world), experiment.threat, experiment.evaluation.candidates
    recorded = len(world.federation.record_rounds) or world.federation.rounds
    smallest = min(experiment.world(arm, experiment.seeds[0]).federation.cohort_size for arm in experiment.arms)
    if threat.colluding >= smallest:
        raise SpecError(f"threat.colluding must be < the cohort of {smallest}, got {threat.colluding}. Leave one client to attack.")
    if threat.labels != "none" and any(experiment.recipe(arm).sampling == "poisson" for arm in experiment.arms):
        raise SpecError(
            f"threat.labels must be 'none' with training.sampling = 'poisson', got {threat.labels!r}: labels say how many records were "
            "drawn, and the guarantee rests on that being secret. Withhold them, or use sampling = 'shuffled'."
        )
    if threat.rounds == "all" and recorded < 2:
        raise SpecError(f"threat.rounds must be 'one' where {recorded} round is recorded, got 'all'. Raise federation.rounds.")
    if threat.public_data and not len(parts.public):
        raise SpecError(f"split.public must give the public at least 1 record, got {experiment.split.public}. Raise it.")
    labels = torch.cat([part.labels for part in ([parts.private, parts.test] if threat.public_data else parts.all)])
    available = int(labels.bincount().min()) if threat.labels != "none" else len(labels)
    if wanted > available:
        raise SpecError(
            f"evaluation.candidates must be ≤ {available}, the records that are neither public nor told apart by disclosed labels, "
            f"got {wanted}. Lower it, or use 0 for all."
        )


def _check_tampering(experiment: Experiment) -> None:
    """An active server must be declared as one, and do what it is declared for."""
    threat, tampering = experiment.threat, experiment.tampering
    if tampering.method != "none" and threat.adversary != "active":
        raise SpecError(
            f"threat.adversary must be 'active' with tampering.method = {tampering.method!r}, got {threat.adversary!r}. "
            "A server that tampers with the model is not honest-but-curious: say so, or drop [tampering]."
        )
    if threat.adversary == "active" and tampering.method == "none":
        raise SpecError(
            "tampering.method must be 'imprint' or 'trap_weights' with threat.adversary = 'active', got 'none'. "
            "Set it, or leave the adversary honest-but-curious."
        )
    if tampering.placed_by == "public" and not (threat.public_data and tampering.method != "none"):
        raise SpecError(
            "tampering.placed_by must be 'prior' without tampering or without threat.public_data, got 'public'. "
            "Set threat.public_data = true and tampering.method, or drop it."
        )
    if (reason := refusal(experiment.world(experiment.arms[0], experiment.seeds[0]))) is not None:
        raise SpecError(f"tampering: {reason}.")
