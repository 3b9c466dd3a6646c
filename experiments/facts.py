"""What an arm claimed and cost: gathered when its federation has ended, and summed up over its seeds for a row of the summary."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from clients.cost import seconds_of_a_round
from clients.private import records_held, splits
from defenses.bounds import ASSUMPTIONS
from defenses.channel.ckks import CKKSAggregation
from defenses.channel.secure_aggregation import SecureAggregation
from experiments.cost import memory_bytes, upload_bytes
from experiments.groups import Row, bounds, mean
from experiments.guarantee import guarantee_of
from experiments.result import ArmFacts
from experiments.rounding import rounding_error as measured_rounding_error
from experiments.statistics import paired_t
from experiments.under_attack import Victim
from experiments.utility import accuracy
from simulator.network import floating
from simulator.transcript import Record
from simulator.types import Upload
from simulator.world import World

COSTS = (
    "upload_bytes", "upload_bytes_formula", "download_bytes", "client_seconds", "server_seconds", "peak_bytes", "memory_bytes_formula",
)  # fmt: skip
"""Of one client and round, the server's and memory of one round; ``upload_bytes_formula`` is what an efficient coding would take."""


FOR_THE_VIEW = "Ceilings are for what the attacks saw"


def columns(facts: Sequence[ArmFacts], upload_bytes: Sequence[float], rounds: Sequence[int]) -> Row:
    """Return the weakest claim over the seeds, and the mean of what it cost.

    Args:
        facts: of one arm, one for each seed.
        upload_bytes: of the attacked uploads; stands in where there are no facts.
        rounds: that were attacked.
    """
    return {
        "epsilon": max((fact.epsilon for fact in facts), default=math.inf),
        "delta": max((fact.delta for fact in facts if fact.delta is not None), default=None),
        "epsilon_for": "; ".join(dict.fromkeys(fact.epsilon_for for fact in facts if fact.epsilon_for)),
        "ceiling": max((most_of(facts, round) for round in rounds), default=1.0),
        "least_ceiling": min((most_of(facts, round) for round in rounds), default=1.0),
        "training_ceiling": max((fact.training_ceiling for fact in facts if fact.training_ceiling is not None), default=None),
        "ceilings": _ceilings(facts),
        "accuracy": mean([fact.accuracy for fact in facts if math.isfinite(fact.accuracy)]),
        "accuracy_by_seed": {str(fact.seed): fact.accuracy if math.isfinite(fact.accuracy) else None for fact in facts},
        "tested_models": min((len(fact.accuracy_per_round) for fact in facts), default=0) or 1,
        "train_seconds": mean([fact.train_seconds for fact in facts]),
        "upload_bytes": mean([fact.upload_bytes for fact in facts] or upload_bytes),
        "cost": _costs(facts),
        "quantization_error": max((fact.quantization_error for fact in facts if fact.quantization_error is not None), default=None),
        "quantization_relative": max((f.quantization_relative for f in facts if f.quantization_relative is not None), default=None),
        "client_failures": [failure for fact in facts for failure in fact.client_failures],
    }


def _costs(facts: Sequence[ArmFacts]) -> Row:
    """Means over the seeds; of memory the least, since what libraries load on first use is none of the defense's."""
    found = {name: [value for fact in facts if (value := getattr(fact, name)) is not None] for name in COSTS}
    return {name: min(values, default=None) if name == "peak_bytes" else mean(values) for name, values in found.items()}


def ceiling_of(facts: ArmFacts, round: int) -> float:
    """The ceiling for an attack on ``round``, for what it saw; in results of an older version that of the whole training."""
    return (facts.ceiling_by_round or {}).get(str(round), facts.ceiling)


def most_of(facts: Sequence[ArmFacts], round: int) -> float:
    """The highest ceiling over the seeds for an attack on ``round``; 1 without facts."""
    return max((ceiling_of(fact, round) for fact in facts), default=1.0)


def accuracy_difference(facts: Sequence[ArmFacts], control: Sequence[ArmFacts]) -> Row | None:
    """Accuracy minus that of the control, paired by seed, with Student's interval over the seeds; None where no seed is in both."""
    before, after = ({fact.seed: fact.accuracy for fact in each if math.isfinite(fact.accuracy)} for each in (control, facts))
    shared = [seed for seed in after if seed in before]
    return {**bounds(paired_t([after[seed] - before[seed] for seed in shared])), "seeds": len(shared)} if shared else None


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
    whole, seen = ([value for fact in facts if (value := getattr(fact, key)) is not None] for key in ("training_ceiling", "latest_seen"))
    if whole and seen and (applies["identification"] or min(whole) < 1):
        sentences.insert(0, for_the_view(max(seen), max(whole)))
    return {"no_prior_psnr_db": psnr, "mse_floor": error, "sentences": sentences}


