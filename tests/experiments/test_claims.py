"""Claims: files that are sound, a command that measures them again, victims that are those of a real run."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attacks.update.random_guess import RandomGuess
from clients.private import held_by, private_batches, splits
from defenses.channel._secagg.cost import upload_bytes
from defenses.channel.secure_aggregation import SecureAggregation
from experiments.benchmarks import strongest, strongest_page
from experiments.benchmarks.secure_aggregation import setting
from experiments.claims import benchmarks
from experiments.claims import claim as claims_module
from experiments.claims.__main__ import DOCS, page
from experiments.claims.check import check
from experiments.claims.claim import Figure, claims, read, select
from experiments.claims.measures import AttackMeasure
from experiments.claims.runs import SecureAggregationMeasure
from experiments.claims.scores import Trial, summarize
from experiments.cli import app, main
from experiments.victims import trained, victim
from simulator import config
from simulator.adversary import Reconstruction
from simulator.errors import SpecError
from simulator.network import network
from simulator.types import Batch, LocalTraining
from tests.federations import federate, world

GOOD = """
claim = "linear_leak gives one digit back"
source = "own"
cpu_seconds = 1

[measure]
kind = "attack"
data = "digits"
model = "linear"
attack = "linear_leak"

[figures.mse_max]
ours = 1e-16
at_most = 1e-10
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Claims of our own instead of those that ship."""
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "false-claim.toml").write_text(
        GOOD.replace("at_most = 1e-10", "at_most = 1e-10\n\n[figures.psnr_db]\nours = 70\nat_least = 61")
    )
    monkeypatch.setattr(claims_module, "files", lambda package: tmp_path)
    return tmp_path


def test_every_claim_that_ships_is_sound_and_the_table_in_the_docs_is_theirs() -> None:
    found = select(())
    assert [claim.id for claim in found] == list(claims())
    assert len(found) > 10
    assert DOCS.read_text(encoding="utf-8") == page(found), "run python -m experiments.claims"


def test_claims_of_secure_aggregation_name_their_range_and_what_the_default_one_costs() -> None:
    """4 bytes a word are those of a range that somebody set."""
    timed = [claim for claim in select(["secure-aggregation-*"]) if isinstance(claim.measure, SecureAggregationMeasure)]
    assert len(timed) >= 6
    for claim in timed:
        n, words, settings = claim.measure.clients, claim.measure.words, setting(claim.measure.clients, claim.measure.graph)
        assert f" at clip_range = {settings.clip_range:g}" in claim.claim
        default, plan = replace(settings, clip_range=SecureAggregation.clip_range), settings.plan_for(n, 1)
        assert default.clip_range == 8
        cost = upload_bytes(words, default.bits_for(n, 2), plan.degree) / words
        assert (f"(at the default range of 8: {cost:.1f} bytes a word" in claim.claim) is (default.bits_for(n, 2) != settings.bits_for(n, 2))


def test_claims_are_measured_and_one_that_does_not_hold_is_an_error(folder: Path) -> None:
    done = CliRunner().invoke(app, ["claims", "good"])
    assert done.exit_code == 0, done.output
    assert "linear_leak gives one digit back" in done.output
    assert [line.split()[-1] for line in done.output.splitlines() if "mse_max" in line] == ["yes"]
    broken = CliRunner().invoke(app, ["claims"])
    assert broken.exit_code == 1
    assert [line.split()[-1] for line in broken.output.splitlines() if "psnr_db" in line] == ["NO"]
    assert "1 of 2 claims" in broken.output


MISSED = GOOD.replace(
    "at_most = 1e-10", 'at_most = 1e-10\n\n[figures.psnr_db]\nours = 60.0\nat_least = 61\nmet = false\nwithin = 0.5\nreason = "capped"'
)


def test_a_bar_that_is_missed_as_filed_is_loud_and_an_error_unless_it_is_accepted(folder: Path) -> None:
    (folder / "missed.toml").write_text(MISSED)
    plain = CliRunner().invoke(app, ["claims", "missed"])
    assert plain.exit_code == 1, plain.output
    assert [line.split()[-2:] for line in plain.stdout.splitlines() if "psnr_db" in line] == [["not", "met"]]
    assert "1 bars are not met" in plain.stderr
    assert "missed psnr_db: capped" in plain.stderr
    assert "do not hold" not in plain.stderr
    accepted = CliRunner().invoke(app, ["claims", "missed", "--known-misses"])
    assert accepted.exit_code == 0, accepted.output
    assert "1 bars are not met" in accepted.stderr
    (folder / "missed.toml").write_text(MISSED.replace("ours = 60.0", "ours = 40.0"))
    worse = CliRunner().invoke(app, ["claims", "missed", "--known-misses"])
    assert worse.exit_code == 1, "neither met nor missed as filed"
    assert "1 of 1 claims" in worse.stderr
    row = json.loads(CliRunner().invoke(app, ["claims", "missed", "--json"]).stdout)
    assert (row["ok"], row["known_misses"]) == (False, [])


def test_misses_are_listed_in_the_docs(folder: Path) -> None:
    (folder / "missed.toml").write_text(MISSED)
    text = page([read(folder / "missed.toml")])
    assert "- **`missed`, `psnr_db`: bar ≥ 61, ours 60.** capped" in text
    assert [line.count("**NOT MET**") for line in text.splitlines() if line.startswith("|  |  | `psnr_db`")] == [1]
    assert "not met" not in page([read(folder / "good.toml")])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"at_least": 61.0, "met": False, "within": 1.0}, "a reason"),
        ({"at_least": 61.0, "met": False, "reason": "capped"}, "within"),
        ({"at_least": 59.0, "met": False, "reason": "capped", "within": 1.0}, "outside the bar"),
        ({"at_least": 59.0, "reason": "capped"}, "met = true"),
        ({"met": False, "reason": "capped", "within": 1.0}, "must have a bar"),
    ],
)
def test_a_miss_must_be_one_and_say_why(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Figure(ours=60.0, **settings)


def test_the_peer_and_strongest_are_read_from_the_data_of_their_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "DOCS", tmp_path)
    rows = [
        {"task": {"network": "n", "side": side, "weight": weight, "data": data, "picture": picture, "budget": 10.0}, "psnr_db": db}
        for side, weight, data, picture, db in [
            ("breaching", 0.2, "public", 0, 10.0), ("breaching", 0.02, "public", 0, 12.0), ("breaching", 0.02, "private", 0, 13.0),
            ("breaching", 0.02, "private", 1, 15.0), ("breaching", 0.2, "private", 0, 30.0), ("inverting_gradients", 1.0, "private", 0, 16.0),
            ("inverting_gradients", 1.0, "private", 1, 19.0), ("inverting_gradients", 1.0, "private", 2, 40.0),
        ]
    ]  # fmt: skip
    (tmp_path / "breaching.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = benchmarks.PeerMeasure(network="n", budget=10.0)()
    assert (found["difference_db"], found["pictures"], found["psnr_db"], found["peer_psnr_db"]) == (3.5, 2.0, 17.5, 14.0)
    with pytest.raises(SpecError, match=r"network and budget must be ones of docs/breaching.jsonl"):
        benchmarks.PeerMeasure(network="n", budget=30.0)()
    with pytest.raises(SpecError, match=r"docs must hold strongest.json"):
        benchmarks.StrongestMeasure()()
    table = [
        {"strongest_db": [20.0, 30.0], "best_db": [20.4, 30.6], "floor_db": [14.0, 14.0], **ALIKE},
        {"strongest_db": [9.0, 14.5], "best_db": [10.0, 15.0], "floor_db": [14.0, 14.0], **ALIKE},
    ]
    (tmp_path / "strongest.json").write_text(json.dumps(table))
    assert benchmarks.StrongestMeasure()() == {"matched": 0.5, "matched_above_floor": 2 / 3, "settings": 2.0, "victims_least": 2.0}
    table[1] |= {"budget": 20.0}
    (tmp_path / "strongest.json").write_text(json.dumps(table))
    with pytest.raises(SpecError, match="must be measured alike"):
        benchmarks.StrongestMeasure()()


ALIKE: dict[str, Any] = {"budget": 15.0, "victims": 2, "source": "unknown"}


@pytest.mark.parametrize("change", [{"budget": 20.0}, {"victims": 3}, {"source": "0123"}])
def test_rows_of_strongest_that_were_not_measured_alike_are_refused(change: dict[str, Any]) -> None:
    assert strongest_page.shared([ALIKE, ALIKE]) == strongest_page.Conditions(**ALIKE)
    with pytest.raises(SpecError, match="must be measured alike"):
        strongest_page.shared([ALIKE, ALIKE | change])
    with pytest.raises(SpecError, match="must be measured alike"):
        strongest_page.shared([ALIKE], strongest_page.Conditions(**(ALIKE | change)))
    with pytest.raises(SpecError, match="without source"):
        strongest_page.shared([{"budget": 15.0, "victims": 2}])


def test_the_page_of_strongest_is_that_of_its_rows_and_names_the_whole_command() -> None:
    rows = json.loads((benchmarks.DOCS / "strongest.json").read_text(encoding="utf-8"))
    text = strongest_page.PAGE.read_text(encoding="utf-8")
    assert text == strongest_page.page(rows)
    assert benchmarks.StrongestMeasure.again == strongest_page.command(strongest_page.shared(rows))
    assert f"`{benchmarks.StrongestMeasure.again}`" in text
    assert "--seconds 15 --victims 2 " in text


def test_more_rows_by_other_options_are_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "row", lambda *_: pytest.fail("measured"))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"setting": "MLP, b = 1", **ALIKE}]))
    for options in ([], ["--seconds", "15", "--victims", "2"]):  # other budget; the same, but by another source
        monkeypatch.setattr(sys, "argv", ["strongest", "--json", str(path), *options])
        with pytest.raises(SpecError, match="must be measured alike"):
            strongest.main()


def test_a_claim_that_is_read_is_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "DOCS", tmp_path)
    row = {"strongest_db": [20.0, 30.0], "best_db": [20.4, 30.6], "floor_db": [14.0, 14.0], **ALIKE}
    (tmp_path / "strongest.json").write_text(json.dumps([row]))
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / "read.toml").write_text(
        'claim = "c"\nsource = "own"\ncpu_seconds = 1\n[measure]\nkind = "strongest"\n[figures.matched]\nours = 0.5\nat_least = 0.4\n'
    )
    monkeypatch.setattr(claims_module, "files", lambda package: folder)
    plain = CliRunner().invoke(app, ["claims", "read"])
    assert plain.exit_code == 0, plain.output
    assert [line.split()[-1] for line in plain.stdout.splitlines() if "  matched" in line] == ["kept"]
    assert f"not measured again, read from docs/strongest.json: {benchmarks.StrongestMeasure.again}" in plain.stdout
    found = json.loads(CliRunner().invoke(app, ["claims", "read", "--json"]).stdout)
    assert (found["ok"], found["measured_again"], found["measure_with"]) == (True, False, benchmarks.StrongestMeasure.again)
    figure = found["figures"]["matched"]
    assert (figure["read"], figure["verdict"], "measured" in figure) == (0.5, "kept", False)
    text = page([read(folder / "read.toml")])
    assert "| kept |" in text
    assert f"`{benchmarks.StrongestMeasure.again}` measures it" in text
    (tmp_path / "strongest.json").write_text(json.dumps([row | {"strongest_db": [9.0, 9.0]}]))
    assert CliRunner().invoke(app, ["claims", "read"]).exit_code == 1


def test_json_is_one_object_a_line(folder: Path) -> None:
    done = CliRunner().invoke(app, ["claims", "--json"])
    assert done.exit_code == 1
    rows = {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {name: row["ok"] for name, row in rows.items()} == {"good": True, "false-claim": False}
    figure = rows["good"]["figures"]["mse_max"]
    assert (figure["filed"], figure["bar"], figure["ok"], figure["reported"]) == (1e-16, "≤ 1e-10", True, None)
    assert 0 <= figure["measured"] < 1e-10


def test_list_measures_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttackMeasure, "__call__", lambda self: pytest.fail("measured"))
    done = CliRunner().invoke(app, ["claims", "--list"])
    assert done.exit_code == 0
    assert "≤ 1e-10" in done.output


def test_unknown_claim_is_refused_with_a_suggestion_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AttackMeasure, "__call__", lambda self: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["fedpeek", "claims", "good", "goood"])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert "claim must be the ID of one, got 'goood'. Did you mean 'good'?" in " ".join(captured.err.split())


def test_interrupt_keeps_what_was_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AttackMeasure.__call__
    calls: list[int] = []

    def second_time_interrupted(self: AttackMeasure) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return honest(self)

    monkeypatch.setattr(AttackMeasure, "__call__", second_time_interrupted)
    done = CliRunner().invoke(app, ["claims", "--json"])
    assert done.exit_code == 130
    assert [json.loads(line)["id"] for line in done.stdout.splitlines() if line.startswith("{")] == ["false-claim"]


BAD = {
    "no bar": ("at_most = 1e-10", "", "a figure must have a bar"),
    "unknown setting": ("attack =", "atack =", "Did you mean 'attack'?"),
    "unknown attack": ('"linear_leak"', '"linear_lek"', "Did you mean 'linear_leak'?"),
    "unknown figure": ("figures.mse_max", "figures.mse_maks", "Did you mean 'mse_max'?"),
    "unknown kind": ('kind = "attack"', 'kind = "atack"', "Did you mean 'attack'?"),
    "ours beyond its own bar": ("ours = 1e-16", "ours = 1", "ours must keep its own bar"),
    "a figure that needs another attack": ("figures.mse_max", "figures.cpu_ratio", "figures must be ones that 'attack' gives"),
    "not TOML": ("[measure]", "[measure", "must be TOML"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD.values(), ids=BAD)
def test_a_claim_that_is_not_as_it_must_be_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(SpecError, match="mine") as refused:
        read(path)
    assert message in str(refused.value)


def test_a_measurement_that_fails_is_a_claim_that_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace('model = "linear"', 'model = "lenet"'))
    outcome = check(read(path))
    assert not outcome.holds
    assert "must support the victims of its claim" in outcome.failure
    path.write_text(GOOD.replace('attack = "linear_leak"', 'attack = "linear_leak"\nbatch = 2000'))
    assert "must be ≤ the 1797 private records" in check(read(path)).failure


def test_bars() -> None:
    bar = Figure(ours=2.0, at_least=1.0, within=0.5)
    assert [bar.holds(value) for value in (1.4, 1.5, 2.5, 2.6, math.nan)] == [False, True, True, False, False]
    assert bar.bar == "≥ 1, ≈ 2 ± 0.5"


@pytest.mark.parametrize("algorithm", ["fedsgd", "fedavg"])
def test_victims_are_those_of_a_real_run(algorithm: str, tmp_path: Path) -> None:
    of = world(training={"algorithm": algorithm, "batch_size": 4})
    view = next(v for v in map(federate(of, tmp_path / "t").observations[0].only, range(4)) if v.upload.senders == {0})
    parts = splits(of)
    trained_on = private_batches(of, 0, 1) if algorithm == "fedsgd" else [held_by(of, 0)]  # under FedAvg victim() finds the order itself
    mine = victim(network(of.model, parts.schema, of.training, of.seed), parts.schema, trained_on, of.training, seed=of.seed)
    assert mine.knowledge.num_examples == view.upload.num_examples
    assert mine.view.upload.update.kind == view.upload.update.kind
    for name, tensor in view.upload.update.tensors.items():
        assert torch.equal(mine.view.upload.update.tensors[name], tensor)
        assert torch.equal(mine.view.broadcast.parameters[name], view.broadcast.parameters[name])
    assert mine.view.broadcast.buffers.keys() == view.broadcast.buffers.keys()


def test_knowledge_holds_what_is_granted_and_no_more() -> None:
    data = config.build_plugin("data", "digits", "data").load()
    model = network(config.build_plugin("models", "linear", "model"), data.schema, LocalTraining(), 0)
    batch = Batch(data.records.inputs[:3], data.records.labels[:3])
    of = {
        labels: victim(model, data.schema, [batch], LocalTraining(batch_size=0), labels=labels).knowledge
        for labels in ("none", "counts", "exact")
    }  # type: ignore[arg-type]
    assert (of["none"].labels, of["none"].label_counts, of["none"].public) == (None, None, None)
    assert of["counts"].labels is None
    assert of["counts"].label_counts is not None
    assert int(of["counts"].label_counts.sum()) == 3
    assert of["exact"].labels is not None


def test_an_aggregate_is_the_mean_of_its_senders() -> None:
    data = config.build_plugin("data", "digits", "data").load()
    model = network(config.build_plugin("models", "mlp", "model"), data.schema, LocalTraining(), 0)
    sizes = [1, 3]
    batches = [
        Batch(part, labels) for part, labels in zip(data.records.inputs[:4].split(sizes), data.records.labels[:4].split(sizes), strict=True)
    ]
    recipe = LocalTraining(batch_size=0)
    joint = victim(model, data.schema, batches, recipe).view.upload
    whole = victim(model, data.schema, [Batch(data.records.inputs[:4], data.records.labels[:4])], recipe).view.upload
    assert (joint.senders, joint.num_examples) == (frozenset({0, 1}), 4)
    for name, tensor in whole.update.tensors.items():
        assert torch.allclose(joint.update.tensors[name], tensor, atol=1e-6)


def test_pretraining_trains() -> None:
    data = config.build_plugin("data", "digits", "data").load()
    model = network(config.build_plugin("models", "mlp", "model"), data.schema, LocalTraining(), 0)
    parameters, buffers = trained(model, data.records, steps=60, batch_size=32, learning_rate=0.1, seed=0)
    logits = torch.func.functional_call(model, {**parameters, **buffers}, (data.records.inputs,))
    assert float((logits.argmax(1) == data.records.labels).double().mean()) > 0.6


def measure(**settings: object) -> AttackMeasure:
    table = {"data": "digits", "model": "mlp", "attack": "random_guess", "batch": 2, "victims": 3, **settings}
    return config.build(AttackMeasure, table)


def test_each_seed_draws_other_victims_and_they_are_disjoint() -> None:
    several = measure(seeds=[0, 1])
    first, second = several.build(0), several.build(1)
    assert not torch.equal(first[0].truth.inputs, second[0].truth.inputs)
    stack = torch.cat([of.truth.inputs for of in first]).flatten(1)
    assert len(stack.unique(dim=0)) == 6
    two = measure(classes=2, batch=20).build(0)
    assert all(len(of.truth.labels.unique()) <= 2 for of in two)
    assert len({tuple(of.truth.labels.unique().tolist()) for of in two}) > 1


@pytest.mark.parametrize("control", ["zeroed", "shuffled", "foreign"])
def test_controls_change_the_update_and_not_the_truth(control: str) -> None:
    plain, other = measure(), measure(control=control)
    victims = plain.build(0)
    for number, of in enumerate(other.build(0)):
        assert torch.equal(of.truth.inputs, victims[number].truth.inputs)
        seen = other.tampered(of, victims, 0, number).upload.update.tensors
        assert any(not torch.equal(seen[name], tensor) for name, tensor in of.view.upload.update.tensors.items())


def test_noise_gains_nothing_over_the_floors() -> None:
    figures = measure(floors=True, victims=10)()
    assert figures["gain_db"] < 0
    assert figures["gain_db_low"] <= figures["gain_db"]
    assert figures["exact"] == figures["certified"] == 0


def test_scores_against_hand_made_answers() -> None:
    truth = Batch(torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]), torch.tensor([3, 5]))
    swapped = Reconstruction(truth.inputs.flip(0).clone(), torch.tensor([5, 3]), certificate=("proof", "proof"))
    lying = Reconstruction(torch.stack([torch.full((1, 4, 4), 0.1), torch.ones(1, 4, 4)]), torch.tensor([3, 4]), certificate=("proof", ""))
    right, wrong = summarize([Trial(truth, swapped, 1.0, None)]), summarize([Trial(truth, lying, 3.0, None)])
    assert (right["exact"], right["exact_batches"], right["certified"], right["certified_wrong"], right["counts_exact"]) == (1, 1, 1, 0, 1)
    assert (wrong["exact"], wrong["exact_batches"], wrong["certified"], wrong["certified_wrong"], wrong["labels_right"]) == (
        0.5,
        0,
        0.5,
        1,
        0.5,
    )
    assert wrong["mse_max"] == pytest.approx(0.01)
    assert wrong["psnr_db_min"] == pytest.approx(20)
    both = summarize([Trial(truth, swapped, 1.0, None), Trial(truth, lying, 3.0, None)])
    assert (both["cpu_seconds"], both["cpu_seconds_max"], both["exact_batches"]) == (2, 3, 0.5)
    twice = replace(swapped, inputs=torch.stack([truth.inputs[0]] * 2))  # one record proven twice: the second proof is of nothing
    assert summarize([Trial(truth, twice, 1.0, None)])["certified_wrong"] == 1
    three = replace(swapped, inputs=torch.cat([swapped.inputs, swapped.inputs[:1]]), certificate=("proof",) * 3)
    assert summarize([Trial(truth, three, 1.0, None)])["certified_wrong"] == 1
    blind = summarize([Trial(truth, replace(swapped, inputs=None), 1.0, None)])
    assert blind["exact"] == blind["certified"] == 0


def test_an_attack_against_itself_is_a_tie() -> None:
    figures = measure(against={"name": "random_guess"}, victims=1)()
    assert figures["difference_db"] == pytest.approx(0, abs=1e-9)
    assert figures["cpu_ratio"] > 0
    assert isinstance(measure().attack, RandomGuess)
