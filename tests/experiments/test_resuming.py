"""A kill costs one attack on one arm at most; how long a run will take is said before and while it runs; costs by formula."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest

from defenses.client.dp_sgd import DPSGD
from defenses.client.gaussian_noise import GaussianNoise
from defenses.client.qsgd import QSGD
from defenses.client.sign_sgd import SignSGD
from defenses.client.top_k import TopK
from experiments import directory, facts, parts
from experiments import run as runs
from experiments.conclude import conclude
from experiments.cost import memory_bytes, upload_bytes
from experiments.directory import FACTS, HOW, RESULTS, read_facts, read_trials
from experiments.estimate import left, plan, span
from experiments.result import Trial
from experiments.run import run
from experiments.spec import Experiment
from simulator import config
from simulator.defense import Defense
from simulator.errors import SpecError
from tests.federations import world

SPEC: dict[str, Any] = {
    "name": "tiny",
    "secret": "the same in both runs",
    "data": "digits",
    "model": {"name": "linear"},
    "federation": {"clients": 3},
    "attacks": ["random_guess", "linear_leak"],
    "arms": [{"name": "none"}, {"name": "clip", "defenses": [{"name": "clip", "clip_norm": 1.0}]}],
}


def tiny(**changes: Any) -> Experiment:
    return config.build(Experiment, SPEC | changes)


def without_seconds(trials: list[Trial]) -> list[Trial]:
    return [replace(trial, seconds=0.0, objective=0.0) for trial in trials]


def test_a_resumed_run_counts_what_had_ended_before(tmp_path: Path) -> None:
    heard: list[int] = []
    assert run(tiny(), tmp_path / "run", workers=1, done=lambda _task, _left, number: heard.append(number)) == []
    assert heard == [1, 2]
    lines = (tmp_path / "run" / FACTS).read_text().splitlines(keepends=True)
    (tmp_path / "run" / FACTS).write_text(lines[0])
    assert run(tiny(), tmp_path / "run", workers=1, resume=True, done=lambda _task, _left, number: heard.append(number)) == []
    assert heard == [1, 2, 2]


def test_a_kill_loses_one_attack_and_the_rest_is_as_it_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tiny(), tmp_path / "whole", workers=1) == []
    done: list[tuple[str, str]] = []
    attack_victims = runs.attack_victims

    def killed_at(last: int) -> Callable[..., Any]:
        def attack(attack: Any, victims: Any, evaluation: Any, world: Any, arm: str) -> Any:
            if len(done) == last:
                raise KeyboardInterrupt
            done.append((arm, attack.name))
            return attack_victims(attack, victims, evaluation, world, arm)

        return attack

    monkeypatch.setattr(runs, "attack_victims", killed_at(3))
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path / "killed", workers=1)
    assert (tmp_path / "killed" / parts.PARTS / "clip-seed0" / "random_guess.jsonl").is_file()
    assert len(read_trials(tmp_path / "killed")) == 6  # the first arm is written down
    monkeypatch.setattr(runs, "attack_victims", killed_at(-1))
    said: list[str] = []
    assert run(tiny(), tmp_path / "killed", workers=1, resume=True, begun=said.append) == []
    assert done == [("none", "random_guess"), ("none", "linear_leak"), ("clip", "random_guess"), ("clip", "linear_leak")]
    assert re.search(r" 1 federations are done, about \d+ s left\.$", said[0])
    assert without_seconds(read_trials(tmp_path / "killed")) == without_seconds(read_trials(tmp_path / "whole"))
    assert not (tmp_path / "killed" / parts.PARTS).exists()


def test_what_was_found_on_another_transcript_does_not_count(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(tiny(), out, workers=1) == []
    trials = read_trials(out)
    parts.save(out, "clip-seed0", "random_guess", [replace(trial, arm="clip", attack="random_guess", round=7) for trial in trials[:1]])
    lines = [line for line in (out / FACTS).read_text().splitlines() if '"clip"' not in line]
    (out / FACTS).write_text("".join(f"{line}\n" for line in lines))
    (out / RESULTS).write_text((out / RESULTS).read_text())
    (out / "transcript" / "clip-seed0.seconds.json").unlink()  # the federation was cut short: it is done again
    assert run(tiny(), out, workers=1, resume=True) == []
    assert without_seconds(read_trials(out)) == without_seconds(trials)


def test_an_attack_that_failed_is_done_again_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, attack_victims, asked = tmp_path / "run", runs.attack_victims, []

    def dies(attack: Any, victims: Any, evaluation: Any, world: Any, arm: str) -> Any:
        asked.append((arm, attack.name))
        outcome = attack_victims(attack, victims, evaluation, world, arm)
        if asked != [("none", "random_guess")]:
            return outcome
        records = tuple(replace(record, identified=False) for record in outcome.trials[0].records)
        dead = replace(outcome.trials[0], status="failed", reason="killed", records=records)
        return replace(outcome, trials=(dead, *outcome.trials[1:]))

    monkeypatch.setattr(runs, "attack_victims", dies)
    assert run(tiny(), out, workers=1) == []
    assert [trial.status for trial in read_trials(out)].count("failed") == 1
    assert len(asked) == 4
    assert run(tiny(), out, workers=1, resume=True) == []
    assert asked[4:] == [("none", "random_guess")]
    assert [trial.status for trial in read_trials(out)] == ["ok"] * 12
    assert run(tiny(), out, workers=1, resume=True) == []
    assert len(asked) == 5
    assert not (out / parts.PARTS).exists()


def test_the_seconds_before_a_kill_count(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(tiny(), out, workers=1) == []
    first, last = read_facts(out)
    assert first.seconds is not None
    assert first.seconds > first.train_seconds
    trials = [trial for trial in read_trials(out) if trial.arm == "clip"]
    parts.save(out, "clip-seed0", "random_guess", [trial for trial in trials if trial.attack == "random_guess"], seconds=500.0)
    (out / FACTS).write_text(f"{replace(first, seconds=1000.0).to_json()}\n")  # the last task was cut off after its first attack
    said: list[str] = []
    assert run(tiny(), out, workers=1, resume=True, begun=said.append) == []
    assert "1 federations are done, about 17 min left." in said[0]
    again = read_facts(out)[1]
    assert again.seconds is not None
    assert 500 + again.train_seconds < again.seconds < 600
    assert again.train_seconds == last.train_seconds


def test_a_run_that_goes_on_with_another_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = tmp_path / "run", []
    spec = tiny(attacks=["random_guess"])
    assert run(spec, out, workers=1) == []
    how = json.loads((out / HOW).read_text())
    assert how["environment"]["fedpeek"] == version("fedpeek")
    assert how["environment"]["source"] == directory.source_digest()
    assert run(spec, out, workers=1, resume=True, begun=said.append) == []
    assert (said, directory.mixed(json.loads((out / HOW).read_text()))) == ([], [])  # nothing was to do, nothing is said
    (out / FACTS).write_text((out / FACTS).read_text().splitlines(keepends=True)[0])
    monkeypatch.setattr(directory, "source_digest", lambda: "another")
    for _ in range(2):
        assert run(spec, out, workers=1, resume=True, begun=said.append) == []
    assert len(said) == 2
    assert said[1].endswith(f"source {how['environment']['source']}, then another. Its rows will be of both.")
    assert directory.mixed(json.loads((out / HOW).read_text())) == [f"source {how['environment']['source']}, then another"]
    _, _, warnings = conclude(out)
    assert any("resumed by another state of fedpeek" in warning for warning in warnings)


def test_the_source_is_told_by_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(directory, "OURS", ("mine",))
    before = directory.source_digest()
    assert directory.source_digest() == before
    (tmp_path / "mine" / "__init__.py").write_text("x = 2\n")
    assert directory.source_digest() != before


def test_the_plan_counts_what_there_is_to_do() -> None:
    secure = {"name": "secure aggregation", "defenses": ["secure_aggregation"]}
    spec = tiny(
        arms=[*SPEC["arms"], secure], seeds=[0, 1], attacks=["random_guess", "linear_leak"],
        federation={"clients": 8, "rounds": 2}, threat={"colluding": 1}, evaluation={"rounds": [1, 2], "victims": 5},
    )  # fmt: skip
    planned = plan(spec)
    assert (planned.arms, planned.seeds, planned.attacks, planned.shuffled) == (3, 2, 2, 2 * 44)
    assert planned.uploads == (5 + 5 + 1) * 2 * 2
    every = replace(spec, evaluation=replace(spec.evaluation, victims=0))
    assert plan(every).uploads == (7 + 7 + 1) * 2 * 2  # whoever colludes is no victim
    assert math.isinf(planned.seconds)
    assert planned.sentence() == (
        "3 arms × 2 seeds = 6 federations; 2 attacks × 44 uploads = 88 reconstructions, and as many on shuffled updates."
    )
    assert planned.bound(2) == "No bound is certain: an attack without a budget of seconds is among them."
    limited = replace(planned, seconds=7200.0)
    assert "budgets stop the attacks on uploads of one record within 60 min of CPU time on 2 workers" in limited.bound(2)


def test_time_left_follows_the_tasks_that_have_ended() -> None:
    assert left([], ["a"], 2) is None
    assert left([("a", 10.0), ("b", 30.0)], ["a", "b", "c", "c"], 2) == pytest.approx((10 + 30 + 20 + 20) / 2)
    assert left([("a", 10.0)], ["a"], 8) == 10.0  # more workers than tasks do not help
    assert [span(seconds) for seconds in (0.2, 40, 600, 3 * 3600, 5 * 86400)] == ["1 s", "40 s", "10 min", "3.0 h", "5.0 days"]


@dataclass(frozen=True)
class Channel(Defense):
    channel: ClassVar[bool] = True

    def upload_bytes(self, numbers: int, world: Any) -> float:
        return 5.0 * numbers


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ((), 4000),
        ((TopK(pruned=0.99),), 80),  # ten numbers and their places
        ((TopK(pruned=0.5),), 2125),  # half of the numbers and a bit for each
        ((SignSGD(),), 125),
        ((QSGD(levels=15, bucket=500),), 633),  # five bits each and two norms
        ((TopK(pruned=0.5), SignSGD()), 125),
        ((TopK(pruned=0.9), GaussianNoise(0.1)), 4000),  # noise fills what was left out
        ((GaussianNoise(0.1), TopK(pruned=0.99)), 80),
        ((TopK(pruned=0.99), Channel()), 5000),
        ((DPSGD(), TopK(pruned=0.99)), 80),
    ],
)
def test_bytes_by_formula(stack: tuple[Defense, ...], expected: float) -> None:
    assert upload_bytes(stack, 1000, world()) == pytest.approx(expected)


def test_memory_by_formula() -> None:
    of = world(federation={"clients": 9, "cohort": 7})
    plain = memory_bytes((), 1000, of, 16)
    assert plain == 4000 * (2 + 7 + 2)  # the server's model, mean and uploads; the client's model and gradient
    assert memory_bytes((TopK(pruned=0.99),), 1000, of, 16) == plain  # on our wire what was left out are zeros
    assert memory_bytes((Channel(),), 1000, of, 16) == plain + 7 * (5000 - 4000)
    assert memory_bytes((DPSGD(),), 1000, of, 16) == plain + 15 * 4000  # a gradient for each record


@pytest.mark.slow
@pytest.mark.parametrize("stack", [[], ["dp_sgd"], ["secure_aggregation"]], ids=["none", "dp_sgd", "secure_aggregation"])
def test_a_federation_takes_what_the_formula_says_and_not_much_more(stack: list[str], tmp_path: Path) -> None:
    """6.3 MB an upload. Beyond the formula: each upload is a message, too, whose bytes client and server share a process with."""
    large = {"model": {"name": "mlp", "hidden": [21_000]}, "federation": {"clients": 12, "rounds": 1}, "training": {"batch_size": 8}}
    spec = tiny(**large, attacks=["random_guess"], arms=[{"name": "the one", "defenses": stack}])
    assert run(spec, tmp_path / "run", workers=1) == []
    (found,) = read_facts(tmp_path / "run")
    assert found.memory_bytes_formula is not None
    assert found.peak_bytes is not None
    assert 1 < found.peak_bytes / found.memory_bytes_formula < 6


def test_formulas_of_channels_are_near_what_they_send(tmp_path: Path) -> None:
    spec = tiny(model={"name": "mlp"}, attacks=["random_guess"], arms=[{"name": "secure", "defenses": ["secure_aggregation"]}])
    assert run(spec, tmp_path / "run", workers=1) == []
    (found,) = read_facts(tmp_path / "run")
    assert found.upload_bytes_formula is not None
    assert found.upload_bytes_formula == pytest.approx(found.upload_bytes, rel=0.1)


def test_the_peak_is_of_what_came_after_the_reset() -> None:
    facts.reset_peak()  # other tests may have left a high mark, or memory to use again
    before = facts.peak_bytes()
    large = bytearray(200_000_000)
    assert facts.peak_bytes() >= before + 150_000_000
    del large
    facts.reset_peak()
    assert facts.peak_bytes() < before + 150_000_000


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(tiny(attacks=["random_guess"]), out, workers=1) == []
    written = (out / RESULTS).read_bytes()
    with directory.alone(out), pytest.raises(SpecError, match="held by no other run"):
        run(tiny(attacks=["random_guess"]), out, workers=1, resume=True)
    assert (out / RESULTS).read_bytes() == written
    assert run(tiny(attacks=["random_guess"]), out, workers=1, resume=True) == []
