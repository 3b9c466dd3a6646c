"""In which worlds secure aggregation does not act, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from defenses.channel._secagg import graph
from defenses.channel._secagg.keys import KEY_BYTES
from defenses.client.laplace_noise import LaplaceNoise
from defenses.client.local_dp import LocalDP
from simulator.defense import Defense
from simulator.errors import ProtocolAbort

if TYPE_CHECKING:
    from defenses.channel.secure_aggregation import SecureAggregation
    from simulator.world import World

NOISE_REACH = 8
LAPLACE_REACH = 25
"""Standard deviations that ``clip_range`` must leave for Gaussian and for Laplace noise; beyond them lie 1e-15 of all coordinates."""


def why_not(settings: SecureAggregation, world: World) -> str | None:
    """Return None if these settings can act in this world, else the reason why not (must be / got / do)."""
    n = world.federation.cohort_size
    if n < 2:
        return f"cohort must be ≥ 2 for secure aggregation, got {n}: the mean over one client is its update. Set federation.cohort."
    reason = _graph(settings, n, world.federation.rounds) or _identities(settings, world)
    if reason is None and sum(defense.channel for defense in world.defenses) > 1:
        names = [defense.name for defense in world.defenses if defense.channel]
        reason = f"a world must have at most 1 channel, got {names}. Keep one."
    if reason is not None:
        return reason
    return _plain(settings, world) if settings.mode == "plain" else _words(settings, world)


def _graph(settings: SecureAggregation, n: int, rounds: int) -> str | None:
    threshold = settings.threshold or 2 * n // 3 + 1
    if settings.graph == "complete":
        if threshold > n:
            return f"threshold must be at most the cohort of {n}, got {threshold}. Use threshold = 0 for {2 * n // 3 + 1}."
        if 2 * threshold <= n:
            return (
                f"threshold must be above half of the cohort of {n}, got {threshold}: two disjoint groups could open both of a client's "
                f"secrets. Use threshold = 0 for {2 * n // 3 + 1}."
            )
    elif settings.plan_for(n, rounds) is None:
        if not settings.degree and graph.solve(n, settings.corrupt, settings.dropout, rounds) is not None:
            return _not_sparse(settings, n, rounds)
        return (
            f"(k, t) must reach {graph.SECURITY_BITS:g} bits of security and {graph.CORRECTNESS_BITS:g} of correctness over all "
            f"{rounds} rounds together, got "
            f"{f'k = {settings.degree}, t = {settings.threshold}' if settings.degree else 'no such pair'} for {n} clients of which "
            f"{settings.corrupt:g} collude and {settings.dropout:g} drop out. Use 0 for both, lower the shares, or graph = 'complete'."
        )
    if not settings.active:
        return _uncertified(settings, n, rounds)
    if settings.graph != "complete":
        return (
            "graph must be complete against an active server, got k-regular: it could draw graphs until one suits it. "
            "Use graph = 'complete'."
        )
    if settings.setup != "each round":
        return "setup must be 'each round' against an active server, got 'once': its keys are signed for a round. Use 'each round'."
    if 3 * threshold <= 2 * n:
        return f"threshold must be above 2/3 of the cohort of {n} against an active server, got {threshold}. Use threshold = 0."
    return _uncertified(settings, n, rounds)


def _not_sparse(settings: SecureAggregation, n: int, rounds: int) -> str:
    """All that can be certified is the complete graph; whoever asked for a sparse one would compare the complete one with itself."""
    larger = graph.next_sparse(n, settings.corrupt, settings.dropout, rounds)
    cure = f"a cohort of {larger}" if larger else f"other shares (with these no cohort up to {graph.LARGEST_SEARCHED} has one)"
    return (
        f"graph must be certified with fewer than {n - 1} neighbors to be k-regular, got none for a cohort of {n} of which "
        f"{settings.corrupt:g} collude and {settings.dropout:g} drop out. Use graph = 'complete', or {cure}."
    )


def _uncertified(settings: SecureAggregation, n: int, rounds: int) -> str | None:
    """What a k-regular graph was asked for already: that shares of corrupt and lost clients leave both properties."""
    if settings.graph != "complete" or (plan := settings.complete_plan(n, rounds)).certified:
        return None
    t, server = plan.threshold, "an active" if settings.active else "a semi-honest"
    if not plan.security_bits:
        limit = graph.most_corrupt(n, t, active=settings.active)
        return (
            f"corrupt must leave fewer than {limit} of {n} clients that collude with {server} server at threshold = {t}, got "
            f"{settings.corrupt:g} of them, {plan.corrupt}. Lower it, or raise threshold."
        )
    return (
        f"dropout must leave threshold = {t} of {n} clients, got {settings.dropout:g} of them, {plan.dropped}, lost. "
        "Lower it, or lower threshold."
    )


def _identities(settings: SecureAggregation, world: World) -> str | None:
    given = settings.identities
    if given and (not settings.active or len(given) != world.federation.clients or len(set(given)) != len(given)):
        return f"identities must be {world.federation.clients} different ones, with active = true, got {len(given)}. Give one a client."
    try:
        wrong = [key for key in given if len(bytes.fromhex(key)) != KEY_BYTES]
    except ValueError:
        wrong = list(given)
    return f"identities must be {KEY_BYTES} bytes in hexadecimal each, got others: {wrong[:3]}. Use raw Ed25519 keys." if wrong else None


def _plain(settings: SecureAggregation, world: World) -> str | None:
    if settings.noised(world):
        return "mode must be quantized or protocol with integer noise, got plain: there are no integers to add it to. Use quantized."
    return None


def _words(settings: SecureAggregation, world: World) -> str | None:
    if world.training.upload_dtype != "float32":
        return (
            f"upload_dtype must be float32 for secure aggregation, got {world.training.upload_dtype}: what crosses are words of fixed "
            "point, finer than it, so that rounding first would cost precision and save nothing. Use float32."
        )
    try:
        settings.scale_in(world)
    except ProtocolAbort as error:
        return str(error).rstrip(".")
    need = tail(world.defenses, world)
    if need > settings.clip_range and not settings.noised(world):
        noise, enough = math.sqrt(sum(defense.noise_std(world) ** 2 for defense in world.defenses)), 2.0 ** math.ceil(math.log2(need))
        return (
            f"clip_range must be ≥ {need / noise:.3g} standard deviations of the noise that goes through it, got {settings.clip_range} "
            f"with noise of {noise:.3g}: clients would have to leave. Set clip_range = {enough:g}."
        )
    return None


def tail(defenses: Sequence[Defense], world: World) -> float:
    """What the noise of these defenses on one coordinate exceeds with probability 1e-15 or so, in the update's unit."""
    stds = [(defense.noise_std(world), _laplace(defense)) for defense in defenses]
    normal = math.sqrt(sum(std**2 for std, heavy in stds if not heavy))
    return NOISE_REACH * normal + LAPLACE_REACH * sum(std for std, heavy in stds if heavy)


def _laplace(defense: Defense) -> bool:
    return isinstance(defense, LaplaceNoise) or (isinstance(defense, LocalDP) and defense.mechanism == "laplace")
