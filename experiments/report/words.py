"""The report's prose: the answer in one sentence, and how to read each number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.checks import EQUIVALENCE_DB, FLAGS
from experiments.ladder import BEST
from experiments.report import values
from experiments.report.headline import control_of, name, rows_of, strongest
from experiments.report.threat import adversary
from experiments.report.values import lookup, number
from experiments.report.verdict import EQUAL, FAILED, MEANING, WORDS, Level, level, verdict
from experiments.statistics import FEW_CLUSTERS, FEWEST_PAIRS

CLAUSES: Mapping[Level, str] = {
    "recognizable": "can recognize the clients’ pictures under ",
    "partial": "rebuilds them in part under ",
    "identifiable": "tells whose picture it was, without rebuilding it, under ",
    "faint": "finds traces, but was not shown to identify anybody, under ",
    "labels": "recovers the labels, but no pictures, under ",
    "floor": "was not shown to do better than a blind guess under ",
    "unmeasured": "was not measured under ",
}

GLOSSARY: Sequence[tuple[str, str]] = (
    (
        "Identified",
        "How often the victim’s true picture is the one nearest to the reconstruction among N candidates, or the one that an identifier "
        "named which was handed them. Chance is 1/N, and k/N for k "
        "pictures that are rebuilt together from one aggregate. It is the most telling number: a blurred "
        "picture can still say who it is, a smooth one can score well and say nothing.",
    ),
    (
        "PSNR",
        "Closeness of reconstruction and truth in decibels, on pictures in [0, 1]: 10·log₁₀(1/MSE). Higher is closer; + 3 dB "
        "is half the squared error. It is capped at 60 dB. It "
        "is a distance, not a judgement: read it as gain over the floor, beside “identified” and "
        "the pictures.",
    ),
    ("SSIM", "Structural similarity, at most 1 (the same picture). It looks at local contrast and structure, where PSNR looks at pixels."),
    ("MSE", "Mean squared error of the pixels in [0, 1]. Lower is closer; 0 is exact."),
    ("Exact", "Fraction of the records that were rebuilt exactly, up to rounding."),
    (
        "Proven exact",
        "Records that the attack itself proved exact, without the truth, by a certificate of its solver. Below it, how many the "
        "identifiability of the updates predicts before any attack, and how many came out exact; and which solver produced how "
        "many.",
    ),
    (
        "Sender named",
        "Of the records in a sum of several clients, how often an attack that says whose each one is names the right client. Chance is "
        "what dealing the records to the senders at random gets right; of labels alone, which are interchangeable, that is more.",
    ),
    (
        "Labels right",
        "Fraction of the private labels that the attack got right. Its floor is what a guess gets right that knows how frequent each class "
        "is among the victims, and that is matched to the truth as the attack’s labels are.",
    ),
    (
        "Floor",
        "The best score that a guess reaches without looking at the upload: the mean training picture, the mean of the true class, another "
        "victim’s picture, random pixels, or the same attack on a shuffled gradient. What does not beat the floor is not leakage.",
    ),
    (
        "PSNR gain",
        "PSNR minus the best floor’s PSNR on the same victim, in dB. Above 0, the upload told the adversary something about the picture.",
    ),
    (
        "Against no defense",
        "The paired difference defended − undefended in what leaks, on the same victims and seeds: the PSNR gain, which counts as 0 where "
        "an attack misses the floor, so that a defense gets credit only for what the undefended attack has shown. It counts as “not "
        f"distinguishable” when its interval holds 0 and lies within ± {values.decibel(EQUIVALENCE_DB)}, and as “undecided” when it holds "
        "0 but reaches further. “If taken alone”: the interval leaves out 0, but Holm’s correction for all rows of the run does not; of "
        "fewer than eight or so independent uploads it hardly can.",
    ),
    (
        "95 % interval",
        "Over victims, given the initial models of these seeds: paired bootstrap for scores, with fewer than "
        f"{FEW_CLUSTERS} independent uploads no narrower than Student’s t; Clopper–Pearson for rates, where uploads hold several records "
        "no narrower than the bootstrap over whole uploads. A record that is sent in several rounds is one victim, and the uploads that "
        "share one count as one. It covers other victims of this data, of whom some come again under another seed. It does not cover other "
        "initial models (the range of the seeds’ means beside it shows how far these few differ), other data or other attacks.",
    ),
    (
        "ε and δ",
        "The differential-privacy guarantee against the adversary, unit, adjacency and sampling that its note names. Smaller is stronger. "
        "∞ means: no guarantee against this adversary, whatever the pictures look like.",
    ),
    (
        "Ceiling",
        "The highest identification rate that any attack can reach which sees what these attacks saw: the releases of the unit (the record "
        "or the client that ε is for) up to the attacked round, or, where all rounds are disclosed, in all of them. It is for the one "
        "guess of one attack, as is the identification rate beside it. In brackets: the same for whoever has every upload of the whole "
        "training. 100 % rules nothing out.",
    ),
    (
        "Accuracy",
        "Test accuracy of the model that was trained under the same defense to the end, what the defense costs in utility; where the spec "
        "tests several of the last rounds, the mean over the models after each of them. Below it, the "
        f"difference to the arm’s undefended control on the same seeds, from {FEWEST_PAIRS} seeds on with half of Student’s 95 % interval.",
    ),
    (
        "Rounding",
        "Where a channel rounds: the rms error of the released mean against the plain one, over the mean’s own rms. Rounding that is not "
        "small would be an undeclared defense.",
    ),
    (
        "Over shuffled updates",
        "PSNR minus that of the same attack on shuffled updates of the same victims: what it saw in the update, and not in the public "
        "pictures that it learned from.",
    ),
    (
        "Cost",
        "Of one client in one round: bytes that it sends (↑) and gets (↓), and CPU time of the client and of the server. More, and what "
        "an efficient coding would send, stands under “Cost”.",
    ),
    (
        "Best, median, worst",
        "Victims ordered by PSNR from the adversary’s side: “best” is the client who lost most. A mean would hide that client.",
    ),
)


def answer(summary: Mapping[str, object], threat: Mapping[str, object]) -> list[tuple[str, bool]]:
    """Return the report's one-sentence answer as pieces of text; True marks the name of an arm."""
    by_level: dict[Level, list[str]] = {}
    for row in strongest(rows_of(summary)):
        by_level.setdefault(level(row), []).append(name(row, "defense"))
    if not by_level:
        return [("Nothing was measured: the summary has no rows.", False)]
    pieces: list[tuple[str, bool]] = [(f"The {adversary(threat)} ", False)]
    present: list[Level] = [key for key in CLAUSES if key in by_level]
    for position, key in enumerate(present):
        clause = CLAUSES[key].replace("them", "the clients’ pictures") if position == 0 else CLAUSES[key]
        pieces.append((("" if position == 0 else "; it ") + clause, False))
        pieces += _enumeration(by_level[key])
    return [*pieces, (".", False)]


