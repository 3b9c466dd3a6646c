"""The SIMULATED hardware: starts the enclave in a process of its own, measures it, signs its quotes, and relays between it and the host.

First comes how to start: the hardware's private key (a real one never leaves the chip), the policy, the run, whether to allow the host
to read memory, and the microcode's version.
"""

from __future__ import annotations

import struct
import sys
from typing import BinaryIO

from defenses.channel import _frames
from defenses.channel._enclave.pipe import PLACE, receive, send
from defenses.channel._enclave.policy import Policy, measurement
from defenses.channel._enclave.program import Enclave
from defenses.channel._enclave.quote import TCB, Quote, signed
from simulator.errors import ProtocolAbort


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer until the host hangs up; each request is a command, a place (round, client) and data, each answer ok or why not, and data."""
    start = receive(source, 5)
    if start is None:
        return
    key, policy_bytes, run, debug, tcb = start
    policy = Policy.from_bytes(policy_bytes)
    enclave, measured = Enclave(policy, run), measurement(policy)
    while (request := receive(source, 3)) is not None:
        command, place, data = request
        round, client = PLACE.unpack(place)
        try:
            if command == b"attest":
                quote = Quote(
                    debug=bool(debug), tcb=int.from_bytes(tcb, "little") if tcb else TCB, measurement=measured,
                    enclave_key=enclave.public_key, nonce=data, run=run,
                )  # fmt: skip
                answer = [b"", signed(quote, key)]
            elif command == b"receive":
                enclave.receive(round, client, data)
                answer = [b"", b""]
            elif command == b"release":
                released = enclave.release(round)
                clients = struct.pack(f"<{len(released.contributors)}Q", *released.contributors)
                mean = released.mean.astype("<f8").tobytes()
                answer = [b"", _frames.pack([clients, struct.pack("<Q", released.num_examples), mean])]
            elif command == b"dump" and debug:
                answer = [b"", b"".join(enclave.dump())]
            else:
                raise ProtocolAbort(f"command must be attest, receive or release, got {command!r}. Memory is closed to the host.")
        except ProtocolAbort as error:
            answer = [str(error).encode(), b""]
        send(sink, answer)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
