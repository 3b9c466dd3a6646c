"""The ladder of attackers, and the strongest of them for each victim."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.ladder import BEST, best_per_victim, left_out, rungs
from experiments.metrics import ImageScores
from experiments.result import ArmFacts
from simulator.adversary import ThreatModel
from tests.experiments.test_summary import arm, record, row, summary, trial


@pytest.mark.parametrize(
    ("threat", "defended", "names"),
    [
        (ThreatModel(), False, ["strongest"]),
        (ThreatModel(), True, ["inverting_gradients", "strongest"]),
        (ThreatModel(rounds="all"), False, ["strongest", "gradient_disaggregation", "support_leak", "label_owners"]),
        (ThreatModel(public_data=True), True, ["inverting_gradients", "strongest", "learning_to_invert"]),
        (
            ThreatModel(public_data=True, candidates=True), True,
            ["inverting_gradients", "strongest", "learning_to_invert", "candidate_identification"],
        ),
    ],
)  # fmt: skip
def test_a_rung_is_there_where_the_threat_model_grants_what_it_needs(threat: ThreatModel, defended: bool, names: list[str]) -> None:
    assert [attack.name for attack in rungs(threat, defended=defended)] == names
    granted = {"learning_to_invert", "candidate_identification"} & set(names)
    assert {name for name in ("learning_to_invert", "candidate_identification") if name not in left_out(threat)} == granted


def test_each_victim_counts_with_its_strongest_attack_and_its_highest_floors() -> None:
    high, low = record(0, 0, psnr_db=30.0), record(0, 0, psnr_db=20.0, identified=False)
    other = record(1, 5, psnr_db=11.0)
    lucky = replace(record(1, 5, psnr_db=13.0), floors={"mean_image": ImageScores(12.9, 0.3, 0.05)})
    trials = [
        trial(attack="first", records=(high, other), senders=(0, 1), seconds=1.0),
        trial(attack="second", records=(low, lucky), senders=(0, 1), seconds=2.0),
    ]
    (best,) = best_per_victim(trials)
    assert best.attack == BEST
    assert [(item.psnr_db, item.solver) for item in best.records] == [(30.0, "first"), (13.0, "second")]
    assert best.records[1].floors["mean_image"].psnr_db == 12.9
    assert best.records[1].floors["random_guess"].psnr_db == 7.0
    assert best.seconds == 3.0
    assert best.converged


def test_a_failure_of_one_attack_leaves_the_others() -> None:
    failed = trial(
        attack="second", status="failed", reason="it raised", records=(record(0, 0, psnr_db=7.0, identified=False),), converged=False
    )
    (best,) = best_per_victim([trial(attack="first"), failed])
    assert best.status == "ok"
    assert best.converged
    assert best.records[0].solver == "first"


def test_one_attack_has_no_row_of_the_best() -> None:
    assert best_per_victim(arm("none", 25.0)) == []
    assert best_per_victim([trial(attack="ig"), trial(attack="labels", answered="labels", records=(record(identified=False),))]) == []


def test_who_was_named_is_said_by_the_attack_that_names_candidates() -> None:
    """Pictures of the others are kept, exactness of the named record is no reconstruction."""
    chosen = trial(attack="candidate_identification", answered="candidates", records=(record(psnr_db=60.0, exact=True, identified=True),))
    missed = [trial(attack=name, records=(record(psnr_db=15.0, identified=False, rank=40),)) for name in ("first", "second")]
    (best,) = best_per_victim([*missed, chosen])
    assert best.records[0].psnr_db == 15.0
    assert best.records[0].identified
    assert not best.records[0].exact


def test_the_row_of_the_best_is_compared_with_that_of_the_undefended_arm() -> None:
    arms = [
        *arm("none", 30.0, attack="a"),
        *arm("none", 20.0, attack="b"),
        *arm("noise", 15.0, attack="a"),
        *arm("noise", 18.0, attack="b"),
    ]
    table = summary(arms)
    assert row(table, "none", BEST)["scores"]["psnr_db"]["mean"] == pytest.approx(row(table, "none", "a")["scores"]["psnr_db"]["mean"])
    best = row(table, "noise", BEST)
    assert best["difference_to_control"]["psnr_db"]["mean"] == pytest.approx(-12.0)
    assert best["solvers"] == {"b": {"records": 16, "certified": 0}}
    assert [item["defense"] for item in table["rows"]] == ["none"] * 3 + ["noise"] * 3


def test_one_record_of_each_upload_counts_against_the_ceiling_as_in_the_audit() -> None:
    """Sixteen uploads whose second record alone is named: half of the records, and no first one; then the other way round."""
    fact = ArmFacts(arm="dp", seed=0, accuracy=0.9, epsilon=1.0, delta=1e-5, ceiling=0.2)
    for first, raised in ((False, False), (True, True)):
        named = [
            trial(
                arm="dp", attack="candidate_identification", answered="candidates", seed=seed, senders=(client,),
                records=(record(client, client, identified=first), record(client, 10 + client, identified=not first)),
            )
            for seed in (0, 1) for client in range(8)
        ]  # fmt: skip
        found = row(summary(named, fact), "dp", "candidate_identification")
        assert found["identified"]["rate"] == 0.5
        assert ("ceiling_exceeded" in found["flags"]) == raised


def test_named_candidates_have_a_rate_and_no_pictures_and_meet_their_ceiling() -> None:
    """Sixteen of sixteen named where (ε, δ) allows a fifth of them: the guarantee is broken, and that is said."""
    fact = ArmFacts(arm="dp", seed=0, accuracy=0.9, epsilon=1.0, delta=1e-5, ceiling=0.2)
    named = [
        trial(arm="dp", attack="candidate_identification", answered="candidates", seed=seed, senders=(client,), records=(record(client, client),))
        for seed in (0, 1) for client in range(8)
    ]  # fmt: skip
    found = row(summary(named, fact), "dp", "candidate_identification")
    assert found["answered"] == "candidates"
    assert found["identified"]["rate"] == 1.0
    assert found["scores"]["psnr_db"] is None
    assert found["gain"] is None
    assert "ceiling_exceeded" in found["flags"]
    allowed = row(summary(named, ArmFacts(arm="dp", seed=0, accuracy=0.9, epsilon=math.inf)), "dp", "candidate_identification")
    assert "ceiling_exceeded" not in allowed["flags"]


def test_the_gray_picture_of_a_failure_is_no_guess_and_a_failed_identifier_draws_none() -> None:
    poor = trial(attack="first", records=(record(psnr_db=5.0, identified=False),))
    failed = trial(attack="second", status="failed", reason="it raised", records=(record(psnr_db=9.5, identified=False),), converged=False)
    (best,) = best_per_victim([poor, failed])
    assert (best.records[0].psnr_db, best.records[0].solver) == (5.0, "first")
    nobody = replace(failed, attack="candidate_identification")
    (best,) = best_per_victim([poor, replace(poor, attack="third"), nobody])
    assert best.records[0].psnr_db == 5.0


def test_a_record_that_its_picture_names_is_identified_whatever_the_identifier_says() -> None:
    """Three guesses, among which the truth chooses, so that chance is three times as high."""
    seen = [trial(attack=name, records=(record(identified=True),)) for name in ("first", "second")]
    missed = trial(attack="candidate_identification", answered="candidates", records=(record(identified=False, rank=9),))
    (best,) = best_per_victim([*seen, missed])
    assert best.records[0].identified
    table = summary([*seen, missed])
    assert row(table, "none", BEST)["identified"]["chance"] == pytest.approx(0.03)
    assert row(table, "none", "first")["identified"]["chance"] == pytest.approx(0.01)


def test_attackers_who_know_nothing_name_no_more_together_than_their_chance() -> None:
    """Three pictures and a named candidate, each right one time in ten, the nearest picture taken: .34 of 600, beyond two guesses' .2."""
    rng, trials = np.random.default_rng(0), []
    for victim in range(600):
        for attack in ("first", "second", "third", "candidate_identification"):
            hit = bool(rng.random() < 0.1)
            near = float(rng.uniform(14, 16) if hit else rng.uniform(5, 14))
            answered = "candidates" if attack == "candidate_identification" else "inputs"
            one = record(victim, victim, psnr_db=near, identified=hit, class_chance=0.2)
            trials.append(trial(attack=attack, answered=answered, senders=(victim,), records=(one,)))
    best = row(summary(trials, candidates=10), "none", BEST)["identified"]
    assert best["rate"] > 0.25
    assert best["chance"] == pytest.approx(0.4)
    assert best["chance_in_class"] == pytest.approx(0.8)
    assert best["low"] < best["rate"] < best["chance"]


