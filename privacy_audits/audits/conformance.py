"""Does a run do what was charged? Noise, clipping, sampling and ledger, measured from inside.

White-box: the audit sees each site's sum before noise, its share, and its contribution, as privfl's
observer shows them. The records (:mod:`privacy_audits.targets.orthogonal`) tell from a sum who is
in it. It finds programming errors in seconds; what an adversary could do with them is for the other
audits.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy_audits.bounds import tests
from privacy_audits.bounds.gaussian import power_of_shift
from privacy_audits.bounds.tests import Outcome
from privacy_audits.levels import LEVEL, any_of
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets import orthogonal
from privacy_audits.targets.job import (
    COLLUSION,
    DELTA,
    LEARNING_RATE,
    LOCAL_STEPS,
    ROUNDS,
    SAMPLING_RATE,
    RecordedRun,
)
from privfl.ledger import Ledger
from privfl.noise.distributed import CLIP_MARGIN

_N = len(orthogonal.SITES)
_FLOAT32 = 1e-5
# Numbers of a share that follow each other. With a deviation of at least 100 grid steps, not even
# one pair of 10^6 windows is alike by chance but with probability 10^-8.
_WINDOW = 8


class Conformance:
    """The checks of one recorded run.

    Args:
        run: a complete run.
    """

    def __init__(self, run: RecordedRun) -> None:
        self._run, self._mode = run, run.mode
        self._began = time.perf_counter()
        self._adversaries = run.adversaries
        # Clipping norm 1: what was charged is the deviation of the noise against `collusion` sites.
        self._sigma = run.events[0].noise

    def results(self) -> list[AuditResult]:
        """Every check, in the order of a step: clip, sample, noise, sum, charge."""
        checks = self._fedsgd() if self._mode == "fedsgd" else self._fedavg()
        return [*checks, self._mask_keys(), *self._ledgers()]

    # -- one noise for all sites -------------------------------------------------------------------

    def _fedsgd(self) -> Iterator[AuditResult]:
        sites = self._run.sites
        totals = [site.arrays["total"] for site in sites]
        step = float(sites[0].facts["step"])
        shares = [site.arrays["share"] * step for site in sites]
        yield self._clipping(totals)
        yield from self._sampling(totals)
        count = shares[0].size
        deviation = self._sigma / math.sqrt(_N - COLLUSION)
        found = [tests.variance(share, deviation**2) for share in shares]
        yield self._tested(
            "share variance",
            "Every site adds a share of noise of deviation sigma C / sqrt(n - t).",
            "compares the variance of the shares with the one that was charged",
            _worst(found),
            "a deviation of 1 times the charged one",
            tests.power_of_variance(count, math.sqrt((_N - COLLUSION) / _N), LEVEL / _N),
            "shares sized for n sites instead of n - t",
            name="measured over charged deviation of a share",
        )
        yield self._independence(_pairs(shares), "shares of the noise", "share correlation")
        found = [tests.normality(share, deviation) for share in shares]
        yield self._tested(
            "share distribution",
            "A share of the noise is Gaussian.",
            "compares the distribution of the shares with the normal one",
            _worst(found),
            "a Kolmogorov distance of about 1 / sqrt(numbers)",
            # The distance of a uniform distribution of the same variance is 0.057.
            1.0 if 0.057 * math.sqrt(count) > 4.0 else 0.0,
            "uniform noise of the same variance",
            name="largest distance between distributions",
        )
        yield self._fresh()
        yield self._sums(totals, step)
        yield self._residual(step, deviation)

    def _fresh(self) -> AuditResult:
        """Noise of which some was used before, anywhere and at any site."""
        every = np.concatenate([site.arrays["share"] for site in self._run.sites])
        windows = np.lib.stride_tricks.sliding_window_view(every, _WINDOW, axis=1)
        # A digest of each window, modulo 2^64.
        odd = np.random.default_rng().integers(2**62, size=_WINDOW, dtype=np.uint64) * 2 + 1
        digests = (windows.astype(np.uint64) * odd).sum(axis=2, dtype=np.uint64)
        again = digests.size - len(np.unique(digests))
        return self._exact(
            "fresh noise",
            "No number of the noise is used a second time.",
            f"looks for {_WINDOW} numbers of a share that follow each other and did so before, in "
            "any step of any site",
            again,
            "0",
            holds=again == 0,
            name=f"repeated runs of {_WINDOW} numbers",
        )

    def _clipping(self, totals: list[NDArray[np.float64]]) -> AuditResult:
        longest, right = 0.0, True
        for site, total in zip(orthogonal.SITES, totals, strict=True):
            own = orthogonal.places(site)
            cut = [
                np.abs(total[:, own.canaries]).max(),
                np.abs(total[:, own.huge]).max(),
                np.linalg.norm(total[:, list(own.straddling)], axis=1).max(),
            ]
            longest = max(longest, *(float(length) for length in cut))
            short, broken = total[:, own.short], total[:, own.infinite]
            unchanged = np.isclose(short, orthogonal.SHORT, rtol=_FLOAT32)
            right &= bool((unchanged | (short == 0.0)).all())
            right &= not broken.any()
        return self._exact(
            "clipping",
            "One record changes a site's sum by at most the clipping norm.",
            "measures how long records of gradients 0.25, 5, 9 and 10^6 times the clipping norm, "
            "and one that is infinite, are in the sums",
            longest,
            f"at most 1 + {CLIP_MARGIN:.4f}, the short one unchanged, the infinite one absent",
            holds=right and longest <= 1.0 + CLIP_MARGIN,
            name="longest record in a sum, in clipping norms",
        )

    def _sampling(self, totals: list[NDArray[np.float64]]) -> Iterator[AuditResult]:
        # Which visible records, canaries that take part and witnesses, are in which step.
        visible = [
            total[:, self._visible(site)] > 0.5
            for site, total in zip(orthogonal.SITES, totals, strict=True)
        ]
        trials = sum(chosen.size for chosen in visible)
        yield self._tested(
            "sampling rate",
            "A record takes part in a step with the probability that is charged.",
            "counts how often known records are in the sums",
            tests.rate(sum(int(chosen.sum()) for chosen in visible), trials, SAMPLING_RATE),
            f"{SAMPLING_RATE:g}",
            tests.power_of_rate(trials, SAMPLING_RATE, SAMPLING_RATE * 1.1, LEVEL),
            "a rate that is 10 % higher",
            name="share of records in a batch",
        )
        # In deviations of a binomial number, for all steps of all sites.
        counts = np.concatenate(
            [
                (chosen.sum(axis=1) - chosen.shape[1] * SAMPLING_RATE)
                / math.sqrt(chosen.shape[1] * SAMPLING_RATE * (1.0 - SAMPLING_RATE))
                for chosen in visible
            ]
        )
        # Of a batch of a fixed size, so much of the variance is left in the visible part.
        left = 1.0 - visible[0].shape[1] / orthogonal.RECORDS
        yield self._tested(
            "sampling spread",
            "Records take part independently of each other.",
            "compares how the number of known records in a batch varies with the binomial "
            "deviation",
            tests.variance(counts, 1.0),
            "a deviation of 1 times the binomial one",
            tests.power_of_variance(counts.size, math.sqrt(left), LEVEL),
            "batches of a fixed size",
            name="measured over binomial deviation",
        )
        witnesses = [
            (total[:, orthogonal.places(site).witnesses] > 0.5).astype(np.float64)
            for site, total in zip(orthogonal.SITES, totals, strict=True)
        ]
        yield self._independence(_pairs(witnesses), "choices of records", "sampling correlation")

    def _visible(self, site: str) -> NDArray[np.int64]:
        own = orthogonal.places(site)
        truth = self._run.truth[orthogonal.SITES.index(site)]
        return np.concatenate([own.canaries[truth], own.witnesses])

    def _sums(self, totals: list[NDArray[np.float64]], step: float) -> AuditResult:
        sites = self._run.sites
        wrong = 0
        for site, total in zip(sites, totals, strict=True):
            integers = np.rint(total / step).astype(np.int64) + site.arrays["share"]
            wrong += int((integers != site.arrays["integers"]).sum())
            wrong += int((site.arrays["contributed"] != site.arrays["integers"]).sum())
            wrong += int((site.arrays["replica"] != sites[0].arrays["replica"]).sum())
        contributed = np.sum([site.arrays["integers"] for site in sites], axis=0)
        wrong += sum(int((site.arrays["summed"] != contributed).sum()) for site in sites)
        return self._exact(
            "sums",
            "What is decrypted is the exact sum of sums and shares, and all replicas follow it.",
            "adds up what every site made, and compares it with what was decrypted at each",
            wrong,
            "0",
            holds=wrong == 0,
            name="integers that differ",
        )

    def _residual(self, step: float, deviation: float) -> AuditResult:
        """What k colluders are left with after they subtract their own shares."""
        sites = self._run.sites
        blank = orthogonal.blank()
        found, worst = [], math.inf
        for colluders in range(_N):
            left = sites[0].arrays["summed"][:, blank].copy()
            for site in sites[:colluders]:
                left -= site.arrays["integers"][:, blank]
            charged = self._adversaries[colluders].noise_factor * self._sigma
            outcome = tests.variance(left * step, charged**2)
            found.append(outcome)
            worst = min(worst, outcome.value)
        count = ROUNDS["fedsgd"] * len(blank)
        return self._tested(
            "noise left for colluders",
            "Of any k sites that pool what they know, a sum keeps the noise of the n - k others.",
            "subtracts the shares of 0 to n - 1 sites from the decrypted sums, and measures what "
            "is left where no record is",
            Outcome(worst, any_of(o.p_value for o in found)),
            "a deviation of 1 times the one of the report",
            tests.power_of_variance(count, math.sqrt((_N - COLLUSION) / _N), LEVEL / _N),
            "shares sized for n sites instead of n - t",
            name="least measured over reported deviation",
            colluders=_N - 1,
        )

    # -- noise of each site ------------------------------------------------------------------------

    def _fedavg(self) -> Iterator[AuditResult]:
        steps = LOCAL_STEPS["fedavg"]
        # From a sum of clipped gradients to what a site contributes: the step of SGD along the mean
        # over the expected batch, and the site's equal part in the mean over sites.
        scale = LEARNING_RATE / (SAMPLING_RATE * orthogonal.RECORDS) / _N
        updates = [-site.arrays["contributed"] / scale for site in self._run.sites]
        noise = [update[:, orthogonal.blank()] for update in updates]
        deviation = self._sigma * math.sqrt(steps)
        yield self._tested(
            "noise variance",
            "Every step of a site gets noise of deviation sigma C.",
            "compares the variance of what a site contributes, where no record is, with the one "
            "that is charged",
            _worst([tests.variance(part, deviation**2) for part in noise]),
            "a deviation of 1 times the charged one",
            tests.power_of_variance(noise[0].size, 0.9, LEVEL / _N),
            "noise that is 10 % too small",
            name="measured over charged deviation",
        )
        yield self._independence(_pairs(noise), "noises", "noise correlation")
        yield self._tested(
            "noise distribution",
            "The noise of a site is Gaussian.",
            "compares the distribution of what a site contributes, where no record is, with the "
            "normal one",
            _worst([tests.normality(part, deviation) for part in noise]),
            "a Kolmogorov distance of about 1 / sqrt(numbers)",
            1.0 if 0.057 * math.sqrt(noise[0].size) > 4.0 else 0.0,
            "uniform noise of the same variance",
            name="largest distance between distributions",
        )
        present = [
            update[:, self._visible(site)]
            for site, update in zip(orthogonal.SITES, updates, strict=True)
        ]
        one = math.sqrt(deviation**2 + steps * SAMPLING_RATE * (1.0 - SAMPLING_RATE))
        every = np.concatenate([part.ravel() for part in present])
        expected = steps * SAMPLING_RATE
        error = one / math.sqrt(every.size)
        found = tests.mean(every, expected, one)
        yield self._tested(
            "clipped and sampled",
            "A record adds the clipping norm to a step, at the charged rate.",
            "measures how far known records move what a site contributes",
            Outcome(float(every.mean()) / expected, found.p_value),
            "1 times clipping norm, rate and steps",
            power_of_shift(expected * 0.5 / error, LEVEL),
            "a clipping norm or a rate that is 50 % too large",
            name="measured over charged length of a record",
        )
        huge = np.concatenate(
            [
                update[:, orthogonal.places(site).huge]
                for site, update in zip(orthogonal.SITES, updates, strict=True)
            ]
        )
        yield self._tested(
            "huge record",
            "A record with a gradient of any length adds at most the clipping norm.",
            "measures how far a gradient of 10^6 clipping norms moves what a site contributes",
            tests.mean(huge, expected, one),
            "0 standard errors from the clipping norm",
            power_of_shift(99 * expected / (one / math.sqrt(huge.size)), LEVEL),
            "a clipping norm that is 100 times too large",
            name="standard errors between measured and charged length",
        )

    # -- both --------------------------------------------------------------------------------------

    def _independence(
        self, pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], what: str, name: str
    ) -> AuditResult:
        least = min(a.size for a, _ in pairs)
        return self._tested(
            name,
            f"The {what} of two sites, and of two steps, are independent.",
            f"correlates the {what} of all pairs of sites, and those of following steps",
            tests.correlation(pairs),
            "about 1 / sqrt(numbers)",
            tests.power_of_correlation(least, len(pairs), 0.1, LEVEL),
            "a correlation of 0.1",
            name="largest correlation",
        )

    def _mask_keys(self) -> AuditResult:
        sites = [site.facts for site in self._run.sites]
        odd = 0
        for facts in sites:
            exchanged = set(facts.get("pair_keys", ()))
            odd += sum(key not in exchanged for key in facts.get("mask_keys", ()))
        known = Counter(key for facts in sites for key in set(facts.get("mask_keys", ())))
        odd += sum(times != 2 for times in known.values())
        expected = ROUNDS[self._mode] * math.comb(_N, 2)
        return self._exact(
            "mask keys",
            "The masks of two sites come from a secret that these two exchange and nobody else "
            "has, anew for every sum.",
            "follows the keys of all masks back to the exchanges of pairs of sites",
            odd + abs(len(known) - expected),
            "0",
            holds=odd == 0 and len(known) == expected,
            name="keys of no exchange, of other than two sites, or too few",
        )

    def _ledgers(self) -> Iterator[AuditResult]:
        late, differ, rounds = 0, 0, ROUNDS[self._mode]
        for rank in self._run.sites:
            charged: dict[int, int] = {}
            for event in rank.facts["happened"]:
                if event["what"] == "charged":
                    charged[event["round"]] = charged.get(event["round"], 0) + 1
                elif event["what"] == "contributed":
                    due = event["round"] * LOCAL_STEPS[self._mode]
                    late += charged.get(event["round"], 0) < 1 or event["on_disk"] < due
            differ += abs(len(rank.happened("contributed")) - rounds)
            differ += abs(sum(charged.values()) - rounds)
        yield self._exact(
            "charged before it leaves",
            "Nothing leaves a site before it is charged.",
            "compares the order of charges and contributions at every site, and reads the ledger "
            "on the disk whenever something is about to leave",
            late + differ,
            "0",
            holds=late + differ == 0,
            name="contributions without a charge before them",
        )
        wrong = 0
        for path in self._run.ledgers:
            with Ledger.read(path) as ledger:
                wrong += len(ledger.problems())
                charges = [c for c in ledger.charges() if c.account == "training"]
                steps = sum(c.steps for c in charges if c.kind == "charge")
                wrong += abs(steps - rounds * LOCAL_STEPS[self._mode])
        wrong += abs(len(self._run.ledgers) - _N)
        yield self._exact(
            "ledger",
            "The ledger on a site's disk holds every step of the run.",
            "reads the ledgers that the run left, verifies them, and counts their steps",
            wrong,
            "0",
            holds=wrong == 0,
            name="problems and missing steps",
        )

    # -- results -----------------------------------------------------------------------------------

    def _claim(self, statement: str, colluders: int | None) -> Claim:
        charged = COLLUSION if self._mode == "fedsgd" else 1
        return Claim(
            statement=statement,
            adversary=self._adversaries[charged if colluders is None else colluders],
            mechanism=self._run.events,
            delta=DELTA,
        )

    def _exact(
        self,
        what: str,
        statement: str,
        attack: str,
        value: float,
        expected: str,
        *,
        holds: bool,
        name: str,
    ) -> AuditResult:
        statistic = Statistic.exact(name, value, expected, holds=holds)
        return self._result(what, statement, attack, statistic, 1.0, "any such fault")

    def _tested(
        self,
        what: str,
        statement: str,
        attack: str,
        outcome: Outcome,
        expected: str,
        power: float,
        against: str,
        *,
        name: str,
        colluders: int | None = None,
    ) -> AuditResult:
        statistic = Statistic.tested(name, outcome, expected)
        return self._result(what, statement, attack, statistic, power, against, colluders)

    def _result(
        self,
        what: str,
        statement: str,
        attack: str,
        statistic: Statistic,
        power: float,
        against: str,
        colluders: int | None = None,
    ) -> AuditResult:
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        return AuditResult(
            name=f"conformance/{self._mode}/{what}",
            claim=self._claim(statement, colluders),
            attack=attack,
            statistic=statistic,
            confidence=1.0 - LEVEL,
            power=power,
            power_against=against,
            seconds=seconds,
        )


def _pairs(numbers: list[NDArray[Any]]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Those of all pairs of sites, and those of following steps of each site."""
    later = [(one[:-1], one[1:]) for one in numbers]
    return [*itertools.combinations(numbers, 2), *later]


def _worst(outcomes: list[Outcome]) -> Outcome:
    """The strangest of several outcomes, at the p-value of all of them together."""
    worst = min(outcomes, key=lambda outcome: outcome.p_value)
    return Outcome(worst.value, any_of(outcome.p_value for outcome in outcomes))
