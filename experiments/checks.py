"""Flags: when a verdict should not be relied on, and why. The tool distrusts itself before the reader has to."""

from __future__ import annotations

import math

from experiments.statistics import Interval, Rate

FEW_RECORDS, FEW_SEEDS, FEW_UPLOADS = 16, 2, 6
"""Below these numbers of record scores, seeds and independent uploads an interval is only indicative."""

TOLERATED_UNCONVERGED = 0.1
"""Share of attacks that may stop early without a flag."""

VACUOUS_CEILING = 0.99
"""A ceiling above this allows practically every record to be identified."""

FLAGS: dict[str, str] = {
    "not_converged": f"more than {TOLERATED_UNCONVERGED:.0%} of the attacks stopped while still improving: the leakage may be larger",
    "floor_not_beaten": "the interval of the gain over the best floor reaches 0 or below: no leakage was shown, which is not its absence",
    "control_failed": "the undefended attack did not beat its own floor: no defense can take credit here",
    "oracle_used": "the threat model disclosed labels to the attack: the leakage holds for that adversary only",
    "few_victims": f"fewer than {FEW_RECORDS} scored records or {FEW_SEEDS} seeds: read the numbers as an example",
    "few_uploads": f"fewer than {FEW_UPLOADS} independent uploads: the intervals are only indicative",
    "ceiling_exceeded": "more records were identified than (ε, δ) allows, beyond chance: the defense or its accounting is broken",
    "ceiling_vacuous": f"(ε, δ) allows more than {VACUOUS_CEILING:.0%} of the records to be identified: the guarantee excludes nothing",
    "clients_lost": "some clients did not answer as they should: victims, accuracy and ε are not those that were planned",
    "attack_failed": "some trials failed or diverged; they are counted as failures of the attack, so the leakage may be larger",
    "not_distinguishable": "the interval of the difference to the undefended run contains 0: no effect on this attack was shown",
}
"""Each flag with its one-line explanation."""

INFORMATION = frozenset({"not_distinguishable", "ceiling_vacuous"})
"""Flags that describe a finding; all others warn."""


def flags_for(
    *,
    statuses: dict[str, int],
    records: int,
    seeds: int,
    uploads: int,
    unconverged: int,
    gain: Interval | None,
    control_gain: Interval | None,
    difference: Interval | None,
    identified: Rate | None,
    epsilon: float,
    ceiling: float,
    oracle: bool,
    clients_lost: bool,
) -> list[str]:
    """Return the flags that a row of the summary deserves, in the order of :data:`FLAGS`.

    Args:
        statuses: how many trials ended how.
        records: scored records over all seeds.
        uploads: attacked uploads over all seeds.
        unconverged: attacks that ended well but stopped while still improving.
        gain: PSNR over the best floor in dB; None in a row without scores.
        control_gain: the same for the undefended arm under this attack; None without a control.
        difference: PSNR minus that of the undefended arm in dB, paired; None for the control itself.
        identified: share of identified records; None in a row without scores.
        epsilon: ∞ without a claim.
        ceiling: the most that ``identified`` can be under the claim.
        oracle: whether the attack was told labels.
    """
    if gain is None or identified is None:
        return [flag for flag, raised in {"oracle_used": oracle, "clients_lost": clients_lost}.items() if raised]
    raised = {
        "not_converged": unconverged > TOLERATED_UNCONVERGED * statuses.get("ok", 0),
        "floor_not_beaten": gain.low <= 0,
        "control_failed": control_gain is not None and control_gain.low <= 0,
        "oracle_used": oracle,
        "few_victims": records < FEW_RECORDS or seeds < FEW_SEEDS,
        "few_uploads": uploads < FEW_UPLOADS,
        "ceiling_exceeded": identified.low > ceiling,
        "ceiling_vacuous": math.isfinite(epsilon) and ceiling > VACUOUS_CEILING,
        "clients_lost": clients_lost,
        "attack_failed": statuses.get("failed", 0) + statuses.get("diverged", 0) > 0,
        "not_distinguishable": difference is not None and difference.low <= 0 <= difference.high,
    }
    return [flag for flag in FLAGS if raised[flag]]
