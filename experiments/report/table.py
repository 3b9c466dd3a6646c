"""The summary as a table for the terminal, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from experiments.ladder import BEST
from experiments.report import beside, values
from experiments.report.headline import laddered, rows_of
from experiments.report.rows import Line, lines, main_lines
from experiments.report.verdict import Level
from experiments.report.words import explain
from experiments.statistics import FEWEST_PAIRS

MOST = 3
"""Comparisons with shuffled updates, and attacks that name senders, below the table; the others are in the report."""

STYLES: Mapping[Level, str] = {
    "recognizable": "bold red",
    "partial": "yellow",
    "identifiable": "yellow",
    "labels": "yellow",
    "floor": "blue",
}


def table(summary: Mapping[str, object]) -> Table:
    """Return the summary's rows for the terminal; letters in the last column are explained below the table."""
    rows, ladder = main_lines(summary), laddered(rows_of(summary))
    several = ladder or len({line.attack for line in rows}) > 1
    letters = beside.letters(flag for line in rows for flag in line.flags)
    caption = _caption(rows, lines(summary), letters)
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left", caption_style="dim")
    result.add_column("defense", overflow="fold", min_width=12, max_width=24)
    result.add_column("view", no_wrap=True)
    for header in ("identified", "PSNR gain dB", "ε", "ceiling", "accuracy"):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("flags", overflow="fold", max_width=5)
    for line in rows:
        rate, gain = line.identified, line.gain
        style = STYLES.get(line.verdict.level, "")
        below = (line.solved or line.attack if several else "", line.rounds)
        result.add_row(
            Text("\n").join([Text(line.defense), *(Text(word, style="dim") for word in below if word)]),
            Text(line.view),
            Text(_labels(line) or _with_range(values.percent(rate.value), values.percent_range(rate.low, rate.high)), style=style),
            Text(_with_range(values.fixed(gain.value, sign=True), values.fixed_range(gain.low, gain.high)), style=style),
            Text(line.epsilon),
            _over(line.ceiling, line.over_training),
            _over(values.percent(line.accuracy.value, 1), line.accuracy_against.replace(" ± ", "\n±")),
            Text(" ".join(letters[flag] for flag in line.flags)),
        )
    return result


def _over(words: str, below: str) -> Text:
    return Text("\n").join([Text(words), *([Text(below, style="dim")] if below else [])])


def _with_range(value: str, interval: str) -> str:
    inner = interval.removesuffix(f"{values.NBSP}%").replace(" to ", ", ").replace("–", ", ")
    return f"{value} [{inner}]" if inner else value


def _labels(line: Line) -> str:
    """What stands in place of the identification rate where the attack answered labels only, so that there is none."""
    if line.labels is None:
        return ""
    found = line.labels
    return f"labels\n{_with_range(values.percent(found.value), values.percent_range(found.low, found.high))}\nfloor {line.label_floor}"


def _caption(rows: list[Line], details: list[Line], letters: Mapping[str, str]) -> Text:
    chances = sorted({line.chance for line in rows if line.chance is not None})
    chance_words = f"; chance {values.join([values.percent(chance) for chance in chances])}" if chances else ""
    in_class = values.percent_span([line.class_chance for line in rows if line.class_chance is not None])
    class_words = f", for who knows the class {in_class}" if in_class else ""
    parts = [f"[…] are 95 % intervals over victims, given these initial models{chance_words}{class_words}."]
    if any(line.solved for line in rows):
        parts.append("Each victim counts with its strongest attack, below the name: which, how often; each attack alone: report.html.")
    if named := list(dict.fromkeys(line.identified_by for line in rows if line.identified_by)):
        parts.append(f"Identified by the one attack that named most: {values.join(named)}.")
    if over := list(dict.fromkeys(line.paired_seeds for line in rows if line.accuracy_against)):
        ends = " ± 95 %" if any("±" in line.accuracy_against for line in rows) else f"; no interval of fewer than {FEWEST_PAIRS}"
        parts.append(f"Below an accuracy: its difference to the arm's control, paired by seed ({values.join(over)}), in points{ends}.")
    if any(line.over_training for line in rows):
        parts.append("Ceiling: for what the attack saw; (all …) for whoever has every upload of the training.")
    parts += _certified(rows)
    parts += _beside(rows, details)
    if named := [f"{line.attack}, {line.defense}: {line.sender}" for line in details if line.sender]:
        parts.append(f"Senders named rightly: {_first(named)}.")
    parts += [f"{letter}: {flag.replace('_', ' ')}. {explain(flag)}".strip() for flag, letter in letters.items()]
    return Text("\n".join(parts + _unmeasured(details)))


def _certified(rows: list[Line]) -> list[str]:
    """What each finite ε says, in words; arms that say the same together."""
    arms: dict[str, list[str]] = {}
    for line in rows:
        if line.sentence and line.epsilon not in ("", values.INFINITY):
            arms.setdefault(line.sentence, []).append(line.defense)
    said = [f"{values.join(names)}: {sentence}" for sentence, names in arms.items()]
    return said if len(said) <= MOST else [*said[:MOST], f"What {len(said) - MOST} more ε say stands in report.html."]


def _beside(rows: list[Line], details: list[Line]) -> list[str]:
    """What a figure must not be read without: how far rounding changed the mean, and what an attack shows of shuffled updates."""
    rounded = {line.defense: line.rounding for line in rows if line.rounding}
    blind = [f"{line.attack}, {line.defense}: {line.over_prior}" for line in details if line.over_prior and line.attack != BEST]
    parts = [f"Rounding, rms of the released mean: {'; '.join(f'{arm} {much}' for arm, much in rounded.items())}."] if rounded else []
    if blind:
        parts.append(f"PSNR above that of the same attack on shuffled updates: {_first(blind)}.")
    return parts


def _first(items: list[str]) -> str:
    return "; ".join(items if len(items) <= MOST else [*items[:MOST], f"{len(items) - MOST} more in report.html"])


def _unmeasured(rows: list[Line]) -> list[str]:
    """Say why a row has no measurement, once for all arms with the same reason."""
    arms: dict[tuple[str, str, str], list[str]] = {}
    for line in rows:
        for reason in line.reasons if line.verdict.level == "unmeasured" else ():
            arms.setdefault((line.attack, line.verdict.words, reason), []).append(line.defense)
    return [f"{attack} under {values.join(names)}: {words}: {reason}" for (attack, words, reason), names in arms.items()]
