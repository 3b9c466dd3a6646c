"""The report's prose: the answer in one sentence, the threat model in plain words, and how to read each number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from experiments.checks import EQUIVALENCE_DB, FLAGS
from experiments.ladder import BEST
from experiments.report import values
from experiments.report.headline import control_of, name, rows_of, strongest
from experiments.report.values import lookup, number
from experiments.report.verdict import EQUAL, FAILED, MEANING, WORDS, Level, level, verdict

CLAUSES: Mapping[Level, str] = {
    "recognizable": "can recognize the clients’ pictures under ",
    "partial": "rebuilds them in part under ",
    "identifiable": "tells whose picture it was, without rebuilding it, under ",
    "faint": "finds traces that identify nobody under ",
    "labels": "recovers the labels, but no pictures, under ",
    "floor": "does no better than a blind guess, with this attack, under ",
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
        "Labels right",
        "Fraction of the private labels that the attack got right. Its floor is what a guess gets right that knows how frequent each class "
        "is among the victims, and that is matched to the truth as the attack’s labels are.",
    ),
    (
        "Floor",
        "The best score that a guess reaches without looking at the upload: the mean training picture, another victim’s picture, random "
        "pixels, or the same attack on a shuffled gradient. What does not beat the floor is not leakage.",
    ),
    (
        "PSNR gain",
        "PSNR minus the best floor’s PSNR on the same victim, in dB. Above 0, the upload told the adversary something about the picture.",
    ),
    (
        "Against no defense",
        "The paired difference defended − undefended, on the same victims and seeds; a victim on which the undefended attack misses its "
        "floor is left out. It counts as “not distinguishable” when its interval holds 0 and lies within "
        f"± {values.decibel(EQUIVALENCE_DB)}, and as “undecided” when it holds 0 but reaches further.",
    ),
    (
        "95 % interval",
        "Over victims and seeds: paired bootstrap for scores, Clopper–Pearson for rates; where one upload holds several records, a rate’s "
        "interval is no narrower than the bootstrap over whole uploads. It covers these victims, not other data or "
        "other attacks.",
    ),
    (
        "ε and δ",
        "The differential-privacy guarantee against the adversary, unit, adjacency and sampling that its note names. Smaller is stronger. "
        "∞ means: no guarantee against this adversary, whatever the pictures look like.",
    ),
    (
        "Ceiling",
        "The highest identification rate that any attack can reach which sees what these attacks saw: the releases of the unit (the record "
        "or the client that ε is for) up to the attacked round, or, where all rounds are disclosed, in all of them. “Identified” is what "
        "this attack did. In brackets: the same for whoever has every upload of the whole training. 100 % rules nothing out.",
    ),
    (
        "Accuracy",
        "Test accuracy of the model that was trained under the same defense to the end: what the defense costs in utility. Below it, the "
        "difference to the arm’s undefended control on the same seeds, with half of Student’s 95 % interval.",
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
    pieces: list[tuple[str, bool]] = [(f"The {_adversary(threat)} ", False)]
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
    found = [_count(len(strongest(rows)), "arm")]
    if victims:
        found.append(_count(min(victims), "victim") if len(victims) == 1 else f"{min(victims)}–{max(victims)} victims")
    if candidates:
        found.append(f"{max(candidates):.0f} candidates")
    return [*found, *([f"{'attack' if len(attacks) == 1 else 'attacks'} {values.join(attacks)}"] if attacks else [])]


def threat_card(threat: Mapping[str, object], summary: Mapping[str, object]) -> list[tuple[str, list[str]]]:
    """Return the threat model in plain words: who, what it sees, what it was told, what it cannot do.

    Args:
        threat: the fields of the threat model. The keys ``who``, ``sees``, ``told`` and ``cannot`` (a text or several) replace the card's
            own words; a key that is not known is printed as it stands under "What it was told".
        summary: tells which views the adversary had.
    """
    views = list(dict.fromkeys(name(row, "view") for row in rows_of(summary)))
    passive = str(threat.get("adversary", "honest-but-curious")) == "honest-but-curious"
    active = str(threat.get("adversary")) == "active"
    habit = ": it runs the protocol exactly as agreed, keeps all that it receives, and analyses it later." if passive else "."
    if active:
        planted = PLANTED.get(str(threat.get("tampering", "")), "numbers of its own")
        habit = (
            f": it is NOT honest-but-curious. In place of the model it broadcasts {planted}, so that the uploads hold records verbatim, "
            "and reads them out. The architecture, the recipe and the sampling stay as agreed; the model learns little."
        )
    sees = [VIEWS.get(view, f"The view “{view}”.") for view in views if view != values.MISSING]
    known = {"adversary", "tampering", "labels", "public_data", "colluding", "candidates", "metadata", "who", "sees", "told", "cannot"}
    colluding = int(number(threat.get("colluding")) or 0)
    if colluding:
        sees.append(f"What {_count(colluding, 'client')} sent, who collude{'s' if colluding == 1 else ''} with it: {ACCOMPLICES}")
    told = [
        "The model, the broadcast parameters and the training recipe: it wrote them itself.",
        "Which defenses are on, with their settings (Kerckhoffs’ principle).",
        LABELS.get(str(threat.get("labels", "none")), f"Labels: {threat.get('labels')}."),
        "Public pictures of the same kind." if threat.get("public_data") else "No pictures of the same kind.",
        *([_candidates(summary)] if threat.get("candidates") else []),
        *(f"{str(key).replace('_', ' ').capitalize()}: {_plain(value)}" for key, value in threat.items() if key not in known),
    ]
    cannot = [
        "Change the model, the protocol or the sampling to make clients leak more." if passive else "",
        "" if threat.get("metadata", True) else "See how many examples a lone sender has, or its BatchNorm statistics: both are withheld.",
        "Look into a client’s device: pictures, labels and keys stay there.",
        "Know a defense’s random numbers: noise, masks and seeds stay with whoever drew them.",
        "Take back the masks of secure aggregation: it gets the sum, not the parts." if "aggregate" in views else "",
    ]
    return [
        ("Who", _texts(threat.get("who")) or [f"The {_adversary(threat).removesuffix(',')}{habit}"]),
        ("What it sees", _texts(threat.get("sees")) or sees),
        ("What it was told", _texts(threat.get("told")) or told),
        ("What it cannot do", _texts(threat.get("cannot")) or [text for text in cannot if text]),
    ]


LABELS = {
    "none": "No labels: the attack recovers them from the upload, or does without.",
    "counts": "How many private records there are of each class, but not which is which.",
    "exact": "Each private label. A real server would have to recover them first.",
}
ACCOMPLICES = (
    "they follow the protocol and tell it afterwards, noise and rounding included. It takes their part out of every sum. They are "
    "no victims."
)
PLANTED = {
    "imprint": "thresholds of brightness planted in its first layer (imprint, Robbing the Fed)",
    "trap_weights": "trap weights planted in its first layer (Curious Abandon Honesty)",
}
VIEWS = {
    "update": "The model that it broadcast, and every client’s upload on its own, with its sender’s name.",
    "aggregate": "Under secure aggregation, only the sum over the whole cohort, once it is unmasked; no single client’s upload.",
    "model": "The trained models that are released, round after round.",
    "query": "Answers of the released model’s query interface.",
}


def _candidates(summary: Mapping[str, object]) -> str:
    counts = {count for row in rows_of(summary) if (count := number(lookup(row, "identified", "candidates")))}
    many = f"A list of {max(counts):.0f} records" if counts else "A list of records"
    return (
        f"{many} with their labels, the true ones among them: the identifier need only say which. It is the game that a ceiling bounds; "
        "a server that cannot guess what a record might be knows less."
    )


def explain(flag: str) -> str:
    """Return what a flag means as a sentence; empty for a flag that is not among ``checks.FLAGS``."""
    text = FLAGS.get(flag, "")
    return text and f"{text[0].upper()}{text[1:]}."


def verdicts() -> list[tuple[str, str]]:
    """Return each verdict with the thresholds behind it."""
    return [*((WORDS[key], MEANING[key]) for key in WORDS), (FAILED, "no attack ended well, so that its scores are those of gray pictures")]


def _adversary(threat: Mapping[str, object]) -> str:
    adversary = str(threat.get("adversary", "honest-but-curious"))
    if adversary == "active":
        return "ACTIVE server, which tampers with the model,"
    return adversary if adversary.endswith(("server", "client", "adversary")) else f"{adversary} server"


def _enumeration(arms: Sequence[str], most: int = 10) -> list[tuple[str, bool]]:
    """Name the arms; of more than ``most`` the first ones, and how many more."""
    pieces: list[tuple[str, bool]] = []
    shown = arms if len(arms) <= most else arms[: most - 1]
    for place, arm in enumerate(shown):
        pieces += [("" if place == 0 else " and " if place == len(arms) - 1 else ", ", False), (arm, True)]
    return pieces if shown is arms else [*pieces, (f" and {len(arms) - len(shown)} more arms", False)]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(value: object) -> str:
    return values.join([str(item) for item in value]) if isinstance(value, list | tuple) else str(value)


def _texts(value: object) -> list[str]:
    if not value:
        return []
    return [str(text) for text in value] if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [str(value)]
