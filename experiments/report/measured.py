"""What was measured of one defense, as Markdown for its page: its arms, their controls, and every flag explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.ladder import BEST
from experiments.report import beside, costs, limits, values
from experiments.report.headline import Row, name, strongest, texts_of
from experiments.report.values import estimate, lookup, number
from experiments.report.words import explain

LEAKS = (
    "arm", "strongest attack: victims", "victims, seeds", "named by one attack, chance (knowing the class)", "by any, chance",
    "PSNR gain, dB", "against control, dB", "flags",
)  # fmt: skip
COSTS = (
    "arm", "ε", "ceiling of one guess", "PSNR without a prior ≤", "MSE without a prior ≥", "accuracy, points against control", "rounding",
    "upload (coded)", "download", "client", "server", "memory (needed)",
)  # fmt: skip
"""Of the columns after ``ε`` those are left out in which no arm has anything."""

OVER = "over the same attack on shuffled updates"
FEWER = "Arms with fewer victims are those whose attacks take long: an inverter or a batch for each upload, sums, another network."
PRICES = (
    "Bytes are of one client and round, in brackets what an efficient coding would send; client and server are CPU time of a round, a "
    "simulated enclave's with the server's; memory is the most that server and clients together took beyond what their process held "
    "before, the least over the seeds, in brackets what a round needs by formula: the model, every upload and their mean at the "
    "server, model and gradients at one client, no activations."
)
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
    leaks = [_leaks(row, own[name(row, "defense")], by_name.get(str(row.get("against"))), letters) for row in shown]
    prices = costs.lines(shown)
    costing = [_costs(row, prices[name(row, "defense")]) for row in shown]
    return "\n".join([*_table(LEAKS, leaks), "", *_table(COSTS, costing), "", *_notes(shown, rows, letters)])


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """As Markdown, without the columns in which nothing stands."""
    kept = [place for place, title in enumerate(titles) if any(line[place] not in ("", values.MISSING) for line in cells)]
    lines = [[titles[place] for place in kept], *([line[place] for place in kept] for line in cells)]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return [head, f"|{'---|' * len(kept)}", *body]


def _leaks(row: Row, members: Sequence[Row], control: Row | None, letters: Mapping[str, str]) -> tuple[str, ...]:
    gain, named = estimate(row, "gain", "psnr_db"), estimate(row, "identified")
    failed = {which: control is not row and beside.control_failed(control, which) for which in ("identified", "gain")}
    together = next((member for member in members if member.get("attack") == BEST), None)
    gained = f"{values.fixed(gain.value, sign=True)} [{values.fixed_range(gain.low, gain.high)}]"
    one = f"{_named(row)} {row.get('identified_by') or ''}".rstrip()
    return (
        name(row, "defense"),
        beside.who(row, members),
        f"{values.significant(number(row.get('victims')))}, {values.significant(number(row.get('seeds')))}",
        beside.CONTROL_FAILED if failed["identified"] and not _shown(named.low, number(lookup(row, "identified", "chance"))) else one,
        "" if together is None else _named(together),
        beside.CONTROL_FAILED if failed["gain"] and not _shown(gain.low, 0.0) else gained,
        "" if row.get("control") else beside.CONTROL_FAILED if failed["gain"] else _difference(row),
        " ".join(letters[flag] for flag in texts_of(row, "flags")),
    )


def _named(row: Row) -> str:
    rate, told = estimate(row, "identified"), {key: number(lookup(row, "identified", key)) for key in ("chance", "chance_in_class")}
    known = "" if told["chance_in_class"] is None else f" ({values.percent(told['chance_in_class'])})"
    return f"{values.percent(rate.value)} [{values.percent_range(rate.low, rate.high)}], {values.percent(told['chance'])}{known}"


def _costs(row: Row, price: costs.Cost) -> tuple[str, ...]:
    points = beside.accuracy(row)
    psnr, error = (number(lookup(row, "ceilings", key)) for key in ("no_prior_psnr_db", "mse_floor"))
    return (
        name(row, "defense"),
        values.significant(number(row.get("epsilon"))),
        limits.identification(row),
        "" if psnr is None else values.decibel(psnr),
        "" if error is None else values.significant(error, 2),
        values.percent(number(row.get("accuracy")), 1) + (f", {points}" if points else ""),
        beside.rounding(row),
        price.upload + (f" ({price.formula})" if price.formula not in (values.MISSING, price.upload) else ""),
        price.download,
        price.client,
        price.server,
        price.memory + (f" ({price.least_memory})" if values.MISSING not in (price.memory, price.least_memory) else ""),
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
    tested = max((int(number(row.get("tested_models")) or 1) for row in shown), default=1)
    over = f" Accuracy is the mean over the models after the last {tested} rounds." if tested > 1 else ""
    half = ", from three seeds on ± half of the interval."
    paired = f" Accuracy against the control is paired by seed ({values.join(seeds)}){half}" if seeds else ""
    rounded = any(map(beside.rounding, shown))
    rounding = " Rounding is the rms error of the released mean against the plain one, over the mean's own rms." if rounded else ""
    ceilings = " Ceilings are for what the attack saw, (all …) for every upload." if any(map(limits.over_training, shown)) else ""
    assumed = dict.fromkeys(words for row in shown for words in limits.assumptions(row))
    arms = {name(row, "defense") for row in shown}
    blind = [row for row in rows if name(row, "defense") in arms and row.get("attack") != BEST and beside.prior(row)]
    named = beside.senders(row for row in rows if name(row, "defense") in arms)
    said = {name(row, "defense"): str(row["epsilon_for"]) for row in shown if row.get("epsilon_for")}
    return [
        "Brackets are 95 % intervals. Each victim's picture is that of the attack which came nearest: which, how often. Who is named is "
        "the word of the one attack that named most: one guess, as a ceiling is for one. "
        f"{FEWER}{over}{paired}{rounding}{ceilings} {PRICES}",
        *([""] if blind else []),
        *(f"- {name(row, 'attack')} under {name(row, 'defense')}: {beside.prior(row)} {OVER}" for row in blind),
        *(["", "What the ceilings assume:", ""] if assumed else []),
        *(f"- {sentence}" for sentence in assumed),
        *(["", "What each ε says:", ""] if said else []),
        *(f"- {', '.join(arm for arm in said if said[arm] == sentence)}: {sentence}" for sentence in dict.fromkeys(said.values())),
        *(["", f"{NAMED}:", ""] if named else []),
        *(f"- {attack} under {arm}: {said}" for arm, attack, said in named),
        *(["", "Flags:", ""] if letters else []),
        *(f"- {letter}: {flag.replace('_', ' ')}. {explain(flag)}".rstrip() for flag, letter in letters.items()),
    ]