def for_the_view(latest: int, whole: float) -> str:
    """What the ceilings of a row are for, beside the one for more than its attacks saw."""
    rounds = "round 1" if latest == 1 else f"rounds 1 to {latest}"
    return (
        f"{FOR_THE_VIEW}, at most the releases of the unit's data in {rounds}; whoever has every upload of the "
        f"whole training identifies ≤ {whole:.3g}."
    )


def gather(
    world: World, record: Record, directory: Path, victims: Sequence[Victim], *, arm: str, candidates: int, delta: float,
    train_seconds: float, peak_bytes: float | None,
) -> ArmFacts:  # fmt: skip
    """Return what one arm claimed and cost under one seed.

    Args:
        world: of the arm and seed; its defenses make the claim.
        record: of the federation, whose last models are tested.
        directory: of the transcript; holds what clients noted.
        victims: the uploads under attack.
        arm: its name.
        candidates: N, the records among which the true one is to be named.
        delta: of the guarantee.
        train_seconds, peak_bytes: of the federation.
    """
    guesses = most_guesses(victims)
    at_least = max(1, (candidates - guesses + 1) // guesses)  # who knows all but the unit's data wastes no guess on the other records
    proven = guarantee_of(world, delta=delta, candidates=at_least, victims=victims)
    guarantee, views = proven.guarantee, proven.views
    psnrs = [view.no_prior_psnr_db for view in views.values() if view.no_prior_psnr_db is not None]
    assert record.released is not None
    first = max(1, world.federation.rounds - world.federation.record_models + 1)
    accuracies = [accuracy(world, splits(world), model) for number, model in sorted(record.models.items()) if number >= first]
    numbers = sum(tensor.numel() for part in record.released for tensor in floating(part).values())
    rounding = rounding_error(world, record)
    batch = max(map(world.training.size_of_batch, records_held(world)))
    return ArmFacts(
        arm=arm, seed=world.seed, accuracy=fmean(accuracies), accuracy_per_round=tuple(accuracies),
        epsilon=guarantee.epsilon, delta=guarantee.delta, epsilon_for=guarantee.sentence,
        client_failures=tuple(f"round {round}: {reason}" for round, _, reason in record.lost),
        upload_bytes=float(record.end["upload_bytes"]), train_seconds=train_seconds,
        quantization_error=rounding, quantization_relative=relative(rounding, record), download_bytes=float(record.end["download_bytes"]),
        client_seconds=seconds_of_a_round(directory), server_seconds=float(record.end["server_seconds"]),
        peak_bytes=None if peak_bytes is None else int(peak_bytes), upload_bytes_formula=upload_bytes(world.defenses, numbers, world),
        ceiling=max(view.identification for view in views.values()), training_ceiling=proven.training.identification,
        ceiling_by_round={str(number): view.identification for number, view in views.items()}, latest_seen=max(proven.seen.values()),
        psnr_ceiling_db=max(psnrs, default=None), mse_floor=proven.training.mse_floor,
        memory_bytes_formula=memory_bytes(world.defenses, numbers, world, batch),
    )  # fmt: skip


def most_guesses(victims: Sequence[Victim]) -> int:
    """As many as an attack may make of one upload, among which the truth chooses: the stated number, where fewer records were drawn."""
    return max(max(len(victim.truth), victim.knowledge.num_examples) for victim in victims)


def reset_peak() -> int:
    """Give back what memory is free, and forget the most that this process has used so far, where the system can; return what it holds.

    A worker does one arm after the other, and holds what libraries and earlier arms left.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    return peak_bytes()


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


def relative(error: float | None, record: Record) -> float | None:
    """An rms error over the rms of the mean that was released beside it, noise included where there is any; None without an error."""
    if error is None:
        return None
    (upload,) = record.observations[0].uploads
    released = torch.cat([tensor.flatten().double() for tensor in upload.update.tensors.values()])
    size = float(released.square().mean().sqrt())
    return error / size if size > 0 else None


def ckks_error(world: World, channel: CKKSAggregation, uploads: Sequence[Upload]) -> float | None:
    """The same of homomorphic aggregation, its noise included; None where the server holds the key and so the uploads themselves."""
    if len(uploads) != 1:
        return None
    (upload,) = uploads
    numbers = channel.length(upload.update.tensors, upload.buffers)
    values = torch.cat([tensor.flatten().double() for part in (upload.update.tensors, upload.buffers) for tensor in part.values()])
    rms = float(values.square().mean().sqrt())
    return channel.error_rms(world, senders=len(upload.senders), num_examples=upload.num_examples, numbers=numbers, rms=rms)
