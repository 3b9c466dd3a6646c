"""The process in which attacks run: it never holds the truth, changes no number, and its death or its nonsense costs one trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import isolated
from experiments.isolated import Answer, Question, Refused
from experiments.run import run
from experiments.spec import Experiment, load
from experiments.trial import attack_victims
from experiments.under_attack import Victim, find_victims
from simulator import config, host, lookup, parcel, progress
from simulator.adversary import BatchedAttack, Reconstruction
from simulator.rng import stream
from simulator.transcript import read
from simulator.world import World
from tests.attacks.test_conformance import fast
from tests.experiments import hostile
from tests.experiments.hostile import MARKER

ROOT = Path(__file__).parents[2]
SPEC = """
name = "tiny"
seeds = [31337]
attacks = ["random_guess"]
[data]
name = "digits"
[model]
name = "mlp"
[federation]
clients = 4
[[arms]]
name = "none"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, World, list[Victim], Path]:
    """A run that ended, with its four victims; the truth is in this process and on disk."""
    place = tmp_path_factory.mktemp("isolated")
    (place / "spec.toml").write_text(SPEC)
    experiment = load(str(place / "spec.toml"))
    assert run(experiment, place / "out", workers=1) == []
    world = experiment.world(experiment.arms[0], MARKER)
    return experiment, world, find_victims(experiment, world, read(place / "out" / "transcript" / f"none-seed{MARKER}")), place / "out"


def questions(victims: list[Victim]) -> list[Question]:
    return [Question(victim.view, victim.knowledge, stream(5, place)) for place, victim in enumerate(victims)]


def plugin(name: str, **settings: Any) -> Any:
    return config.build_plugin("attacks", {"name": f"tests.experiments.hostile:{name}", **settings}, "attack")


def ask(attack: Any, done: tuple[Experiment, World, list[Victim], Path]) -> list[Answer]:
    _, world, victims, _ = done
    return isolated.ask(attack, config.dump(world.model), questions(victims))


def same(left: Reconstruction, right: Reconstruction) -> bool:
    if (left.inputs is None) != (right.inputs is None) or not torch.equal(left.labels, right.labels):
        return False
    return (left.certificate, left.solver) == (right.certificate, right.solver) and (
        left.inputs is None or (right.inputs is not None and torch.equal(left.inputs, right.inputs))
    )


@pytest.mark.parametrize("name", lookup.names("attacks"))
def test_the_process_changes_no_bit(name: str, done: tuple[Experiment, World, list[Victim], Path]) -> None:
    _, _, victims, _ = done
    attack = fast(name)
    asked = questions(victims)
    here = [attack.supports(question.view, question.knowledge) for question in asked]
    able = [question for question, reason in zip(asked, here, strict=True) if reason is None]
    if isinstance(attack, BatchedAttack) and len(able) > 1:
        direct = attack.many([q.view for q in able], [q.knowledge for q in able], rngs=[q.rng for q in able])
    else:
        direct = [attack(question.view, question.knowledge, rng=question.rng) for question in able]
    there = ask(attack, done)
    assert [answer.reason if isinstance(answer, Refused) else None for answer in there] == here
    answers = [answer for answer in there if isinstance(answer, Reconstruction)]
    assert all(same(*pair) for pair in zip(direct, answers, strict=True))


OPEN = {"images in memory": "0", "world in memory": "[]", "modules": "[]", "environment": "['MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS']",
        "command line": "[]", "own directory": "[]", "pictures of the run": "[]"}  # fmt: skip
"""What a prying attack may look at, and finds empty."""


