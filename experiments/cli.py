"""The command ``fedpeek``: run an experiment, attack a recorded transcript, list what there is, write the report again.

One module, if a long one: thin commands, each its options, its help and a call, which are read as a list.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from experiments.bars import progress_bars
from experiments.listing import HEADINGS, OF_CLASSES, Listed, entry, rows
from experiments.terminal import console, errors, print_table, say, warn
from simulator.errors import FedpeekError, SpecError

if TYPE_CHECKING:
    from experiments.spec import Experiment

OK, ERROR, BAD_INPUT, INCOMPLETE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
"""Exit codes: all well; an error; bad input, nothing written; finished but clients, tasks or observations were lost; Ctrl-C; SIGTERM."""

HELP = """
Shows what a federated-learning server can see.

fedpeek runs a real Flower federation, records exactly what its honest-but-curious server receives, reconstructs the clients'
private records from that, and puts leakage, formal guarantee, accuracy and cost of every defense side by side.

[bold]Start here[/bold]

  fedpeek run                                 the demo; 2.5 CPU minutes, 1:40 on two idle cores
  fedpeek run --set training.batch_size=2     the same with one setting changed
  fedpeek list attacks                        what there is; also defenses, data, models, metrics, specs
  fedpeek list attacks dlg                    one of them: its source, and what each setting means
  fedpeek list settings                       every key of a spec, its default and its meaning
  fedpeek run my.toml --out my-run            your own experiment; copy one of `fedpeek list specs` to start
  fedpeek attack my-run/transcript/none-seed0 --attack dlg
  fedpeek audit my-run                        does any attack beat a guarantee's ceiling? then the guarantee is wrong
  fedpeek claims --list                       every figure that is filed with its bar; `fedpeek claims ID` measures it again

