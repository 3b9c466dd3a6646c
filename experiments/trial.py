"""One attack on one upload: the place where the adversary's guess meets the truth.

The attack itself runs in a process that never holds the truth, see :mod:`experiments.isolated`; here its answer arrives, and every step
at which the truth is touched can be read in one sitting. Who is attacked: :mod:`experiments.under_attack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from clients.private import splits
from experiments import controls, isolated, matching, metrics
from experiments.isolated import Answer, Question, Refused
from experiments.perceptual import load_lpips
from experiments.result import Answered, RecordResult, Status, Trial
from experiments.spec import Evaluation
from experiments.under_attack import Victim, candidate_set
from simulator import config
from simulator.adversary import Reconstruction
from simulator.dataset import Splits
from simulator.rng import secret_stream, stream
from simulator.types import Batch, Observation
from simulator.world import World


@dataclass(frozen=True)
class Outcome:
    """The trials of one attack, with the pictures behind their records: private, and the matched guess (gray if none)."""

    trials: tuple[Trial, ...]
    private: Float[Tensor, "record channel height width"]
    guess: Float[Tensor, "record channel height width"]


def attack_victims(attack: Any, victims: Sequence[Victim], evaluation: Evaluation, world: World, arm: str) -> Outcome:
    """Run one attack on every victim, and on their shuffled updates as a floor, and score what it answers."""
    model = config.dump(world.architecture)
    answers = isolated.ask(attack, model, [_question(attack, victim, world) for victim in victims])
    shuffles: Any = iter(())
    able = [victim for victim, answer in zip(victims, answers, strict=True) if not _unsupported(answer)]
    if count := evaluation.shuffled(attack.name, len(able)):
        blind = _blinded(able[:count], world.seed)
        shuffles = iter(isolated.ask(attack, model, [_question(attack, victim, world) for victim in blind], supported=True))
    parts, trials, private, guesses = splits(world), [], [], []
    for victim, answer in zip(victims, answers, strict=True):
        if _unsupported(answer):
            trials.append(_trial(victim, arm, attack.name, world.seed, "unsupported", answer.reason))
            continue
        trial, guess = score(victim, answer, next(shuffles, None), parts, evaluation, arm, attack.name, world.seed)
        trials.append(trial)
        private.append(victim.truth.inputs)
        guesses.append(guess)
    empty = torch.zeros(0, *parts.schema.shape)
    return Outcome(tuple(trials), torch.cat([empty, *private]), torch.cat([empty, *guesses]))


def score(
    victim: Victim, answer: Answer, blind: Answer | None, parts: Splits, evaluation: Evaluation, arm: str, attack: str, seed: int
) -> tuple[Trial, Tensor]:
    """Judge one answer; return the trial, and the guess for each record in the records' order."""
    truth = victim.truth.inputs
    status, reason, guess = _judge(answer)
    assignment = None if guess is None else matching.assign(guess, truth)
    labels = answer.labels if isinstance(answer, Reconstruction) else None
    perceptual, _ = load_lpips()
    scores = metrics.evaluate(guess, truth, assignment, guess_labels=labels, true_labels=victim.truth.labels, perceptual=perceptual)
    candidates, true_index = candidate_set(victim, parts, evaluation.candidates, seed)
    found = metrics.identify(guess, assignment, candidates.inputs, true_index)
    records = Batch(*(torch.cat([getattr(part, what) for part in parts.all]) for what in ("inputs", "labels")))
    rng = stream(seed, "floors", victim.round, victim.senders)
    floors = controls.floors(truth, records, victim.record_ids, rng=rng)
    if blind is not None:
        _, _, blind_guess = _judge(blind)
        for floor, blind_score in zip(floors, controls.floor_scores(blind_guess, truth), strict=True):
            floor[controls.SAMPLE if evaluation.shuffled_victims else "shuffled_gradient"] = blind_score
    by_class = metrics.class_chance(victim.truth.labels, candidates.labels)
    whose = attributed_to(answer, assignment, victim)
    results = tuple(
        RecordResult(
            client=client, record=int(record), psnr_db=s.psnr_db, ssim=s.ssim, mse=s.mse, exact=s.exact, identified=f.identified,
            rank=f.rank, label_correct=s.label_correct, floors=floor, lpips=s.lpips, label=int(label),
            certificate=_of_guess(answer, "certificate", assignment, place), solver=_of_guess(answer, "solver", assignment, place),
            attributed=None if (who := whose[place]) is None else who == client, class_chance=by_class[place],
        )
        for place, (client, record, label, s, f, floor) in enumerate(
            zip(victim.clients, victim.record_ids, victim.truth.labels, scores, found, floors, strict=True)
        )
    )  # fmt: skip
    trial = _trial(victim, arm, attack, seed, status, reason, results, answer)
    if guess is not None and assignment is not None:
        trial = replace(trial, guesses=len(guess), surplus_proofs=_surplus(answer, assignment))
    return trial, _in_order(guess, assignment, truth)


def _unsupported(answer: Answer) -> TypeGuard[Refused]:
    return isinstance(answer, Refused) and answer.status == "unsupported"


def _question(attack: Any, victim: Victim, world: World) -> Question:
    """What the attack gets of a victim."""
    return Question(victim.view, victim.knowledge, _attack_rng(attack, victim, world))


def _attack_rng(attack: Any, victim: Victim, world: World) -> torch.Generator:
    """The same for every arm, so that arms are compared on the same victims with the same luck.

    From a seed alone the attacker could find that seed by trying, and with it who has which records.
    """
    return secret_stream(world.seed, world.secret, "attack", attack.name, victim.round, victim.senders)


