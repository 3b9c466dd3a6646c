"""From trials to the table: one row for each arm, attack and view, and, if asked, attacked round.

Failures count with the score of the mid-gray image. Every mean has an interval over whole clusters of uploads and, beside it, the range of
the seeds' means; every score has its floor, and every defended arm its difference to the undefended one on the same victims and seeds.
An attack that answered labels only is judged by its labels: its row has no scores of images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from defenses.audit import Measured, audit
from experiments.checks import flags_for
from experiments.comparison import compare, correct
from experiments.facts import accuracy_difference, columns, most_of
from experiments.groups import Group, Row, bounds, clusters, interval_of, mean, rate_of, seed_means
from experiments.held import hold
from experiments.json_lines import plain
from experiments.ladder import BEST, best_per_victim
from experiments.result import ArmFacts, Trial
from experiments.row_scores import above_floor, attributed, floor, guessed, guessed_in_class, over_prior, scores

SCHEMA = 1


def summarize(
    trials: Sequence[Trial],
    facts: Sequence[ArmFacts],
    *,
    candidates: int,
    control_arm: str | None,
    controls: Mapping[str, str] | None = None,
    environment: Mapping[str, object],
    version: str,
    by_round: bool = False,
    stacks: Mapping[str, Sequence[str]] | None = None,
    colluding: bool = False,
    one_round: bool = True,
    skewed: bool = False,
    candidates_of: Mapping[str, int] | None = None,
    not_modeled: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Return the content of ``summary.json``, in the order in which arms and attacks first appear.

    Means of PSNR are means of dB. ``identified.chance`` is 1/N for single records and at most k/N for a joint batch of k,
    ``chance_in_class`` the same for who knows each record's class.

    Args:
        candidates: N, the records among which the true one must be the nearest.
        control_arm: name of the undefended arm; None where there is none.
        controls: name of the arm that each arm is judged against; arms that are missing here are judged against ``control_arm``.
        by_round: one row for each attacked round, to see the initial beside the trained model, instead of one for all.
        stacks: the names of each arm's defenses, by which the report finds arms of one family.
        colluding: whether clients told the server what they sent.
        one_round: whether attacks used one round alone, so that each round's upload counts against a ceiling.
        skewed: whether clients hold classes of their own.
        candidates_of: N of the arms that have one of their own.
        not_modeled: the names of each arm's defenses that no attack knows.

    Raises:
        ValueError: a victim was scored twice by the same attack under the same arm.
    """
    groups = _groups([*trials, *best_per_victim(trials)], by_round)
    judges = {group.arm: (controls or {}).get(group.arm, control_arm) for group in groups}
    of_arm = {name: [fact for fact in facts if fact.arm == name] for name in {*judges, *judges.values()}}
    undefended = {arm: of_arm[control] if control != arm else [] for arm, control in judges.items()}
    among = {group.arm: (candidates_of or {}).get(group.arm, candidates) for group in groups}
    held = [  # the ceiling is for one guess: the best of several attacks had several
        hold(group.trials, of_arm[group.arm], one_round=one_round, candidates=among[group.arm], skewed=skewed)
        if group.attack != BEST and of_arm[group.arm]
        else ""
        for group in groups
    ]
    verdicts = iter(audit([one for one in held if isinstance(one, Measured)]))
    rows = [
        _row(
            group,
            _control(group, groups, judges[group.arm]),
            of_arm[group.arm],
            candidates=among[group.arm],
            colluding=colluding,
            exceeded=isinstance(one, Measured) and next(verdicts).failed,
            not_modeled=bool((not_modeled or {}).get(group.arm)),
        )
        | {
            "not_modeled": list((not_modeled or {}).get(group.arm, ())),
            "stack": list((stacks or {}).get(group.arm, ())),
            "accuracy_difference": accuracy_difference(of_arm[group.arm], undefended[group.arm]),
        }
        for group, one in zip(groups, held, strict=True)
    ]
    correct(rows)
    for row in rows:
        if row["attack"] == BEST and all("prior_only" in other["flags"] for other in _sources(row, rows)):
            row["flags"].append("prior_only")
    return {"schema": SCHEMA, "fedpeek": version, "environment": plain(environment), "rows": plain(rows)}


