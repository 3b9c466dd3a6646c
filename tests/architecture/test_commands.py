"""Every command that a help text, README or CONTRIBUTING shows is one that works: parsed by the command itself, its spec loaded."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from experiments.claims.claim import select
from experiments.cli import HELP, app
from experiments.listing import entry
from experiments.refusals import check
from experiments.spec import find, load
from simulator import config, lookup
from simulator.errors import SpecError
from simulator.registry import registered

ROOT = Path(__file__).parents[2]
COMMANDS: click.Group = typer.main.get_command(app)  # type: ignore[assignment]
START = re.compile(r"^(?:\.venv/bin/)?(fedpeek|python -m|python3 -m)(?:$| +(.*))")
PLACEHOLDERS = {"ID", "NAME", "package.module:Class"}
"""Words for what the reader has; not looked up."""


def shown(text: str) -> Iterator[str]:
    """Commands among inline code, shell blocks and the lines of a help text, without what is said of them."""
    fences = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in fences for line in block.splitlines()] + [
        " ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)
    ]
    lines += [line.strip() for line in rest.splitlines() if line.startswith("  ")]
    for line in lines:
        for part in re.split(r" && |\s+#\s|\s{3,}", line):
            if START.match(part.strip()):
                yield part.strip()


def texts() -> Iterator[tuple[str, str]]:
    yield "fedpeek --help", HELP
    for name, command in COMMANDS.commands.items():
        helps = [command.help, *(getattr(each, "help", None) for each in command.params)]
        yield f"fedpeek {name} --help", "\n".join(filter(None, helps))
    for name in ("README.md", "CONTRIBUTING.md"):
        yield name, (ROOT / name).read_text(encoding="utf-8")


SHOWN = sorted({(command, where) for where, text in texts() for command in shown(text)})
UNLIKE = sorted({command for command, _ in SHOWN})


def verify(command: str) -> None:
    """Raise if the command would refuse its words: nothing is run."""
    program, words = START.match(command).groups("")  # type: ignore[union-attr]
    if program != "fedpeek":
        module, *more = shlex.split(words)
        assert importlib.util.find_spec(module) is not None, module
        assert [word for word in more if word.startswith("tests/") and not (ROOT / word).exists()] == []
        return
    name, *rest = shlex.split(words) or ["--help"]
    if name in ("--help", "--version"):
        return
    assert name in COMMANDS.commands, name
    if not rest:
        return  # a command that is spoken of
    given = COMMANDS.commands[name].make_context(name, rest).params
    if name == "run":
        check(load(given["spec"], given["assign"] or ()))
    elif name == "claims":
        assert select([each for each in given["ids"] or () if each not in PLACEHOLDERS])
    elif name == "attack" and given["attack"] not in PLACEHOLDERS:
        table = {"name": given["attack"]}
        for assignment in given["assign"] or ():
            table = config.override(table, assignment)
        config.build_plugin("attacks", table, "attack")
    elif name == "list" and given["name"] not in {None, *PLACEHOLDERS}:
        entry(given["kind"], given["name"])


@pytest.mark.parametrize("command", UNLIKE)
def test_shown_commands_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """:func:`verify` raises where one does not."""
    (tmp_path / "my.toml").write_text(find("demo").read_text(encoding="utf-8"))  # the reader's own
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registered, ("attacks", "my_attack"), lookup.get("attacks", "random_guess"))  # CONTRIBUTING's new file
    verify(command)


def test_commands_are_found() -> None:
    found: dict[str, set[str]] = {}
    for command, where in SHOWN:
        found.setdefault(where, set()).add(command)
    assert {"fedpeek run", "fedpeek run --set training.batch_size=2", "fedpeek list attacks", "fedpeek claims ID"} <= found[
        "fedpeek --help"
    ]
    assert {"fedpeek run lattice", "python -m tests.smoke DIRECTORY", "fedpeek run my.toml --out my-run --resume"} <= found["README.md"]
    assert """fedpeek run --set 'attacks=["my_attack"]'""" in found["CONTRIBUTING.md"]
    assert "fedpeek audit" in found["fedpeek run --help"]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("fedpeek run --set model.width=16", SpecError),  # what the help once showed
        ("fedpeek run nowhere.toml", SpecError),
        ("fedpeek claims B99", SpecError),
        ("fedpeek attack RUN/t --attack dlg --set stepz=3", SpecError),
        ("fedpeek list attacks dgl", SpecError),
        ("fedpeek list atacks", click.UsageError),
        ("fedpeek run --sett a.b=1", click.UsageError),
        ("fedpeek prun", AssertionError),
        ("python -m experiments.nothing", AssertionError),
    ],
)
def test_wrong_commands_would_be_seen(command: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        verify(command)


def test_the_example_in_the_refusal_of_an_assignment_works() -> None:
    with pytest.raises(SpecError) as refused:
        config.override({}, "clients")
    assert str(refused.value).endswith("Example: --set training.learning_rate=0.05")
    assert load(None, [str(refused.value).rpartition("--set ")[2]]).training.learning_rate == 0.05
