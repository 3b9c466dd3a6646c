"""The paired difference of a defended arm to the undefended one, on the same victims and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.groups import Row, Scored, bounds, clusters, fixed_rng, mean
from experiments.statistics import Interval, bootstrap_mean, holm, sign_flip_p


@dataclass(frozen=True)
class Comparison:
    """The paired difference to the control: its interval, None where no pair is left, and what the row says of it."""

    interval: Interval | None
    row: Row


def compare(scored: Sequence[Scored], control: Sequence[Scored]) -> Comparison | None:
    """Compare the leaks of the victims that both arms share, resampled by the uploads of both arms that common records join.

    A leak is the gain over the record's best floor, and nothing where the attack misses it. So no defense gets credit on a victim on
    which the undefended attack fails (rule T13), and none for luck: to leave these victims out would choose those on which chance
    favoured the undefended arm alone, of which every defense seems to take something.
    """
    undefended = {item.key: item for item in control}
    pairs = [(item, undefended[item.key]) for item in scored if item.key in undefended]
    if not pairs:
        return None
    counts = {"pairs": len(pairs), "undefended_missed": sum(not other.beats_floor for _, other in pairs)}
    if counts["undefended_missed"] == len(pairs):
        return Comparison(None, {"psnr_db": None, "identified": None, **counts, "p": None})
    of = clusters([item for item, _ in pairs], [other for _, other in pairs])
    change = [item.leak_db - other.leak_db for item, other in pairs]
    interval = bootstrap_mean(change, of, rng=fixed_rng())
    identified = mean([float(item.record.identified) - float(other.record.identified) for item, other in pairs])
    return Comparison(interval, {"psnr_db": bounds(interval), "identified": {"mean": identified}, **counts, "p": sign_flip_p(change, of)})


def correct(rows: Sequence[Row]) -> None:
    """Add to each difference its p-value after Holm's correction over all rows."""
    differences = [row["difference_to_control"] for row in rows if row["difference_to_control"]]
    for difference in differences:
        difference["p_holm"] = None
    compared = [difference for difference in differences if difference["p"] is not None]
    for difference, p in zip(compared, holm([difference["p"] for difference in compared]), strict=True):
        difference["p_holm"] = p
