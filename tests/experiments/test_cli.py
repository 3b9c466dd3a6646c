"""The command as a user meets it: it teaches, it refuses bad input before writing, and a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
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


def test_occupied_directory_is_left_alone(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "--out must be empty or new" in refuse(capsys, monkeypatch, "run", spec, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_out_below_a_file_and_missing_transcripts_are_refused(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--out must be a directory that can be written" in refuse(capsys, monkeypatch, "run", spec, "--out", spec / "below")
    assert "transcript must be a directory" in refuse(capsys, monkeypatch, "attack", tmp_path / "no", "--attack", "dlg")


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
    assert fedpeek("report", out).returncode == 0
    assert (out / "report.html").is_file()
    attacked = fedpeek("attack", out / "transcript" / "none-seed0", "--attack", "linear_leak")
    assert attacked.returncode == 0, attacked.stderr
    assert "yes" in attacked.stdout  # a linear model gives its inputs away: identified
    (lines,) = [path.read_text().splitlines() for path in out.glob("attacks/*/results.jsonl")]
    certified = [record for line in lines for record in json.loads(line)["records"]]
    assert [(record["certificate"], record["exact"]) for record in certified] == [("rank one", True)] * 4
    lone = shutil.copytree(out / "transcript" / "none-seed0", tmp_path / "elsewhere" / "deep" / "t")
    blind = fedpeek("attack", lone, "--attack", "linear_leak", "--out", tmp_path / "blind")
    assert "not scored" in blind.stdout
    assert len(list((tmp_path / "blind").glob("*.png"))) == 4


def test_killed_run_goes_on_and_ends_with_the_same_results(spec: Path, tmp_path: Path) -> None:
    slow = ["--set", "federation.rounds=200", "--workers", "1"]
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


BROKEN = {
    "raises": "raise RuntimeError('boom')",
    "answers nothing": "return None",
    "answers no records": "return Reconstruction(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))",
    "answers another shape": "return Reconstruction(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_attack_that_misbehaves_is_a_counted_failure_and_no_success(body: str, tmp_path: Path) -> None:
    from experiments.conclude import conclude
    from experiments.run import run
    from experiments.spec import load

    name = f"broken{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom dataclasses import dataclass\nfrom simulator.adversary import Reconstruction\n\n\n"
        "@dataclass(frozen=True)\nclass Broken:\n    def supports(self, view, knowledge):\n        return None\n\n"
        f"    def __call__(self, view, knowledge, *, rng):\n        {body}\n"
    )
    path = tmp_path / "spec.toml"
    path.write_text(TINY.replace('"random_guess"', f'"{name}:Broken"'))
    sys.path.insert(0, str(tmp_path))
    try:
        assert run(load(str(path)), tmp_path / "out", workers=1) == []
        _, _, warnings = conclude(tmp_path / "out")
    finally:
        sys.path.remove(str(tmp_path))
    assert len(warnings) == 2
    assert all("no trial ended well" in warning for warning in warnings)
    trials = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert [trial["status"] for trial in trials] == ["failed"] * 8
    assert not any(record["identified"] for trial in trials for record in trial["records"])


def test_each_run_draws_its_own_secret_which_the_report_does_not_show(spec: Path, tmp_path: Path) -> None:
    from experiments.conclude import conclude
    from experiments.run import run
    from experiments.spec import load

    found = []
    for name in ("a", "b"):
        run(load(str(spec)), tmp_path / name, workers=1)
        _, report, _ = conclude(tmp_path / name)
        secret = tomllib.loads((tmp_path / name / "spec.toml").read_text())["secret"]
        assert len(secret) == 32
        assert secret not in report.read_text()
        assert not any(secret in path.read_text() for path in (tmp_path / name / "transcript").rglob("*.jsonl"))
        found.append(secret)
    assert found[0] != found[1]
    again = load(str(tmp_path / "a" / "spec.toml"))
    assert again.secret == found[0]


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
    assert _marked(str(tmp_path)) == []


def _marked(mark: str) -> list[str]:
    """Processes whose environment carries the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FEDPEEK_MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_specs_that_ship_are_sound() -> None:
    from experiments.spec import check, load, specs

    assert {"demo", "dlg-digits", "dlg-faces", "cifar10", "fedavg"} <= set(specs())
    for name in specs():
        experiment = load(name)
        check(experiment)
        assert (experiment.name, experiment.control is not None) == (name, True)


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


def test_recovered_labels_are_judged_as_labels(spec: Path, tmp_path: Path) -> None:
    done = fedpeek("run", spec, "--out", tmp_path / "out", "--set", 'attacks=["label_recovery"]', "--set", "federation.clients=40")
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]:
        assert row["gain"] is None
        assert row["identified"] is None
        assert row["scores"]["label_accuracy"]["mean"] == 1.0
        assert row["scores"]["label_accuracy"]["low"] > row["scores"]["label_accuracy"]["floor"]
        assert "floor_not_beaten" not in row["flags"]
    assert "labels recovered" in (tmp_path / "out" / "report.html").read_text()
