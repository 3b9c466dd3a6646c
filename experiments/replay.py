"""Attacks a recorded transcript again: with the truth where the run's spec tells it, without anywhere else."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from experiments import isolated
from experiments.arms import Arm
from experiments.directory import RESULTS, SPEC, TRANSCRIPTS
from experiments.isolated import Question, Refused
from experiments.refusals import check_budget
from experiments.report import pictures
from experiments.spec import Experiment
from experiments.trial import attack_victims
from experiments.under_attack import find_victims, outlooks
from experiments.unmodeled import sentence, unmodeled
from experiments.workers import Notify
from simulator import config, lookup, progress
from simulator.adversary import Knowledge
from simulator.defense import Defense
from simulator.errors import FedpeekError, SpecError
from simulator.rng import stream
from simulator.transcript import LINES, Record, read
from simulator.types import LocalTraining, Observation, Schema

Say = Callable[[str], None]

MOST_HELD = 12
"""Transcripts of a run that an error names."""


def replay(
    directory: Path, attack: str, assignments: Sequence[str], round: int, out: Path | None, notify: Notify, say: Say
) -> tuple[Path, Table, list[str]]:
    """Attack every upload of the recorded rounds (or of ``round``); write pictures and scores. Before, say what each can tell.

    Returns:
        Where they are, a table, and what is missing: the end of a transcript that was cut short, observations whose tensor file is damaged,
        uploads that could not be attacked.

    Raises:
        TranscriptError: the chain of events was altered, or no round can be read.
        SpecError: no such attack or setting, or ``out`` is not empty.
    """
    directory = directory.resolve()
    if not (directory / LINES).is_file():
        raise SpecError(f"transcript must be a directory with {LINES}, got {directory}. {_instead(directory)}")
    record = read(directory, whole=False)
    table: dict[str, Any] = {"name": attack}
    for assignment in assignments:
        table = config.override(table, assignment)
    plugin = config.build_plugin("attacks", table, "attack")
    check_budget(plugin)
    rounds = (round,) if round else tuple(observation.broadcast.round for observation in record.observations)
    recorded = [observation.broadcast.round for observation in record.observations]
    if round and round not in recorded:
        gone = "".join(f" ({sentence})" for sentence in _unread(record))
        raise SpecError(f"--round must be one of the recorded {recorded}, got {round}{gone}. Use 0 for all of them.")
    root = _root(directory)
    name = f"{directory.name}-{plugin.name}-{datetime.now():%Y%m%d-%H%M%S}"
    out = out or (root or directory) / "attacks" / name  # what is no part of a run keeps its answers in itself
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        which = "" if out.is_dir() else ", which is a file"
        raise SpecError(f"--out must be an empty or new directory, got {out}{which}. Choose another.")
    with progress.listening(lambda *tick: notify(plugin.name, *tick)):
        found = _run_of(directory, root) if root else None
        isolated.warm([plugin])
        rows, missing = (
            _scored(record, plugin, rounds, *found, out, say) if found is not None else _unscored(record, plugin, rounds, out, say)
        )
        return out, rows, [*_unread(record), *missing]


def _instead(directory: Path) -> str:
    """What to give in place of a directory that is no transcript: one of those that lie in it, if it is a run's."""
    for folder in (directory / TRANSCRIPTS, directory):
        if held := sorted(path.parent.name for path in folder.glob(f"*/{LINES}")):
            more = f" and {len(held) - MOST_HELD} more" if len(held) > MOST_HELD else ""
            return f"Give {folder}/NAME, where NAME is one of {', '.join(held[:MOST_HELD])}{more}."
    return "Give RUN/transcript/ARM-seedN."


def _unread(record: Record) -> list[str]:
    """What of the transcript could not be read, and why."""
    return [*([record.missing] if record.missing else []), *record.damaged]


def _root(directory: Path) -> Path | None:
    """The run that the transcript lies in; None if it lies elsewhere."""
    root = directory.parent.parent
    return root if directory.parent.name == TRANSCRIPTS and (root / SPEC).is_file() else None


def _run_of(directory: Path, root: Path) -> tuple[Experiment, Arm, int] | None:
    """The experiment, arm and seed that the transcript came from, if it still has the name that its run gave it."""
    experiment = config.build(Experiment, tomllib.loads((root / SPEC).read_text(encoding="utf-8")))
    places = {f"{arm.slug}-seed{seed}": (experiment, arm, seed) for arm in experiment.arms for seed in experiment.seeds}
    return places.get(directory.name)


