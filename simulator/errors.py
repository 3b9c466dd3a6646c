"""Every error that fedpeek raises on purpose; each message says what must be, what it got, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedpeekError(Exception):
    """Base of all errors that are explained to the user without a traceback."""


class SpecError(FedpeekError):
    """A setting, name or combination of settings that cannot run; raised before anything is written."""


class TranscriptError(FedpeekError):
    """A transcript that is truncated, altered, or of another schema; names the round where it breaks."""


class WireError(FedpeekError):
    """A message whose content is not what the protocol allows (NaN, wrong shape, wrong name)."""


class FederationError(FedpeekError):
    """A federation that cannot go on: too few clients answered, or a worker died."""


class BroadcastRefused(FedpeekError):
    """A client that does not train on the model which it was sent."""


class ProtocolAbort(FedpeekError):
    """A secure-aggregation party that refuses to go on because a check failed."""


MANY = 20
"""More names than these are not printed: in a list of all attacks or claims nobody finds the one that was meant."""


def did_you_mean(word: str, known: Iterable[str], see: str = "") -> str:
    """Return the valid names as a sentence, with the nearest one first when there is one.

    Args:
        word: what was given.
        known: the valid names.
        see: the command that lists them; of many names it is printed in their place, behind the nearest ones.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    if len(known) <= MANY:
        return f"{hint}Valid: {', '.join(known) or '(none)'}."
    near = f"Also near: {', '.join(close[1:])}. " if close[1:] else ""
    return f"{hint}{near}{len(known)} names are valid{f', see `{see}`' if see else ''}."