def no_better(summary: Mapping[str, object]) -> list[tuple[str, bool]]:
    """Return the arms that leak no less than no defense does, as pieces of text; empty where there are none."""
    rows = rows_of(summary)
    found = [row for row in strongest(rows) if verdict(row, control_of(row, rows)).against_control == EQUAL]
    return _enumeration([name(row, "defense") for row in found])


def facts(summary: Mapping[str, object]) -> list[str]:
    """Return the size of the experiment as short phrases: arms, victims, candidates, attacks."""
    rows = rows_of(summary)
    victims = {int(count) for row in rows if (count := number(row.get("victims"))) is not None and abs(count) != float("inf")}
    candidates = {count for row in rows if (count := number(lookup(row, "identified", "candidates")))}
    attacks = [attack for attack in dict.fromkeys(name(row, "attack") for row in rows) if attack != BEST]
    found = [values.count(len(strongest(rows)), "arm")]
    if victims:
        found.append(values.count(min(victims), "victim") if len(victims) == 1 else f"{min(victims)}–{max(victims)} victims")
    if candidates:
        found.append(f"{max(candidates):.0f} candidates")
    return [*found, *([f"{'attack' if len(attacks) == 1 else 'attacks'} {values.join(attacks)}"] if attacks else [])]


def explain(flag: str) -> str:
    """Return what a flag means as a sentence; empty for a flag that is not among ``checks.FLAGS``."""
    text = FLAGS.get(flag, "")
    return text and f"{text[0].upper()}{text[1:]}."


def verdicts() -> list[tuple[str, str]]:
    """Return each verdict with the thresholds behind it."""
    return [*((WORDS[key], MEANING[key]) for key in WORDS), (FAILED, "no attack ended well, so that its scores are those of gray pictures")]


def _enumeration(arms: Sequence[str], most: int = 10) -> list[tuple[str, bool]]:
    """Name the arms; of more than ``most`` the first ones, and how many more."""
    pieces: list[tuple[str, bool]] = []
    shown = arms if len(arms) <= most else arms[: most - 1]
    for place, arm in enumerate(shown):
        pieces += [("" if place == 0 else " and " if place == len(arms) - 1 else ", ", False), (arm, True)]
    return pieces if shown is arms else [*pieces, (f" and {len(arms) - len(shown)} more arms", False)]
