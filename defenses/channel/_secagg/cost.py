"""What a client sends in one aggregation, by formula: exact for a client that takes part in every stage, with all others."""

from __future__ import annotations

from defenses.channel._secagg import envelope, keys
from defenses.channel._secagg.identity import SIGNATURE_BYTES
from defenses.channel._secagg.masking import packed_bytes
from defenses.channel._secagg.messages import HEADER_BYTES
from defenses.channel._secagg.shamir import SHARE_BYTES

_CLIENT, _COUNT, _SIZE, _GCM = 8, 4, 8, 16


def upload_bytes(length: int, bits: int, degree: int, *, active: bool = False, standing: bool = False) -> int:
    """Bytes of all messages of one client with ``degree`` neighbors; keys that outlive a round are not counted."""
    advert = 0 if standing else HEADER_BYTES + 2 * keys.KEY_BYTES + (SIGNATURE_BYTES if active else 0)
    locked = _COUNT + degree * (_CLIENT + keys.KEY_BYTES) + _GCM if standing else 0
    shares = HEADER_BYTES + 2 * _SIZE + _COUNT + degree * (_CLIENT + envelope.ENVELOPE_BYTES) + locked
    masked = HEADER_BYTES + packed_bytes(length, bits)
    signature = HEADER_BYTES + SIGNATURE_BYTES if active else 0
    opened = HEADER_BYTES + _COUNT + (degree + 1) * (_CLIENT + SHARE_BYTES)
    return advert + shares + masked + signature + opened
