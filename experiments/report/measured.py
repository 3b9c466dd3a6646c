"""What was measured of one defense, as Markdown for its page: its arms, their controls, and every flag explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.ladder import BEST
from experiments.report import beside, limits, values
from experiments.report.headline import Row, name, strongest, texts_of
from experiments.report.values import estimate, lookup, number
from experiments.report.words import explain

TITLES = (
    "arm", "strongest attack: victims", "victims, seeds", "identified, chance (knowing the class)", "PSNR gain, dB", "against control, dB",
    "ε", "ceiling", "accuracy, points against control", "rounding", "upload", "client", "flags",
)  # fmt: skip


OVER = "over the same attack on shuffled updates"
NAMED = "Senders that an attack names for the records of a sum, rightly; chance deals the records to the senders at random"


def table(defense: str, rows: Sequence[Row]) -> str:
    """The arms that this defense is in, and the undefended ones that they are judged against, with notes; empty without any."""
    heads = strongest(rows)
    mine = [row for row in heads if defense in texts_of(row, "stack")]
    if not mine:
        return ""
    against = {row.get("against") for row in mine}
    shown = [*[row for row in heads if row.get("control") and (row.get("against") in against or None in against)], *mine]
    letters = beside.letters(flag for row in shown for flag in texts_of(row, "flags"))
    by_name = {name(row, "defense"): row for row in heads}
    own = {arm: [row for row in rows if name(row, "defense") == arm] for arm in by_name}
    cells = [_cells(row, own[name(row, "defense")], by_name.get(str(row.get("against"))), letters) for row in shown]
    lines = [dict(zip(TITLES, each, strict=True)) for each in cells]
    titles = [title for title in TITLES if title != "rounding" or any(line[title] for line in lines)]
    body = [f"| {' | '.join(line[title] for title in titles)} |" for line in lines]
    return "\n".join([f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *body, "", *_notes(shown, rows, letters)])


def _cells(row: Row, members: Sequence[Row], control: Row | None, letters: Mapping[str, str]) -> tuple[str, ...]:
    rate, gain, chance = estimate(row, "identified"), estimate(row, "gain", "psnr_db"), number(lookup(row, "identified", "chance"))
    failed = {which: control is not row and beside.control_failed(control, which) for which in ("identified", "gain")}
    in_class = number(lookup(row, "identified", "chance_in_class"))
    known = "" if in_class is None else f" ({values.percent(in_class)})"
    identified = f"{values.percent(rate.value)} [{values.percent_range(rate.low, rate.high)}], {values.percent(chance)}{known}"
    gained = f"{values.fixed(gain.value, sign=True)} [{values.fixed_range(gain.low, gain.high)}]"
    points = beside.accuracy(row)
    return (
        name(row, "defense"),
        beside.who(row, members),
        f"{values.significant(number(row.get('victims')))}, {values.significant(number(row.get('seeds')))}",
        beside.CONTROL_FAILED if failed["identified"] and not _shown(rate.low, chance) else identified,
        beside.CONTROL_FAILED if failed["gain"] and not _shown(gain.low, 0.0) else gained,
        "" if row.get("control") else beside.CONTROL_FAILED if failed["gain"] else _difference(row),
        values.significant(number(row.get("epsilon"))),
        limits.identification(row),
        values.percent(number(row.get("accuracy")), 1) + (f", {points}" if points else ""),
        beside.rounding(row),
        values.size(number(lookup(row, "cost", "upload_bytes"))),
        values.duration(number(lookup(row, "cost", "client_seconds"))),
        " ".join(letters[flag] for flag in texts_of(row, "flags")),
    )


def _shown(low: float | None, least: float | None) -> bool:
    """Whether leakage was shown, which stands whatever the control did."""
    return low is not None and least is not None and low > least


def _difference(row: Row) -> str:
    found = estimate(row, "difference_to_control", "psnr_db")
    ends = values.fixed_range(found.low, found.high)
    return values.fixed(found.value, sign=True) + (f" [{ends}]" if ends else "")


def _notes(shown: Sequence[Row], rows: Sequence[Row], letters: Mapping[str, str]) -> list[str]:
    seeds = list(dict.fromkeys(beside.paired_seeds(row) for row in shown if beside.accuracy(row)))
    paired = f" Accuracy against the control is paired by seed ({values.join(seeds)}), ± half of the interval." if seeds else ""
    rounded = any(map(beside.rounding, shown))
    rounding = " Rounding is the rms error of the released mean against the plain one, over the mean's own rms." if rounded else ""
    ceilings = " Ceilings are for what the attack saw, (all …) for every upload." if any(map(limits.over_training, shown)) else ""
    arms = {name(row, "defense") for row in shown}
    blind = [row for row in rows if name(row, "defense") in arms and row.get("attack") != BEST and beside.prior(row)]
    named = beside.senders(row for row in rows if name(row, "defense") in arms)
    said = {name(row, "defense"): str(row["epsilon_for"]) for row in shown if row.get("epsilon_for")}
    return [
        f"Brackets are 95 % intervals. Each victim counts with its strongest attack: which, how often.{paired}{rounding}{ceilings}",
        *([""] if blind else []),
        *(f"- {name(row, 'attack')} under {name(row, 'defense')}: {beside.prior(row)} {OVER}" for row in blind),
        *(["", "What each ε says:", ""] if said else []),
        *(f"- {', '.join(arm for arm in said if said[arm] == sentence)}: {sentence}" for sentence in dict.fromkeys(said.values())),
        *(["", f"{NAMED}:", ""] if named else []),
        *(f"- {attack} under {arm}: {said}" for arm, attack, said in named),
        *(["", "Flags:", ""] if letters else []),
        *(f"- {letter}: {flag.replace('_', ' ')}. {explain(flag)}".rstrip() for flag, letter in letters.items()),
    ]
