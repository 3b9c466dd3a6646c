"""README's blocks of measured figures: words from here, numbers from the files of the claims, so that none can be stale.

``{ID.figure:format}`` stands for the filed value of a claim's figure, in Python's format or as ``pct`` (a share in percent), ``of`` (a
share of all records or batches that the claim attacks, counted). A figure whose bar is missed says so behind its value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from experiments.claims.claim import Claim, select
from experiments.claims.measures import AttackMeasure

BLOCKS = {
    "figures": """\
| victim, float32 updates, labels not told unless it says so | solver | what comes back | CPU seconds | claim |
|---|---|---|---|---|
| perceptron, 8 / 16 / 24 / 32 photos of 32×32 | `sparse_factorization` | batches exact: {B5.exact_batches:of} / {B6.exact_batches:of} / \
{B7.exact_batches:of} / {B7-target.exact_batches:of} | {B5.cpu_seconds_median:.2f} / {B6.cpu_seconds_median:.2f} / \
{B7.cpu_seconds_median:.2f} / {B7-target.cpu_seconds_median:.2f} | B5, B6, B7, B7-target |
| perceptron, ReLU, 64 photos; sigmoid, 16 / 64 / 128 photos | `cocktail_party` | photos exact: {cocktail-relu-64.exact:of}; \
{cocktail-sigmoid-16.exact:of} / {cocktail-sigmoid-64.exact:of} / {cocktail-sigmoid-128.exact:of} | \
{cocktail-relu-64.cpu_seconds:.1f}; {cocktail-sigmoid-16.cpu_seconds:.1f} / {cocktail-sigmoid-64.cpu_seconds:.1f} / \
{cocktail-sigmoid-128.cpu_seconds:.0f} | cocktail-* |
| sigmoid LeNet; ReLU CNN of width 32, one picture | `r_gap` | {r-gap-lenet.exact:of} exact, {r-gap-lenet.certified:pct} proven; \
{r-gap-cnn.exact:of}, {r-gap-cnn.certified:pct} | {r-gap-lenet.cpu_seconds:.1f}; {r-gap-cnn.cpu_seconds:.1f} | r-gap-lenet, r-gap-cnn |
| vision transformer, one picture | `april` | {april-vit.exact:of} exact, {april-vit.certified:pct} proven | \
{april-vit.cpu_seconds:.1f} | april-vit |
| CNN with a hidden ReLU layer, 8 / 16 photos | `hybrid` | {B16.psnr_db:.1f} / {B17.psnr_db:.1f} dB in the mean; labels right: \
{B16.labels_right:pct} / {B17.labels_right:pct} | {B16.cpu_seconds:.1f} / {B17.cpu_seconds:.1f} | B16, B17 |
| the same, 5 batches of 8 photos, labels told | `hybrid` against `inverting_gradients` | {B16-against.difference_db:+.1f} dB, paired | \
{B16-against.cpu_ratio:.2f} of its time | B16-against |
| two of these batches, labels told | `inverting_gradients`, 800 steps | {B15b.psnr_db:.1f} dB | \
{B15b.cpu_seconds:.0f} | B15b |""",
    "misses": "**{missed} of {bars} bars are not met**: [docs/claims.md](docs/claims.md) begins with them and the reasons.",
    "noise": """\
Digits behind the LeNet under gradient noise of 0.1: `learning_to_invert` gives {learned-noise.psnr_db:.1f} dB, against
{learned-noise-adaptive.psnr_db:.1f} by `adaptive_matching`, which is told of the noise and uses no public records: paired,
{learned-noise.difference_db:+.1f} dB in {learned-noise.cpu_ratio:.2f} of its CPU seconds
(claims learned-noise, learned-noise-adaptive).""",
    "active figures": """\
| `tampering.method` and attack | B = 8 | B = 20 | the client's detector (`model_inspection`) |
|---|---|---|---|
| `imprint` (Robbing the Fed), `placed_by = "public"` | {active-imprint-8.exact:pct} | {active-imprint-20.exact:pct} | parallel rows |
| `imprint`, `placed_by = "prior"` (assumes photographs) | {active-imprint-prior-8.exact:pct} | {active-imprint-prior-20.exact:pct} | \
parallel rows |
| `trap_weights` (Curious Abandon Honesty) | {active-trap-8.exact:pct} | {active-trap-20.exact:pct} | rows that sum below 0 with half of \
their weights above |
| none: an honest model, `linear_leak` | {active-none-8.exact:pct} | {active-none-20.exact:pct} | no alarm on 30 honest models, initial \
and trained |""",
    "measured": """\
