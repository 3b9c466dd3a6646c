"""Results survive the disk; rows say what the trials say; flags fall where they must."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.checks import EQUIVALENCE_DB, FLAGS, INFORMATION, flags_for
from experiments.groups import Scored, clusters, fixed_rng, interval_of, rate_of
from experiments.json_lines import ResultError
from experiments.metrics import ImageScores
from experiments.result import ArmFacts, RecordResult, Trial
from experiments.statistics import Interval, binomial_rate, bootstrap_mean, clustered_rate
from experiments.summary import summarize

FLOOR_DB = 12.0


def record(client: int = 0, index: int = 0, **changes: Any) -> RecordResult:
    floors = {"mean_image": ImageScores(FLOOR_DB, 0.3, 0.063), "random_guess": ImageScores(7.0, 0.01, 0.2)}
    values = {"psnr_db": 25.0, "ssim": 0.9, "mse": 0.003, "exact": False, "identified": True, "rank": 1, "label_correct": True}
    return RecordResult(client=client, record=index, floors=floors, **(values | changes))


def trial(**changes: Any) -> Trial:
    values = {"arm": "none", "attack": "ig", "seed": 0, "round": 1, "senders": (0,), "status": "ok", "records": (record(),)}
    return Trial(**(values | {"converged": True} | changes))


def arm(name: str, psnr_db: float, *, clients: int = 8, identified: bool = True, attack: str = "ig", spread: float = 1.0) -> list[Trial]:
    """Two seeds of single-sender trials; victims differ, in the same way under every arm."""
    return [
        trial(
            arm=name, attack=attack, seed=seed, senders=(client,), seconds=2.0, upload_bytes=400,
            records=(record(client, client, psnr_db=psnr_db + spread * math.sin(8 * seed + client), identified=identified),),
        )
        for seed in (0, 1) for client in range(clients)
    ]  # fmt: skip


def aggregate(name: str, psnr_db: float, *, clients: int = 8) -> list[Trial]:
    return [
        trial(
            arm=name, seed=seed, senders=tuple(range(clients)),
            records=tuple(record(client, client, psnr_db=psnr_db, identified=False, rank=50) for client in range(clients)),
        )
        for seed in (0, 1)
    ]  # fmt: skip


def label_arm(name: str, right: Callable[[int], bool], *, batch: int = 1, clients: int = 8, classes: int = 4) -> list[Trial]:
    """Two seeds of an attack that answers labels only; pictures are those of the mid-gray image."""
    gray = {"psnr_db": 7.0, "ssim": 0.0, "mse": 0.2, "identified": False, "rank": 100}
    return [
        trial(
            arm=name, attack="label_recovery", seed=seed, senders=(client,), answered="labels",
            records=tuple(record(client, n, label=n % classes, label_correct=right(n), **gray) for n in range(batch * client, batch * (client + 1))),
        )
        for seed in (0, 1) for client in range(clients)
    ]  # fmt: skip


def summary(trials: list[Trial], *facts: ArmFacts, control: str | None = "none", by_round: bool = False, candidates: int = 100) -> dict[str, Any]:
    environment = {"torch": "2", "cores": 2}
    table = summarize(
        trials, facts, candidates=candidates, control_arm=control, environment=environment, version="0.1", by_round=by_round
    )  # fmt: skip
    return json.loads(json.dumps(table, allow_nan=False))  # what a reader gets


def row(table: dict[str, Any], defense: str, attack: str = "ig") -> dict[str, Any]:
    return next(row for row in table["rows"] if (row["defense"], row["attack"]) == (defense, attack))


# results


@pytest.mark.parametrize(
    "value",
    [
        trial(trace=((0, 1.5), (10, math.inf)), objective=-math.inf, flags=("oracle_used",)),
        trial(senders=(0, 1), records=(record(0, label_correct=None, lpips=0.25), record(1)), objective=0.5),
        trial(status="unsupported", records=(), reason="needs a dense layer with bias, got none", objective=0.0),
        trial(status="diverged", records=(record(identified=False),), objective=math.inf),
        trial(answered="labels", records=(record(identified=False, label=3),), objective=0.0),
        ArmFacts(arm="dp", seed=1, accuracy=0.8, accuracy_per_round=(0.5, 0.8), epsilon=8.0, delta=1e-5, client_failures=("3: NaN",)),
        ArmFacts(arm="none", seed=0, accuracy=0.9, quantization_error=1e-6),
    ],
)
def test_a_result_is_one_line_of_standard_json_and_comes_back(value: Any) -> None:
    line = value.to_json()
    assert "\n" not in line
    assert "NaN" not in line.replace("3: NaN", "")
    assert "Infinity" not in line
    assert type(value).from_json(line) == value


def test_infinite_epsilon_and_undefined_objective_are_text() -> None:
    assert json.loads(ArmFacts(arm="none", seed=0, accuracy=1.0).to_json())["epsilon"] == "inf"
    table = json.loads(trial().to_json())
    assert (table["objective"], table["view"]) == ("nan", "update")
    assert json.loads(trial(senders=(0, 1)).to_json())["view"] == "aggregate"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "trial must be an object with exactly the keys"),
        ({"seed": "0"}, r"trial.seed must be of type int, got '0'"),
        ({"seed": True}, "trial.seed must be of type int"),
        ({"objective": None}, "trial.objective must be a number"),
        ({"status": "fine"}, "trial.status must be one of 'ok'"),
        ({"answered": "both"}, "trial.answered must be one of 'inputs'"),
        ({"answered": "labels"}, "must not identify a record"),
        ({"senders": 3}, "trial.senders must be a list"),
        ({"view": "aggregate"}, "trial.view must be 'update'"),
        ({"trace": [[1, 2.0, 3.0]]}, "trial.trace.0 must be a list of the right length"),
        ({"records": [{}]}, "trial.records.0 must be an object with exactly the keys"),
        ({"records": []}, "must score its records"),
    ],
)
def test_reading_is_strict(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        Trial.from_json(json.dumps(json.loads(trial().to_json()) | change))


def test_lines_of_an_older_version_are_read_and_no_other_key_may_be_missing() -> None:
    table = json.loads(trial(objective=0.5).to_json())
    del table["answered"], table["records"][0]["label"]
    assert Trial.from_json(json.dumps(table)) == trial(objective=0.5)
    for key in ("flags", "seconds", "status"):
        with pytest.raises(ResultError, match="trial must be an object with exactly the keys"):
            Trial.from_json(json.dumps({name: value for name, value in table.items() if name != key}))


@pytest.mark.parametrize("line", ["", '{"arm": "no', "[]", "3"])
def test_a_broken_line_is_refused(line: str) -> None:
    with pytest.raises(ResultError, match="a result must be"):
        Trial.from_json(line)


def test_a_failed_trial_scores_its_records_and_identifies_none() -> None:
    with pytest.raises(ValueError, match="must not identify"):
        trial(status="failed")
    with pytest.raises(ValueError, match="must have no records"):
        trial(status="unsupported")


# summary


def test_row_has_the_keys_and_types_of_the_schema() -> None:
    facts = ArmFacts(arm="none", seed=0, accuracy=0.9, upload_bytes=400, epsilon_for="nobody")
    table = summary(arm("none", 25.0), facts)
    assert (table["schema"], table["fedpeek"], table["environment"]) == (1, "0.1", {"torch": "2", "cores": 2})
    got = table["rows"][0]
    want = {
        "defense": str, "attack": str, "view": str, "victims": int, "statuses": dict, "scores": dict, "floor": dict, "gain": dict,
        "identified": dict, "epsilon": str, "delta": type(None), "epsilon_for": str, "ceiling": float, "accuracy": float,
        "seconds": float, "upload_bytes": float, "flags": list,
    }  # fmt: skip
    assert {key: type(got[key]) for key in want} == want
    assert got["epsilon"] == "inf"
    assert set(got["scores"]["psnr_db"]) >= {"mean", "low", "high", "min", "median", "max"}
    assert set(got["scores"]["label_accuracy"]) == {"mean", "low", "high", "floor"}
    assert (got["answered"], got["control"]) == ("inputs", True)
    assert set(got["gain"]["psnr_db"]) == {"mean", "low", "high", "seeds"}
    assert set(got["identified"]) >= {"rate", "low", "high", "chance"}


def test_numbers_of_a_row_are_those_of_its_records() -> None:
    trials = arm("none", 25.0)
    psnr = np.array([t.records[0].psnr_db for t in trials])
    got = row(summary(trials, ArmFacts(arm="none", seed=0, accuracy=0.8), ArmFacts(arm="none", seed=1, accuracy=0.9)), "none")
    assert (got["victims"], got["seeds"], got["uploads"], got["statuses"], got["rounds"]) == (16, 2, 16, {"ok": 16}, [1])
    scores = got["scores"]["psnr_db"]
    assert (scores["mean"], scores["min"], scores["max"]) == pytest.approx((psnr.mean(), psnr.min(), psnr.max()))
    assert (scores["median"], scores["p95"]) == pytest.approx((np.median(psnr), np.percentile(psnr, 95)))
    assert (scores["low"], scores["high"]) == pytest.approx(stats.t.interval(0.95, 15, psnr.mean(), stats.sem(psnr)), abs=0.05)
    assert got["gain"]["psnr_db"]["mean"] == pytest.approx(psnr.mean() - FLOOR_DB)
    assert (got["floor"]["psnr_db"], got["floor"]["name"]) == (FLOOR_DB, "mean_image")
    assert got["floor"]["by_name"]["random_guess"]["psnr_db"] == pytest.approx(7.0)
    assert (got["identified"]["rate"], got["identified"]["chance"]) == (1.0, 0.01)
    assert got["identified"]["low"] == pytest.approx(0.025 ** (1 / 16))  # closed form of Clopper–Pearson at n of n
    assert got["accuracy"] == pytest.approx(0.85)
    assert (got["seconds"], got["upload_bytes"]) == (2.0, 0.0)
    assert "lpips" not in got["scores"]
    assert got["flags"] == []


def test_proofs_and_predictions_are_held_against_the_truth() -> None:
    proven = record(certificate="rank one", solver="linear_leak", exact=True)
    wrong = record(1, 1, certificate="rank one", solver="linear_leak")
    guessed = record(2, 2, solver="dlg")
    trials = [trial(senders=(item.client,), records=(item,), predicted=1 if item is proven else None) for item in (proven, wrong, guessed)]
    got = row(summary(trials), "none")
    assert got["certified"] == {"records": 2, "wrong": 1}
    assert got["solvers"] == {"linear_leak": {"records": 2, "certified": 2}, "dlg": {"records": 1, "certified": 0}}
    surplus = row(summary([replace(trials[0], surplus_proofs=1)]), "none")  # a proof that is left when each record has its own
    assert (surplus["certified"]["wrong"], "certificate_wrong" in surplus["flags"]) == (1, True)
    assert got["identifiability"] == {"uploads": 1, "predicted": 1, "exact": 1}
    assert "certificate_wrong" in got["flags"]
    assert "prediction_missed" not in got["flags"]
    missed = [trial(records=(replace(proven, exact=False, certificate=""),), predicted=1)]
    assert "prediction_missed" in row(summary(missed), "none")["flags"]
    labels = [replace(missed[0], answered="labels", records=(replace(missed[0].records[0], identified=False),))]
    assert "prediction_missed" not in row(summary(labels), "none")["flags"]


def test_best_floor_is_chosen_for_each_record() -> None:
    swapped = {"mean_image": ImageScores(10.0, 0, 0.1), "random_guess": ImageScores(20.0, 0, 0.01)}
    trials = [replace(t, records=(replace(t.records[0], floors=swapped),)) if t.seed else t for t in arm("none", 25.0, spread=0.0)]
    got = row(summary(trials), "none")
    assert got["floor"]["psnr_db"] == pytest.approx((12 + 20) / 2)
    assert got["gain"]["psnr_db"]["mean"] == pytest.approx(25 - 16)


def test_failures_count() -> None:
    trials = arm("none", 25.0, spread=0.0)
    gray = [(replace(t.records[0], psnr_db=10.0, identified=False),) for t in trials]
    broken = [replace(t, status="failed", reason="CUDA fell over", converged=False, records=g) for t, g in zip(trials, gray, strict=True)]
    failed = trials[:8] + broken[8:]
    got = row(summary(failed), "none")
    assert got["statuses"] == {"ok": 8, "failed": 8}
    assert got["victims"] == 16
    assert got["scores"]["psnr_db"]["mean"] == pytest.approx(17.5)
    assert got["identified"]["rate"] == 0.5
    assert got["reasons"] == ["CUDA fell over"]
    assert got["flags"] == ["attack_failed"]


def test_a_row_of_failures_alone_says_so_and_keeps_the_scores_of_gray_pictures() -> None:
    gray = arm("none", 7.0, identified=False, spread=0.0)
    broken = [replace(t, status="failed", reason="CUDA fell over", converged=False) for t in gray]
    got = row(summary(broken), "none")
    assert got["statuses"] == {"ok": 0, "failed": 16}
    assert (got["scores"]["psnr_db"]["mean"], got["identified"]["rate"]) == (7.0, 0.0)
    assert got["flags"] == ["floor_not_beaten", "control_failed", "attack_failed"]


def test_unsupported_attack_has_a_row_without_scores() -> None:
    trials = [trial(attack="linear_leak", status="unsupported", records=(), reason="needs a dense layer", flags=("oracle_used",))]
    got = row(summary(trials), "none", "linear_leak")
    assert (got["victims"], got["statuses"]["unsupported"], got["scores"], got["gain"]) == (0, 1, {}, None)
    assert got["reasons"] == ["needs a dense layer"]
    assert got["flags"] == ["oracle_used", "unsupported"]


def test_recovered_labels_are_judged_as_labels_and_never_as_pictures() -> None:
    got = row(summary(label_arm("none", lambda n: n != 0)), "none", "label_recovery")
    assert (got["answered"], got["victims"], got["gain"], got["identified"], got["floor"]) == ("labels", 16, None, None, None)
    assert [got["scores"][name] for name in ("psnr_db", "ssim", "mse", "exact")] == [None] * 4
    exact = binomial_rate(14, 16)
    assert got["scores"]["label_accuracy"] == pytest.approx({"mean": 14 / 16, "low": exact.low, "high": exact.high, "floor": 0.25})
    assert got["flags"] == []


def test_recovered_labels_must_beat_a_guess_of_the_class_frequencies() -> None:
    chance = summary(label_arm("none", lambda n: n % 4 == 0) + label_arm("noise", lambda n: n % 4 == 0))
    assert row(chance, "none", "label_recovery")["flags"] == ["floor_not_beaten", "control_failed"]
    assert row(chance, "noise", "label_recovery")["flags"] == ["floor_not_beaten", "control_failed"]
    defended = summary(label_arm("none", lambda n: True) + label_arm("noise", lambda n: n % 4 == 0))
    assert row(defended, "noise", "label_recovery")["flags"] == ["floor_not_beaten"]
    unknown = [replace(t, records=tuple(replace(r, label=None) for r in t.records)) for t in label_arm("none", lambda n: True)]
    got = row(summary(unknown), "none", "label_recovery")
    assert (got["scores"]["label_accuracy"]["floor"], got["flags"]) == (None, ["floor_not_beaten", "control_failed"])


def test_floor_of_labels_has_the_freedom_that_the_attack_had() -> None:
    trials = label_arm("none", lambda n: True, batch=4, classes=2)
    matched = row(summary(trials), "none", "label_recovery")["scores"]["label_accuracy"]["floor"]
    pictured = row(summary([replace(t, answered="inputs") for t in trials]), "none", "label_recovery")["scores"]["label_accuracy"]["floor"]
    assert pictured == matched  # pictures bring their labels to the truth as well: class means get more than the most frequent class
    assert matched == pytest.approx(1 - 2 * (1 / 16) * 2 / 4 - 2 * (4 / 16) * 1 / 4)  # two of each: 4:0 misses two, 3:1 misses one


def test_one_guess_of_inputs_makes_it_a_row_of_pictures() -> None:
    trials = label_arm("none", lambda n: True)
    pictured = replace(trials[0], answered="inputs", records=(record(label=0),))
    got = row(summary([pictured, *trials[1:]]), "none", "label_recovery")
    assert got["answered"] == "inputs"
    assert got["identified"]["rate"] == 1 / 16


def test_failures_of_label_recovery_count_against_it() -> None:
    trials = label_arm("none", lambda n: True)
    failed = [
        replace(t, status="failed", answered="inputs", records=tuple(replace(r, label_correct=False) for r in t.records))
        for t in trials[:4]
    ]
    got = row(summary(failed + trials[4:]), "none", "label_recovery")
    assert (got["answered"], got["scores"]["label_accuracy"]["mean"], got["flags"]) == ("labels", 0.75, ["attack_failed"])


def test_accuracy_that_was_not_measured_is_null() -> None:
    facts = [ArmFacts(arm="none", seed=seed, accuracy=math.nan) for seed in (0, 1)]
    got = row(summary(arm("none", 25.0), *facts), "none")
    assert (got["accuracy"], got["accuracy_by_seed"]) == (None, {"0": None, "1": None})
    known = row(summary(arm("none", 25.0), facts[0], ArmFacts(arm="none", seed=1, accuracy=0.5)), "none")
    assert (known["accuracy"], known["accuracy_by_seed"]) == (0.5, {"0": None, "1": 0.5})


def test_no_defense_gets_credit_without_an_undefended_run() -> None:
    noise, none = arm("noise", 12.5), arm("none", 25.0)
    assert "no_control" in row(summary(noise, control=None), "noise")["flags"]
    assert "no_control" in row(summary(noise + arm("none", 25.0, attack="dlg")), "noise")["flags"]
    assert "no_control" in row(summary([*noise, replace(none[0], status="unsupported", records=())]), "noise")["flags"]
    others = [replace(t, round=9) for t in none]
    assert "no_control" in row(summary(noise + others), "noise")["flags"]
    assert all("no_control" not in r["flags"] for r in summary(noise + none)["rows"])
    assert "no_control" not in INFORMATION


def test_credit_is_given_only_where_the_undefended_attack_beats_its_floor() -> None:
    none, noise = arm("none", FLOOR_DB + 9, spread=0.0), arm("noise", FLOOR_DB + 4, spread=0.0)
    weak = [replace(t, records=(replace(t.records[0], psnr_db=FLOOR_DB),)) for t in none[:6]]  # at its floor, not above it
    gray = [replace(t, status="failed", records=(replace(t.records[0], psnr_db=FLOOR_DB + 1, identified=False),)) for t in none[6:8]]
    got = row(summary(weak + gray + none[8:] + noise), "noise")["difference_to_control"]
    assert (got["pairs"], got["undefended_missed"]) == (16, 8)
    assert got["psnr_db"]["mean"] == pytest.approx((8 * 4 - 8 * 5) / 16)  # what it leaks where the other leaks nothing counts against it
    below = [replace(t, records=(replace(t.records[0], psnr_db=FLOOR_DB - 20),)) for t in noise]
    got = row(summary(weak + gray + none[8:] + below), "noise")["difference_to_control"]
    assert got["psnr_db"]["mean"] == pytest.approx(-8 * 9 / 16)  # below the floor nothing is left to take
    blind = [replace(t, records=(replace(t.records[0], psnr_db=FLOOR_DB - 1),)) for t in none]
    table = summary(blind + noise + arm("clip", FLOOR_DB + 4))
    nothing = {"psnr_db": None, "identified": None, "pairs": 16, "undefended_missed": 16, "p": None, "p_holm": None}
    assert row(table, "noise")["difference_to_control"] == nothing
    assert "control_failed" in row(table, "noise")["flags"]
    assert "not_distinguishable" not in row(table, "noise")["flags"]


def test_a_defense_that_does_nothing_takes_nothing_from_an_attack_that_works_half_of_the_time() -> None:
    """Each attack succeeds by luck of its own: to compare where the undefended one did gives every defense half of its gain."""
    wins = np.random.default_rng(0).random((2, 100)) < 0.5
    none, null = (
        [
            trial(arm=name, seed=place % 2, senders=(place,), records=(record(place, place, psnr_db=FLOOR_DB + (12 if won else -2)),))
            for place, won in enumerate(row_)
        ]
        for name, row_ in zip(("none", "null"), wins, strict=True)
    )
    got = row(summary(none + null), "null")["difference_to_control"]
    assert got["psnr_db"]["low"] < 0 < got["psnr_db"]["high"]
    assert got["psnr_db"]["mean"] == pytest.approx(12 * (wins[1].mean() - wins[0].mean()))


def test_rates_of_joint_batches_are_no_narrower_than_whole_uploads_allow() -> None:
    lucky = [
        replace(t, records=tuple(replace(r, identified=True, exact=True, rank=1) for r in t.records)) for t in aggregate("secagg", 25.0)
    ]
    uploads = [replace(t, seed=4 * t.seed + at) for at in range(4) for t in (lucky if at == 0 else aggregate("secagg", 12.5))]
    got, records = row(summary(uploads), "secagg"), binomial_rate(16, 64)
    assert got["identified"]["rate"] == 0.25
    for rate in (got["identified"], got["scores"]["exact"]):
        assert rate["high"] - rate["low"] > 1.5 * (records.high - records.low)


def test_difference_to_control_is_paired_by_victim() -> None:
    table = summary(arm("none", 25.0, spread=5.0) + arm("noise", 22.0, spread=5.0)[::-1] + arm("clip", 25.0, spread=5.0))
    noise, clip = row(table, "noise")["difference_to_control"], row(table, "clip")["difference_to_control"]
    assert noise["psnr_db"]["low"] == pytest.approx(-3)  # the victims' spread of 5 dB is gone
    assert noise["psnr_db"]["high"] == pytest.approx(-3)
    assert (noise["pairs"], noise["undefended_missed"]) == (16, 0)
    assert clip["psnr_db"] == pytest.approx({"mean": 0.0, "low": 0.0, "high": 0.0}, abs=1e-9)
    assert noise["p"] < noise["p_holm"] == pytest.approx(2 * noise["p"])
    assert "not_distinguishable" in row(table, "clip")["flags"]
    assert "not_distinguishable" not in row(table, "noise")["flags"]
    assert row(table, "none")["difference_to_control"] is None


def test_aggregate_is_compared_victim_by_victim_and_resampled_by_the_aggregate() -> None:
    table = summary(arm("none", 25.0) + aggregate("secagg", 12.5))
    got = row(table, "secagg")
    assert (got["view"], got["victims"], got["uploads"]) == ("aggregate", 16, 2)
    assert got["identified"]["chance"] == pytest.approx(8 / 100)
    control = [t.records[0].psnr_db for t in arm("none", 25.0)]
    seeds = [12.5 - np.mean(control[:8]), 12.5 - np.mean(control[8:])]  # two clusters: nothing beyond the two seeds' means
    ends = stats.t.interval(0.95, 1, np.mean(seeds), stats.sem(seeds))
    difference = got["difference_to_control"]
    assert difference["pairs"] == 16
    assert (difference["psnr_db"]["low"], difference["psnr_db"]["high"]) == pytest.approx(ends)
    assert "few_uploads" in got["flags"]
    alone = row(summary(aggregate("secagg", 12.5)[:1], control=None), "secagg")
    assert (alone["gain"]["psnr_db"]["low"], alone["gain"]["psnr_db"]["high"]) == (None, None)
    assert alone["flags"] == ["floor_not_beaten", "no_control", "few_victims", "few_uploads"]


def test_rounds_share_a_row_or_have_their_own() -> None:
    late = [replace(t, round=5) for t in arm("none", 15.0)] + [replace(t, round=5) for t in arm("clip", 15.0)]
    trials = arm("none", 25.0) + arm("clip", 25.0) + late
    pooled, split = summary(trials), summary(trials, by_round=True)
    assert [(r["defense"], r["rounds"], r["victims"]) for r in pooled["rows"]] == [("none", [1, 5], 16), ("clip", [1, 5], 16)]
    assert [(r["scored"], r["uploads"], r["independent_uploads"]) for r in pooled["rows"]] == [(32, 32, 16)] * 2
    means = [r["scores"]["psnr_db"]["mean"] for r in (row(pooled, "clip"), split["rows"][1], split["rows"][3])]
    assert means[0] == pytest.approx((means[1] + means[2]) / 2)
    assert [(r["defense"], r["rounds"]) for r in split["rows"]] == [("none", [1]), ("clip", [1]), ("none", [5]), ("clip", [5])]
    for defended in (*split["rows"][1::2], row(pooled, "clip")):
        assert defended["difference_to_control"]["psnr_db"]["mean"] == pytest.approx(0)  # each victim against itself in the same round


def test_a_record_that_is_sent_in_four_rounds_is_one_victim() -> None:
    once = arm("none", 25.0, clients=3)
    again = [replace(t, round=at) for at in (1, 6, 11, 16) for t in once]
    one, four = row(summary(once), "none"), row(summary(again), "none")
    assert (four["victims"], four["scored"], four["uploads"], four["independent_uploads"]) == (6, 24, 24, 6)
    for name in ("mean", "low", "high"):
        assert four["scores"]["psnr_db"][name] == pytest.approx(one["scores"]["psnr_db"][name])
        assert four["gain"]["psnr_db"][name] == pytest.approx(one["gain"]["psnr_db"][name])
    assert four["identified"]["low"] == pytest.approx(one["identified"]["low"]) == pytest.approx(0.025 ** (1 / 6))
    assert "few_victims" in four["flags"]
    assert "few_uploads" in row(summary(again[::6] + again[1::6]), "none")["flags"]  # two of the six
    others = [replace(t, records=(replace(t.records[0], record=100 * t.round),)) for t in again]  # other records of the same clients
    assert row(summary(others), "none")["independent_uploads"] == 24


def test_cohorts_with_a_common_record_are_resampled_together() -> None:
    def of(round: int, *clients: int) -> Trial:
        return trial(round=round, senders=clients, records=tuple(record(client, client) for client in clients))

    chained = [of(1, 0, 1), of(2, 1, 2), of(3, 2, 3), of(4, 4, 5)]
    scored = [Scored(t, r) for t in chained for r in t.records]
    assert clusters(scored) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert clusters(scored[:2] + scored[6:]) == [0, 0, 1, 1]
    assert clusters(scored[::-1]) == [0, 0, 1, 1, 1, 1, 1, 1]
    alone = [Scored(of(1, client), record(client, client)) for client in range(4)]
    pairs = [Scored(of(1, *both), record(client, client)) for both in ((0, 1), (2, 3)) for client in both]
    assert clusters(alone, pairs) == clusters(pairs, alone) == [0, 0, 1, 1]


def test_rows_of_one_round_are_resampled_by_the_upload_as_ever() -> None:
    singles, joint = arm("none", 25.0, spread=5.0), [replace(t, senders=(t.senders[0] // 2,)) for t in arm("none", 25.0, spread=5.0)]
    for trials in (singles, aggregate("none", 20.0), joint):
        scored = [Scored(t, r) for t in trials for r in t.records]
        values, hits = [item.gain_db for item in scored], [item.record.psnr_db > 25 for item in scored]
        uploads = [item.upload for item in scored]
        assert interval_of(values, scored) == bootstrap_mean(values, uploads, rng=fixed_rng())  # to the bit
        assert rate_of(hits, scored) == clustered_rate(hits, uploads, rng=fixed_rng())


def test_the_range_of_the_seeds_means_stands_beside_the_interval() -> None:
    trials = arm("none", 20.0, spread=0.0)[:8] + arm("none", 30.0, spread=0.0, identified=False)[8:]
    got = row(summary(trials), "none")
    assert got["gain"]["psnr_db"]["seeds"] == {"low": 8.0, "high": 18.0}
    assert got["scores"]["psnr_db"]["seeds"] == {"low": 20.0, "high": 30.0}
    assert got["identified"]["seeds"] == {"low": 0.0, "high": 1.0}
    assert "seeds" not in row(summary(trials[:8]), "none")["gain"]["psnr_db"]  # one seed has no range


def test_no_row_depends_on_the_others() -> None:
    one, two = summary(arm("none", 25.0)), summary(arm("other", 3.0) + arm("none", 25.0))
    assert row(one, "none")["scores"] == row(two, "none")["scores"]


def test_a_victim_scored_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="must be scored once by 'ig' under 'none'"):
        summary(arm("none", 25.0) + arm("none", 25.0)[:1])


def test_claims_take_the_worst_seed() -> None:
    facts = [
        ArmFacts(arm="dp", seed=0, accuracy=0.5, epsilon=8.0, delta=1e-5, ceiling=0.3, epsilon_for="server; record; add-remove"),
        ArmFacts(arm="dp", seed=1, accuracy=0.7, epsilon=9.0, delta=1e-5, ceiling=0.4, epsilon_for="server; record; add-remove"),
    ]
    got = row(summary(arm("none", 25.0) + arm("dp", 11.0, identified=False), *facts), "dp")
    assert (got["epsilon"], got["delta"], got["ceiling"], got["epsilon_for"]) == (9.0, 1e-5, 0.4, "server; record; add-remove")
    assert got["flags"] == ["floor_not_beaten"]


# flags


def flags(**changes: Any) -> list[str]:
    sound: dict[str, Any] = {
        "statuses": {"ok": 32}, "records": 32, "seeds": 2, "uploads": 32, "unconverged": 0, "gain": Interval(10, 8, 12),
        "controlled": True, "control_gain": Interval(10, 8, 12), "difference": Interval(-5, -6, -4), "exceeded": False,
        "epsilon": math.inf, "ceiling": 1.0, "oracle": False, "clients_lost": False,
    }  # fmt: skip
    return flags_for(**(sound | changes))


@pytest.mark.parametrize(
    ("changes", "raised"),
    [
        ({}, []),
        ({"unconverged": 3}, []),
        ({"unconverged": 4}, ["not_converged"]),
        ({"gain": Interval(1, 0, 2)}, ["floor_not_beaten"]),
        ({"gain": Interval(5, -math.inf, math.inf)}, ["floor_not_beaten"]),
        ({"control_gain": Interval(1, -0.1, 2)}, ["control_failed"]),
        ({"control_gain": None, "difference": None}, []),
        ({"controlled": False, "control_gain": None, "difference": None}, ["no_control"]),
        ({"oracle": True}, ["oracle_used"]),
        ({"records": 15}, ["few_victims"]),
        ({"seeds": 1}, ["few_victims"]),
        ({"uploads": 5}, ["few_uploads"]),
        ({"epsilon": 1.0, "ceiling": 0.01, "exceeded": True}, ["ceiling_exceeded"]),
        ({"epsilon": 1.0, "ceiling": 0.01}, []),
        ({"epsilon": 50.0, "ceiling": 0.999}, ["ceiling_vacuous"]),
        ({"chance": 0.49}, []),
        ({"chance": 0.5}, ["no_test"]),
        ({"clients_lost": True}, ["clients_lost"]),
        ({"certified_wrong": True}, ["certificate_wrong"]),
        ({"prediction_missed": True}, ["prediction_missed"]),
        ({"statuses": {"ok": 31, "diverged": 1}}, ["attack_failed"]),
        ({"difference": Interval(-0.1, -0.3, 0.0)}, ["not_distinguishable", "equivalent"]),
        ({"difference": Interval(0.0, -9.0, 9.0)}, ["not_distinguishable"]),
        ({"difference": Interval(0.0, -math.inf, math.inf)}, ["not_distinguishable"]),
        ({"difference": Interval(-0.2, -0.3, -0.1)}, ["equivalent"]),
        ({"difference": Interval(0.1, -EQUIVALENCE_DB, 0.2)}, ["not_distinguishable"]),
        ({"difference": Interval(0.1, -0.2, EQUIVALENCE_DB)}, ["not_distinguishable"]),
        ({"gain": Interval(0.1, 0.0, 0.2)}, ["floor_not_beaten"]),
        ({"gain": None, "oracle": True, "records": 0}, ["oracle_used"]),
        ({"gain": None, "statuses": {"ok": 0, "unsupported": 3}, "records": 0}, ["unsupported"]),
    ],
)
def test_each_flag_falls_at_its_threshold(changes: dict[str, Any], raised: list[str]) -> None:
    assert flags(**changes) == raised


def test_every_flag_is_explained_in_one_line() -> None:
    assert set(FLAGS) >= INFORMATION
    assert all(sentence and "\n" not in sentence for sentence in FLAGS.values())


# the ladder


def test_rows_tell_of_candidates_that_were_told_of_accomplices_and_of_the_stack() -> None:
    gray = {"psnr_db": 7.0, "ssim": 0.0, "mse": 0.2}
    named = [
        replace(each, attack="identifier", answered="candidates", records=tuple(replace(r, **gray) for r in each.records))
        for each in arm("dp", 25.0)
    ]
    table = summarize(
        [*arm("dp", 25.0), *arm("dp", 20.0, attack="other"), *named], [ArmFacts(arm="dp", seed=0, accuracy=0.8, epsilon=1.0, ceiling=0.2)],
        candidates=100, control_arm="none", environment={}, version="0.1", stacks={"dp": ("dp_sgd", "clip")}, colluding=True,
    )  # fmt: skip
    flags = {each["attack"]: each["flags"] for each in table["rows"]}
    assert "candidates_told" in flags["identifier"]
    assert all("candidates_told" not in flags[other] for other in ("ig", "other", "best per victim"))
    assert all("colluding_clients" in each for each in flags.values())
    assert "ceiling_exceeded" in flags["identifier"]
    assert "ceiling_exceeded" not in flags["best per victim"]  # the ceiling is for one guess
    assert "ceiling_vacuous" not in flags["best per victim"]
    assert {tuple(each["stack"]) for each in table["rows"]} == {("dp_sgd", "clip")}
    assert {"candidates_told", "colluding_clients"} <= INFORMATION


def test_ceilings_of_a_row_are_the_loosest_of_its_seeds_and_say_what_they_assume() -> None:
    facts = [
        ArmFacts(arm="none", seed=0, accuracy=1.0, ceiling=0.2, psnr_ceiling_db=9.0, mse_floor=0.2, upload_bytes_formula=100.0),
        ArmFacts(arm="none", seed=1, accuracy=1.0, ceiling=0.3, psnr_ceiling_db=11.0, mse_floor=0.1, upload_bytes_formula=300.0),
    ]
    found = row(summary(arm("none", 25.0), *facts), "none")
    assert (found["ceiling"], found["ceilings"]["no_prior_psnr_db"], found["ceilings"]["mse_floor"]) == (0.3, 11.0, 0.1)
    assert [sentence.partition(":")[0] for sentence in found["ceilings"]["sentences"]] == ["Identification", "PSNR", "MSE"]
    assert "prior" in found["ceilings"]["sentences"][1]
    assert found["cost"]["upload_bytes_formula"] == 200.0
    assert row(summary(arm("none", 25.0)), "none")["ceilings"]["sentences"] == []


def test_a_row_has_the_ceiling_of_its_rounds_and_beside_it_that_of_the_whole_training() -> None:
    seen = {
        "ceiling": 0.6,
        "ceiling_by_round": {"1": 0.4, "3": 0.6},
        "training_ceiling": 0.9,
        "latest_seen": 3,
        "epsilon": 2.0,
        "delta": 1e-5,
    }
    facts = ArmFacts(arm="none", seed=0, accuracy=1.0, **seen)
    assert ArmFacts.from_json(facts.to_json()) == facts
    trials = [trial(round=round, senders=(at,), records=(record(at, 10 * round + at),)) for round in (1, 3) for at in range(8)]
    rounds = {each["rounds"][0]: each for each in summary(trials, facts, by_round=True)["rows"]}
    assert {number: (each["ceiling"], each["training_ceiling"]) for number, each in rounds.items()} == {1: (0.4, 0.9), 3: (0.6, 0.9)}
    assert ["ceiling_exceeded" in rounds[number]["flags"] for number in (1, 3)] == [True, True]  # 8 of 8: at least 63 %
    both = row(summary(trials, facts), "none")
    assert both["ceiling"] == 0.6
    assert "rounds 1 to 3" in both["ceilings"]["sentences"][0]
    assert "0.9" in both["ceilings"]["sentences"][0]
    older = row(summary(trials, ArmFacts(arm="none", seed=0, accuracy=1.0, ceiling=0.6)), "none")
    assert (older["ceiling"], older["training_ceiling"]) == (0.6, None)


def test_rounds_in_which_everybody_may_be_named_hide_no_others() -> None:
    """Eight of eight in round 1 beside a ceiling of 0.4 refute it, though nothing can exceed that of round 8; the guarantee excludes something."""
    trials = [trial(round=round, senders=(at,), records=(record(at, 10 * round + at),)) for round in (1, 8) for at in range(8)]
    for first, flags in ((0.4, (True, False)), (1.0, (False, True))):
        facts = ArmFacts(arm="none", seed=0, accuracy=1.0, epsilon=8.0, delta=1e-5, ceiling=1.0, ceiling_by_round={"1": first, "8": 1.0})
        found = row(summary(trials, facts), "none")
        assert found["ceiling"] == 1.0  # the highest of its rounds
        assert tuple(flag in found["flags"] for flag in ("ceiling_exceeded", "ceiling_vacuous")) == flags


def test_naming_one_of_few_candidates_is_no_test() -> None:
    batches = [trial(senders=(at,), records=tuple(record(at, 10 * at + n) for n in range(50))) for at in range(2)]
    (half,) = (each for each in summary(batches)["rows"] if each["attack"] == "ig")
    assert half["identified"]["chance"] == 0.5
    assert "no_test" in half["flags"]
    assert "no_test" not in row(summary(arm("none", 25.0)), "none")["flags"]


def test_chance_counts_the_guesses_that_were_made_and_the_candidates_of_the_class() -> None:
    """Eight guesses for three records that were drawn; of the class there are as many candidates as each record says."""
    mine = tuple(record(0, place, class_chance=share) for place, share in enumerate((0.1, 0.2, 0.3)))
    got = row(summary([trial(records=mine, guesses=8)]), "none")
    assert (got["identified"]["chance"], got["identified"]["chance_in_class"]) == (pytest.approx(0.08), pytest.approx(0.2))
    assert row(summary([trial(records=mine)]), "none")["identified"]["chance"] == pytest.approx(0.03)
    assert row(summary([trial()]), "none")["identified"]["chance_in_class"] is None
