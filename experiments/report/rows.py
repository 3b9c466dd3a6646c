"""The rows of a summary as the page and the terminal print them: one frozen line of texts and positions for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.ladder import BEST
from experiments.report import beside, values
from experiments.report.headline import control_of, headlines, laddered, name, rows_of, strongest, texts_of
from experiments.report.limits import of_the_view, over_training
from experiments.report.values import Estimate, estimate, lookup, number
from experiments.report.verdict import Verdict, verdict

SCORES = {
    "psnr_db": ("PSNR", 1),
    "ssim": ("SSIM", 2),
    "mse": ("MSE", None),
    "lpips": ("LPIPS", 2),
    "exact": ("Exact", "%"),
    "label_accuracy": ("Labels right", "%"),
}


def flags_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """Return the row's flags by name."""
    return tuple(dict.fromkeys(texts_of(row, "flags")))


def main_lines(summary: Mapping[str, object]) -> list[Line]:
    """Return the main table ready to print: one line for each arm where a ladder of attacks ran, else every row."""
    return _lines(headlines(rows_of(summary)), rows_of(summary))


def lines(summary: Mapping[str, object]) -> list[Line]:
    """Return every row of the summary ready to print, in the summary's order."""
    return _lines(rows_of(summary), rows_of(summary))


def _lines(rows: Sequence[Mapping[str, object]], everything: Sequence[Mapping[str, object]]) -> list[Line]:
    gains = [estimate(row, "gain", "psnr_db") for row in rows]
    span = _span(gains)
    sentences = list(dict.fromkeys(str(row["epsilon_for"]) for row in rows if row.get("epsilon_for")))
    several = len({name(row, "attack") for row in rows}) > 1 and not laddered(everything)
    best = strongest(rows) if several else []
    by_round = len({tuple(texts_of(row, "rounds")) for row in rows}) > 1
    return [
        Line(
            defense=name(row, "defense"),
            attack=name(row, "attack"),
            rounds=_rounds(row) if by_round else "",
            view=name(row, "view"),
            verdict=verdict(row, control_of(row, everything)),
            solved=_solved(row),
            strongest=any(row is other for other in best),
            victims=_victims(row),
            labels=estimate(row, "scores", "label_accuracy") if row.get("answered") == "labels" else None,
            label_floor=values.percent(number(lookup(row, "scores", "label_accuracy", "floor"))),
            identified=estimate(row, "identified"),
            identified_seeds=_seeds(row, "identified"),
            identified_by=str(row.get("identified_by") or ""),
            chosen=row.get("answered") == "candidates",
            candidates=f"{number(lookup(row, 'identified', 'candidates')) or 0:.0f}",
            chance=number(lookup(row, "identified", "chance")),
            class_chance=number(lookup(row, "identified", "chance_in_class")),
            identified_bar=_bar(estimate(row, "identified"), (0.0, 1.0), number(lookup(row, "identified", "chance"))),
            gain=gain,
            gain_seeds=_seeds(row, "gain", "psnr_db"),
            gain_bar=_bar(gain, span, 0.0),
            epsilon=values.significant(number(row.get("epsilon"))),
            delta=values.significant(number(row.get("delta"))) if number(row.get("delta")) else "",
            note=sentences.index(str(row["epsilon_for"])) + 1 if row.get("epsilon_for") else 0,
            sentence=str(row.get("epsilon_for") or ""),
            ceiling=of_the_view(row),
            over_training=over_training(row),
            accuracy=estimate(row, "accuracy"),
            accuracy_against=beside.accuracy(row),
            paired_seeds=beside.paired_seeds(row),
            rounding=beside.rounding(row),
            over_prior=beside.prior(row),
            sender=beside.sender(row),
            upload=values.size(number(row.get("upload_bytes"))),
            seconds=values.duration(number(row.get("seconds"))),
            flags=flags_of(row),
            reasons=tuple(texts_of(row, "reasons")),
            failures=tuple(texts_of(row, "client_failures")),
            scores=tuple(_score(row, key) for key in SCORES),
            floor=_floor(row),
            proven=_proven(row),
            difference=estimate(row, "difference_to_control", "psnr_db"),
            p_holm=number(lookup(row, "difference_to_control", "p_holm")),
        )
        for row, gain in zip(rows, gains, strict=True)
    ]


def _victims(row: Mapping[str, object]) -> str:
    """Count the victims, how often they were attacked where that is more than once each, and every status that is not ok."""
    total, statuses = number(row.get("victims")), row.get("statuses")
    failed = {str(key): number(count) for key, count in statuses.items() if key != "ok"} if isinstance(statuses, Mapping) else {}
    scored = number(row.get("scored"))
    words = [values.MISSING if total is None else f"{total:.0f}"]
    if total is not None and scored is not None and scored > total:
        words = [f"{total:.0f} (scored {scored:.0f} times)"]
    return ", ".join(words + [f"{count:.0f} {key}" for key, count in failed.items() if count])


def _seeds(row: Mapping[str, object], *path: str) -> str:
    """The range of the seeds' means, which no interval over victims holds; empty of one seed."""
    found = estimate(row, *path, "seeds")
    if found.low is None or found.high is None:
        return ""
    return f"seeds {(values.percent_range if path[0] == 'identified' else values.fixed_range)(found.low, found.high)}"


