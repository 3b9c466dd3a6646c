"""The threat model in plain words: who the adversary is, what it sees, what it was told, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from experiments.report import values
from experiments.report.headline import name, rows_of
from experiments.report.values import lookup, number


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
        sees.append(f"What {values.count(colluding, 'client')} sent, who collude{'s' if colluding == 1 else ''} with it: {ACCOMPLICES}")
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
        "Take the mean apart by the channel’s own means." if "aggregate" in views else "",
    ]
    return [
        ("Who", _texts(threat.get("who")) or [f"The {adversary(threat).removesuffix(',')}{habit}"]),
        ("What it sees", _texts(threat.get("sees")) or sees),
        ("What it was told", _texts(threat.get("told")) or told),
        ("What it cannot do", _texts(threat.get("cannot")) or [text for text in cannot if text]),
    ]


def adversary(threat: Mapping[str, object]) -> str:
    """Name the adversary, as the subject of a sentence."""
    found = str(threat.get("adversary", "honest-but-curious"))
    if found == "active":
        return "ACTIVE server, which tampers with the model,"
    return found if found.endswith(("server", "client", "adversary")) else f"{found} server"


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
    "aggregate": "One mean over the whole cohort (secure aggregation, encryption or an enclave); no single client’s upload.",
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


def _plain(value: object) -> str:
    return values.join([str(item) for item in value]) if isinstance(value, list | tuple) else str(value)


def _texts(value: object) -> list[str]:
    if not value:
        return []
    return [str(text) for text in value] if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [str(value)]
