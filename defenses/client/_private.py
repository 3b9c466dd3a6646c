"""What defenses that look again need of their client."""

from __future__ import annotations

from simulator.defense import ClientContext, Private


def private_of(context: ClientContext, name: str) -> Private:
    """The client's own data of this round, for the defense of this name.

    Raises:
        ValueError: they are not there.
    """
    if context.private is None:
        raise ValueError(f"context.private must be there for {name}, got None. Let clients.local hand it over.")
    return context.private
