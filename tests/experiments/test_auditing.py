"""An audit of a real run: it passes a guarantee that holds, and refutes one whose noise is half of what it claims."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent

from clients.private import private_record_ids, records_held
from defenses.accounting import guarantee
from defenses.audit import Measured, audit
from defenses.bounds import success_ceiling
from defenses.client import dp_sgd
from experiments.auditing import audit_run, measured
from experiments.cli import main
from experiments.conclude import conclude
from experiments.directory import read_facts
from experiments.facts import most_guesses
from experiments.result import ArmFacts
from experiments.run import run
from experiments.spec import Experiment
from simulator import config
from simulator.errors import SpecError
from tests.experiments.test_summary import arm, record, trial

SPEC: dict[str, Any] = {
    "name": "audit",
    "secret": "the same noise in every run of this test",
    "data": "digits",
    "model": {"name": "mlp"},
    "split": {"test": 0.5, "public": 0.46},
    "federation": {"clients": 60, "rounds": 4},
    "training": {"batch_size": 1},
    "threat": {"candidates": True},
    "evaluation": {"candidates": 20, "shuffled_control": False},
    "attacks": ["candidate_identification"],
    "arms": [
        {"name": "none", "federation": {"rounds": 1}},
        {"name": "DP-SGD", "defenses": [{"name": "dp_sgd", "clip_norm": 0.5, "noise_multiplier": 1.0}]},
    ],
}


def federation(out: Path, first: int = 0) -> Path:
    """A run of the arms from this one on."""
    assert run(config.build(Experiment, {**SPEC, "arms": SPEC["arms"][first:]}), out, workers=1) == []
    return out


def test_a_guarantee_that_holds_passes_and_halved_noise_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record enters each of 4 releases, and the attack on round 1 sees one: beside all 4, half the noise could not fail."""
    (kept,), left_out = audit_run(federation(tmp_path / "as-claimed"))
    assert not kept.failed
    assert kept.measured.trials == 60
    assert left_out == ["none: not audited: nothing is certified against this adversary."]
    honest = dp_sgd.add_gaussian
    monkeypatch.setattr(dp_sgd, "add_gaussian", lambda tensors, sigma, rng: honest(tensors, sigma / 2, rng))
    (refuted,), _ = audit_run(federation(tmp_path / "halved", first=1))
    assert refuted.failed
    one, four = (success_ceiling(GaussianDpEvent(1 / math.sqrt(releases)), 1 / 20) for releases in (1, 4))
    assert [fact.training_ceiling for fact in read_facts(tmp_path / "halved")] == [pytest.approx(four)]
    assert refuted.measured.ceiling == kept.measured.ceiling == pytest.approx(one)
    assert one < refuted.low < four
    for directory, code in (("as-claimed", 0), ("halved", 1)):
        monkeypatch.setattr("sys.argv", ["fedpeek", "audit", str(tmp_path / directory)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == code
        assert ("AUDIT FAILED" in capsys.readouterr().out) == bool(code)


@pytest.mark.slow
def test_a_right_defense_passes_under_poisson_sampling(tmp_path: Path) -> None:
    """Victims are records that were drawn, whom secret sampling does not hide: a ceiling that q makes small would be beaten honestly."""
    sampled = {
        **SPEC,
        "seeds": [0, 1],
        "federation": {"clients": 40},
        "split": {"test": 0.2, "public": 0.3},
        "training": {"batch_size": 1, "sampling": "poisson"},
        "evaluation": {"candidates": 100, "shuffled_control": False},
        "arms": [{"name": "dp", "defenses": [{"name": "dp_sgd", "clip_norm": 1.0, "noise_multiplier": 0.4}]}],
    }
    assert run(config.build(Experiment, sampled), tmp_path / "run", workers=1) == []
    (verdict,), _ = audit_run(tmp_path / "run")
    experiment = config.build(Experiment, sampled)
    worlds = [experiment.world(experiment.arms[0], seed) for seed in (0, 1)]
    most = [
        max(len(private_record_ids(world, client, 1)) for client in range(40)) for world in worlds
    ]  # more than are stated: so many are named
    own = [success_ceiling(GaussianDpEvent(0.4), 1 / ((101 - held) // held)) for held in most]
    assert own[0] != own[1]
    assert [fact.ceiling for fact in read_facts(tmp_path / "run")] == pytest.approx(own)
    assert not verdict.failed
    assert verdict.fails_from is not None
    assert sorted(set(verdict.measured.own)) == pytest.approx(sorted(own))
    assert verdict.measured.ceiling == pytest.approx(sum(verdict.measured.own) / verdict.measured.trials)
    claim = guarantee(worlds[0], records_held=records_held(worlds[0])).claim
    assert claim is not None
    assert verdict.low > success_ceiling(claim.event, 1 / ((101 - max(most)) // max(most)))  # what was called a violation before
    table = json.loads((tmp_path / "run" / "summary.json").read_text()) if conclude(tmp_path / "run") else {}
    assert not any("ceiling_exceeded" in each["flags"] for each in table["rows"])


def test_one_record_an_upload_counts_and_what_is_not_audited_is_said() -> None:
    facts = [ArmFacts(arm="dp", seed=seed, accuracy=1.0, ceiling=most) for seed, most in enumerate((0.2, 0.3))]
    facts.append(ArmFacts(arm="none", seed=0, accuracy=1.0))
    batch = trial(arm="dp", seed=0, records=(record(0, 0), record(0, 1, identified=False)), answered="candidates")
    later = trial(arm="dp", seed=0, round=2, records=(record(0, 2, identified=False), record(0, 3)), answered="candidates")
    again = trial(arm="dp", seed=0, round=3, records=(record(0, 1), record(0, 4)), answered="candidates")  # one of round 1 is in it
    rows, left_out = measured([batch, later, again, *arm("none", 25.0)], facts, one_round=True, candidates=10)
    (row,) = rows
    assert (row.name, row.successes, row.trials, row.ceiling, row.own) == ("dp, ig", 1, 2, 0.2, ())  # that of their seed
    (both,), _ = measured([batch, replace(batch, seed=1)], facts, one_round=True, candidates=10)
    assert (both.ceiling, both.own) == (0.25, (0.2, 0.3))
    (unknown,), _ = measured([replace(batch, seed=2)], facts, one_round=True, candidates=10)
    assert unknown.ceiling == 0.3  # the highest
    assert row.chance == 0.2
    assert left_out == ["none: not audited: nothing is certified against this adversary."]
    mixed = [trial(arm="dp", round=n, senders=who, records=(record(who[0], n),)) for n, who in enumerate(((0, 1), (0, 2), (2, 3)), 1)]
    (chained,), _ = measured(mixed, facts, one_round=False, candidates=10)
    assert chained.trials == 1  # cohorts of which each shares a client with the one before
    (together,), _ = measured([batch, later], facts, one_round=False, candidates=10)  # it used both rounds: they are one trial
    assert (together.successes, together.trials) == (1, 1)
    (drawn,), _ = measured([replace(batch, guesses=8)], facts, one_round=True, candidates=10)  # of a sample smaller than is stated
    assert drawn.chance == 0.8
    told = trial(arm="dp", records=(record(0, 0), record(0, 1)), flags=("oracle_used",))
    assert measured([told], facts, one_round=True, candidates=10)[0] == []
    assert "labels that were told" in measured([told], facts, one_round=True, candidates=10)[1][-1]
    alike = measured([batch], facts, one_round=True, candidates=10, skewed=True)
    assert alike[0] == []
    assert "clients hold classes of their own" in alike[1][-1]
    alone = trial(arm="dp", records=(record(0, 0),))
    assert len(measured([alone], facts, one_round=True, candidates=10, skewed=True)[0]) == 1  # nothing beside it
    unsupported = trial(arm="dp", status="unsupported", records=(), reason="no dense layer")
    assert "it named nobody" in measured([unsupported], facts, one_round=True, candidates=10)[1][-1]


def test_a_trial_counts_against_the_ceiling_of_its_own_round() -> None:
    facts = [
        ArmFacts(arm="dp", seed=0, accuracy=1.0, epsilon=8.0, ceiling=1.0, ceiling_by_round={"1": 0.2, "4": 1.0}, training_ceiling=1.0)
    ]
    first, last = (trial(arm="dp", round=round, records=(record(0, round),)) for round in (1, 4))
    vacuous = ["dp: not audited: (ε, δ) lets everybody be named by what an attack saw."]
    assert [row.ceiling for row in measured([first], facts, one_round=True, candidates=10)[0]] == [0.2]
    assert measured([last], facts, one_round=True, candidates=10) == ([], vacuous)
    (row,), _ = measured([first, last], facts, one_round=True, candidates=10)
    assert (row.successes, row.trials, row.ceiling, row.own, row.left_out) == (1, 1, 0.2, (), 1)
    repeated = trial(arm="dp", round=4, records=(record(0, 1),))  # not counted, so that its round is none
    assert [row.ceiling for row in measured([first, repeated], facts, one_round=True, candidates=10)[0]] == [0.2]
    older = [ArmFacts(arm="dp", seed=0, accuracy=1.0, epsilon=8.0, ceiling=0.7)]
    assert [row.ceiling for row in measured([first, last], older, one_round=True, candidates=10)[0]] == [0.7]


def test_rounds_that_allow_everything_do_not_hide_those_that_do_not() -> None:
    """Distributed DP at z = 1.5 in eight attacked rounds: the first four are held against their own ceilings, whatever the others show."""
    ceilings = {str(number): most for number, most in enumerate((0.36, 0.52, 0.65, 0.81, 1.0, 1.0, 1.0, 1.0), 1)}
    facts = [ArmFacts(arm="dp", seed=seed, accuracy=1.0, epsilon=8.0, ceiling=1.0, ceiling_by_round=ceilings) for seed in range(6)]

    def rows(hit: Callable[[int, int], bool]) -> list[Measured]:
        every = [
            trial(arm="dp", seed=seed, round=round, records=(record(0, round, identified=hit(seed, round)),))
            for seed in range(6) for round in range(1, 9)
        ]  # fmt: skip
        found, skipped = measured(every, facts, one_round=True, candidates=10)
        assert skipped == []
        return found

    (verdict,) = audit(rows(lambda seed, round: True))
    row = verdict.measured
    assert (row.successes, row.trials, row.left_out, row.ceiling) == (24, 24, 24, pytest.approx(0.585))
    assert row.own == (0.36, 0.52, 0.65, 0.81) * 6
    assert verdict.failed
    assert verdict.p_value == pytest.approx((0.36 * 0.52 * 0.65 * 0.81) ** 6)
    assert "24 of 24 (100.0%) named in those of 48 trials whose ceiling is below 1" in verdict.sentence
    assert rows(lambda seed, round: round < 5) == [row]  # what the others showed makes no difference
    (within,) = audit(rows(lambda seed, round: seed < 3))
    assert not within.failed
    assert "within ceilings of 36.0% to 81.0%, 58.5% on average" in within.sentence


def test_of_a_record_in_several_rounds_the_first_counts_whatever_its_ceiling() -> None:
    """Which of the trials that share noise counts is settled before any ceiling is looked at."""
    facts = [ArmFacts(arm="dp", seed=0, accuracy=1.0, epsilon=8.0, ceiling=1.0, ceiling_by_round={"1": 1.0, "4": 0.2})]
    twice = [trial(arm="dp", round=round, records=(record(0, 7),)) for round in (1, 4)]
    assert measured(twice, facts, one_round=True, candidates=10)[0] == []
    other = trial(arm="dp", round=4, records=(record(0, 8),))
    (row,), _ = measured([*twice, other], facts, one_round=True, candidates=10)
    assert (row.trials, row.left_out, row.ceiling) == (1, 1, 0.2)


@pytest.mark.parametrize(("candidates", "said"), [(20, "within the ceiling of 60.0%"), (8, "no test: guessing alone names 50%.")])
def test_where_guessing_names_half_nothing_is_tested(candidates: int, said: str) -> None:
    facts = [ArmFacts(arm="dp", seed=0, accuracy=1.0, epsilon=8.0, ceiling=0.6)]
    batches = [trial(arm="dp", senders=(at,), records=tuple(record(at, n, identified=at < 8) for n in range(4))) for at in range(16)]
    rows, _ = measured(batches, facts, one_round=True, candidates=candidates)
    assert said in audit(rows)[0].sentence
    every = [replace(one, records=tuple(replace(of, identified=True) for of in one.records)) for one in batches]
    rows, _ = measured(every, facts, one_round=True, candidates=candidates)
    assert "AUDIT FAILED" in audit(rows)[0].sentence  # an alarm is one whatever the chance


def test_a_directory_that_is_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="must be that of a run"):
        audit_run(tmp_path)


def test_guesses_are_counted_even_where_fewer_records_were_drawn() -> None:
    """A Poisson sample of three records behind a stated batch of eight: eight guesses, of which the truth chooses three."""
    small = SimpleNamespace(truth=range(3), knowledge=SimpleNamespace(num_examples=8))
    large = SimpleNamespace(truth=range(11), knowledge=SimpleNamespace(num_examples=8))
    assert most_guesses([small]) == 8  # type: ignore[list-item]
    assert most_guesses([small, large]) == 11  # type: ignore[list-item]