def test_prying_attack_finds_the_truth_in_the_evaluators_process_but_not_in_its_own(
    done: tuple[Experiment, World, list[Victim], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, victims, out = done
    secret = tomllib.loads((out / "spec.toml").read_text())["secret"]
    assert len(secret) == 32
    monkeypatch.chdir(out)
    monkeypatch.setenv("FEDPEEK_SECRET", secret)
    attack = plugin("Prying", run=str(out))
    with pytest.raises(RuntimeError) as here:
        attack(victims[0].view, victims[0].knowledge, rng=stream(0))
    Path("report.json").unlink()
    found = json.loads(str(here.value))  # the controls of this test: every way is open in a process that holds the truth
    assert int(found["images in memory"]) > 3
    assert "Victim" in found["world in memory"]
    assert secret in found["spec of the run"]
    assert secret in found["another process"]
    assert found["data set that ships with a package"] == "1797"
    assert found["import clients.private"] == "True"

    isolated.stop()  # a new process, started from the run's directory with the secret in the environment
    first, *_ = ask(attack, done)
    assert isinstance(first, Refused)
    assert secret not in first.reason
    assert str(MARKER) not in first.reason
    report = json.loads(first.reason.removeprefix("RuntimeError: "))
    descriptors = report.pop("descriptors")
    assert descriptors.count("pipe") == 4, descriptors  # requests, replies, and standard output and error on one
    assert descriptors.replace("'pipe'", "").strip("[], ") in ("'/dev/null'", "'/dev/null', '/proc/self/fd'"), descriptors
    assert {what: report.pop(what) for what in OPEN} == OPEN
    assert {what: result for what, result in report.items() if not result.startswith("refused: ")} == {}
    assert len(report) > 15


def test_nothing_that_is_sent_holds_seed_secret_or_path_of_the_run(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    _, world, victims, out = done
    job = isolated._job(lookup.get("attacks", "random_guess")(), config.dump(world.model), questions(victims), ask=True, together=True)
    body = parcel.pack({**job, "path": []})
    secret = tomllib.loads((out / "spec.toml").read_text())["secret"]
    for truth in (secret, str(MARKER), str(out)):
        assert truth.encode() not in body
    assert MARKER.to_bytes(4, "little") not in body
    for victim in victims:
        assert victim.truth.inputs.numpy().tobytes()[64:192] not in body


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("exit", "exit code 7"),
        pytest.param("segfault", "SIGSEGV", marks=pytest.mark.slow),  # as "killed", by another signal
        ("killed", "SIGKILL, as when memory runs out"),
        ("closes the pipe", "closed its pipe"),
        pytest.param("shouts", "sent what is no answer", marks=pytest.mark.slow),  # as the next, with a shorter message
        ("announces a terabyte", "sent what is no answer: a parcel must have at most"),
    ],
)
def test_attack_that_kills_its_process_fails_on_that_victim_alone(
    how: str, reason: str, done: tuple[Experiment, World, list[Victim], Path]
) -> None:
    answers = ask(plugin("Dying", how=how), done)
    assert [isinstance(answer, Refused) for answer in answers] == [False, True, False, False]
    assert isinstance(answers[1], Refused)
    assert (answers[1].status, reason in answers[1].reason) == ("failed", True), answers[1].reason


@pytest.mark.slow
def test_attack_that_dies_on_many_at_once_is_asked_one_by_one(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    assert all(isinstance(answer, Reconstruction) for answer in ask(plugin("DyingTogether"), done))


GARBAGE = {
    "nothing": "TypeError: an attack must answer a Reconstruction, got NoneType",
    "text": "got str",
    "wrong shape": "inputs must have shape (1, 8, 8) each, got (3, 4, 4)",
    "no records": "≥ 1 record",
    "many guesses": "at most 1 records, as many as the upload, got 10",
    "huge": "inputs must have shape (1, 8, 8) each",
    "labels as floats": "labels must be a tensor of class indices",
    "labels missing": "labels must be a tensor of class indices",
    "integers for images": "inputs must be a dense tensor of floating-point images, got torch.strided torch.int64",
    "negative time": "seconds must be ≥ 0",
    "certificates for others": "certificate must name something for each of the 1 records",
    "objective is text": "could not convert string to float",
    "sparse": "inputs must be a dense tensor of floating-point images, got torch.sparse_coo",
    "raises": "ValueError:  [2Jxxx",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_a_failure_with_a_reason(what: str, done: tuple[Experiment, World, list[Victim], Path]) -> None:
    for answer in ask(plugin("Garbage", what=what), done):
        assert isinstance(answer, Refused), answer
        assert answer.status == "failed"
        assert GARBAGE[what] in answer.reason
        assert answer.reason.isprintable()
        assert len(answer.reason) < 2100


@pytest.mark.parametrize(("what", "status"), [("nan", "diverged"), ("infinite", "diverged"), ("out of range", "ok")])
def test_values_that_are_no_image_count_against_the_attack(
    what: str, status: str, done: tuple[Experiment, World, list[Victim], Path]
) -> None:
    experiment, world, victims, _ = done
    outcome = attack_victims(plugin("Garbage", what=what), victims, experiment.evaluation, world, "none")
    assert {trial.status for trial in outcome.trials} == {status}
    records = [record for trial in outcome.trials for record in trial.records]
    assert not any(record.identified or record.certificate or record.exact for record in records if status != "ok")
    assert all(record.psnr_db < 15 and record.mse <= 1 for record in records)
    assert bool(outcome.guess.isfinite().all())


def test_text_from_the_attack_cannot_write_to_the_terminal(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    for answer in ask(plugin("Garbage", what="terminal codes"), done):
        assert isinstance(answer, Reconstruction)
        assert answer.certificate == (" [2Jexact",)


def test_time_is_that_of_the_evaluators_clock(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    """An attack's own word only divides what many victims took together."""
    for answer in ask(plugin("Garbage", what="another's time"), done):
        assert isinstance(answer, Reconstruction)
        assert 0 < answer.seconds < 60
    assert host._shares([1.0, 3.0], 10.0) == [2.5, 7.5]
    assert host._shares([0.0, 3.0], 10.0) == [5.0, 5.0]


def test_global_generators_start_from_the_victims_own(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    first, second = ask(plugin("Careless"), done), ask(plugin("Careless"), done)
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, Reconstruction)
        assert isinstance(other, Reconstruction)
        assert same(one, other)
    assert isinstance(first[0], Reconstruction)
    assert isinstance(first[1], Reconstruction)
    assert not same(first[0], first[1])


def test_attack_that_its_process_could_not_import_is_a_failure(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    class Local(hostile.Careless):
        name = "local"

    for answer in ask(Local(), done):
        assert isinstance(answer, Refused)
        assert "must be importable" in answer.reason


def test_progress_arrives(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    heard: list[tuple[str, int, int, str]] = []
    with progress.listening(lambda *tick: heard.append(tick)):
        ask(plugin("Careless"), done)
    assert heard[-1] == ("victims", 4, 4, "")


def test_parcels_keep_every_bit_and_refuse_what_is_none(done: tuple[Experiment, World, list[Victim], Path]) -> None:
    _, _, victims, _ = done
    values = {"a": torch.tensor([torch.nan, -0.0]), "b": torch.zeros(0, 3), "c": torch.tensor(7), "d": torch.ones(2, dtype=torch.bfloat16)}
    back = parcel.unpack(parcel.pack({"t": values, "v": victims[0].view, "n": (1, 2.5, float("inf"), None, True, "x", frozenset({3}))}))
    assert all(torch.equal(back["t"][name].view(torch.uint8) if tensor.ndim else back["t"][name],
                           tensor.view(torch.uint8) if tensor.ndim else tensor) for name, tensor in values.items())  # fmt: skip
    assert back["n"] == (1, 2.5, float("inf"), None, True, "x", frozenset({3}))
    assert back["v"].broadcast.training == victims[0].view.broadcast.training
    for body in (b"", b"x" * 30, parcel.pack({})[:-1], parcel.pack(1).replace(b"1", b"{")):
        with pytest.raises(parcel.ParcelError):
            parcel.unpack(body)
    with pytest.raises(TypeError, match="got object"):
        parcel.pack({"x": object()})
    deep = b"[" * 100_000
    with pytest.raises(parcel.ParcelError):
        parcel.unpack(len(deep).to_bytes(8, "big") + deep)
    assert "World" not in parcel.NOUNS
    assert set(parcel.NOUNS) > {"Reconstruction", "Knowledge", "Observation"}


EVALUATOR = """
from pathlib import Path
from experiments.host import Host
from simulator import parcel
Host().ask(parcel.unpack(Path("job").read_bytes()), print, 1 << 30)
"""
"""The least that an evaluator is: it imports neither Flower nor what draws reports, and so is up sooner than ``fedpeek run``."""

RUN = ["-m", "experiments", "run", "spec.toml", "--out", "out", "--workers", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "stop"),
    [
        (["-c", EVALUATOR], signal.SIGKILL),
        *(pytest.param(RUN, stop, marks=pytest.mark.slow) for stop in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
    ],
    ids=["SIGKILL", "run-SIGKILL", "run-SIGTERM", "run-SIGINT"],
)
def test_the_process_ends_with_the_evaluator(
    words: list[str], stop: signal.Signals, done: tuple[Experiment, World, list[Victim], Path], tmp_path: Path
) -> None:
    _, world, victims, _ = done
    (tmp_path / "spec.toml").write_text(SPEC.replace('"random_guess"', '"tests.experiments.hostile:Endless"'))
    job = isolated._job(plugin("Endless"), config.dump(world.model), questions(victims), ask=True, together=False)
    (tmp_path / "job").write_bytes(parcel.pack(job))
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=environment)
    until(lambda: len(list(tmp_path.glob("fedpeek-attack-*/busy"))) == 1)
    assert len(hosts(tmp_path)) == 1
    process.send_signal(stop)
    assert process.wait(60) == {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}[stop]
    until(lambda: hosts(tmp_path) == [])
    until(lambda: list(tmp_path.glob("fedpeek-attack-*")) == [])


def hosts(place: Path) -> list[str]:
    """Processes that work in a scratch directory below ``place``."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(link).startswith(f"{place}/fedpeek-attack-"):
                found.append(link.parent.name)
        except OSError:
            continue
    return found


def until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
