"""The command as a user meets it: it teaches, it refuses bad input before writing, and a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app, main
from experiments.directory import FACTS, RESULTS
from experiments.listing import entry, keys, tables
from simulator import lookup
from simulator.adversary import ThreatModel
from simulator.errors import SpecError, TranscriptError
from simulator.events import broadcast_event, upload_event
from simulator.transcript import Transcript, read
from simulator.types import Upload
from tests.federations import federate, world

ROOT = Path(__file__).parents[2]
TINY = """
name = "tiny"
attacks = ["random_guess"]
[data]
name = "digits"
[model]
name = "linear"
[federation]
clients = 4
[[arms]]
name = "none"
[[arms]]
name = "clip"
defenses = [{ name = "clip", clip_norm = 1.0 }]
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def fedpeek(*words: object, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd), **more}
    command = [sys.executable, "-m", "experiments", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def refuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """Run the command in this process; it must exit with 2 and one explanation."""
    monkeypatch.setattr(sys, "argv", ["fedpeek", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2, captured
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


BAD = {
    "unknown key": (["--set", "model.widht=3"], "got 'widht'"),
    "unknown table": (["--set", "federaton.clients=3"], "Did you mean 'federation'?"),
    "unknown name": (["--set", "model=linea"], "Did you mean 'linear'?"),
    "unknown attack": (["--set", 'attacks=["dgl"]'], "Did you mean 'dlg'?"),
    "unknown name, of models that a spec may name": (
        ["--set", "model=convent"],
        "Did you mean 'convnet'? Valid: cnn, convnet, lenet, linear, mlp, resnet18, resnet20, vit.",
    ),
    "no name, of models that a spec may name": (["--set", "model=3"], "got 3. Valid: cnn, convnet, lenet, linear, mlp, resnet18"),
    "a user's own data": (["--set", "data=mydata.csv"], "For your own data set: package.module:Class."),
    "unknown choice": (["--set", "training.algorithm=fedsdg"], "Did you mean 'fedsgd'?"),
    "wrong type": (["--set", 'federation.clients="four"'], "federation.clients must be a whole number, got 'four'"),
    "not an assignment": (["--set", "clients"], "must be of the form a.b=value"),
    "batch larger than a client's data": (
        ["--set", "training.batch_size=400"],
        "training.batch_size must be ≤ what every client holds, got 400",
    ),
    "more clients than records": (["--set", "federation.clients=2000"], "federation.clients must be ≤"),
    "attacked round never happens": (["--set", "evaluation.rounds=[3]"], "must be ≤ federation.rounds = 1"),
    "dp with batchnorm": (
        ["--set", "model=resnet20", "--set", 'arms.1.defenses=[{name="dp_sgd", clip_norm=1.0, noise_multiplier=1.0}]'],
        "BatchNorm",
    ),
    "secure aggregation below its threshold": (
        ["--set", 'arms.1.defenses=[{name="secure_aggregation", threshold=9}]'],
        "threshold must be at most the cohort of 4, got 9",
    ),
    "two per-example defenses": (
        [
            "--set",
            'arms.1.defenses=[{name="dp_sgd", clip_norm=1.0, noise_multiplier=1.0}, {name="dp_sgd", clip_norm=1.0, noise_multiplier=1.0}]',
        ],
        "at most one per-example defense",
    ),
    "delta that means nothing": (["--set", "evaluation.delta=0.1"], "delta must be"),
    "negative noise": (["--set", 'arms.1.defenses=[{name="gaussian_noise", sigma=-1.0}]'], "got -1.0"),
    "absent online data": (["--set", "data=cifar10"], "download"),
    "negative batch": (["--set", "training.batch_size=-1"], "batch_size must be ≥ 0, got -1"),
    "no epochs": (["--set", "training.epochs=0"], "epochs must be ≥ 1, got 0"),
    "momentum beyond one": (["--set", "training.momentum=5.0"], "momentum must be in [0, 1), got 5.0"),
    "learning rate that is none": (["--set", "training.learning_rate=nan"], "learning_rate must be > 0 and finite, got nan"),
    "more answers than clients": (["--set", "federation.min_clients=9"], "min_clients must be in 1..4"),
    "a round twice": (["--set", "evaluation.rounds=[1, 1]"], "rounds must differ"),
    "an attack twice": (["--set", 'attacks=["random_guess", "random_guess"]'], "attacks must differ"),
    "recorded round never happens": (["--set", "federation.record_rounds=[1, 99]"], "federation.record_rounds must lie in 1..1"),
    "public data without public records": (
        ["--set", "threat.public_data=true", "--set", "split.public=0.0001"],
        "split.public must give the public at least 1 record",
    ),
    "more candidates than the disclosed labels leave": (
        ["--set", 'threat.labels="exact"', "--set", "evaluation.candidates=500"],
        "evaluation.candidates must be ≤",
    ),
    "no such spec": (["--resume"], "--resume must name a run"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_explained_with_exit_code_2_and_nothing_is_written(
    words: list[str], message: str, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert message in refuse(capsys, monkeypatch, "run", spec, "--out", out, *words)
    assert not out.exists()


def test_unknown_example_gets_a_suggestion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Did you mean 'demo'?" in refuse(capsys, monkeypatch, "run", "dem")
    assert "got 'nosuch.toml', and there is no such file. " in refuse(capsys, monkeypatch, "run", "nosuch.toml")


def test_of_many_names_the_nearest_are_printed_and_where_all_stand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = refuse(capsys, monkeypatch, "claims", "demo-nune")
    assert re.search(r"Did you mean 'demo-none'\? Also near: .* \d+ names are valid\. See `fedpeek claims --list`\.$", told)
    told = refuse(capsys, monkeypatch, "claims", "B999")
    assert len(told) < 200, told
    told = refuse(capsys, monkeypatch, "run", "--set", 'attacks=["dgl"]')
    assert "Did you mean 'dlg'? Also near: " in told
    assert f"{len(lookup.names('attacks'))} names are valid, see `fedpeek list attacks`." in told
    assert "trap_weights" not in told


def test_occupied_directory_is_left_alone(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "--out must be empty or new" in refuse(capsys, monkeypatch, "run", spec, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    told = refuse(capsys, monkeypatch, "run", spec, "--out", tmp_path / "out" / "thesis.txt")
    assert "which is a file. Choose another name." in told
    (tmp_path / "out" / "spec.toml").touch()
    assert "Add --resume" in refuse(capsys, monkeypatch, "run", spec, "--out", tmp_path / "out")


def test_out_below_a_file_and_missing_transcripts_are_refused(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--out must be a directory that can be written" in refuse(capsys, monkeypatch, "run", spec, "--out", spec / "below")
    assert "transcript must be a directory" in refuse(capsys, monkeypatch, "attack", tmp_path / "no", "--attack", "dlg")
    for number in range(14):
        (tmp_path / "run" / "transcript" / f"arm-seed{number:02d}").mkdir(parents=True)
        (tmp_path / "run" / "transcript" / f"arm-seed{number:02d}" / "transcript.jsonl").touch()
    for given in ("run", "run/transcript"):
        told = "".join(refuse(capsys, monkeypatch, "attack", tmp_path / given).split())  # lines are folded anywhere
        assert "run/transcript/NAME,whereNAMEisoneofarm-seed00,arm-seed01," in told
        assert told.endswith("arm-seed11and2more.")


def test_help_teaches() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for word in ("fedpeek run", "fedpeek list attacks", "Exit codes", "honest-but-curious"):
        assert word in text
    for command in ("run", "attack", "audit", "list", "report"):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("command", "meaning"),
    [
        ("run", "SPEC: A TOML file or the name of an example"),
        ("attack", "TRANSCRIPT: The directory of a transcript"),
        ("report", "DIRECTORY: The directory of a run."),
        ("audit", "DIRECTORY: The directory of a run."),
        ("claims", "IDS: IDs of claims, * allowed"),
        ("list", "KIND: What to list."),
        ("list", "NAME: One of them"),
    ],
)
def test_arguments_are_explained_whatever_click_is_installed(command: str, meaning: str) -> None:
    assert meaning in CliRunner().invoke(app, [command, "--help"]).output


def test_version_is_that_of_the_distribution() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"fedpeek {tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}\n"


def test_a_list_that_is_piped_is_not_folded() -> None:
    lines = fedpeek("list", "specs", COLUMNS="60").stdout.splitlines()
    assert re.split(r"  +", lines[1]) == ["name", "what it is", "run with"]
    paths = [Path(line.rpartition("copy ")[2]) for line in lines[2:]]
    assert paths == sorted((ROOT / "experiments" / "specs").glob("*.toml"))
    assert all(line == line.rstrip() for line in lines)


def test_a_table_that_is_piped_has_the_columns_of_the_environment() -> None:
    code = "from experiments.terminal import console; print(console.width)"
    for columns, width in ((None, 100), ("60", 60)):
        environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | ({"COLUMNS": columns} if columns else {})
        told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert int(told.stdout) == width


def test_models_that_only_defenses_put_around_another_are_not_listed() -> None:
    names = [line.split()[0] for line in CliRunner().invoke(app, ["list", "models"]).stdout.splitlines()[2:]]
    assert names == ["cnn", "convnet", "lenet", "linear", "mlp", "resnet18", "resnet20", "vit"]
    assert set(lookup.names("models")) - set(names) == {"clip_norm", "frozen_first_layer", "group_norm", "no_first_bias", "precode"}


def test_list_explains_one_name() -> None:
    text = CliRunner().invoke(app, ["list", "attacks", "dlg"]).stdout
    assert "Source: Zhu et al., 2019, arXiv:1906.08935" in text
    assert re.search(r"^restarts +1 +random starts for each victim; the lowest objective wins\.$", text, flags=re.MULTILINE)
    for kind, name, word in (
        ("defenses", "dp_sgd", "C, largest L2 norm of one record's gradient"),
        ("data", "cifar10", "fetch the files when they are absent"),  # said of the class that it inherits from
        ("models", "mlp", "hidden"),
        ("metrics", "ssim", "higher is better"),
        ("specs", "lattice", "fedpeek run lattice; copy "),
    ):
        assert word in CliRunner().invoke(app, ["list", kind, name]).stdout
    for kind, name, hint in (("attacks", "dgl", "dlg"), ("metrics", "sim", "ssim"), ("specs", "latice", "lattice")):
        refused = CliRunner().invoke(app, ["list", kind, name]).exception
        assert isinstance(refused, SpecError)
        assert f"Did you mean '{hint}'?" in str(refused)


@pytest.mark.parametrize("kind", ["attacks", "defenses", "data", "models"])
def test_every_setting_has_a_default_and_a_meaning(kind: Any) -> None:
    found = [entry(kind, name) for name in lookup.names(kind)]
    assert sum(len(each.settings) for each in found) >= 8
    assert [(each.name, setting.name) for each in found for setting in each.settings if not (setting.default and setting.meaning)] == []
    if kind in ("attacks", "defenses"):
        assert [each.name for each in found if len(each.source) < 10] == []


def test_every_key_of_a_spec_is_listed_with_its_default_and_a_meaning() -> None:
    from experiments.spec import Experiment, load

    listed = {setting.name: setting for section, cls in tables().items() for setting in keys(cls, section)}
    assert set(tables()) == {"", "arms", "split", "federation", "training", "threat", "tampering", "evaluation"}
    for section, cls in tables().items():
        assert {f"{section}.{each.name}".lstrip(".") for each in dataclasses.fields(cls)} <= set(listed)
    assert {field.name for field in dataclasses.fields(Experiment) if dataclasses.is_dataclass(get_type_hints(Experiment)[field.name])} < set(tables())
    assert [name for name, setting in listed.items() if not (setting.default and len(setting.meaning) > 10)] == []
    lines = CliRunner().invoke(app, ["list", "settings"]).stdout.splitlines()
    assert lines[1].split("  ")[0] == "name"
    assert [line.split()[0] for line in lines[2:]] == list(listed)
    assert re.search(r"^training.batch_size +1 +records in a batch; 0 means all that the client holds\.$", "\n".join(lines), flags=re.MULTILINE)
    assert CliRunner().invoke(app, ["list", "settings", "threat"]).stdout.count("threat.") == len(dataclasses.fields(ThreatModel))
    assert "default: 1\n" in CliRunner().invoke(app, ["list", "settings", "training.batch_size"]).stdout
    for name, setting in listed.items():  # what is printed is what --set takes
        if name.partition(".")[0] in {"split", "federation", "training", "threat", "tampering", "evaluation"} and setting.default != "a table":
            assert load(None, [f"{name}={setting.default}"])
    with pytest.raises(SpecError, match=r"Did you mean 'training\.batch_size'"):
        entry("settings", "batch_size")


def test_a_file_that_is_not_there_is_the_example_of_its_name(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.spec import find, load, specs

    assert find("specs/lattice.toml") == specs()["lattice"]
    assert load("specs/lattice.toml") == load("lattice")
    (tmp_path / "lattice.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    assert load("lattice.toml").name == "tiny", "a file that is there comes first"
    for wrong in ("specs/latice.toml", "specs/lattice", "specs/lattice.json", "results/2026/lattice.toml"):
        with pytest.raises(SpecError, match="must be a TOML file or an example's name"):
            find(wrong)
    tried = ["run", "specs/demo.toml", "--set", "federation.clients=2000"]  # refused, but only after it has said what it would run
    assert "There is no file specs/demo.toml; running the example demo." in CliRunner().invoke(app, tried).stderr
    assert "There is no file" not in CliRunner().invoke(app, ["run", str(spec), *tried[2:]]).stderr


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("attacks", ["dlg", "fedavg_matching", "inverting_gradients", "label_recovery", "linear_leak", "random_guess"]),
        ("defenses", ["central_dp", "client_dp", "clip", "dp_sgd", "gaussian_noise", "secure_aggregation"]),
        ("data", ["cifar10-sample", "digits", "faces", "imagenet-sample", "mnist5k", "svhn", "synthetic"]),
        ("models", ["convnet", "lenet", "linear", "mlp", "resnet18", "resnet20"]),
        ("metrics", ["identified", "psnr_db", "ssim"]),
        ("settings", ["data", "driver", "training.batch_size", "arms.control"]),
        ("specs", ["demo"]),
    ],
)
def test_list_names_everything(kind: str, expected: list[str]) -> None:
    output = CliRunner().invoke(app, ["list", kind]).output
    assert [name for name in expected if name not in output] == []


def test_run_writes_what_it_promises_and_attack_and_report_go_on_from_there(spec: Path, tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    done = fedpeek("run", spec, "--out", out, "--workers", 1, HOME=str(home), XDG_CACHE_HOME="", XDG_CONFIG_HOME="")
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []
    names = {path.name for path in out.iterdir()}
    assert {"spec.toml", "transcript", RESULTS, FACTS, "summary.json", "report.html", "leakage-vs-accuracy.png"} <= names
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1
    assert [(row["defense"], row["attack"], row["view"]) for row in summary["rows"]] == [
        ("none", "random_guess", "update"), ("clip", "random_guess", "update"),
    ]  # fmt: skip
    row = summary["rows"][0]
    keys = "defense attack view victims statuses scores floor gain identified epsilon delta epsilon_for ceiling accuracy seconds upload_bytes flags"
    assert set(keys.split()) <= set(row)
    assert row["epsilon"] == "inf"
    assert len((out / RESULTS).read_text().splitlines()) == 8
    (out / "report.html").unlink()
    invoke = CliRunner().invoke  # from here on in this process, which knows nothing of the run and has imported what the command needs
    assert invoke(app, ["report", str(out)]).exit_code == 0
    assert (out / "report.html").is_file()
    attacked = invoke(app, ["attack", str(out / "transcript" / "none-seed0"), "--attack", "linear_leak"])
    assert attacked.exit_code == 0, attacked.stderr
    assert "yes" in attacked.stdout  # a linear model gives its inputs away: identified
    (lines,) = [path.read_text().splitlines() for path in out.glob("attacks/*/results.jsonl")]
    certified = [record for line in lines for record in json.loads(line)["records"]]
    assert [(record["certificate"], record["exact"]) for record in certified] == [("rank one", True)] * 4
    lone = shutil.copytree(out / "transcript" / "none-seed0", tmp_path / "elsewhere" / "deep" / "t")
    blind = invoke(app, ["attack", str(lone), "--attack", "linear_leak", "--out", str(tmp_path / "blind")])
    assert "not scored" in blind.stdout
    assert len(list((tmp_path / "blind").glob("*.png"))) == 4


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_with_the_same_results(spec: Path, tmp_path: Path) -> None:
    slow = ["--set", "federation.rounds=200", "--set", "secret=again", "--workers", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "experiments", "run", spec, "--out", killed, *slow], cwd=ROOT, env=environment)
    transcript = killed / "transcript" / "none-seed0" / "transcript.jsonl"
    deadline = time.monotonic() + 120
    while not (transcript.is_file() and transcript.stat().st_size > 20000) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    assert fedpeek("run", spec, "--out", killed, "--resume", *slow).returncode == 0
    assert fedpeek("run", spec, "--out", whole, *slow).returncode == 0
    assert _scores(killed) == _scores(whole)
    other = fedpeek("run", spec, "--out", killed, "--resume")
    assert other.returncode == 2
    assert "same spec" in other.stderr


def _scores(out: Path) -> list[object]:
    return [json.loads(line)["records"] for line in (out / RESULTS).read_text().splitlines()]


@pytest.mark.slow
def test_run_that_lost_a_client_does_not_exit_with_success(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(
        "from dataclasses import dataclass\nfrom simulator.defense import Defense\n\n\n"
        "@dataclass(frozen=True)\nclass Fragile(Defense):\n    def on_update(self, update, context):\n"
        "        if context.client == 2:\n            raise RuntimeError('battery empty')\n        return update\n"
    )
    path = tmp_path / "spec.toml"
    path.write_text(TINY.replace('[{ name = "clip", clip_norm = 1.0 }]', '["fragile:Fragile"]'))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "experiments", "run", path, "--out", tmp_path / "out"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3, done.stderr
    assert "battery empty" in done.stderr
    rows = {row["defense"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]}
    assert "clients_lost" in rows["clip"]["flags"]
    assert "clients_lost" not in rows["none"]["flags"]


BROKEN = {
    "raises": "raise RuntimeError('boom')",
    "answers nothing": "return None",
    "answers no records": "return Reconstruction(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))",
    "answers another shape": "return Reconstruction(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))",
}


def test_attacks_that_misbehave_are_counted_failures_and_no_success(tmp_path: Path) -> None:
    from experiments.conclude import conclude
    from experiments.run import run
    from experiments.spec import load

    names = [f"broken{place}:Broken" for place in range(len(BROKEN))]
    for name, body in zip(names, BROKEN.values(), strict=True):
        (tmp_path / f"{name.split(':')[0]}.py").write_text(
            "import torch\nfrom dataclasses import dataclass\nfrom simulator.adversary import Reconstruction\n\n\n"
            "@dataclass(frozen=True)\nclass Broken:\n    def supports(self, view, knowledge):\n        return None\n\n"
            f"    def __call__(self, view, knowledge, *, rng):\n        {body}\n"
        )
    path = tmp_path / "spec.toml"
    path.write_text(TINY.replace('["random_guess"]', json.dumps(names)))
    sys.path.insert(0, str(tmp_path))
    try:
        assert run(load(str(path)), tmp_path / "out", workers=1) == []
        _, _, warnings = conclude(tmp_path / "out")
    finally:
        sys.path.remove(str(tmp_path))
    assert len(warnings) == 2 * (len(names) + 1)  # in each arm, each and the best of them on each victim
    assert all("no trial ended well" in warning for warning in warnings)
    trials = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert [(trial["attack"], trial["status"]) for trial in trials].count((names[0], "failed")) == 8
    assert [trial["status"] for trial in trials] == ["failed"] * 8 * len(names)
    assert not any(record["identified"] for trial in trials for record in trial["records"])


def test_each_run_draws_its_own_secret_which_the_report_does_not_show(spec: Path, tmp_path: Path) -> None:
    from experiments.conclude import conclude
    from experiments.run import run
    from experiments.spec import load

    found = []
    for name in ("a", "b"):
        run(load(str(spec)), tmp_path / name, workers=1)
        secret = tomllib.loads((tmp_path / name / "spec.toml").read_text())["secret"]
        assert len(secret) == 32
        assert not any(secret in path.read_text() for path in (tmp_path / name / "transcript").rglob("*.jsonl"))
        found.append(secret)
    assert found[0] != found[1]
    _, report, _ = conclude(tmp_path / "a")
    assert found[0] not in report.read_text()
    again = load(str(tmp_path / "a" / "spec.toml"))
    assert again.secret == found[0]


@pytest.mark.slow
def test_interrupted_run_leaves_no_process_behind(spec: Path, tmp_path: Path) -> None:
    """SIGTERM to the command: its workers end, and with them whatever they started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDPEEK_MARK": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "experiments",
        "run",
        spec,
        "--out",
        tmp_path / "out",
        "--set",
        "federation.rounds=5000",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("transcript/*/transcript.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert [command for command in _marked(str(tmp_path)) if "multiprocessing.resource_tracker" not in command] == []
    deadline = time.monotonic() + 10  # Python's tracker sees our pipe close only when we are no more, and ends then
    while _marked(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _marked(str(tmp_path)) == []


def _marked(mark: str) -> list[str]:
    """Command lines of the processes whose environment carries the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FEDPEEK_MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_specs_that_ship_are_sound() -> None:
    from experiments.refusals import check
    from experiments.spec import load, specs

    assert {"demo", "dlg-digits", "dlg-faces", "cifar10", "fedavg"} <= set(specs())
    for name in specs():
        experiment = load(name)
        check(experiment)
        assert (experiment.name, experiment.control is not None) == (name, True)


@pytest.mark.slow
def test_newcomers_file_is_listed_tested_and_runs(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 30
    for package in ("simulator", "clients", "server", "attacks", "defenses", "experiments", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "attacks" / "update" / "my_attack.py").write_text(code)
    (tmp_path / "spec.toml").write_text(TINY.replace('["random_guess"]', '["my_attack"]'))
    assert "my_attack" in fedpeek("list", "attacks", cwd=tmp_path).stdout
    done = fedpeek("run", "spec.toml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/attacks", "-k", "my_attack", "-p", "no:cacheprovider"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout


def test_set_reaches_into_lists_and_bare_names() -> None:
    from experiments.spec import load

    experiment = load(None, ["model=convnet", "model.width=4", "arms.1.defenses.0.clip_norm=2.5", "seeds=[7]", 'attacks=["dlg"]'])
    assert (experiment.arms[1].defenses[0].clip_norm, experiment.seeds) == (2.5, (7,))  # type: ignore[attr-defined]
    with pytest.raises(SpecError, match="must be an index below"):
        load(None, ["arms.99.name=x"])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_deployment_is_taken_down_by_its_workers(stop: signal.Signals, spec: Path, tmp_path: Path) -> None:
    """Flower's processes are children of fedpeek's workers: they must not outlive the command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDPEEK_MARK": str(tmp_path)}
    words = ["run", spec, "--out", tmp_path / "out", "--set", 'driver="deployment"', "--set", "federation.clients=2", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "experiments", *map(str, words)], cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 180
    while len(_marked(str(tmp_path))) < 9 and time.monotonic() < deadline:  # command, tracker, workers, two SuperLinks, SuperNodes
        time.sleep(0.2)
    assert len(_marked(str(tmp_path))) >= 9
    (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)  # a terminal's Ctrl-C reaches the whole group
    assert process.wait(90) == (143 if stop == signal.SIGTERM else 130)
    time.sleep(1)
    assert _marked(str(tmp_path)) == []


@pytest.mark.slow
def test_recovered_labels_are_judged_as_labels(spec: Path, tmp_path: Path) -> None:
    words = ["run", spec, "--out", tmp_path / "out", "--set", 'attacks=["label_recovery"]', "--set", "federation.clients=40", "--workers", 1]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.stderr
    for row in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]:
        assert row["gain"] is None
        assert row["identified"] is None
        assert row["scores"]["label_accuracy"]["mean"] == 1.0
        assert row["scores"]["label_accuracy"]["low"] > row["scores"]["label_accuracy"]["floor"]
        assert "floor_not_beaten" not in row["flags"]
    assert "labels recovered" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("command", ["run", "attack"])
@pytest.mark.parametrize("name", [name for name in lookup.names("attacks") if hasattr(lookup.get("attacks", name)(), "seconds")])
def test_budget_of_nothing_is_bad_input(
    name: str, command: str, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["run", spec, "--set", f'attacks=[{{name="{name}", seconds=0.0}}]']
    if command == "attack":
        transcript = Transcript(tmp_path / "t", {})
        transcript.append("broadcast", 1, {"training": {}}, {"parameters/w": torch.zeros(1)})
        transcript.close("ok")
        words = ["attack", tmp_path / "t", "--attack", name, "--set", "seconds=0.0"]
    explained = refuse(capsys, monkeypatch, *words, "--out", out)
    assert "seconds" in explained
    assert "must be > 0, got 0.0" in explained
    assert not out.exists()


def test_budget_of_a_users_own_attack_is_checked(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hasty.py").write_text("from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Hasty:\n    seconds: float = 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "seconds of hasty:Hasty must be > 0, got 0.0" in refuse(capsys, monkeypatch, "run", spec, "--set", 'attacks=["hasty:Hasty"]')


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    """Three rounds of four clients, outside of any run."""
    federate(world(model={"name": "mlp", "hidden": [16]}, federation={"rounds": 3}), tmp_path / "kept" / "deep" / "t")
    return tmp_path / "kept" / "deep" / "t"


def altered(transcript: Path, out: Path, change: Callable[[Upload], Upload]) -> Path:
    """The transcript written again, whole and with valid hashes, with the upload of client 1 in round 2 changed."""
    record = read(transcript)
    writer = Transcript(out, {key: value for key, value in record.header.items() if key not in ("event", "kind", "round", "previous", "digest")})
    for observation in record.observations:
        number = observation.broadcast.round
        writer.append("broadcast", number, *broadcast_event(observation.broadcast))
        for upload in observation.uploads:
            wanted = number == 2 and upload.senders == {1}
            writer.append("upload", number, *upload_event(change(upload) if wanted else upload))
    writer.close("ok")
    return out


def with_tensors(upload: Upload, change: Callable[[torch.Tensor], torch.Tensor]) -> Upload:
    name, *others = upload.update.tensors
    tensors = {name: change(upload.update.tensors[name]), **{other: upload.update.tensors[other] for other in others}}
    return replace(upload, update=replace(upload.update, tensors=tensors))


STRANGE: dict[str, tuple[Callable[[Upload], Upload], str]] = {
    "NaN": (lambda upload: with_tensors(upload, lambda tensor: tensor * torch.nan), "NaN"),
    "of another model": (lambda upload: with_tensors(upload, lambda tensor: tensor[..., :-1].clone()), "shape"),
    "without a tensor": (
        lambda upload: replace(upload, update=replace(upload.update, tensors=dict(list(upload.update.tensors.items())[1:]))),
        "another model",
    ),
    "no records": (lambda upload: replace(upload, num_examples=0), "must be"),
    "of more records than a batch": (lambda upload: replace(upload, num_examples=5), "5"),
}


@pytest.mark.parametrize(("change", "word"), STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("attack", ["dlg", "linear_leak", "strongest"])
def test_strange_upload_is_refused_with_its_reason_and_the_others_are_attacked(
    attack: str, change: Callable[[Upload], Upload], word: str, transcript: Path, tmp_path: Path
) -> None:
    settings = ["--set", "evaluations=2"] if attack == "dlg" else ["--set", "seconds=0.5"] if attack == "strongest" else []
    done = CliRunner().invoke(
        app, ["attack", str(altered(transcript, tmp_path / "t", change)), "--attack", attack, *settings, "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 3, done.output
    text = " ".join(done.stderr.split())
    assert text.count("missing") == 1, text
    assert "round 2, client 1: unsupported: " in text
    assert " must " in text
    assert word in text
    assert len(list((tmp_path / "out").glob("*.png"))) == 11


def test_transcript_cut_short_is_attacked_up_to_its_last_whole_round(transcript: Path, tmp_path: Path) -> None:
    path = transcript / "transcript.jsonl"
    body = path.read_bytes()
    lines = body.splitlines(keepends=True)
    third = next(i for i, line in enumerate(lines) if json.loads(line)["round"] == 3)
    for place, (kept, sentence, pictures) in enumerate(
        [
            (b"".join(lines[: third + 2])[:-30], "cut short in round 3", 8),  # half a line: a kill while it was written
            (b"".join(lines[:-1]), "cut short after round 3", 12),
        ]
    ):
        path.write_bytes(kept)
        out = tmp_path / f"out{place}"
        done = CliRunner().invoke(app, ["attack", str(transcript), "--attack", "linear_leak", "--out", str(out)])
        assert done.exit_code == 3, done.output
        assert sentence in " ".join(done.stderr.split())
        assert len(list(out.glob("*.png"))) == pictures
        path.write_bytes(body)
    second = next(i for i, line in enumerate(lines) if json.loads(line)["round"] == 2)
    path.write_bytes(b"".join(lines[: second - 1]))  # not one whole round
    refused = CliRunner().invoke(app, ["attack", str(transcript), "--attack", "linear_leak"]).exception
    assert isinstance(refused, TranscriptError)
    assert "cut short in round 1" in str(refused)
    path.write_bytes(body.replace(b'"num_examples": 1', b'"num_examples": 2', 1))
    refused = CliRunner().invoke(app, ["attack", str(transcript), "--attack", "linear_leak"]).exception
    assert isinstance(refused, TranscriptError)  # exits with 1
    assert "must be unaltered" in str(refused)


def test_damaged_tensor_file_costs_what_was_in_it_and_no_more(transcript: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (transcript / "transcript.jsonl").read_text().splitlines()]
    upload = next(event for event in events if event["kind"] == "upload" and event["round"] == 2)
    broadcast = next(event for event in events if event["kind"] == "broadcast" and event["round"] == 3)
    (transcript / upload["file"]).write_bytes(b"damaged")
    (transcript / broadcast["file"]).unlink()
    before = set(tmp_path.parent.iterdir()) | set(tmp_path.iterdir()) | set((tmp_path / "kept").iterdir())
    done = CliRunner().invoke(app, ["attack", str(transcript), "--attack", "linear_leak"])
    assert done.exit_code == 3, done.output
    text = " ".join(done.stderr.split())
    assert f"round 2, client {upload['senders'][0]}: damaged: {upload['file']} of round 2 must match its digest, got an altered file" in text
    assert "round 3, every client: damaged: " in text
    assert text.count("missing") == 2, "nothing else is"
    assert len(list(transcript.glob("attacks/*/*.png"))) == 4 + 3, "all others are attacked, and written into the transcript's own directory"
    assert set(tmp_path.parent.iterdir()) | set(tmp_path.iterdir()) | set((tmp_path / "kept").iterdir()) == before
    with pytest.raises(TranscriptError, match="must match its digest"):
        read(transcript)
    for event in events:
        (transcript / event.get("file", "none")).unlink(missing_ok=True)
    nothing = CliRunner().invoke(app, ["attack", str(transcript), "--attack", "linear_leak"]).exception
    assert isinstance(nothing, TranscriptError)
    assert "a broadcast that can be read" in str(nothing)


def test_attack_on_a_cut_transcript_of_a_run_is_scored(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert CliRunner().invoke(app, ["run", str(spec), "--out", str(out), "--set", "federation.rounds=2", "--workers", "1"]).exit_code == 0
    path = out / "transcript" / "none-seed0" / "transcript.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
    done = CliRunner().invoke(app, ["attack", str(path.parent), "--attack", "linear_leak"])
    assert done.exit_code == 3, done.output
    assert "cut short in round 2" in " ".join(done.stderr.split())
    assert done.stdout.count(" yes ") == 4


WORKERS = {
    "negative": ("-1", "--workers must be a number ≥ 0, ray, or ray:HOST:PORT, got '-1'"),
    "a word": ("many", "got 'many'"),
    "no port": ("ray:somewhere", "must name the cluster's head, got 'somewhere'"),
    "nobody there": ("ray:127.0.0.1:1", "must name a Ray cluster that answers, got 127.0.0.1:1"),
}


@pytest.mark.parametrize(("workers", "message"), WORKERS.values(), ids=WORKERS)
def test_workers_that_cannot_be_had_are_bad_input(
    workers: str, message: str, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert message in refuse(capsys, monkeypatch, "run", spec, "--out", out, "--workers", workers)
    assert not out.exists()


def test_ray_must_be_installed_and_the_driver_must_leave_it_alone(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["run", spec, "--out", out, "--workers", "ray"]
    assert "each starts a Ray of its own" in refuse(capsys, monkeypatch, *words, "--set", 'driver="simulation"')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fedpeek[simulation]'" in refuse(capsys, monkeypatch, *words)
    assert not out.exists()


def test_a_worker_that_dies_takes_only_its_own_task_along() -> None:
    from experiments.workers import each

    assert sorted(each([3, 4, 5], math.factorial, 2)) == [(3, 6, ""), (4, 24, ""), (5, 120, "")]
    deaths = list(each([5, 7, 9], os._exit, 2))
    assert sorted(deaths) == [(code, None, f"its process died with exit code {code}") for code in (5, 7, 9)]


STOPPED = """
import atexit, os, pathlib, signal, sys, threading, time
from experiments.workers import each

def job(number):
    atexit.register(time.sleep, 0.5)  # as what ends the attack's process takes its time
    pathlib.Path(f"started{number}").touch()
    time.sleep(60)

def stop(whom):
    while len(list(pathlib.Path().glob("started*"))) < 2:
        time.sleep(0.05)
    whom(0 if whom is os.killpg else os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=stop, args=(getattr(os, sys.argv[1]),), daemon=True).start()
    list(each([1, 2, 3], job, 2))
"""


@pytest.mark.parametrize("whom", ["kill", "killpg"])
def test_workers_that_are_stopped_print_nothing(whom: str, tmp_path: Path) -> None:
    """A group's SIGTERM, as of ``timeout``, reaches a worker twice: from outside, and from the run that ends it."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "stopped.py", whom]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_a_worker_for_each_core_that_may_be_used() -> None:
    from experiments.workers import cores

    mask = os.sched_getaffinity(0)
    assert 1 <= cores() <= len(mask)
    os.sched_setaffinity(0, {min(mask)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, mask)


@pytest.mark.slow
def test_run_over_ray_gives_the_bits_of_local_workers_and_names_what_failed(spec: Path, tmp_path: Path) -> None:
    words = ["run", spec, "--set", 'attacks=["linear_leak", "random_guess"]', "--set", "secret=again"]
    for name, workers in (("local", "2"), ("ray", "ray")):
        done = fedpeek(*words, "--out", tmp_path / name, "--workers", workers)
        assert done.returncode == 0, done.stderr
    local, ray = (_trials(tmp_path / name) for name in ("local", "ray"))
    assert local == ray
    assert len(local) == 16
    for path in (tmp_path / "local" / "reconstructions").glob("*"):
        assert path.read_bytes() == (tmp_path / "ray" / "reconstructions" / path.name).read_bytes()
    (tmp_path / "fragile.py").write_text(
        "import os\nfrom dataclasses import dataclass\nfrom simulator.defense import Defense\n\n\n"
        "@dataclass(frozen=True)\nclass Fragile(Defense):\n    def on_update(self, update, context):\n        os._exit(9)\n"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = fedpeek(*words, "--set", 'arms.1.defenses=["fragile:Fragile"]', "--out", tmp_path / "dead", "--workers", "ray", PYTHONPATH=paths)
    assert done.returncode == 3, done.stderr
    assert "failed clip, seed 0" in " ".join(done.stderr.split())


def _trials(out: Path) -> dict[tuple[object, ...], object]:
    """All that is known of each trial but for how long it took."""
    trials = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    timed = ("seconds", "cpu_seconds")
    return {(t["arm"], t["attack"], *t["senders"]): {key: value for key, value in t.items() if key not in timed} for t in trials}


def test_estimate_times_a_sample_says_how_long_and_writes_nothing(spec: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["run", str(spec), "--estimate", "--out", str(tmp_path / "out")])
    assert told.exit_code == 0
    assert "2 arms × 1 seed = 2 federations; 1 attack × 8 uploads = 8 reconstructions" in told.output
    assert re.search(r"About \d+ (s|min) on \d+ workers? .* in 2 of 2 kinds of arms", " ".join(told.output.split()))
    assert "No bound is certain" in told.output or "Certain is only" in told.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_may_be_audited_at_once(spec: Path, tmp_path: Path) -> None:
    noise = 'arms.1.defenses=[{name="dp_sgd", clip_norm=1.0, noise_multiplier=1.0}]'
    words = ["run", str(spec), "--out", str(tmp_path / "out"), "--workers", "1", "--audit", "--set", noise, "--set", "training.batch_size=1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "within the ceiling of" in done.output
    assert "none: not audited" in done.output