def test_an_upload_to_which_one_attack_alone_applies_is_no_less_a_victim() -> None:
    """Of 32 victims one attack solves 24, the other applies to the other 8 alone and misses."""
    solved = [trial(attack="first", senders=(n,), records=(record(n, n, psnr_db=40.0),)) for n in range(24)]
    refused = [trial(attack="first", senders=(n,), status="unsupported", reason="too many", records=()) for n in range(24, 32)]
    missed = [trial(attack="second", senders=(n,), records=(record(n, n, psnr_db=9.0, identified=False),)) for n in range(24, 32)]
    left = [trial(attack="second", senders=(n,), status="unsupported", reason="one only", records=()) for n in range(24)]
    best = row(summary([*solved, *refused, *missed, *left]), "none", BEST)
    assert (best["victims"], best["identified"]["rate"]) == (32, 0.75)


def test_only_what_was_taken_from_an_attack_asks_whether_it_had_ended() -> None:
    """A solver that is done, beside one that its budget stopped and that nothing was taken from."""
    done, stopped = trial(attack="first", records=(record(psnr_db=40.0),)), trial(attack="second", converged=False)
    (best,) = best_per_victim([done, replace(stopped, records=(record(psnr_db=20.0),))])
    assert best.converged
    (best,) = best_per_victim([done, replace(stopped, records=(record(psnr_db=50.0),))])
    assert not best.converged


def test_what_the_best_reached_over_shuffled_updates_is_said_of_each_attack_and_not_of_the_best() -> None:
    blind = {"mean_image": ImageScores(12.0, 0.3, 0.063), "shuffled_gradient": ImageScores(11.0, 0.3, 0.08)}
    solver = arm("none", 40.0, attack="first")
    learned = [replace(t, records=(replace(t.records[0], floors=blind),)) for t in arm("none", 11.0, attack="second")]
    table = summary([*solver, *learned])
    assert row(table, "none", "second")["over_prior"] is not None
    assert row(table, "none", BEST)["over_prior"] is None
