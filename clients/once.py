"""One answer a round: noise belongs to a client and a round, so that the answers to two models of one round would differ by no noise."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from simulator.errors import ProtocolAbort
from simulator.world import World

ANSWERED = "answered"
"""Key of the client's state: the last round that it answered."""


def fresh(world: World, round: int, state: RecordDict) -> None:
    """Let a round begin that this client has not answered, of those that there are.

    Raises:
        ProtocolAbort: the round, or a later one, was answered, or is beyond those that (ε, δ) accounts for.
    """
    last = int((state.config_records.get(ANSWERED) or {}).get("round", 0))  # type: ignore[arg-type]
    if not last < round <= world.federation.rounds:
        raise ProtocolAbort(f"round must be in {last + 1}..{world.federation.rounds}, each answered once, got {round}. Refused.")


def answer_once(world: World, round: int, state: RecordDict) -> None:
    """Note that this round gets an answer, before there is one: whatever comes of it, there is no second.

    Raises:
        ProtocolAbort: as :func:`fresh`.
    """
    fresh(world, round, state)
    state[ANSWERED] = ConfigRecord({"round": round})
