"""The paired difference of a defended arm to the undefended one, on the same victims and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.groups import Row, Scored, bounds, clusters, fixed_rng, mean
from experiments.statistics import Interval, bootstrap_difference, holm, sign_flip_p


@dataclass(frozen=True)
class Comparison:
    """The paired difference to the control: its interval, None where no pair is left, and what the row says of it."""

    interval: Interval | None
    row: Row


def compare(scored: Sequence[Scored], control: Sequence[Scored]) -> Comparison | None:
    """Compare the victims that both arms share, resampled by the uploads of both arms that common records join.

    A victim on which the undefended attack misses its own floor gives no defense credit and is excluded (rule T13); where the
    control is at its floor, the ones that are left are its lucky ones, so that the difference errs towards the defense.
    """
    undefended = {item.key: item for item in control}
    shared = [(item, undefended[item.key]) for item in scored if item.key in undefended]
    if not shared:
        return None
    pairs = [(item, other) for item, other in shared if other.beats_floor]
    counts = {"pairs": len(pairs), "excluded": len(shared) - len(pairs)}
    if not pairs:
        return Comparison(None, {"psnr_db": None, "identified": None, **counts, "p": None})
    of = clusters([item for item, _ in pairs], [other for _, other in pairs])
    values, reference = [item.record.psnr_db for item, _ in pairs], [other.record.psnr_db for _, other in pairs]
    interval = bootstrap_difference(values, reference, of, rng=fixed_rng())
    p = sign_flip_p([value - other for value, other in zip(values, reference, strict=True)], of, rng=fixed_rng())
    identified = mean([float(item.record.identified) - float(other.record.identified) for item, other in pairs])
    return Comparison(interval, {"psnr_db": bounds(interval), "identified": {"mean": identified}, **counts, "p": p})


def correct(rows: Sequence[Row]) -> None:
    """Add to each difference its p-value after Holm's correction over all rows."""
    differences = [row["difference_to_control"] for row in rows if row["difference_to_control"]]
    for difference in differences:
        difference["p_holm"] = None
    compared = [difference for difference in differences if difference["p"] is not None]
    for difference, p in zip(compared, holm([difference["p"] for difference in compared]), strict=True):
        difference["p_holm"] = p