| what | figure | command |
|---|---|---|
| demo, no defense: identified, PSNR gain over the best floor | {demo-none.identified:pct} of 32 victims \
[{demo-none.identified_low:pct}, {demo-none.identified_high:pct}]; {demo-none.gain_db:+.1f} dB [{demo-none.gain_db_low:.1f}, \
{demo-none.gain_db_high:.1f}] | `make demo` |
| demo, secure aggregation (joint batch of 8) | {demo-secure-aggregation.identified:pct} \
[{demo-secure-aggregation.identified_low:pct}, {demo-secure-aggregation.identified_high:pct}], chance ≤ 8 %; \
{demo-secure-aggregation.gain_db:+.1f} dB [{demo-secure-aggregation.gain_db_low:.1f}, {demo-secure-aggregation.gain_db_high:.1f}]: floor \
not beaten | `make demo` |
| demo, DP-SGD with z = 1.5: ε = {demo-dp-sgd.epsilon:.1f} at δ = 1e-5 for each record (zero-out) against the server, over 40 rounds | \
{demo-dp-sgd.identified:pct} in rounds 1 and 2, ceiling {demo-dp-sgd.ceiling:pct} for these, {demo-dp-sgd.training_ceiling:pct} for all; \
accuracy {demo-dp-sgd.accuracy:pct} against {demo-accuracy.accuracy:pct}, guessing 50 % | `make demo` |
| `linear_leak`, one image | mean squared error < 1e-10 (about 1e-16) | `pytest tests/attacks -k linear_leak_is_exact` |
| `dlg`, lenet, 20 digits; 20 faces | {dlg-digits.exact:pct} and {dlg-faces.exact:pct} exact | `fedpeek claims 'dlg-*'` |
| `inverting_gradients`, convnet of width 16, 20 CIFAR-10 pictures, initial weights | {B14.psnr_db_0:.1f}, {B14.psnr_db_1:.1f}, \
{B14.psnr_db_2:.1f} dB on three initial models, {B14.cpu_seconds:.1f} CPU s each | `fedpeek claims B14` |
| the same, initial beside trained model | {cifar10-initial.psnr_db:.1f} dB initial; {cifar10-trained.psnr_db:.1f} dB \
after 200 rounds; identified among 20: {cifar10-initial.identified:pct} and {cifar10-trained.identified:pct} | \
`fedpeek run cifar10` |
| secure aggregation at `clip_range = 2`, all parties in one process | n = 10, 1e6 words: \
{secure-aggregation-10.cpu_seconds:.2f} s; n = 50, 1e5 words: {secure-aggregation-50.cpu_seconds:.1f} s | \
`fedpeek claims secure-aggregation-10 secure-aggregation-50` |
| tap and transcript, 1e6 parameters, 20 clients | {tap.overhead:pct} of a round's time | \
`python -m experiments.benchmarks.tap` |
| three drivers | the same observations to the bit | `make slow` |""",
}
"""By the name of their markers in README."""

FIGURE = re.compile(r"\{([\w-]+)\.(\w+):([^}]+)\}")


def blocks() -> dict[str, str]:
    """Every block with its numbers, from the claims as filed."""
    found = {claim.id: claim for claim in select(())}
    return {name: filled(text, found) for name, text in BLOCKS.items()}


def filled(text: str, claims: Mapping[str, Claim]) -> str:
    """``text`` with the filed values in their places.

    Raises:
        KeyError: it names a claim or a figure that there is not.
    """
    missed, bars = sum(len(claim.misses) for claim in claims.values()), sum(len(claim.figures) for claim in claims.values())
    text = text.replace("{missed}", str(missed)).replace("{bars}", str(bars))
    return FIGURE.sub(lambda match: printed(claims[match[1]], match[2], match[3]), text)


def printed(claim: Claim, name: str, form: str) -> str:
    """One filed value, and that it misses its bar where it does."""
    figure = claim.figures[name]
    value = figure.ours
    if form == "of":
        count = attacked(claim, name)
        shown = f"{round(value * count)} of {count}"
    elif form == "pct":
        shown = f"{100 * value:.0f} %"
    else:
        shown = format(value, form).replace("-", "−")
    return shown if figure.met else f"{shown} (bar {figure.bar}: **not met**)"


def attacked(claim: Claim, name: str) -> int:
    """How many records a claim attacks, or batches where the figure is one of batches."""
    measure = claim.measure
    if not isinstance(measure, AttackMeasure):
        raise TypeError(f"claim must be one of attacks on uploads, got {claim.id}. Use another format than 'of'.")
    batches = len(measure.seeds) * measure.victims
    return batches if name == "exact_batches" else batches * measure.batch * measure.clients
