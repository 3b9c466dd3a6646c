"""The command as a user meets it: it teaches, it refuses bad input before writing, and a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app, main
from experiments.run import FACTS, RESULTS
from simulator.errors import SpecError

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


def fedpeek(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
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


def test_occupied_directory_is_left_alone(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "--out must be empty or new" in refuse(capsys, monkeypatch, "run", spec, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_help_teaches() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for word in ("fedpeek run", "fedpeek list attacks", "Exit codes", "honest-but-curious"):
        assert word in text
    for command in ("run", "attack", "list", "report"):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("attacks", ["dlg", "fedavg_matching", "inverting_gradients", "label_recovery", "linear_leak", "random_guess"]),
        ("defenses", ["central_dp", "client_dp", "clip", "dp_sgd", "gaussian_noise", "secure_aggregation"]),
        ("data", ["cifar10-sample", "digits", "faces", "imagenet-sample", "mnist5k", "svhn", "synthetic"]),
        ("models", ["convnet", "lenet", "linear", "mlp", "resnet18", "resnet20"]),
        ("metrics", ["identified", "psnr_db", "ssim"]),
        ("specs", ["demo"]),
    ],
)
def test_list_names_everything(kind: str, expected: list[str]) -> None:
    output = CliRunner().invoke(app, ["list", kind]).output
    assert [name for name in expected if name not in output] == []


def test_run_writes_what_it_promises_and_attack_and_report_go_on_from_there(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = fedpeek("run", spec, "--out", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
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
    assert fedpeek("report", out).returncode == 0
    assert (out / "report.html").is_file()
    attacked = fedpeek("attack", out / "transcript" / "none-seed0", "--attack", "linear_leak")
    assert attacked.returncode == 0, attacked.stderr
    assert "yes" in attacked.stdout  # a linear model gives its inputs away: identified
    lone = shutil.copytree(out / "transcript" / "none-seed0", tmp_path / "elsewhere" / "deep" / "t")
    blind = fedpeek("attack", lone, "--attack", "linear_leak", "--out", tmp_path / "blind")
    assert "not scored" in blind.stdout
    assert len(list((tmp_path / "blind").glob("*.png"))) == 4


def test_killed_run_goes_on_and_ends_with_the_same_results(spec: Path, tmp_path: Path) -> None:
    slow = ["--set", "federation.rounds=400", "--workers", "1"]
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


def test_specs_that_ship_are_sound() -> None:
    from experiments.spec import check, load, specs

    for name in specs():
        check(load(name))


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
