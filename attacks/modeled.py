"""What attacks know of defenses, by name: the one home of every set of names, and the answer to whether any attack knows one at all.

An adversary who is told a defense's name and settings can only use what its code says of that name. A defense that is in none of these
sets is attacked as if it were absent.
"""

from __future__ import annotations

PRUNING = ("top_k", "random_pruning")
"""Defenses of which a zero is no observation."""

LOSSY = (*PRUNING, "sign_sgd", "qsgd", "soteria", "outpost", "censor")
"""Heuristic defenses after which an update is no longer a multiple of what the client computed, nor that plus small noise; attackers
simulate them with :mod:`simulator.mechanisms`."""

PER_RECORD = ("dp_sgd",)
"""Defenses that clip each record's gradient."""

NOISY = ("gaussian_noise", "laplace_noise", "client_dp", "local_dp", *PER_RECORD)
"""Defenses that put noise of a stated deviation on every coordinate of one sender's upload."""

NOISY_SUMS = ("distributed_dp", "simulated_enclave")
"""Defenses whose noise is stated for the sum, each sender adding its share."""

NOISY_LATER = ("central_dp", "adaptive_clipping")
"""Defenses whose noise comes after the server's view, which has their clipping only."""

CLIPPING = ("clip", "client_dp", "local_dp", *NOISY_LATER, *NOISY_SUMS, *PER_RECORD)
"""Defenses that scale an update, or each record's gradient, down to a norm which is a setting of theirs, or was broadcast."""

LATENT = ("precode",)
"""Defenses of the model whose randomness is read off the update or found along with the records."""

MIXING = ("mixup", "instahide")
"""Defenses that mix records and labels: what leaks is the mixture, trained towards soft labels, which are found along with it."""

TRANSFORMING = ("ats",)
"""Defenses that transform each record by a public list of policies."""

IN_THE_VIEW = {
    "model_inspection": "it refuses a tampered model and leaves an honest round as it is",
    "secure_aggregation": "the view is the sum, with the number of its senders",
    "ckks_aggregation": "the view is the sum, with the number of its senders",
    "no_first_bias": "the architecture is public, and attacks read it off the model",
    "group_norm": "the architecture is public, and attacks read it off the model",
    "frozen_first_layer": "the architecture is public, and attacks read it off the model",
}
"""Defenses that no attack needs to know, since all that they do is in what it is handed; each with the reason."""

KINDS = {
    "clipping": CLIPPING,
    "noise": (*NOISY, *NOISY_SUMS),
    "lossy": LOSSY,
    "latent noise": LATENT,
    "mixing": MIXING,
    "transforming": TRANSFORMING,
    "in the view": tuple(IN_THE_VIEW),
}
"""The sets under the words that :func:`known_as` answers with."""


def known_as(name: str) -> tuple[str, ...]:
    """What attacks take the defense of this name for, keys of :data:`KINDS`; empty where none knows it."""
    return tuple(kind for kind, names in KINDS.items() if name in names)
