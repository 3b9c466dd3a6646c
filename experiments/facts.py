"""What an arm claimed and cost: gathered when its federation has ended, and summed up over its seeds for a row of the summary."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from clients.cost import seconds_of_a_round
from clients.private import splits
from defenses.bounds import ASSUMPTIONS
from defenses.channel.ckks import CKKSAggregation
from defenses.channel.secure_aggregation import SecureAggregation
from experiments.cost import upload_bytes
from experiments.groups import Row, mean
from experiments.guarantee import guarantee_of
from experiments.result import ArmFacts
from experiments.rounding import rounding_error as measured_rounding_error
from experiments.under_attack import Victim
from experiments.utility import accuracy
from simulator.transcript import Record
from simulator.types import Upload
from simulator.world import World

COSTS = ("upload_bytes", "upload_bytes_formula", "download_bytes", "client_seconds", "server_seconds", "peak_bytes")
"""Of one client and round, the server's of one round; ``upload_bytes_formula`` is what an efficient coding would take."""


def columns(facts: Sequence[ArmFacts], upload_bytes: Sequence[float]) -> Row:
    """Return the weakest claim over the seeds, and the mean of what it cost.

    Args:
        facts: of one arm, one for each seed.
        upload_bytes: of the attacked uploads; stands in where there are no facts.
    """
    return {
        "epsilon": max((fact.epsilon for fact in facts), default=math.inf),
        "delta": max((fact.delta for fact in facts if fact.delta is not None), default=None),
        "epsilon_for": "; ".join(dict.fromkeys(fact.epsilon_for for fact in facts if fact.epsilon_for)),
        "ceiling": max((fact.ceiling for fact in facts), default=1.0),
        "ceilings": _ceilings(facts),
        "accuracy": mean([fact.accuracy for fact in facts if math.isfinite(fact.accuracy)]),
        "accuracy_by_seed": {str(fact.seed): fact.accuracy if math.isfinite(fact.accuracy) else None for fact in facts},
        "train_seconds": mean([fact.train_seconds for fact in facts]),
        "upload_bytes": mean([fact.upload_bytes for fact in facts] or upload_bytes),
        "cost": {name: mean([value for fact in facts if (value := getattr(fact, name)) is not None]) for name in COSTS},
        "quantization_error": max((fact.quantization_error for fact in facts if fact.quantization_error is not None), default=None),
        "client_failures": [failure for fact in facts for failure in fact.client_failures],
    }


def _ceilings(facts: Sequence[ArmFacts]) -> Row:
    """What an attack without a prior reaches at most, the loosest over the seeds, and what every ceiling that applies assumes."""
    psnr = max((fact.psnr_ceiling_db for fact in facts if fact.psnr_ceiling_db is not None), default=None)
    error = min((fact.mse_floor for fact in facts if fact.mse_floor is not None), default=None)
    applies = {
        "identification": any(fact.ceiling < 1 for fact in facts),
        "no_prior_psnr_db": psnr is not None,
        "dfil": error is not None,
    }
    words = {"identification": "Identification", "no_prior_psnr_db": "PSNR", "dfil": "MSE"}
    sentences = [f"{words[key]}: {ASSUMPTIONS[key]}." for key, there in applies.items() if there]
    return {"no_prior_psnr_db": psnr, "mse_floor": error, "sentences": sentences}


def gather(
    world: World, record: Record, directory: Path, victims: Sequence[Victim], *, arm: str, candidates: int, delta: float,
    train_seconds: float, peak_bytes: float | None,
) -> ArmFacts:  # fmt: skip
    """Return what one arm claimed and cost under one seed.

    Args:
        world: of the arm and seed; its defenses make the claim.
        record: of the federation, whose last model is tested.
        directory: of the transcript; holds what clients noted.
        victims: the uploads under attack.
        arm: its name.
        candidates: N, as the spec asks; 0 for all records.
        delta: of the guarantee.
        train_seconds, peak_bytes: of the federation.
    """
    records = len(world.data.load().records)
    guesses = max(len(victim.truth) for victim in victims)  # the truth assigns k guesses, so that chance is up to k/N
    at_least = max(1, min(candidates or records, records) // guesses)
    guarantee, ceilings = guarantee_of(world, delta=delta, candidates=at_least, victims=victims)
    assert record.released is not None
    numbers = sum(tensor.numel() for part in record.released for tensor in part.values())
    return ArmFacts(
        arm=arm, seed=world.seed, accuracy=accuracy(world, splits(world), record.released),
        epsilon=guarantee.epsilon, delta=guarantee.delta, epsilon_for=guarantee.sentence, ceiling=ceilings.identification,
        client_failures=tuple(f"round {round}: {reason}" for round, _, reason in record.lost),
        upload_bytes=float(record.end["upload_bytes"]), train_seconds=train_seconds,
        quantization_error=rounding_error(world, record), download_bytes=float(record.end["download_bytes"]),
        client_seconds=seconds_of_a_round(directory), server_seconds=float(record.end["server_seconds"]),
        peak_bytes=None if peak_bytes is None else int(peak_bytes), upload_bytes_formula=upload_bytes(world.defenses, numbers, world),
        psnr_ceiling_db=ceilings.no_prior_psnr_db, mse_floor=ceilings.mse_floor,
    )  # fmt: skip


def reset_peak() -> None:
    """Forget the most memory that this process has used so far, where the system can: a worker does one arm after the other."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory that this process has used since :func:`reset_peak`, or, where the system cannot say so, since it started."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rounding_error(world: World, record: Record) -> float | None:
    """Rms rounding error of a coordinate of the aggregate, in the update's unit; None without a channel that rounds."""
    if isinstance(world.channel, CKKSAggregation):
        return ckks_error(world, world.channel, record.observations[0].uploads)
    if not isinstance(world.channel, SecureAggregation):
        return None
    return measured_rounding_error(world, world.channel, record.observations[0])


def ckks_error(world: World, channel: CKKSAggregation, uploads: Sequence[Upload]) -> float | None:
    """The same of homomorphic aggregation, its noise included; None where the server holds the key and so the uploads themselves."""
    if len(uploads) != 1:
        return None
    (upload,) = uploads
    numbers = channel.length(upload.update.tensors, upload.buffers)
    return channel.error_rms(world, senders=len(upload.senders), num_examples=upload.num_examples, numbers=numbers)
