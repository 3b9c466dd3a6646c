"""The attack's process: the one place where an attack is called. It holds views and knowledge, and nothing of the truth.

The evaluator starts this file as a fresh interpreter (never a fork, which would copy the truth), with an empty command line, a bare
environment, an empty scratch directory to work in and one pipe each way. A job comes as data alone: the class of the attack and its
settings, the model's name and settings, views, knowledge and the states of the generators. Answers, reasons and ticks go back; see
``simulator.parcel`` for how, and ``simulator.guard`` for what is closed while an attack runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import queue
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

TICK_SECONDS = 0.1
"""Ticks closer together than this are dropped, but for the last of a kind."""

LONGEST_REASON = 2000
"""Characters of a reason."""


def main() -> None:
    """Serve jobs until the evaluator closes the pipe."""
    requests, replies = _take_pipe()
    hello = json.loads(requests.readline())
    sys.argv[:], sys.path[:] = [""], hello["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the evaluator, which then closes the pipe
    faulthandler.enable()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write("800")  # when memory runs out, this process is the one to go
    import torch

    from simulator import guard, parcel

    torch.set_num_threads(1)
    guard.install(Path.cwd(), sys.path, Path(__file__).parent.parent)
    for name in hello["modules"]:
        with contextlib.suppress(Exception):  # told again, with its reason, when a job needs it
            importlib.import_module(name)
    jobs: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(requests, jobs), daemon=True).start()
    while True:
        for message in _do(jobs.get(), replies):
            parcel.write(replies, message)
        parcel.write(replies, {"kind": "done"})


def _do(job: Mapping[str, Any], replies: BinaryIO) -> Iterator[dict[str, Any]]:
    """Carry out one job; say what is under way before, and what came of it after."""
    from simulator import parcel, progress

    last = 0.0

    def tell(what: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > TICK_SECONDS:
            last = time.monotonic()
            parcel.write(replies, {"kind": "tick", "what": str(what), "done": int(done), "total": int(total), "note": str(note)})

    try:
        sys.path[:] = job["path"]
        importlib.invalidate_caches()
        attack, model = _attack(job), _model(job)
        rounds, pools = job["rounds"], job["pools"]
        knowledge = [
            replace(known, model=model, history=tuple(rounds[place] for place in history), public=pools[pool])
            for known, history, pool in zip(job["knowledge"], job["history"], job["public"], strict=True)
        ]
    except Exception as error:
        yield from ({"kind": "refused", "index": i, "status": "failed", "reason": _reason(error)} for i in range(len(job["views"])))
        return
    with progress.listening(tell):
        yield from _answers(attack, job["views"], knowledge, job["rngs"], asked=job["ask"], together=job["together"])


def _answers(
    attack: Any, views: Sequence[Any], knowledge: Sequence[Any], states: Sequence[Any], *, asked: bool, together: bool
) -> Iterator[dict[str, Any]]:
    from simulator import progress
    from simulator.adversary import BatchedAttack
    from simulator.answer import checked

    able = list(range(len(views)))
    for index in able[:] if asked else ():
        yield {"kind": "start", "index": index}
        reason = _unsupported(attack, views[index], knowledge[index])
        if reason is not None:
            able.remove(index)
            yield {"kind": "refused", "index": index, "status": "unsupported", "reason": reason}
    if together and len(able) > 1 and isinstance(attack, BatchedAttack):
        yield {"kind": "start", "index": -1}
        started = time.perf_counter()
        try:
            rngs = [_generator(states[i]) for i in able]
            found = list(attack.many([views[i] for i in able], [knowledge[i] for i in able], rngs=rngs))
            whole = [checked(answer, knowledge[i]) for answer, i in zip(found, able, strict=True)]
        except Exception:
            print(f"{attack.name} failed on {len(able)} victims at once; trying one by one", file=sys.stderr)
            traceback.print_exc()
        else:
            shares = _shares([answer.seconds for answer in whole], time.perf_counter() - started)
            answers = (replace(answer, seconds=share) for answer, share in zip(whole, shares, strict=True))
            yield from ({"kind": "answer", "index": i, "answer": answer} for i, answer in zip(able, answers, strict=True))
            return
    for number, index in enumerate(able):
        yield {"kind": "start", "index": index}
        started = time.perf_counter()
        try:
            answer = checked(attack(views[index], knowledge[index], rng=_generator(states[index])), knowledge[index])
            yield {"kind": "answer", "index": index, "answer": replace(answer, seconds=time.perf_counter() - started)}
        except Exception as error:
            yield {"kind": "refused", "index": index, "status": "failed", "reason": _reason(error)}
        progress.tick("victims", number + 1, len(able))


def _shares(told: Sequence[float], total: float) -> list[float]:
    """The time that the victims took together by this clock, in the shares that the attack tells; equal ones where it tells none."""
    known = sum(told) if all(seconds > 0 for seconds in told) else 0.0
    return [total * seconds / known if known else total / len(told) for seconds in told]


def _unsupported(attack: Any, view: Any, knowledge: Any) -> str | None:
    """Why the attack does not run on this victim; an attack that cannot even say is tried, and fails there."""
    try:
        reason = attack.supports(view, knowledge)
    except Exception as error:
        print(f"{attack.name}.supports raised {error!r}", file=sys.stderr)
        return None
    return None if reason is None else str(reason)[:LONGEST_REASON]


def _attack(job: Mapping[str, Any]) -> Any:
    """A fresh object for each job: what it may have kept of another victim is gone."""
    from simulator import config

    cls: Any = importlib.import_module(job["module"])
    for part in job["qualname"].split("."):
        cls = getattr(cls, part)
    if not getattr(cls, "name", ""):
        cls.name = job["name"]  # as simulator.lookup does for a class by dotted path
    return config.build(cls, job["settings"])


def _model(job: Mapping[str, Any]) -> Any:
    """The architecture; the weights that matter come with each view."""
    from simulator import config
    from simulator.network import network

    known = job["knowledge"][0]
    return network(config.build_plugin("models", job["model"], "model"), known.schema, known.training, job["model_seed"])


def _generator(state: Any) -> Any:
    """The generator in this state. Global generators start from it, too: an attack that uses them is repeatable at least."""
    import numpy as np
    import torch

    rng, twin = torch.Generator(), torch.Generator()
    rng.set_state(state)
    twin.set_state(state)
    seed = int(torch.randint(1 << 62, (), generator=twin))  # of a state that was set, initial_seed says nothing
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    return rng


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]


def _listen(requests: BinaryIO, jobs: queue.Queue[Any]) -> None:
    """Take jobs from the pipe; when the evaluator is gone, whatever the attack is at, so is this process."""
    from simulator import parcel

    with contextlib.suppress(BaseException):
        while True:
            jobs.put(parcel.read(requests))
    shutil.rmtree(Path.cwd(), ignore_errors=True)
    os._exit(0)


def _take_pipe() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, moved away, so that an attack that prints or reads does not meet the protocol."""
    requests, replies = os.dup(0), os.dup(1)  # not inheritable
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return open(requests, "rb"), open(replies, "wb")


if __name__ == "__main__":
    main()