[bold]Exit codes[/bold]  0 all well · 1 error, or a claim or guarantee that does not hold · 2 bad input, nothing written
3 finished, but something was lost · 130 Ctrl-C · 143 SIGTERM
"""

# Arguments are explained in the docstrings: click 8.5 forgets the help of an Argument of typer < 0.21, which Flower asks for.
app = typer.Typer(help=HELP, rich_markup_mode="rich", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="a.b=v", help="Change one setting; may be repeated. Values are TOML; a number in the path indexes a list."
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedpeek {metadata.version('fedpeek')}")
        raise typer.Exit(OK)


@app.callback()
def fedpeek(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)] = False,
) -> None:
    """Take the options of the command itself; its help is :data:`HELP`."""


@app.command()
def run(
    spec: Annotated[str | None, typer.Argument(show_default=False)] = None,
    assign: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; must be new or empty. Default: fedpeek-out/NAME-TIME.", show_default=False)
    ] = None,
    workers: Annotated[
        str, typer.Option(metavar="N|ray[:HOST:PORT]", help="Worker processes; 0 means one for each core. ray sends the tasks over Ray.")
    ] = "0",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; it must have the same spec.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Check the spec, time a few arms on one victim each (a minute), say how long; write nothing.")
    ] = False,
    audit: Annotated[bool, typer.Option("--audit", help="Then audit the run's guarantees, as `fedpeek audit` does.")] = False,
) -> None:
    """Run an experiment: federate, record, attack, compare; print the table and write the report.

    SPEC: A TOML file or the name of an example; the demo if left out.

    Writes spec.toml (resolved), transcript/, results.jsonl (one line a trial), facts.jsonl, summary.json, report.html and PNGs.
    Ctrl-C leaves a run that --resume completes.
    """
    from experiments import spec as specs
    from experiments.arms import slug
    from experiments.refusals import check
    from experiments.run import run as run_experiment
    from experiments.workers import cores, parse

    if resume and out is None:
        raise SpecError("--resume must come with --out, got none. Name the directory of the run.")
    if spec is not None and (found := specs.find(spec)) != Path(spec) and Path(spec).suffix:
        say(f"There is no file {spec}; running the example {found.stem}.")
    experiment, at_once = specs.load(spec, assign or ()), parse(workers)
    if estimate:
        check(experiment)
        _estimate(experiment, at_once if isinstance(at_once, int) and at_once else cores())
        raise typer.Exit(OK)
    out = out or Path("fedpeek-out") / f"{slug(experiment.name)}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        with progress_bars(errors, len(experiment.arms) * len(experiment.seeds)) as (notify, advance):
            failures = run_experiment(experiment, out, workers=at_once, resume=resume, notify=notify, done=advance, begun=say)
    except KeyboardInterrupt:
        errors.print(f"\nInterrupted. Nothing that was finished is lost; go on with the same command and --out {out} --resume")
        raise typer.Exit(INTERRUPTED) from None
    for failure in failures:
        errors.print(f"[red]failed[/red] {escape(failure.task.arm)}, seed {failure.task.seed}: {escape(failure.failure)}")
    code = _conclude(out, bool(failures))
    if audit:
        _audit(out)
    raise typer.Exit(code)


@app.command("audit")
def audit_(directory: Path) -> None:
    """Hold what attacks identified against what (ε, δ) allows; exits with 1 where a guarantee is refuted.

    DIRECTORY: The directory of a run.

    Each attack is held against what the releases up to its round allow, or all where the threat model discloses all rounds. One record
    of each upload counts, and none in two rounds, so that trials are independent; those whose own ceiling is 1 are left out. More successes
    than the ceilings allow, after Holm's correction, mean that the defense or its accounting is broken. That nothing fails proves nothing.
    `candidate_identification` (threat.candidates = true) comes nearest to the ceilings.
    """
    _audit(directory)


@app.command()
def report(directory: Path) -> None:
    """Compute summary.json and report.html of a run again, from its results.

    DIRECTORY: The directory of a run.
    """
    raise typer.Exit(_conclude(directory, failed=False))


@app.command()
def attack(
    transcript: Path,
    attack: Annotated[str, typer.Option(help="Name of the attack; see `fedpeek list attacks`.")] = "strongest",
    assign: Assignments = None,
    round: Annotated[int, typer.Option(min=0, help="The round to attack; 0 means every recorded one.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where to write pictures and scores. Default: attacks/NAME-ATTACK in the run.", show_default=False)
    ] = None,
) -> None:
    """Attack a recorded transcript again, with another attack or other settings (--set steps=1000).

    TRANSCRIPT: The directory of a transcript, e.g. RUN/transcript/none-seed0.

    Where the transcript lies in a run, the truth is recomputed from the run's seed and the answer is scored; elsewhere the
    reconstructions are written without scores: that is all an adversary gets, and nothing is written but in the transcript's own
    directory. A transcript that was cut short is attacked up to its last whole round, one with damaged tensor files but for what was in
    them. Exit code 3 where an upload could not be attacked or something is missing, with the reason of each.
    """
    from experiments.replay import replay

    with progress_bars(errors, 1) as (notify, _):
        written, table, missing = replay(transcript, attack, assign or (), round, out, notify, lambda line: errors.print(escape(line)))
    console.print(table)
    console.print(f"Written to {written}")
    for sentence in missing:
        errors.print(f"[yellow]missing[/yellow] {escape(sentence)}")
    raise typer.Exit(INCOMPLETE if missing else OK)


@app.command()
def claims(
    ids: Annotated[list[str] | None, typer.Argument(show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, as each claim is done.")] = False,
    as_filed: Annotated[bool, typer.Option("--list", help="Print what is filed and what it costs; measure nothing.")] = False,
    accept: Annotated[bool, typer.Option("--known-misses", help="Exit with 0 where a bar is missed exactly as its file says.")] = False,
) -> None:
    """Measure published numbers again and compare them with their bars; exits with 1 if one is missed.

    IDS: IDs of claims, * allowed; all if left out.

    A claim is one file: what is claimed, who reports it, the setting, our value, the bar. A bar that we miss is filed too, with the
    reason: it counts as missed, unless --known-misses is given and the miss is as filed. What takes hours is read from a committed file:
    "kept", not measured again, beside the command that measures. All claims take long: see --list. Ctrl-C keeps what is printed.
    """
    from experiments.claims.check import Outcome, check, heading, lines
    from experiments.claims.claim import select
    from simulator import progress

    try:
        chosen, broken, done = select(ids or ()), 0, 0
    except SpecError as error:
        raise SpecError(f"{error} See `fedpeek claims --list`.") from error
    missed: list[str] = []
    if not as_json:
        console.print(heading(), style="bold", highlight=False, soft_wrap=True)
    try:
        with progress_bars(errors, len(chosen), unit="claims") as (notify, advance):
            for claim in chosen:
                with progress.listening(partial(notify, claim.id)):
                    outcome = Outcome(claim, {}) if as_filed else check(claim)
                broken, done = broken + (not as_filed and not outcome.holds), done + 1
                missed += [f"{claim.id} {name}: {claim.figures[name].reason}" for name in outcome.known_misses]
                advance(claim.id)
                for line in [json.dumps(outcome.to_json())] if as_json else lines(outcome):
                    console.print(escape(line), highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        errors.print(f"\nInterrupted after {done} of {len(chosen)} claims.")
        raise typer.Exit(INTERRUPTED) from None
    if missed:
        errors.print(f"[red]{len(missed)} bars are not met, as their files say:[/red]", *map(escape, missed), sep="\n  ", highlight=False)
    if broken:
        errors.print(f"[red]{broken} of {done} claims do not hold[/red]")
    if broken or (missed and not accept and not as_filed):
        raise typer.Exit(ERROR)


@app.command("list")
def list_(kind: Listed, name: Annotated[str | None, typer.Argument(show_default=False)] = None) -> None:
    """List attacks, defenses, data sets, models, metrics, example specs or the settings of a spec; with a name, explain that one.

    KIND: What to list.

    NAME: One of them, such as dlg, or of the settings a section or key, such as training; all in short if left out. A path
    package.module:Class is allowed, too.
    """
    if name is None:
        print_table(kind, HEADINGS.get(kind, OF_CLASSES), rows(kind, warn))
        return
    found = entry(kind, name)
    for line in (found.name, found.description, found.note, f"Source: {found.source}" if found.source else ""):
        if line:
            console.print(escape(line), highlight=False, soft_wrap=not console.file.isatty())
    if found.settings:
        print_table("", ("setting", "default", "what it means"), ((each.name, each.default, each.meaning) for each in found.settings))


def main() -> None:
    """Run the command; explained errors become one line on stderr and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that the processes of a driver are ended, too
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ.setdefault("MPLCONFIGDIR", scratch)  # matplotlib would keep its font list in the user's home
            app()
    except SpecError as error:
        errors.print(f"[red]bad input[/red] {escape(str(error))}")
        sys.exit(BAD_INPUT)
    except FedpeekError as error:
        errors.print(f"[red]error[/red] {escape(str(error))}")
        sys.exit(ERROR)


def _estimate(experiment: Experiment, workers: int) -> None:
    from experiments.estimate import plan
    from experiments.timing import in_turn, sample

    planned = plan(experiment)
    say(planned.sentence())
    with progress_bars(errors, len(in_turn(experiment)), unit="kinds of arms timed") as (notify, advance):
        found = sample(experiment, notify, advance)
    say(found.sentence(len(experiment.seeds), workers))
    say(planned.bound(workers))


def _audit(directory: Path) -> None:
    from experiments.auditing import audit_run

    verdicts, unaudited = audit_run(directory)
    for verdict in verdicts:
        console.print(escape(verdict.sentence), style="bold red" if verdict.failed else "", highlight=False, soft_wrap=True)
    for sentence in unaudited:
        console.print(escape(sentence), style="dim", highlight=False, soft_wrap=True)
    if any(verdict.failed for verdict in verdicts):
        raise typer.Exit(ERROR)


def _conclude(directory: Path, failed: bool) -> int:
    from experiments.conclude import conclude

    table, report_path, warnings = conclude(directory)
    console.print(table)
    for warning in warnings:
        errors.print(f"[yellow]warning[/yellow] {escape(warning)}")
    console.print(f"Report: {report_path}")
    return INCOMPLETE if failed or warnings else OK
