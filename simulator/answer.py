"""What counts as an attack's answer. The attack's process asks, and the evaluator asks again: to it the answer is untrusted."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from simulator.adversary import Knowledge, Reconstruction

LONGEST_NAME = 200
"""Characters of a certificate or a solver's name."""


def checked(answer: Any, knowledge: Knowledge) -> Reconstruction:
    """The answer with plain numbers and tensors of its own, if it is one. NaN in a guess is no reason to refuse it: it is judged.

    Certificates are dropped where records were changed before training (:attr:`Knowledge.encoded`).

    Raises:
        TypeError, ValueError: it is no Reconstruction; or not one record at least and at most as many as the upload's, each with a
            label; or inputs of another shape; or a certificate or solver for another number of records.
    """
    if not isinstance(answer, Reconstruction):
        raise TypeError(f"an attack must answer a Reconstruction, got {type(answer).__name__}.")
    inputs, labels = answer.inputs, answer.labels
    if not _dense(labels) or labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be a tensor of class indices, one for each record, got {_kind(labels)}.")
    if inputs is not None and (not _dense(inputs) or not inputs.is_floating_point()):
        raise TypeError(f"inputs must be a dense tensor of floating-point images, got {_kind(inputs)}.")
    if not len(labels) or (inputs is not None and (not inputs.ndim or len(inputs) != len(labels))):
        count = None if inputs is None else len(inputs) if inputs.ndim else 0
        raise ValueError(f"an answer must hold ≥ 1 record and a label for each, got {count} inputs and {len(labels)} labels.")
    if len(labels) > knowledge.num_examples:
        raise ValueError(
            f"an answer must hold at most {knowledge.num_examples} records, as many as the upload, got {len(labels)}. "
            "More guesses would let the comparison with the truth choose among them."
        )
    if inputs is not None and tuple(inputs.shape[1:]) != tuple(knowledge.schema.shape):
        raise ValueError(f"inputs must have shape {tuple(knowledge.schema.shape)} each, got {tuple(inputs.shape[1:])}.")
    return Reconstruction(
        inputs=None if inputs is None else inputs.detach().cpu().float(),
        labels=labels.detach().cpu().to(torch.int64),
        objective=float(answer.objective),
        trace=tuple((int(step), float(value)) for step, value in answer.trace),
        certificate=() if knowledge.encoded else _names(answer.certificate, len(labels), "certificate"),
        solver=_names(answer.solver, len(labels), "solver"),
        clients=_clients(answer.clients, len(labels)),
        seconds=_seconds(answer.seconds),
        converged=bool(answer.converged),
    )


def printable(text: str, longest: int) -> str:
    """Text from the attack as what a terminal and a report can show: no control characters, not too long."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    return clean if len(clean) <= longest else f"{clean[:longest]}…"


def _names(names: Any, records: int, what: str) -> tuple[str, ...]:
    found = tuple(printable(str(name), LONGEST_NAME) for name in names)
    if len(found) not in (0, records):
        raise ValueError(f"{what} must name something for each of the {records} records, or be empty, got {len(found)}.")
    return found


def _clients(named: Any, records: int) -> tuple[int, ...]:
    found = tuple(int(client) for client in named)
    if len(found) not in (0, records):
        raise ValueError(f"clients must name one for each of the {records} records, or be empty, got {len(found)}.")
    return found


def _seconds(value: Any) -> float:
    if not 0 <= float(value) < inf:
        raise ValueError(f"seconds must be ≥ 0 and finite, got {value}.")
    return float(value)


def _dense(value: Any) -> bool:
    """Whether it can be sent: another layout would end the process that tried."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def _kind(value: Any) -> str:
    return f"{value.layout} {value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
