"""Flags: when a verdict should not be relied on, and why. The tool distrusts itself before the reader has to."""

from __future__ import annotations

import math

from defenses.audit import NO_TEST
from experiments.statistics import Interval

FEW_RECORDS, FEW_SEEDS, FEW_UPLOADS = 16, 2, 6
"""Below these numbers of distinct records, seeds and independent uploads an interval is only indicative."""

TOLERATED_UNCONVERGED = 0.1
"""Share of attacks that may stop early without a flag."""

VACUOUS_CEILING = 0.99
"""A ceiling above this allows practically every record to be identified."""

EQUIVALENCE_DB = 3.0
"""Margin in dB of the paired difference to the undefended run: a factor of two in squared error, which no eye would call a defense."""

FLAGS: dict[str, str] = {
    "not_converged": f"more than {TOLERATED_UNCONVERGED:.0%} of the attacks were stopped while still improving: the leakage may be larger; "
    "where it was their budget of CPU seconds that ended, a faster machine finds more",
    "floor_not_beaten": "the interval of the gain over the best floor reaches 0 or below: no leakage was shown, which is not its absence",
    "prior_only": "on the same victims the attack did no better than on shuffled updates (the interval reaches 0 or below): what it shows "
    "may be its prior",
    "control_failed": "the undefended attack did not beat its own floor: no defense can take credit here",
    "no_control": "there is no undefended run on the same victims: no defense can take credit",
    "defense_not_modeled": "no attack here models a defense of this arm: but for what the architecture and the upload show by themselves, "
    "it was attacked as if it were absent, and the leakage may be larger",
    "oracle_used": "the threat model disclosed labels to the attack: the leakage holds for that adversary only",
    "active_server": "the server tampered with the model: not an honest-but-curious adversary",
    "candidates_told": "the adversary was handed the candidates, the true record among them: that is the game that a ceiling bounds, and "
    "more than a server usually knows",
    "colluding_clients": "clients told the server what they sent: the leakage holds for a server with these accomplices",
    "few_victims": f"fewer than {FEW_RECORDS} distinct records, or fewer than {FEW_SEEDS} seeds: read the numbers as an example",
    "few_uploads": f"fewer than {FEW_UPLOADS} uploads without a common record: the intervals are only indicative",
    "ceiling_exceeded": "more records were identified than (ε, δ) allows, beyond chance and allowing for all rows, as in `fedpeek "
    "audit`: the defense or its accounting is broken",
    "ceiling_vacuous": f"(ε, δ) allows more than {VACUOUS_CEILING:.0%} of the records to be identified by what this attack saw: the "
    "guarantee excludes nothing",
    "no_test": f"guessing alone names {NO_TEST:.0%} of the records or more: that they were named is no test of the defense",
    "clients_lost": "some clients did not answer as they should: victims, accuracy and ε are not those that were planned",
    "certificate_wrong": "a record that the attack proved exact is not: the proof or its assumptions are broken; please report it",
    "prediction_missed": "fewer records are exact than the update's identifiability allows: a stronger attack may exist",
    "unsupported": "the attack does not apply here and was not run, for the reason given: nothing is known of the leakage",
    "attack_failed": "some trials failed or diverged; they are counted as failures of the attack, so the leakage may be larger",
    "not_distinguishable": "the interval of the difference to the undefended run contains 0: no effect was shown, which is not its absence",
    "equivalent": f"the interval of the difference to the undefended run lies within ±{EQUIVALENCE_DB:g} dB: any effect is smaller",
}
"""Each flag with its one-line explanation."""

INFORMATION = frozenset({"not_distinguishable", "equivalent", "ceiling_vacuous", "candidates_told", "colluding_clients"})
"""Flags that describe a finding; all others warn."""


def flags_for(
    *,
    statuses: dict[str, int],
    records: int,
    seeds: int,
    uploads: int,
    unconverged: int,
    gain: Interval | None,
    controlled: bool,
    control_gain: Interval | None,
    difference: Interval | None,
    exceeded: bool,
    epsilon: float,
    ceiling: float,
    oracle: bool,
    clients_lost: bool,
    certified_wrong: bool = False,
    prediction_missed: bool = False,
    active: bool = False,
    candidates_told: bool = False,
    colluding: bool = False,
    prior: Interval | None = None,
    chance: float | None = None,
    not_modeled: bool = False,
) -> list[str]:
    """Return the flags that a row of the summary deserves, in the order of :data:`FLAGS`.

    Args:
        statuses: how many trials ended how.
        records: distinct scored records over all seeds; one that was sent in several rounds counts once.
        uploads: attacked uploads over all seeds, those with a common record counted once.
        unconverged: attacks that ended well but stopped while still improving.
        gain: what the attack reached over its floor: PSNR over the best one in dB, or, where it answered labels only, the share
            of right labels over theirs; None in a row without scores.
        controlled: whether the undefended arm, or this row as such, has scores under this attack on the same victims.
        control_gain: ``gain`` of the undefended arm under this attack; None without a control.
        difference: PSNR minus that of the undefended arm in dB, paired; None for the control itself, and where none is left.
        exceeded: whether the audit of all rows refutes the claim by this one.
        epsilon: ∞ without a claim.
        ceiling: the largest share of records that can be named under the claim, for what the attack saw, in the round that allows least:
            a guarantee excludes something if it does in any round.
        oracle: whether the attack was told labels.
        certified_wrong: whether a record with a certificate is not exact.
        active: whether the server tampered with the model.
        candidates_told: whether the row says who was identified by an attack that was handed the candidates.
        colluding: whether clients told the server what they sent.
        prior: PSNR minus that of the same attack on shuffled updates in dB, on the same victims; None where none were shuffled.
        chance: of naming a record without any update; None in a row that names nobody.
        not_modeled: whether a defense of the arm is one that no attack knows.
        prediction_missed: whether fewer records are exact than identifiability predicted.
    """
    if gain is None:
        missing = statuses.get("unsupported", 0) > 0
        lack = {"oracle_used": oracle, "active_server": active, "colluding_clients": colluding, "clients_lost": clients_lost}
        return [flag for flag, raised in (lack | {"unsupported": missing}).items() if raised]
    raised = {
        "not_converged": unconverged > TOLERATED_UNCONVERGED * statuses.get("ok", 0),
        "floor_not_beaten": gain.low <= 0,
        "prior_only": prior is not None and prior.low <= 0 < gain.low,
        "control_failed": control_gain is not None and control_gain.low <= 0,
        "no_control": not controlled,
        "defense_not_modeled": not_modeled,
        "oracle_used": oracle,
        "active_server": active,
        "candidates_told": candidates_told,
        "colluding_clients": colluding,
        "few_victims": records < FEW_RECORDS or seeds < FEW_SEEDS,
        "few_uploads": uploads < FEW_UPLOADS,
        "ceiling_exceeded": exceeded,
        "ceiling_vacuous": math.isfinite(epsilon) and ceiling > VACUOUS_CEILING,
        "no_test": chance is not None and chance >= NO_TEST,
        "clients_lost": clients_lost,
        "certificate_wrong": certified_wrong,
        "prediction_missed": prediction_missed,
        "unsupported": False,
        "attack_failed": statuses.get("failed", 0) + statuses.get("diverged", 0) > 0,
        "not_distinguishable": difference is not None and difference.low <= 0 <= difference.high,
        "equivalent": difference is not None and max(-difference.low, difference.high) < EQUIVALENCE_DB,
    }
    return [flag for flag in FLAGS if raised[flag]]
