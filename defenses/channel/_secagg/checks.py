"""What both parties of secure aggregation demand of who takes part and of what they send."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from defenses.channel._secagg.masking import Words, word_type
from defenses.channel._secagg.parameters import Parameters
from simulator.errors import ProtocolAbort


def check_members(members: Collection[int], allowed: Collection[int], what: str, *, client: int, threshold: int) -> None:
    """Demand a client's own presence, no repetition, no strangers, and at least the threshold, which is above half of the share holders.

    Raises:
        ProtocolAbort: one of these is not so.
    """
    distinct = set(members)
    if len(distinct) != len(members) or client not in distinct or not distinct <= set(allowed):
        raise ProtocolAbort(
            f"{what} must be distinct, include client {client} and be among {sorted(allowed)}, got {sorted(members)}. Leave this run."
        )
    if len(distinct) < threshold:
        raise ProtocolAbort(f"{what} must be ≥ threshold = {threshold}, got {len(distinct)}. Leave this run.")


def check_vector(vector: Words, parameters: Parameters) -> None:
    """Demand a vector of the length and the words that were agreed on.

    Raises:
        ProtocolAbort: it is another one.
    """
    wanted = word_type(parameters.bits)
    if vector.dtype != wanted or vector.shape != (parameters.length,):
        raise ProtocolAbort(
            f"vector must be {wanted} of shape ({parameters.length},), got {vector.dtype} of shape {vector.shape}. "
            "Use SecureAggregation.encode."
        )


def check_replies(replies: Mapping[int, bytes], allowed: Collection[int], what: str, parameters: Parameters, *, least: int = 0) -> None:
    """Demand that enough clients replied, and nobody else; ``least`` is the quorum unless it is given.

    Raises:
        ProtocolAbort: a stranger, or too few.
    """
    least, strangers = least or parameters.least, sorted(set(replies) - set(allowed))
    if strangers:
        raise ProtocolAbort(f"{what} must come from clients {sorted(allowed)}, got some from {strangers}. Drop them.")
    if len(replies) < least:
        need = "threshold" if least == parameters.threshold else "quorum"
        raise ProtocolAbort(
            f"{what} must be ≥ {need} = {least} of {len(parameters.clients)} clients, "
            f"got {len(replies)}. Skip this round, or wait longer for clients."
        )


def check_rows(rows: Mapping[int, bytes], wanted: Collection[int], client: int) -> None:
    """Demand a row for each of those that ``client`` deals with, and for nobody else.

    Raises:
        ProtocolAbort: one is missing, or there is another.
    """
    if rows.keys() != set(wanted):
        raise ProtocolAbort(f"rows from client {client} must be for clients {sorted(wanted)}, got {sorted(rows)}. Abort the round.")