def _scored(
    record: Record, attack: Any, rounds: tuple[int, ...], experiment: Experiment, arm: Arm, seed: int, out: Path, say: Say
) -> tuple[Table, list[str]]:
    evaluation, world = replace(experiment.judged(arm), rounds=rounds), experiment.world(arm, seed)
    victims = find_victims(experiment, world, record, evaluation)
    _foretell([(victim.view, victim.knowledge) for victim in victims], seed, say)
    outcome = attack_victims(attack, victims, evaluation, world, arm.name)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text("".join(f"{trial.to_json()}\n" for trial in outcome.trials), encoding="utf-8")
    table = Table(
        "round", "clients", "record", "status", "PSNR dB", "SSIM", "identified", "label", "proof",
        title=f"{attack.name} on {arm.name}, seed {seed}",
    )  # fmt: skip
    place = 0
    for trial in outcome.trials:
        clients = ", ".join(map(str, trial.senders))
        if not trial.records:
            table.add_row(str(trial.round), clients, "", trial.status, "", "", escape(trial.reason), "", "")
        for result in trial.records:
            label = "" if result.label_correct is None else "right" if result.label_correct else "wrong"
            place += 1
            if trial.answered == "labels":
                table.add_row(str(trial.round), clients, str(result.record), trial.status, "", "", "", label, "")
                continue
            picture = f"{place - 1:03d}-round{trial.round}-client{result.client}.png"
            _write_pair(out / picture, outcome.private[place - 1], outcome.guess[place - 1])
            scores = (f"{result.psnr_db:.1f}", f"{result.ssim:.3f}", "yes" if result.identified else f"no (rank {result.rank})", label)
            proof = ": ".join(part for part in (result.solver, result.certificate) if part)
            table.add_row(str(trial.round), clients, str(result.record), escape(trial.reason) or trial.status, *scores, proof)
    lost = [trial for trial in outcome.trials if trial.status != "ok"]
    return table, [_loss(trial.round, ", ".join(map(str, trial.senders)), trial.status, trial.reason) for trial in lost]


def _unscored(record: Record, attack: Any, rounds: tuple[int, ...], out: Path, say: Say) -> tuple[Table, list[str]]:
    """What an adversary with nothing but the transcript gets."""
    table = Table("round", "clients", "records", "labels", "objective", title=f"{attack.name}; not scored: the truth is not here")
    places = [(number, index) for number in rounds for index in range(len(record.observation(number).uploads))]
    questions = [_question(record, attack, record.observation(number).only(index)) for number, index in places]
    missing = []
    _foretell([(question.view, question.knowledge) for question in questions], 0, say)
    answers = isolated.ask(attack, record.header["model"], questions)
    for (number, index), question, answer in zip(places, questions, answers, strict=True):
        senders = ", ".join(map(str, sorted(question.view.upload.senders)))
        if isinstance(answer, Refused):
            table.add_row(str(number), senders, "", "", escape(f"{answer.status}: {answer.reason}"))
            missing.append(_loss(number, senders, answer.status, answer.reason))
            continue
        out.mkdir(parents=True, exist_ok=True)
        for place, image in enumerate([] if answer.inputs is None else answer.inputs.nan_to_num(0.5)):
            _write_image(out / f"round{number}-upload{index}-record{place}.png", image)
        table.add_row(str(number), senders, str(len(answer.labels)), " ".join(map(str, answer.labels.tolist())), f"{answer.objective:.3g}")
    return table, missing


def _question(record: Record, attack: Any, view: Observation) -> Question:
    knowledge = _public_knowledge(record, view.broadcast.training, view.upload.num_examples)
    senders = ", ".join(map(str, sorted(view.upload.senders)))
    return Question(view, knowledge, stream(0, "attack", attack.name, view.broadcast.round, senders))


def _foretell(surfaces: Sequence[tuple[Observation, Knowledge]], seed: int, say: Say) -> None:
    """Say what each update can tell, before any attack."""
    if absent := unmodeled(name for _, known in surfaces for name, _ in known.defenses):
        say(sentence(absent))
    for (view, _), found in zip(surfaces, outlooks(surfaces, seed), strict=True):
        place = f"round {view.broadcast.round}, client {', '.join(map(str, sorted(view.upload.senders)))}"
        say(f"{place}: {found or 'identifiability not asked: the update cannot be used, or known defenses added noise'}")


def _loss(round: int, senders: str, status: str, reason: str) -> str:
    """One observation that gave nothing, and why."""
    return f"round {round}, client {senders}: {status}: {reason}"


def _public_knowledge(record: Record, training: LocalTraining, num_examples: int) -> Knowledge:
    """What the transcript's header discloses to whoever holds it."""
    facts = record.header
    try:
        family = config.build_plugin("models", facts["model"], "transcript.model")
        schema = Schema(tuple(facts["schema_of_a_record"]["shape"]), tuple(facts["schema_of_a_record"]["class_names"]))
    except (KeyError, TypeError) as error:
        raise FedpeekError(f"transcript's header must name model and schema_of_a_record, got {sorted(facts)}. Record it again.") from error
    model = family.build(schema, stream(0, "model")).train(training.batch_norm == "train")
    defenses = tuple((defense["name"], defense) for defense in facts.get("defenses", []))
    return Knowledge(
        model=model, schema=schema, training=training, num_examples=num_examples, defenses=defenses,
        adversary="active" if "tampering" in facts else "honest-but-curious", encoded=any(_encodes(name) for name, _ in defenses),
    )  # fmt: skip


def _encodes(name: str) -> bool:
    """Whether the defense of this name changes records before training; one that is not installed here might."""
    return name not in lookup.names("defenses") or lookup.get("defenses", name).on_batch is not Defense.on_batch


def _write_pair(path: Path, private: torch.Tensor, guess: torch.Tensor) -> None:
    arrays = [image.permute(1, 2, 0).squeeze(-1).numpy() for image in (private, guess)]
    path.write_bytes(pictures.png(pictures.pair(*arrays)))


def _write_image(path: Path, image: torch.Tensor) -> None:
    array = image.detach().clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
    path.write_bytes(pictures.png(pictures.eight_bit(array)))