def _sources(best: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows of the attacks from which the best of each victim was taken."""
    place = best["defense"], best["view"], best["rounds"]
    found = [row for row in rows if (row["defense"], row["view"], row["rounds"]) == place and row["attack"] in best["solvers"]]
    return found or [best]


def _groups(trials: Sequence[Trial], by_round: bool) -> list[Group]:
    named: dict[tuple[str, str, str, int | None], list[Trial]] = {}
    for trial in trials:
        named.setdefault((trial.arm, trial.attack, trial.view, trial.round if by_round else None), []).append(trial)
    groups = [Group(*name, tuple(members)) for name, members in named.items()]
    for best in [group for group in groups if group.attack == BEST]:  # beside the others of its arm
        groups.remove(best)
        groups.insert(1 + max(place for place, group in enumerate(groups) if (group.arm, group.round) == (best.arm, best.round)), best)
    for group in groups:
        twice = [key for key, count in Counter(scored.key for scored in group.scored).items() if count > 1]
        if twice:
            raise ValueError(
                f"a victim must be scored once by {group.attack!r} under {group.arm!r}, got (seed, round, client, record) = {twice[0]} "
                "more than once. Remove the repeated lines."
            )
    return groups


def _control(group: Group, groups: Sequence[Group], control_arm: str | None) -> Group | None:
    """The same attack on the same rounds without defense, whatever the view; the group itself if it is the control."""
    wanted = control_arm, group.attack, group.round
    return next((other for other in groups if (other.arm, other.attack, other.round) == wanted), None)


def _row(
    group: Group,
    control: Group | None,
    facts: Sequence[ArmFacts],
    *,
    candidates: int,
    colluding: bool,
    exceeded: bool,
    not_modeled: bool,
) -> Row:
    scored, seeds = group.scored, {trial.seed for trial in group.trials}
    uploads, victims, groups = {item.upload for item in scored}, {item.victim for item in scored}, set(clusters(scored))
    statuses = {"ok": 0} | Counter(trial.status for trial in group.trials)
    pictured = [] if group.labels_only or group.chosen else scored
    named = [] if group.labels_only else scored
    gains, hits = [item.gain_db for item in pictured], [item.record.identified for item in named]
    gain = interval_of(gains, pictured) if pictured else None
    prior = over_prior(pictured)
    identified = rate_of(hits, named) if named else None
    comparison = compare(pictured, control.scored) if pictured and control and control is not group else None
    certified_wrong = sum(bool(item.record.certificate) and not item.record.exact for item in scored)
    certified_wrong += sum(trial.surplus_proofs for trial in group.trials)
    foreseen = [trial for trial in group.trials if trial.predicted is not None and trial.answered == "inputs"]
    exact_there = sum(record.exact for trial in foreseen for record in trial.records)
    chances = {"chance": guessed(group, candidates), "chance_in_class": guessed_in_class(group), "candidates": candidates}
    flags = flags_for(
        statuses=statuses,
        records=len(victims),
        seeds=len(seeds),
        uploads=len(groups),
        unconverged=sum(trial.status == "ok" and not trial.converged for trial in group.trials),
        gain=above_floor(group, candidates),
        prior=prior[0] if prior else None,
        controlled=control is not None and not {item.key for item in scored}.isdisjoint(item.key for item in control.scored),
        control_gain=above_floor(control, candidates) if control else None,
        difference=comparison.interval if comparison else None,
        exceeded=exceeded,
        chance=chances["chance"] if identified else None,
        epsilon=max((fact.epsilon for fact in facts), default=math.inf),
        ceiling=min((most_of(facts, trial.round) for trial in group.trials), default=1.0),
        oracle=any("oracle_used" in trial.flags for trial in group.trials),
        active=any("active_server" in trial.flags for trial in group.trials),
        candidates_told=group.chosen,
        not_modeled=not_modeled,
        colluding=colluding,
        clients_lost=any(fact.client_failures for fact in facts),
        certified_wrong=certified_wrong > 0,
        prediction_missed=any(sum(record.exact for record in trial.records) < (trial.predicted or 0) for trial in foreseen),
    )
    return {
        "defense": group.arm,
        "attack": group.attack,
        "view": group.view,
        "answered": "labels" if group.labels_only else "candidates" if group.chosen else "inputs",
        "control": control is group,
        "against": control.arm if control else None,
        "rounds": sorted({trial.round for trial in group.trials}),
        "senders": sorted({len(trial.senders) for trial in group.trials}),
        "victims": len(victims),
        "scored": len(scored),
        "seeds": len(seeds),
        "uploads": len(uploads),
        "independent_uploads": len(groups),
        "statuses": statuses,
        "reasons": sorted({trial.reason for trial in group.trials if trial.reason}),
        "scores": scores(group) if scored else {},
        "floor": floor(pictured) if pictured else None,
        "gain": {"psnr_db": bounds(gain) | seed_means(gains, pictured)} if gain else None,
        "over_prior": {"psnr_db": bounds(prior[0]), "records": prior[1]} if prior else None,
        "difference_to_control": comparison.row if comparison else None,
        "identified": bounds(identified) | seed_means(hits, named) | chances if identified else None,
        "attributed": attributed(scored),
        "certified": {
            "records": sum(bool(item.record.certificate) for item in scored),
            "wrong": certified_wrong,
        },
        "solvers": {
            name: {
                "records": sum(item.record.solver == name for item in scored),
                "certified": sum(item.record.solver == name and bool(item.record.certificate) for item in scored),
            }
            for name in dict.fromkeys(item.record.solver for item in scored if item.record.solver)
        },
        "identifiability": {"uploads": len(foreseen), "predicted": sum(trial.predicted or 0 for trial in foreseen), "exact": exact_there},
        "seconds": mean([trial.seconds for trial in group.trials if trial.status != "unsupported"]),
        **columns(facts, [float(trial.upload_bytes) for trial in group.trials], sorted({trial.round for trial in group.trials})),
        "flags": flags + sorted({flag for trial in group.trials for flag in trial.flags} - set(flags)),
    }
