"""Where a client stands in one aggregation, and what it remembers from one stage to the next."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from defenses.channel._secagg import envelope, keys, messages
from simulator.errors import ProtocolAbort


class Stage(enum.IntEnum):
    """What a party does next; SIGN against an active server only."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    SIGN = 3
    UNMASK = 4
    DONE = 5
    ABORTED = 6

    def following(self, active: bool) -> Stage:
        """The stage after this one."""
        return Stage(self + (2 if self is Stage.MASK and not active else 1))


def check_stage(current: Stage, wanted: Stage, who: str) -> None:
    """Let a party go through its stages in order, each once.

    Raises:
        ProtocolAbort: another stage is due.
    """
    if current is not wanted:
        raise ProtocolAbort(f"{who}: next stage must be {current.name}, got {wanted.name}. Call each stage once, in order.")


@dataclass(frozen=True, repr=False)
class Memory:
    """What a client remembers between two stages; every stage makes a new one without what is spent.

    Attributes:
        envelope_private: X25519 private key of the envelopes; spent once the envelope keys are derived.
        mask_private: X25519 private key of the pairwise masks; spent once the pair keys are derived and it is shared.
        tag: names the run and its keys.
        own_key: key of the client's own mask; spent once the vector is masked.
        pair_keys: key of the mask shared with each neighbor; spent likewise.
        envelope_keys: the key shared with each neighbor.
        shares: by owner: a share of its seed, then a share of what its pairwise masks come from.
        survivors: the set that this client signed, as clients of empty rows.
    """

    envelope_private: bytes = b""
    mask_private: bytes = b""
    tag: bytes = b""
    own_key: bytes = b""
    pair_keys: Mapping[int, bytes] = field(default_factory=dict)
    envelope_keys: Mapping[int, bytes] = field(default_factory=dict)
    shares: Mapping[int, bytes] = field(default_factory=dict)
    survivors: Mapping[int, bytes] = field(default_factory=dict)

    def to_fields(self) -> list[bytes]:
        """The attributes as bytes, in order."""
        parts = [getattr(self, entry.name) for entry in fields(self)]
        return [part if isinstance(part, bytes) else messages.pack_table(part) for part in parts]

    @staticmethod
    def from_fields(packed: list[bytes]) -> Memory:
        """The inverse of :meth:`to_fields`.

        Raises:
            ProtocolAbort: a damaged table.
        """
        read: dict[str, Any] = {
            entry.name: messages.unpack_table(part, width=_TABLES[entry.name], origin="the saved state") if entry.name in _TABLES else part
            for entry, part in zip(fields(Memory), packed, strict=True)
        }
        return Memory(**read)


_TABLES = {"pair_keys": keys.KEY_BYTES, "envelope_keys": keys.KEY_BYTES, "shares": envelope.CONTENT_BYTES, "survivors": 0}
FIELDS = len(fields(Memory))