def _blinded(victims: Sequence[Victim], seed: int) -> list[Victim]:
    """The victims with shuffled updates, those of the other rounds too, each of which is shuffled once for all of them.

    Other rounds show the attacked round's model: the difference of two broadcasts is the true mean update.
    """
    rounds = {id(seen): seen for victim in victims for seen in victim.knowledge.history}
    blind = {key: controls.shuffled(seen, stream(seed, "shuffle", "history", seen.broadcast.round)) for key, seen in rounds.items()}
    shown: dict[tuple[int, int], Observation] = {}  # one object for all victims of a round, so that it is handed over once

    def history(victim: Victim) -> tuple[Observation, ...]:
        keys = [(id(seen), victim.round) for seen in victim.knowledge.history]
        for key in keys:
            shown.setdefault(key, _as_in(blind[key[0]], victim.view))
        return tuple(shown[key] for key in keys)

    return [
        replace(
            victim,
            view=controls.shuffled(victim.view, stream(seed, "shuffle", victim.round, victim.senders)),
            knowledge=replace(victim.knowledge, history=history(victim)),
        )
        for victim in victims
    ]


def _as_in(seen: Observation, view: Observation) -> Observation:
    return replace(seen, broadcast=replace(view.broadcast, round=seen.broadcast.round, training=seen.broadcast.training))


def _judge(answer: Answer) -> tuple[Status, str, Tensor | None]:
    if isinstance(answer, Refused):
        return answer.status, answer.reason, None
    if answer.inputs is None:
        return "ok", "", None
    if not bool(torch.isfinite(answer.inputs).all()):
        return "diverged", "the guess holds NaN or infinity", None
    return "ok", "", answer.inputs.detach()


def _all_among(guess: Tensor | None, candidates: Batch | None) -> bool:
    """Whether every guess is, bit by bit, a record that the attack was handed."""
    if guess is None or candidates is None:
        return False
    return bool((guess[:, None] == candidates.inputs[None]).flatten(2).all(2).any(1).all())


def attributed_to(answer: Answer, assignment: Tensor | None, victim: Victim) -> list[int | None]:
    """The client whom the attack names for each record: by its guess of it, or where it guesses labels only, by one of its class.

    Guessed labels are interchangeable: of one class, as many as possible are matched to a client's own.
    """
    nobody: list[int | None] = [None] * len(victim.truth)
    if not isinstance(answer, Reconstruction) or not answer.clients or len(victim.senders) < 2:
        return nobody
    if answer.inputs is not None:
        places = [matching.UNMATCHED] * len(nobody) if assignment is None else assignment.tolist()
        named = [-1 if place == matching.UNMATCHED else answer.clients[place] for place in places]
        return [None if client < 0 else client for client in named]
    left = list(zip(answer.labels.tolist(), answer.clients, strict=True))
    truth = list(zip(victim.truth.labels.tolist(), victim.clients, strict=True))
    for place, pair in enumerate(truth):
        if pair in left:
            left.remove(pair)
            nobody[place] = pair[1]
    for place, (label, _) in enumerate(truth):
        wrong = next((pair for pair in left if pair[0] == label and pair[1] >= 0), None)
        if nobody[place] is None and wrong is not None:
            left.remove(wrong)
            nobody[place] = wrong[1]
    return nobody


def _of_guess(answer: Answer, what: Literal["certificate", "solver"], assignment: Tensor | None, place: int) -> str:
    """What the attack said of the guess which is matched to the record at ``place``: its proof, or who produced it."""
    if not isinstance(answer, Reconstruction) or assignment is None or assignment[place] == matching.UNMATCHED:
        return ""
    said = getattr(answer, what)
    return str(said[int(assignment[place])]) if int(assignment[place]) < len(said) else ""


def _surplus(answer: Answer, assignment: Tensor) -> int:
    """How many guesses with a certificate belong to no record: the truth has fewer."""
    proofs = answer.certificate if isinstance(answer, Reconstruction) else ()
    return sum(bool(proof) and place not in assignment for place, proof in enumerate(proofs))


def _in_order(guess: Tensor | None, assignment: Tensor | None, truth: Tensor) -> Tensor:
    gray = torch.full_like(truth, 0.5)
    if guess is None or assignment is None:
        return gray
    chosen = guess[assignment.clamp(min=0)].clamp(0, 1).to(truth)
    return torch.where((assignment == matching.UNMATCHED)[:, None, None, None], gray, chosen)


def _trial(
    victim: Victim, arm: str, attack: str, seed: int, status: Status, reason: str,
    records: tuple[RecordResult, ...] = (), answer: Answer | None = None,
) -> Trial:  # fmt: skip
    upload = victim.view.upload
    tensors = [*upload.update.tensors.values(), *upload.buffers.values()]
    told = victim.knowledge
    raised = {"oracle_used": told.labels is not None or told.label_counts is not None, "active_server": told.adversary == "active"}
    trial = Trial(
        arm=arm, attack=attack, seed=seed, round=victim.round, senders=victim.senders, status=status, reason=reason,
        records=records, predicted=victim.predicted if records else None, flags=tuple(flag for flag in raised if raised[flag]),
        upload_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )  # fmt: skip
    if not isinstance(answer, Reconstruction):
        return trial
    answered: Answered = "labels" if status == "ok" and answer.inputs is None else "inputs"
    if status == "ok" and _all_among(answer.inputs, told.candidates):
        answered = "candidates"
    return replace(
        trial, answered=answered, objective=answer.objective, converged=answer.converged, trace=answer.trace, seconds=answer.seconds,
    )  # fmt: skip
