"""Calls attacks in a process of their own, which is told no more than the threat model discloses.

The trust boundary in one place. To the process go, as data, views, knowledge, the attack's class and settings, the model's name and
settings, and the states of the generators; never a seed, a secret, a world or a path of the run, and no record but those that the
knowledge holds: public ones and, where the threat model says so, candidates, among whom the true ones are. What comes back is
untrusted: it is read without running code, up to a size that the question sets, and checked like any user's input. A process that
dies takes the victim under way with it, as a failed trial with the reason; the others are asked again of a new process.

The evaluator imports an attack's module as well, to check its settings; it never calls it.

Here stands all that crosses the boundary; :mod:`experiments.host` starts the process and ends it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from experiments.disclose import ARCHITECTURE_SEED
from experiments.host import LONGEST_LINE, Died, Host, search_path
from simulator import config, progress
from simulator.adversary import Knowledge, Reconstruction
from simulator.answer import checked, printable
from simulator.errors import SpecError
from simulator.types import Observation

SPARE_BYTES = 16 << 20
"""What an answer may take besides its tensors: traces, certificates, reasons."""

LONGEST_REASON = 2000
TOGETHER = -1
"""Index of what is under way when it is all victims at once."""


@dataclass(frozen=True)
class Refused:
    """No reconstruction, and why: the attack does not take this victim, or it failed on it."""

    status: Literal["unsupported", "failed"]
    reason: str


@dataclass(frozen=True)
class Question:
    """One victim as the attack sees it."""

    view: Observation
    knowledge: Knowledge
    rng: torch.Generator


Answer = Reconstruction | Refused


_host: Host | None = None
_owner = 0


def warm(attacks: Sequence[Any]) -> None:
    """Start the process of these attacks if there is none yet, without waiting for it: it takes two seconds of CPU to be ready."""
    global _host, _owner
    if _host is not None and _owner == os.getpid() and _host.alive:
        return
    stop()
    _host, _owner = Host(sorted({type(attack).__module__ for attack in attacks})), os.getpid()


def cpu_seconds() -> float | None:
    """CPU time of this process's host so far; None without one, or where the system does not say."""
    return _host.cpu_seconds if _host is not None and _owner == os.getpid() else None


def stop() -> None:
    """End this process's host, if it has one."""
    global _host
    if _host is not None and _owner == os.getpid():
        _host.close()
    _host = None


atexit.register(stop)


def ask(attack: Any, model: Mapping[str, Any], questions: Sequence[Question], *, supported: bool = False) -> list[Answer]:
    """What the attack answers to each question, from the process that holds nothing else.

    Args:
        attack: a frozen dataclass that its process can import; its fields are sent.
        model: the model family's name and settings; the process builds the architecture that knowledge holds here.
        questions: the victims.
        supported: do not ask again whether the attack takes them.
    """
    problem = _unsendable(attack)
    if problem:
        return [Refused("failed", problem) for _ in questions]
    answers: dict[int, Answer] = {}
    together = True
    while waiting := [place for place in range(len(questions)) if place not in answers]:
        conversation = _Conversation(questions, waiting, answers)
        blamed: Sequence[int] = waiting
        warm([attack])
        assert _host is not None
        job = _job(attack, model, [questions[place] for place in waiting], ask=not supported, together=together)
        reason = "the attack's process answered nothing"
        try:
            _host.ask(job, conversation.hear, _limit(questions))
        except Died as death:
            reason, blamed = str(death), conversation.blamed(together)
            together = False  # what was under way for many at once is tried one by one
        answers.update({place: Refused("failed", reason) for place in blamed if place not in answers})
    return [answers[place] for place in range(len(questions))]


