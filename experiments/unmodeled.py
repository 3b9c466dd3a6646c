"""Which defenses no attack here knows: they are attacked as if they were absent, and little leakage is then no credit of theirs."""

from __future__ import annotations

from collections.abc import Iterable

from attacks.modeled import known_as
from simulator import lookup
from simulator.defense import CLIENT_HOOKS, overrides
from simulator.errors import SpecError

HOOKS = tuple(hook for hook in CLIENT_HOOKS if hook != "on_broadcast")
"""Where a defense changes the model, the records or the upload, and does not only look at what was sent to it. A channel changes who sees
what, and what the server does comes later."""


def unmodeled(names: Iterable[str]) -> tuple[str, ...]:
    """Those of these defenses that act before the server's view and that no attack knows by name, each once."""
    return tuple(name for name in dict.fromkeys(names) if not known_as(name) and _acts(name))


def sentence(names: Iterable[str]) -> str:
    """What the reader of a table or a transcript must be told of these defenses."""
    return f"no attack here models {', '.join(names)}: it was attacked as if it were absent, and the leakage may be larger"


def _acts(name: str) -> bool:
    """Whether the defense of this name acts before the view; one that is not installed here might."""
    try:
        defense = lookup.get("defenses", name)
    except SpecError:
        return True
    return any(overrides(defense, hook) for hook in HOOKS)