def _solved(row: Mapping[str, object]) -> str:
    """Which attack gave how many victims, where each victim counts with its strongest."""
    return beside.who(row) if row.get("attack") == BEST else ""


def _rounds(row: Mapping[str, object]) -> str:
    rounds = texts_of(row, "rounds")
    return f"round{'s' if len(rounds) > 1 else ''} {values.join(rounds)}" if rounds else ""


def _floor(row: Mapping[str, object]) -> tuple[str, str]:
    label = lookup(row, "floor", "name")
    return values.decibel(number(lookup(row, "floor", "psnr_db"))), "" if label is None else str(label).replace("_", " ")


def _proven(row: Mapping[str, object]) -> tuple[str, tuple[str, ...]]:
    """Records with a proof; below, what identifiability predicted and what came of it, and each solver's records and proofs."""
    certified, solvers = number(lookup(row, "certified", "records")), row.get("solvers")
    asked, predicted, exact = (number(lookup(row, "identifiability", key)) for key in ("uploads", "predicted", "exact"))
    parts = [f"{asked:.0f} uploads: {predicted or 0:.0f} predicted, {exact or 0:.0f} exact"] if asked else []
    for solver, entry in solvers.items() if isinstance(solvers, Mapping) else ():
        parts.append(f"{solver}: {number(lookup(entry, 'records')) or 0:.0f}, {number(lookup(entry, 'certified')) or 0:.0f} proven")
    return values.MISSING if certified is None else f"{certified:.0f}", tuple(parts)


def _score(row: Mapping[str, object], key: str) -> Score:
    label, style = SCORES[key]
    found = estimate(row, "scores", key)
    worst, middle, best = (number(lookup(row, "scores", key, part)) for part in ("min", "median", "max"))
    if style == "%":
        floor = number(lookup(row, "scores", key, "floor"))
        beside = "" if floor is None else f"floor {values.percent(floor)}"
        return Score(label, values.percent(found.value), values.percent_range(found.low, found.high), beside)
    texts = [values.significant(x, 2) if style is None else values.fixed(x, int(style)) for x in (found.value, worst, middle, best)]
    low, high = (values.significant(x, 2) if style is None else values.fixed(x, int(style)) for x in (found.low, found.high))
    return Score(
        label,
        texts[0] + (f"{values.NBSP}dB" if key == "psnr_db" and found.value is not None else ""),
        "" if found.low is None or found.high is None else f"{low} to {high}",
        "" if None in (worst, middle, best) else " · ".join(texts[1:]),
    )


def _span(gains: Sequence[Estimate]) -> tuple[float, float]:
    """Return the common scale of all gains in dB; it holds 0 and is finite."""
    ends = [x for gain in gains for x in (gain.value, gain.low, gain.high) if x is not None and abs(x) != float("inf")]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _bar(found: Estimate, span: tuple[float, float], mark: float | None) -> Bar | None:
    if found.value is None:
        return None
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    at = [round(3 + 70 * min(max((x - span[0]) / (span[1] - span[0]), 0.0), 1.0), 1) for x in (low, found.value, high, mark or 0.0)]
    return Bar(at[0], at[1], at[2], None if mark is None else at[3])


@dataclass(frozen=True)
class Bar:
    """An interval drawn in a box 76 wide: its ends, its middle, and the mark of what no information gives."""

    low: float
    middle: float
    high: float
    mark: float | None


@dataclass(frozen=True)
class Score:
    """One metric of one row as text: mean, interval, and ``min · median · max``, or for a rate its floor."""

    label: str
    mean: str
    interval: str
    spread: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row, ready to print; estimates stay numbers where page and terminal print them differently.

    ``solved`` says which attack gave how many victims, where each counts with its strongest; ``identified_by`` names the attack whose
    identification rate this is. ``labels`` is the share of right labels where the attack answered nothing else,
    else None. ``accuracy_against``, ``rounding``, ``over_prior`` and ``sender`` come from :mod:`experiments.report.beside`.
    ``identified_seeds`` and ``gain_seeds`` are the range of the seeds' means. ``proven`` says how many records carry a certificate, and
    which solver produced how many.
    """

    defense: str
    attack: str
    rounds: str
    view: str
    verdict: Verdict
    solved: str
    strongest: bool
    victims: str
    labels: Estimate | None
    label_floor: str
    identified: Estimate
    identified_seeds: str
    identified_by: str
    chosen: bool
    candidates: str
    chance: float | None
    class_chance: float | None
    identified_bar: Bar | None
    gain: Estimate
    gain_seeds: str
    gain_bar: Bar | None
    epsilon: str
    delta: str
    note: int
    sentence: str
    ceiling: str
    over_training: str
    accuracy: Estimate
    accuracy_against: str
    paired_seeds: str
    rounding: str
    over_prior: str
    sender: str
    upload: str
    seconds: str
    flags: tuple[str, ...]
    reasons: tuple[str, ...]
    failures: tuple[str, ...]
    scores: tuple[Score, ...]
    floor: tuple[str, str]
    proven: tuple[str, tuple[str, ...]]
    difference: Estimate
    p_holm: float | None