class _Conversation:
    """What was heard about one job: fills ``answers`` and remembers which victim was under way."""

    def __init__(self, questions: Sequence[Question], places: Sequence[int], answers: dict[int, Answer]) -> None:
        self._questions, self._places, self._answers = questions, places, answers
        self._before = len(answers)
        self._under_way: int | None = None

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in one message.

        Raises:
            ValueError, TypeError, KeyError: it is none of ours.
        """
        if message["kind"] == "tick":
            progress.tick(_text(message["what"]), int(message["done"]), int(message["total"]), _text(message["note"]))
            return
        index = int(message["index"])
        if not -1 <= index < len(self._places) or (message["kind"] != "start" and (index < 0 or self._places[index] in self._answers)):
            raise ValueError("an answer to what was not asked")
        if message["kind"] == "start":
            self._under_way = index
            return
        self._answers[self._places[index]] = _judged(message, self._questions[self._places[index]].knowledge)

    def blamed(self, together: bool) -> Sequence[int]:
        """The victims that a death takes with it: the one under way; none if many were; all if nothing was under way at all."""
        if self._under_way == TOGETHER and together:
            return ()
        if self._under_way is not None and self._under_way >= 0 and self._places[self._under_way] not in self._answers:
            return (self._places[self._under_way],)
        return () if len(self._answers) > self._before else self._places


def _job(attack: Any, model: Mapping[str, Any], questions: Sequence[Question], *, ask: bool, together: bool) -> dict[str, Any]:
    cls = type(attack)
    rounds = {id(seen): seen for question in questions for seen in question.knowledge.history}
    places = {key: place for place, key in enumerate(rounds)}
    public = {id(question.knowledge.public): question.knowledge.public for question in questions}
    pools = {key: place for place, key in enumerate(public)}
    return {
        "path": search_path(),
        "module": cls.__module__, "qualname": cls.__qualname__, "name": attack.name, "settings": _settings(attack),
        "model": dict(model), "model_seed": ARCHITECTURE_SEED,
        "views": [question.view for question in questions],
        "knowledge": [replace(q.knowledge, model=None, history=(), public=None) for q in questions],  # type: ignore[arg-type]
        "rounds": list(rounds.values()),  # once, and not once for each victim: attacks share work between victims of one pool
        "history": [[places[id(seen)] for seen in question.knowledge.history] for question in questions],
        "pools": list(public.values()),
        "public": [pools[id(question.knowledge.public)] for question in questions],
        "rngs": [question.rng.get_state() for question in questions],
        "ask": ask, "together": together,
    }  # fmt: skip


def _judged(message: Mapping[str, Any], knowledge: Knowledge) -> Answer:
    """The answer in a message, checked again here: whoever sent it may not have."""
    if message["kind"] == "answer":
        try:
            return checked(message["answer"], knowledge)
        except (TypeError, ValueError, OverflowError) as error:
            return Refused("failed", f"{type(error).__name__}: {error}")
    status: Literal["unsupported", "failed"] = "unsupported" if message["status"] == "unsupported" else "failed"
    return Refused(status, printable(str(message["reason"]), LONGEST_REASON))


def _settings(attack: Any) -> dict[str, Any]:
    """All settings, those that are None included, since a default may be something else."""
    return {field.name: config.dump(getattr(attack, field.name)) for field in fields(attack) if field.init}


def _unsendable(attack: Any) -> str:
    """Why another process could not make this attack again; empty if it can."""
    cls = type(attack)
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        return f"an attack must be importable by its process, got {cls.__module__}.{cls.__qualname__}. Define it in a module of its own."
    try:
        same = config.dump(config.build(cls, _settings(attack))) == config.dump(attack)
    except SpecError as error:
        return str(error)
    if not same:
        return f"settings of {attack.name} must be what a spec can hold, got {attack!r}. Use numbers, texts, lists and tables."
    return ""


def _limit(questions: Sequence[Question]) -> int:
    """Bytes of the largest message: float32 images of one answer, and room for the rest."""
    return SPARE_BYTES + max(8 * q.knowledge.num_examples * (2 + torch.Size(q.knowledge.schema.shape).numel()) for q in questions)


def _text(value: Any) -> str:
    return printable(str(value), LONGEST_LINE)


