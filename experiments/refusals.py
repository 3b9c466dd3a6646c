"""What of an experiment cannot run, each with its reason, said before anything is written."""

from __future__ import annotations

from typing import Any

from clients.private import partition, records_held, splits
from defenses.accounting import guarantee
from defenses.channel.ckks import CKKSAggregation
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.distributed_dp import DistributedDP
from experiments.arms import Arm
from experiments.candidates import available
from experiments.collude import understated
from experiments.metadata import cannot_be_withheld
from experiments.spec import Evaluation, Experiment
from experiments.stack import misplaced
from server.active import refusal
from simulator.errors import SpecError, did_you_mean
from simulator.world import Federation, World


def check(experiment: Experiment) -> None:
    """Refuse an experiment that cannot run.

    Raises:
        SpecError: the first reason, as must be / got / do.
    """
    federation, evaluation = experiment.federation, experiment.evaluation
    for arm in experiment.arms:
        if (reason := experiment.recipe(arm).without_effect()) is not None:
            raise SpecError(f"arm {arm.name!r}, training: {reason}" if arm.training else f"training: {reason}")
    _check_rounds(evaluation, federation, "")
    for arm in experiment.arms:
        if arm.evaluation or arm.federation:
            _check_rounds(experiment.judged(arm), experiment.federation_of(arm), f"arm {arm.name!r}, ")
        _check_control(experiment, arm)
    for attack in (attack for arm in experiment.arms for attack in experiment.asked(arm)):
        check_budget(attack)
    names = [attack.name for attack in experiment.rungs]
    if unknown := [name for name in evaluation.shuffled_attacks if name not in names]:
        raise SpecError(
            f"evaluation.shuffled_attacks must be among the attacks {', '.join(names)}, got {unknown}. {did_you_mean(unknown[0], names)}"
        )
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
        if isinstance(world.channel, SecureAggregation) and world.channel.identities:
            raise SpecError(
                f"arm {arm.name!r}, secure_aggregation: identities must be empty where `fedpeek run` starts the clients, got "
                f"{len(world.channel.identities)}: each private key is in its client's own environment. Leave them out: they are derived."
            )
        for defense in arm.defenses:
            reason = defense.refuses(world) or (understated(world, experiment.threat.colluding) if defense.channel else None)
            if reason is not None:
                raise SpecError(f"arm {arm.name!r}, {defense.name}: {reason}")
            if isinstance(defense, DistributedDP) and experiment.threat.colluding > (most := defense.tolerated(world)):
                raise SpecError(
                    f"arm {arm.name!r}: colluding of distributed_dp must be ≥ threat.colluding = {experiment.threat.colluding}, got "
                    f"{most}: a sum without their noise has less than it claims. Set it."
                )
        guarantee(world, records_held=records_held(world), delta=evaluation.delta)  # refuses a δ that means nothing


def _check_rounds(evaluation: Evaluation, federation: Federation, whose: str) -> None:
    """Attacked rounds must happen and be kept."""
    if max(evaluation.rounds) > federation.rounds:
        raise SpecError(
            f"{whose}evaluation.rounds must be ≤ federation.rounds = {federation.rounds}, got {list(evaluation.rounds)}. "
            "Train longer or attack earlier."
        )
    missing = set(evaluation.rounds) - set(federation.record_rounds)
    if federation.record_rounds and missing:
        raise SpecError(
            f"{whose}federation.record_rounds must hold the attacked rounds, got none of {sorted(missing)}. Add them or leave it empty."
        )
    if federation.record_rounds and not all(1 <= round <= federation.rounds for round in federation.record_rounds):
        raise SpecError(
            f"{whose}federation.record_rounds must lie in 1..{federation.rounds}, got {list(federation.record_rounds)}. Drop the others."
        )


def _check_control(experiment: Experiment, arm: Arm) -> None:
    """An arm's own control must differ from it by defenses and recipe alone, and share rounds with it."""
    if not arm.control:
        return
    control = next((other for other in experiment.arms if other.name == arm.control), None)
    if control is None or control is arm:
        others = [other.name for other in experiment.arms if other is not arm]
        raise SpecError(
            f"arm {arm.name!r}: control must be the name of another arm, got {arm.control!r}. {did_you_mean(arm.control, others)}"
        )
    if control.defenses or control.control:
        raise SpecError(f"arm {arm.name!r}: control must be an arm without defenses and control, got {control.name!r}. Add such an arm.")
    if not control.changes.items() <= arm.changes.items():
        only = [".".join(place) for place, value in control.changes.items() if value != arm.changes.get(place)]
        raise SpecError(f"arm {arm.name!r}: all that its control {control.name!r} changes must be changed alike, got other {only}. Do so.")
    asked, alike = experiment.judged(arm).candidates, experiment.judged(control).candidates
    if asked != alike:
        raise SpecError(
            f"arm {arm.name!r}: candidates must be as many as of its control {control.name!r}, got {asked} and {alike}. "
            "Chance depends on them: set both alike."
        )
    rounds, of_control = experiment.judged(arm).rounds, experiment.judged(control).rounds
    if not set(rounds) & set(of_control):
        raise SpecError(
            f"arm {arm.name!r}: rounds must be shared with its control {control.name!r}, got {list(rounds)} and {list(of_control)}. "
            "Attack one round under both."
        )


def check_budget(attack: Any) -> None:
    """Refuse an attack whose budget of CPU seconds lets it do nothing; users' own attacks may not check theirs.

    Raises:
        SpecError: ``seconds`` is not above 0.
    """
    seconds = getattr(attack, "seconds", None)
    if isinstance(seconds, int | float) and not seconds > 0:
        raise SpecError(f"seconds of {attack.name} must be > 0, got {seconds}. It is the attack's budget of CPU seconds; inf is none.")


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
    parts, threat = splits(world), experiment.threat
    wanted = max(experiment.judged(arm).candidates for arm in experiment.arms)
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
    for arm in [] if threat.metadata else experiment.arms:
        of = experiment.world(arm, experiment.seeds[0])
        reason = cannot_be_withheld(of, labels=threat.labels != "none", rounds=threat.rounds == "all")
        if reason is not None:
            raise SpecError(f"arm {arm.name!r}: threat.metadata {reason}.")
    if threat.public_data and not len(parts.public):
        raise SpecError(f"split.public must give the public at least 1 record, got {experiment.split.public}. Raise it.")
    possible = available(experiment)
    if max(wanted, 2) > possible:
        raise SpecError(
            f"evaluation.candidates must be ≤ {possible}, the records that are neither public nor told apart by disclosed labels, "
            f"and at least 2, got {wanted}. Lower it, or use 0 for all."
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
