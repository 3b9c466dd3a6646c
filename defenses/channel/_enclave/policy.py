"""What the SIMULATED enclave releases and what it is measured as."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from simulator import errors

HERE = Path(__file__).parent
CODE = (*sorted(HERE.glob("*.py")), HERE.parent / "_frames.py", Path(errors.__file__))
"""All of ours that runs inside."""
LIBRARIES = ("cryptography", "numpy")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The configuration of the enclave; part of its measurement, so that clients know it before they send.

    Attributes:
        min_contributors: the mean is released over at least so many clients.
        releases: rounds that it releases at most: a claim of differential privacy counts them.
        max_examples: bound on a client's number of examples; its weight is n_i / max_examples.
        update_length: numbers at the start of a vector that are the update; only these are clipped and get noise.
        length: numbers in a vector.
        clip_norm: L2 norm to which the enclave clips each update, where it adds noise.
        noise_multiplier: standard deviation of the Gaussian noise on the weighted sum of updates in units of ``clip_norm``; 0 neither
            clips nor adds noise.
    """

    min_contributors: int
    releases: int
    max_examples: int
    update_length: int
    length: int
    clip_norm: float
    noise_multiplier: float

    def to_bytes(self) -> bytes:
        """The one way to write it."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Policy:
        """The inverse of :meth:`to_bytes`."""
        return cls(**json.loads(data))


def measurement(policy: Policy, code: tuple[Path, ...] = CODE) -> bytes:
    """SHA-256 of the code, the versions of what it rests on, and the configuration; each piece behind its length."""
    digest = hashlib.sha256()
    versions = [f"{name} {version(name)}" for name in LIBRARIES] + [f"python {platform.python_version()}"]
    files = [part for path in code for part in (path.name.encode(), path.read_bytes())]
    for part in (b"fedpeek SIMULATED enclave", *files, *(text.encode() for text in versions), policy.to_bytes()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
